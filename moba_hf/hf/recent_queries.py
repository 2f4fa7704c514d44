"""The queries of a layer's last rows, with which decode steps of a shared choice choose their blocks.

A step takes blocks by the mean mass over the rows of its tile up to itself (step 8 of `moba_hf.op.shared`).
The earlier ones of these rows are *heard* by the step. The masses of a row depend on its
query and on blocks that are complete, so the queries are all that a cache must keep of earlier rows. They can
be cropped with the cache, whereas sums of masses could not.

Dynamic and static layers keep the same number, so that their steps use the same rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.utils import logging

from moba_hf.op.block_means import writable

# Most tokens, usually rejected candidates, that can be removed again without losing rows that steps need.
MOST_REMOVED = 64


def most_rows(tile: int) -> int:
    """How many queries a layer keeps: those that a step may use, and those that a crop may remove."""
    return tile - 1 + MOST_REMOVED


_ALONE = (
    "a static cache has lost queries that compiled decode steps of a shared choice hear, because more than "
    f"{MOST_REMOVED} tokens were cropped or rows were read by another attention implementation: these steps "
    "now choose blocks by their own query alone, and may attend to other keys. To hear earlier rows again, "
    "reset the cache and read the text again, or run `tile` - 1 steps without torch.compile"
)

logger = logging.get_logger(__name__)


class RecentQueries:
    """The queries of the slots just before `end`; their number varies.

    Attributes:
        queries: `(batch, num_heads, rows, head_dim)`; None: none are known.
        end: the slot after the last of them.
        in_graphs: whether compiled graphs keep them.
    """

    in_graphs = False

    def __init__(self) -> None:
        self.queries: Tensor | None = None
        self.end = 0

    def follow(self, query: Tensor, slot: int, tile: int) -> Tensor | None:
        """Records the queries of a call; returns those known of at most `tile - 1` slots just before them.

        Args:
            query: `(batch, num_heads, rows, head_dim)`.
            slot: the slot of the first of them.
        """
        before = self.before(slot, query, tile)
        self.record(query, slot, tile)
        return before

    def before(self, slot: int, like: Tensor, tile: int) -> Tensor | None:
        """The known queries of at most `tile - 1` slots just before `slot`; None: there are none.

        Args:
            like: queries `(batch, num_heads, any, head_dim)` of the current call.
        """
        held = self._fitting(slot, like)
        return None if held is None else held[:, :, max(0, held.shape[2] - tile + 1) :]

    def _fitting(self, slot: int, like: Tensor) -> Tensor | None:
        held = self.queries
        return held if held is not None and self.end == slot and _fits(held, like) else None

    def record(self, query: Tensor, begin: int, tile: int) -> None:
        """Adds the queries of a call whose first row is at slot `begin`, and drops those that are too old."""
        rows = query.shape[2]
        kept = last_rows(self._fitting(begin, query), query.detach(), most_rows(tile))
        self.queries, self.end = kept.clone() if rows >= kept.shape[2] else kept, begin + rows

    def forget(self) -> None:
        """Discards all queries."""
        self.queries = None

    def cropped(self, length: int) -> None:
        """Discards the queries of slots from `length` on."""
        if self.queries is not None and length < self.end:
            left = self.queries.shape[2] - (self.end - length)
            self.queries = self.queries[:, :, :left] if left > 0 else None
            self.end = length

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies `change`, a selection along dim 0, to the rows of the batch."""
        if self.queries is not None:
            self.queries = change(self.queries)


