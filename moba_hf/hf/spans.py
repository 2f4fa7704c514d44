"""Which tokens of a batch form a sequence, from values on the host: plain numpy, nothing here waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

HOLE = (
    "has holes: MoBA takes padding before and after a row's tokens, not between them; pad prompts on the "
    "left, and join turns or virtual tokens without padding between them"
)
SHORT = "the attention mask must name every token of the cache and of the call"


@dataclass(frozen=True)
class Seen:
    """What one look at a forward read.

    Attributes:
        batch, q_len, kv_len: sizes of the queries and keys.
        q_offset: slot of the first query.
        real: bool `(batch, q_offset + q_len)`, the slots that are no padding; None: all.
        positions: `(batch, q_len)` or `(1, q_len)`, the position ids that layers get; None: they get none.
        axes: `(3, batch, q_len)`, M-RoPE ids that the model keeps to itself, else None.
        neighbours: bool `(2, batch, q_len - 1)`: by transformers' own mask, whether a query sees the key
            before it, and whether it sees the one after it. None: plain causal masks.
        offsets_q, offsets_k: `(num_seqs + 1,)`, `cu_seq_lens_q` and `cu_seq_lens_k`, else None.
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
        """Whether any position id, that of padding included, is not above the one before it."""
        return self.positions is not None and bool((np.diff(self.positions, axis=1) <= 0).any())

    def restarts(self, row: np.ndarray, slot: np.ndarray) -> np.ndarray:
        """For each token but the first: whether its position starts again after the token before it."""
        if self.positions is None:
            return np.zeros(max(len(row) - 1, 0), dtype=bool)
        query = slot - self.q_offset
        positions = np.broadcast_to(self.positions, (self.batch, self.q_len))
        here = positions[row, query.clip(min=0)]
        return (row[1:] == row[:-1]) & (query[:-1] >= 0) & (here[1:] <= here[:-1])


def spans_of(seen: Seen) -> tuple[np.ndarray, bool]:
    """`(row, begin, end)` of each sequence, int `(num_seqs, 3)`, and whether rows hold several documents.

    A document begins where position ids start again; where they jump ahead, it goes on. A row of padding only
    has no sequence.

    Raises:
        ValueError: a row with padding between tokens of one document.
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
    """`(row, begin, end)` of the sequences that `cu_seq_lens_q` names, int `(num_seqs, 3)`.

    Raises:
        ValueError: offsets that do not rise or leave the call, keys or bounds that do not fit them, a padding
            mask that says otherwise.
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
            "packed sequences hold all their keys in the call, so cu_seq_lens_k must equal cu_seq_lens_q "
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
            f"cu_seq_lens_q names {ends[-1]} tokens from the first on, but the attention mask says that "
            "others are padding: pass one of the two, or a mask of ones for just these tokens"
        )
    return np.stack([np.zeros_like(offsets[1:]), offsets[:-1], offsets[1:]], axis=1)


def check_axes(seen: Seen) -> None:
    """Raises ValueError where M-RoPE ids, which layers do not get, begin a second document in a row.

    A token that stands, on every axis, no further than the first of its row starts again. Text after a video
    may step back on the time axis, but never so far.
    """
    if seen.axes is None:
        return
    row, slot = seen.tokens()
    first = np.concatenate([np.ones(min(len(row), 1), dtype=bool), row[1:] != row[:-1]])
    begin = np.maximum.accumulate(np.where(first, np.arange(len(row)), 0))
    here = seen.axes[:, row, slot - seen.q_offset]
    if bool(((here <= here[:, begin]).all(axis=0) & ~first).any()):
        raise ValueError(
            "packed sequences: the position ids start again inside a row, but this model gives its "
            "attention layers no text positions, so the documents would be mixed; pass position ids of "
            "four axes (text first) and use_cache=False, or one document per row"
        )


def check_separated(seen: Seen, what: str) -> None:
    """Raises ValueError unless the masks of stock layers (`what` says why) keep packed sequences apart.

    Transformers leaves them together as soon as it makes a cache or is given a mask.
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
    """What is wrong where a stock layer joins packed sequences; `what` says why the layer is stock."""
    return (
        f"packed sequences reach a layer that keeps the stock implementation ({what}), whose mask does not "
        "separate them: transformers reads position_ids only, so pass them, and use_cache=False"
    )
