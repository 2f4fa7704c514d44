"""The queries of a layer's last rows, which decode steps of a shared choice hear (`moba_hf.op.shared`, 8).

A step takes blocks by the mean mass over the rows of its tile up to itself. The masses of a row depend on its
query and on blocks that are complete, so the queries are all that a cache must keep of earlier rows. They can
be cropped with the cache, whereas sums of masses could not.

Dynamic and static layers keep as many, so that their steps hear the same rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moba_hf.op.block_means import writable

# Most tokens, usually rejected candidates, that can be removed again without losing rows that steps hear.
MOST_REMOVED = 64


def most_rows(tile: int) -> int:
    """How many queries a layer keeps: those that a step may hear, and those that a crop may remove."""
    return tile - 1 + MOST_REMOVED


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

    def before(self, slot: int, like: Tensor, tile: int) -> Tensor | None:
        """The known queries of at most `tile - 1` slots just before `slot`; None: there are none.

        Args:
            like: queries `(batch, num_heads, any, head_dim)` of the call that asks.
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
    """The queries of the last rows of a static layer, in one buffer that is updated in place.

    The last row of the buffer is always that of the last slot. Rows before the first slot are zeros. No step
    hears them, so they count as known, and the shape of what steps hear need not grow with the text.

    Attributes:
        queries: `(batch, num_heads, most_rows(tile), head_dim)`; None: not allocated.
        known: how many of the last rows are known, at least. Compiled graphs do not read it, because a number
            that changes would compile them again.
        lost: fewer rows are known than steps hear.
        unrecorded: the layer has appended rows whose queries have not been recorded.
        in_graphs: whether compiled graphs keep them.
    """

    in_graphs = True

    def __init__(self) -> None:
        self.queries: Tensor | None = None
        self.known = 0
        self.lost = self.unrecorded = False
        self.empty = True

    def appended(self) -> None:
        """Call this whenever the layer appends rows; `record` follows if steps hear rows."""
        if self.unrecorded:
            self.known, self.lost, self.empty = 0, True, False
        self.unrecorded = True

    def before(self, _slot: int | Tensor, like: Tensor, tile: int) -> Tensor | None:
        """The known queries of the last `tile - 1` rows before a call; None: there are none.

        In a compiled graph there are none while some are lost.

        Args:
            like: queries `(batch, num_heads, any, head_dim)` of the call that asks.
        """
        held = self.queries
        if held is None or not self._fitting(like, tile):
            return None
        if not self.lost:
            return held[:, :, MOST_REMOVED:]
        if torch.compiler.is_compiling() or self.known == 0:
            return None
        return held[:, :, held.shape[2] - min(self.known, tile - 1) :]

    def _fitting(self, like: Tensor, tile: int) -> bool:
        held = self.queries
        return held is not None and held.shape[2] == most_rows(tile) and _fits(held, like)

    def record(self, query: Tensor, _begin: int | Tensor, tile: int) -> None:
        """Adds the queries of a call."""
        if not self._fitting(query, tile):
            self._allocate(query, tile)
        assert self.queries is not None
        self.queries = writable(self.queries)
        self.queries.copy_(last_rows(self.queries, query.detach(), most_rows(tile)))
        self.unrecorded = self.empty = False
        if not torch.compiler.is_compiling():
            self.known = min(self.known + query.shape[2], most_rows(tile))
            self.lost = self.known < tile - 1

    def _allocate(self, like: Tensor, tile: int) -> None:
        """Allocates the buffer; what another one contained is lost."""
        rows = most_rows(tile)
        self.queries = like.new_zeros((*like.shape[:2], rows, like.shape[3]))
        self.known, self.lost = (rows, False) if self.empty else (0, True)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.queries)

    def reset(self) -> None:
        """Starts again at the first slot; the buffer is kept."""
        self.lost, self.unrecorded, self.empty = False, False, True
        if self.queries is not None:
            self.queries = writable(self.queries)
            self.queries.zero_()
            self.known = self.queries.shape[2]

    def cropped(self, removed: int) -> None:
        """Discards the queries of the last `removed` rows."""
        if self.queries is None:
            return
        self.known = max(0, self.known - removed)
        self.lost = self.known < self.queries.shape[2] - MOST_REMOVED
        self.queries = writable(self.queries)
        self.queries.copy_(self.queries.roll(removed, 2))  # the removed rows are now the oldest

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies `change`, a selection along dim 0, to the rows of the batch."""
        if self.queries is not None:
            self.queries = change(self.queries)


def _fits(held: Tensor, like: Tensor) -> bool:
    """Whether queries are of the same batch, heads, head dim, dtype and device."""
    shapes = ((*x.shape[:2], x.shape[3], x.dtype, x.device) for x in (held, like))
    return next(shapes) == next(shapes)


def last_rows(first: Tensor | None, second: Tensor, count: int) -> Tensor:
    """The last `count` rows (dim 2) of `first` followed by `second`, or all if there are fewer."""
    second = second[:, :, max(0, second.shape[2] - count) :]
    missing = count - second.shape[2]
    if first is None or missing == 0:
        return second
    return torch.cat([first[:, :, max(0, first.shape[2] - missing) :], second], 2)
