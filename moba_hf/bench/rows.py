"""What the benchmark measures: the rows of the table, and the two speed figures of the MoBA paper."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_DIM = 128
K = 1 << 10
M = 1 << 20


@dataclass(frozen=True)
class Row:
    """One line of a table: tokens, heads and MoBA settings."""

    name: str
    length: int
    num_heads: int
    num_kv_heads: int
    block_size: int
    topk: int


ROWS = (
    Row("32K-128/8", 32 * K, 32, 8, 128, 8),
    Row("131K-128/8", 128 * K, 32, 8, 128, 8),
    Row("131K-512/3", 128 * K, 32, 8, 512, 3),
    Row("131K-512/8", 128 * K, 32, 8, 512, 8),
    Row("131K-4096/12", 128 * K, 32, 8, 4096, 12),
    Row("131K-64/16", 128 * K, 32, 8, 64, 16),
    Row("1M-128/8", M, 8, 2, 128, 8),
    Row("1M-512/3", M, 8, 2, 512, 3),
    Row("1M-4096/12", M, 8, 2, 4096, 12),
)
TINY = Row("tiny", 96, 4, 2, 16, 3)


@dataclass(frozen=True)
class Figure:
    """Rows that make one picture.

    Attributes:
        title: what the picture shows.
        claim: what the paper reports, for the text beside it.
        rows: in order of length.
        slice_from: from this number of tokens on, dense attention is timed on the last queries only and
            scaled by (query, key) pairs.
    """

    name: str
    title: str
    claim: str
    rows: tuple[Row, ...]
    slice_from: int


def _label(length: int) -> str:
    return f"{length // M}M" if length >= M else f"{length // K}K"


_TO_1M = tuple(
    Row(f"{_label(n)}-4096/12", n, 8, 2, 4096, 12)
    for n in (8 * K, 16 * K, 32 * K, 64 * K, 128 * K, 256 * K, 512 * K, M)
)
_TO_10M = tuple(
    Row(f"{_label(n)}-{n // 64}/3", n, 1, 1, n // 64, 3) for n in (128 * K, 512 * K, M, 2 * M, 4 * M, 10 * M)
)
FIGURES: dict[str, tuple[Figure, ...]] = {
    "paper": (
        Figure(
            "1m",
            "block 4096, topk 12 (8 query, 2 kv heads)",
            "6.5 times FlashAttention at 1M tokens",
            _TO_1M,
            2 * M,
        ),
        Figure(
            "10m",
            "64 blocks, topk 3 (one head)",
            "16 times FlashAttention at 10M tokens",
            _TO_10M,
            2 * M,
        ),
    )
}
