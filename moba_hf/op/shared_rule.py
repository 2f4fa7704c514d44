"""The settings of the shared choice of blocks, which `moba_hf.op.shared` defines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moba_hf.op.numerics import check_int

# Which two coordinates a rotary embedding rotates together: (d, d + D/2) or (2d, 2d + 1).
ROTARY_PAIRS = ("halves", "neighbours")


@dataclass(frozen=True)
class SharedRule:
    """Which blocks a tile of queries attends to; see `moba_hf.op.shared`.

    Attributes:
        block_size: tokens per block.
        tile: queries per tile, a multiple or a divisor of `block_size`.
        threshold: attend to blocks whose mass is at least `threshold` times the largest; in (0, 1). None: no
            threshold.
        share: attend to the heaviest blocks that together reach this share of the mass; in (0, 1). None: no
            share.
        topk: maximum number of blocks that a tile attends to, including own, sink and local blocks; None: no
            limit.
        sink_blocks: number of first blocks that are always attended.
        local_blocks: number of blocks just before the tile that are always attended.
        sample: every `sample`-th row is used to estimate the masses of a tile; a divisor of `tile`.
        dense_below: rows before this position attend to every key; a multiple of `tile`.
        rotary_pairs: one of `ROTARY_PAIRS`, as in the model's rotary embedding.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value has the wrong type.
    """

    block_size: int
    tile: int
    threshold: float | None = None
    share: float | None = None
    topk: int | None = None
    sink_blocks: int = 1
    local_blocks: int = 1
    sample: int = 1
    dense_below: int = 0
    rotary_pairs: str = "halves"

    def __post_init__(self) -> None:
        for name, least in (("block_size", 1), ("tile", 1), ("sink_blocks", 0), ("local_blocks", 0)):
            check_int(name, getattr(self, name), minimum=least)
        check_int("sample", self.sample, minimum=1)
        check_int("dense_below", self.dense_below, minimum=0)
        if self.tile % self.block_size and self.block_size % self.tile:
            raise ValueError(
                f"tile={self.tile} must be a multiple or a divisor of block_size={self.block_size}"
            )
        if self.tile % self.sample:
            raise ValueError(f"sample={self.sample} must divide tile={self.tile}")
        if self.dense_below % self.tile:
            raise ValueError(f"dense_below={self.dense_below} must be a multiple of tile={self.tile}")
        for name in ("threshold", "share"):
            _check_fraction(name, getattr(self, name))
        if self.threshold is None and self.share is None and self.topk is None:
            raise ValueError("a shared choice needs threshold, share or topk")
        if self.topk is not None:
            check_int("topk", self.topk, minimum=1)
            if self.topk < self.forced_blocks:
                raise ValueError(
                    f"topk={self.topk} is too small: it counts the {self.own_blocks} blocks that a tile "
                    f"overlaps, {self.sink_blocks} sink_blocks and {self.local_blocks} local_blocks, so it "
                    f"must be at least {self.forced_blocks}"
                )
        check_rotary_pairs(self.rotary_pairs)

    def forces(self, block: Tensor, own: Tensor) -> Tensor:
        """Whether a tile with first own block `own` always attends to `block`, which is not a later block."""
        return (block < self.sink_blocks) | (block >= own - self.local_blocks)

    @property
    def gate(self) -> str:
        """How blocks are scored: always by mass."""
        return "mass"

    @property
    def own_blocks(self) -> int:
        """Number of blocks that a complete tile overlaps."""
        return max(1, self.tile // self.block_size)

    @property
    def forced_blocks(self) -> int:
        """Number of blocks that a complete tile always attends to; the minimum of `topk`."""
        return self.own_blocks + self.sink_blocks + self.local_blocks

    @property
    def dense_len(self) -> int:
        """Sequences of at most this many tokens always get full attention."""
        return max(self.dense_below, self.tile)

    @property
    def max_keys(self) -> int | None:
        """The most keys that a row attends to; None: it depends on the text."""
        return None if self.topk is None else max(self.dense_below, self.topk * self.block_size)

    def pairs(self, length: int) -> int:
        """The most (query, key) pairs of a causal sequence of `length` tokens, per head."""
        if self.topk is None:
            return length * (length + 1) // 2
        return sum(self._tile_pairs(begin, length, self.topk) for begin in range(0, length, self.tile))

    def _tile_pairs(self, begin: int, length: int, topk: int) -> int:
        """The most pairs of the tile at position `begin`."""
        rows = min(self.tile, length - begin)
        first = begin // self.block_size * self.block_size  # first key of the blocks that the tile overlaps
        earlier = (
            first if begin < self.dense_below else min(first, (topk - self.own_blocks) * self.block_size)
        )
        return rows * (earlier + begin - first) + rows * (rows + 1) // 2

    def to_dict(self) -> dict[str, Any]:
        """The rule as keyword arguments of `moba_attention` and `select_blocks`."""
        names = (
            "block_size",
            "topk",
            "sink_blocks",
            "local_blocks",
            "gate",
            "tile",
            "threshold",
            "sample",
            "dense_below",
            "rotary_pairs",
        )
        return {name: getattr(self, name) for name in names}


def check_rotary_pairs(value: object) -> None:
    """Raises ValueError if `value` is not one of `ROTARY_PAIRS`."""
    if value not in ROTARY_PAIRS:
        raise ValueError(f"rotary_pairs must be one of {', '.join(map(repr, ROTARY_PAIRS))}, got {value!r}")


def _check_fraction(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number between 0 and 1, got {value!r}")
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, both excluded, got {value}")
