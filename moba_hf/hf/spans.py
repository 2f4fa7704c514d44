"""Which tokens of a batch form a sequence. Plain numpy on host values, so nothing waits for the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

HOLE = (
    "has holes: MoBA supports padding before and after a row's tokens, not between them; pad prompts on the "
    "left, and join turns or virtual tokens without padding between them"
)
SHORT = "the attention mask must cover every token of the cache and of the call"


@dataclass(frozen=True)
class Seen:
    """The arguments of a forward, copied to the host.

    Attributes:
        batch: rows of the batch.
        q_len: number of queries per row.
        kv_len: number of keys per row.
        q_offset: slot of the first query.
        real: bool `(batch, q_offset + q_len)`, False for padding; None: no padding.
        positions: `(batch, q_len)` or `(1, q_len)`, the position ids that layers get; None: they get none.
        axes: `(3, batch, q_len)`, M-RoPE ids that the model does not pass to its layers, else None.
        neighbours: bool `(2, batch, q_len - 1)`: in transformers' own mask, whether a query sees the key of
            the token before it, and whether it sees that of the token after it. None: plain causal masks.
        offsets_q: `(num_seqs + 1,)`, `cu_seq_lens_q`, else None.
        offsets_k: `(num_seqs + 1,)`, `cu_seq_lens_k`, else None.
    """

    batch: int
    q_len: int
    kv_len: int
    q_offset: int
    real: np.ndarray | None = None
    positions: np.ndarray | None = None
    axes: np.ndarray | None = None
    neighbours: np.ndarray | None = None
    offsets_q: np.ndarray | None = None
    offsets_k: np.ndarray | None = None

    @property
    def end(self) -> int:
        """The slot after the last query."""
        return self.q_offset + self.q_len

    def padded(self) -> bool:
        """Whether any token is padding."""
        return self.real is not None and not self.real.all()

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Batch row and slot of every real token, in order."""
        real = np.ones((self.batch, self.end), dtype=bool) if self.real is None else self.real
        row, slot = real.nonzero()
        return row, slot

    def may_restart(self) -> bool:
        """Whether any position id (also of padding) is not above the previous one."""
        return self.positions is not None and bool((np.diff(self.positions, axis=1) <= 0).any())

    def restarts(self, row: np.ndarray, slot: np.ndarray) -> np.ndarray:
        """For each token except the first: whether its position id is not above that of the previous one."""
        if self.positions is None:
            return np.zeros(max(len(row) - 1, 0), dtype=bool)
        query = slot - self.q_offset
        positions = np.broadcast_to(self.positions, (self.batch, self.q_len))
        here = positions[row, query.clip(min=0)]
        return (row[1:] == row[:-1]) & (query[:-1] >= 0) & (here[1:] <= here[:-1])


def spans_of(seen: Seen) -> tuple[np.ndarray, bool]:
    """`(row, begin, end)` of each sequence, int `(num_seqs, 3)`, and whether any row has several documents.

    A document begins where position ids restart; a jump forward does not begin one. A row that is all padding
    has no sequence.

    Raises:
        ValueError: a row has padding between tokens of one document.
    """
    row, slot = seen.tokens()
    restarts = seen.restarts(row, slot)
    same_row = row[1:] == row[:-1]
    holes = (same_row & (np.diff(slot) > 1) & ~restarts).nonzero()[0]
    if len(holes):
        raise ValueError(f"the attention mask of batch row {int(row[holes[0]])} {HOLE}")
    first = np.concatenate([np.ones(min(len(row), 1), dtype=bool), ~same_row | restarts])
    last = np.concatenate([first[1:], np.ones(min(len(row), 1), dtype=bool)])
    return np.stack([row[first], slot[first], slot[last] + 1], axis=1), bool(restarts.any())


def spans_of_offsets(seen: Seen, kwargs: dict[str, Any]) -> np.ndarray:
    """`(row, begin, end)` of the sequences that `cu_seq_lens_q` defines, int `(num_seqs, 3)`.

    Raises:
        ValueError: the offsets are not sorted or exceed the call, or `cu_seq_lens_k`, `max_length_q/k` or the
            padding mask contradict them.
    """
    offsets = seen.offsets_q
    assert offsets is not None
    ends = offsets.tolist()
    if ends[:1] != [0] or ends != sorted(ends) or ends[-1] > seen.q_len:
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to at most the {seen.q_len} tokens of the call, got {ends}"
        )
    if seen.offsets_k is not None and not np.array_equal(seen.offsets_k, offsets):
        raise ValueError(
            "all keys of packed sequences are in the call, so cu_seq_lens_k must equal cu_seq_lens_q "
            f"{ends}, got {seen.offsets_k.tolist()}"
        )
    longest = int(np.diff(offsets).max(initial=0))
    for name in ("max_length_q", "max_length_k"):
        bound = kwargs.get(name)
        if bound is not None and int(bound) < longest:
            raise ValueError(f"{name}={int(bound)} is below the longest packed sequence, {longest} tokens")
    named = np.arange(seen.q_len) < ends[-1]
    if seen.real is not None and not seen.real.all() and not np.array_equal(seen.real, named[None]):
        raise ValueError(
            f"cu_seq_lens_q says that the first {ends[-1]} tokens are real, but the attention mask "
            "disagrees: pass only one of the two, or a mask that is 1 for exactly these tokens"
        )
    return np.stack([np.zeros_like(offsets[1:]), offsets[:-1], offsets[1:]], axis=1)


def check_axes(seen: Seen) -> None:
    """Raises ValueError if M-RoPE ids that layers do not get begin a second document in a row.

    A token begins a document if its ids on all axes are at most those of the first token of its row. Text
    after a video may go back on the time axis, but never that far.
    """
    if seen.axes is None:
        return
    row, slot = seen.tokens()
    first = np.concatenate([np.ones(min(len(row), 1), dtype=bool), row[1:] != row[:-1]])
    begin = np.maximum.accumulate(np.where(first, np.arange(len(row)), 0))
    here = seen.axes[:, row, slot - seen.q_offset]
    if bool(((here <= here[:, begin]).all(axis=0) & ~first).any()):
        raise ValueError(
            "packed sequences: the position ids restart inside a row, but this model passes no text "
            "positions to its attention layers, so the documents would be mixed; pass position ids with "
            "four axes (text first) and use_cache=False, or one document per row"
        )


def check_separated(seen: Seen, what: str) -> None:
    """Raises ValueError if the masks of stock layers do not separate packed sequences.

    transformers does not separate them if it creates a cache or is passed a mask.

    Args:
        what: why the layers keep the stock implementation.
    """
    if seen.offsets_q is not None:
        begins = seen.offsets_q[:-1][np.diff(seen.offsets_q) > 0]
        slot = begins[begins > 0]
        row = np.zeros_like(slot)
    else:
        row, slot = seen.tokens()
        restarts = seen.restarts(row, slot)
        row, slot = row[1:][restarts], slot[1:][restarts] - seen.q_offset
    if not len(slot) or (seen.neighbours is not None and not seen.neighbours[0, row, slot - 1].any()):
        return
    raise ValueError(joined(what))


def joined(what: str) -> str:
    """The error message for a stock layer that mixes packed sequences; `what` says why it is stock."""
    return (
        f"packed sequences reach a layer that keeps the stock implementation ({what}), whose mask does not "
        "separate them: transformers reads only position_ids, so pass position_ids and use_cache=False"
    )
