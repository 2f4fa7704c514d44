"""The queries of a layer's last rows, which decode steps of a shared choice hear (`moba_hf.op.shared`, 8).

A step takes blocks by the mean mass over the rows of its tile up to itself. The masses of a row depend on its
query and on blocks that are complete, so the queries are all that a cache must keep of earlier rows. They can
be cropped with the cache, whereas sums of masses could not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Most tokens of one call, usually rejected candidates, that can be removed again without losing older rows.
MOST_REMOVED = 256


class RecentQueries:
    """The queries of the slots just before `end`.

    Attributes:
        queries: `(batch, num_heads, rows, head_dim)`; None: none are known.
        end: the slot after the last of them.
    """

    def __init__(self) -> None:
        self.queries: Tensor | None = None
        self.end = 0

    def before(self, slot: int, like: Tensor) -> Tensor | None:
        """The known queries of the slots that end just before `slot`; None if there are none.

        Args:
            like: queries `(batch, num_heads, any, head_dim)` of the call that asks.
        """
        held = self.queries
        if held is None or self.end != slot or held.dtype != like.dtype or held.device != like.device:
            return None
        return held if (*held.shape[:2], held.shape[3]) == (*like.shape[:2], like.shape[3]) else None

    def record(self, query: Tensor, begin: int, tile: int) -> None:
        """Adds the queries of a call whose first row is at slot `begin`, and drops those that are too old."""
        rows = query.shape[2]
        kept = last_rows(self.before(begin, query), query.detach(), tile - 1 + min(rows, MOST_REMOVED))
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


def last_rows(first: Tensor | None, second: Tensor, count: int) -> Tensor:
    """The last `count` rows (dim 2) of `first` followed by `second`, or all if there are fewer."""
    second = second[:, :, max(0, second.shape[2] - count) :]
    missing = count - second.shape[2]
    if first is None or missing == 0:
        return second
    return torch.cat([first[:, :, max(0, first.shape[2] - missing) :], second], 2)