class FixedQueries:
    """The queries of the last rows of a static layer, in a ring of fixed shape.

    Slot `s` is in place `s % rows`, so a graph needs no number from the device, and a call that is repeated
    with the same length writes the same. No step uses rows before the first slot. So they count as known,
    and the number of heard queries does not grow with the text.

    Attributes:
        queries: `(batch, num_heads, most_rows(tile), head_dim)`; None: not allocated.
        known: how many of the last rows are known, at least. Compiled graphs do not read it, because a number
            that changes would compile them again.
        lost: fewer rows are known than steps use.
        unrecorded: the layer has appended rows whose queries have not been recorded.
        empty: no row has been appended since the start or the last reset.
        in_graphs: whether compiled graphs keep them.
    """

    in_graphs = True

    def __init__(self) -> None:
        self.queries: Tensor | None = None
        self.known = 0
        self.lost = self.unrecorded = False
        self.empty = True

    def appended(self) -> None:
        """Call this whenever the layer appends rows; `follow` is called next if steps use earlier rows."""
        if self.unrecorded:
            self.known, self.lost, self.empty = 0, True, False
        self.unrecorded = True

    def follow(self, query: Tensor, slot: Tensor, tile: int) -> Tensor | None:
        """Records the queries of a call; returns those known of the `tile - 1` slots just before them.

        In a compiled graph it returns None, and warns once, while some are lost. Graphs keep recording, but
        nothing on the host counts their rows, so only a reset or rows that are read without a graph end this.

        Args:
            query: `(batch, num_heads, rows, head_dim)`.
            slot: int64, 0-d, the slot of the first of them.
        """
        rows, heard, ring = query.shape[2], tile - 1, most_rows(tile)
        held = self.queries
        fits = held is not None and held.shape[2] == ring and _fits(held, query)
        if not fits:
            self._allocate(query, tile)
        assert self.queries is not None
        self.queries = writable(self.queries)
        place = (slot + torch.arange(-heard, rows, device=query.device)) % ring
        known = heard
        if self.lost:
            known = min(self.known, heard)
            if torch.compiler.is_compiling():
                _warn_of_steps_alone()
                known = 0
        before = None
        if fits and known > 0:
            before = self.queries.index_select(2, place[heard - known : heard])
        new = min(rows, ring)
        self.queries.index_copy_(2, place[heard + rows - new :], query.detach()[:, :, rows - new :])
        self.unrecorded = self.empty = False
        if not torch.compiler.is_compiling():
            self.known = min(self.known + rows, ring)
            self.lost = self.known < tile - 1
        return before

    def _allocate(self, like: Tensor, tile: int) -> None:
        """Allocates the ring; what another one contained is lost."""
        rows = most_rows(tile)
        self.queries = like.new_zeros((*like.shape[:2], rows, like.shape[3]))
        self.known, self.lost = (rows, False) if self.empty else (0, True)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.queries)

    def reset(self) -> None:
        """Starts again at the first slot; the ring is kept."""
        self.lost, self.unrecorded, self.empty = False, False, True
        if self.queries is not None:
            self.queries = writable(self.queries)
            self.queries.zero_()
            self.known = self.queries.shape[2]

    def cropped(self, removed: int) -> None:
        """The last `removed` rows have been removed."""
        if self.queries is not None:
            self.known = max(0, self.known - removed)
            self.lost = self.known < self.queries.shape[2] - MOST_REMOVED

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies `change`, a selection along dim 0, to the rows of the batch."""
        if self.queries is not None:
            self.queries = change(self.queries)


@torch.compiler.assume_constant_result
def _warn_of_steps_alone() -> bool:
    """Warns once, while a graph is traced."""
    logger.warning_once(_ALONE)
    return True


def _fits(held: Tensor, like: Tensor) -> bool:
    """Whether queries are of the same batch, heads, head dim, dtype and device."""
    same = held.dtype == like.dtype and held.device == like.device
    return same and held.shape[:2] == like.shape[:2] and held.shape[3] == like.shape[3]


def last_rows(first: Tensor | None, second: Tensor, count: int) -> Tensor:
    """The last `count` rows (dim 2) of `first` followed by `second`, or all if there are fewer."""
    second = second[:, :, max(0, second.shape[2] - count) :]
    missing = count - second.shape[2]
    if first is None or missing == 0:
        return second
    return torch.cat([first[:, :, max(0, first.shape[2] - missing) :], second], 2)
