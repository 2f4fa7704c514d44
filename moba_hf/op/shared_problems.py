"""The attention problems of the shared choice in pure torch, arranged for batched matmuls.

Legend: H query heads, HK kv heads, NB blocks, D head dim, B block size, T tile, M queries of a sequence, P
problems.

Every (head, tile) is one dense problem: its T rows attend to the keys of its blocks. Problems with equally
many blocks are batched and their keys gathered block by block. Batches are small, and long lists of blocks
are split into pieces, so that scores stay in a CPU's cache. The forward (`shared_portable`) and the backward
(`shared_portable_backward`) both use this.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from moba_hf.op.numerics import accumulate_dtype
from moba_hf.op.sequences import Sequences
from moba_hf.op.shared import sequence_tiles, unpack_blocks

# Elements that the scores of one step may hold for each thread, keys in one piece of a list, and elements of
# the masks whose lists are made at a time. Off the CPU, launches dominate instead of cache misses, so budgets
# are those of `_DEVICE_THREADS` threads.
_SCORE_BUDGET = 1 << 19
_PIECE_KEYS = 4096
_LIST_BUDGET = 1 << 20
# Natural logarithm of what sums of `exp(score)` times values may grow, or values shrink, without a shift.
_HEADROOM = 16
_DEVICE_THREADS = 128


def budget(elements: int, x: Tensor) -> int:
    """`elements` for each thread that computes with `x`."""
    return elements * (torch.get_num_threads() if x.device.type == "cpu" else _DEVICE_THREADS)


def shifted_exp(scores: Tensor, shift: Tensor) -> Tensor:
    """`exp(scores - shift)` in place, limited from below so that its products are not subnormal.

    CPUs compute slowly with subnormal numbers.
    """
    least = math.ceil(math.log(torch.finfo(scores.dtype).tiny)) + 20
    return scores.sub_(shift).clamp_(min=least).exp_()


def needs_shift(lse: Tensor) -> bool:
    """Whether sums `exp(lse)` without a shift are so small that products with values may be subnormal."""
    return bool((lse < -_HEADROOM).any())


class Scratch:
    """Named buffers of one dtype that steps reuse, because touching new pages is slow."""

    def __init__(self, like: Tensor):
        self.like, self.space = like, dict[str, Tensor]()

    def room(self, name: str, *shape: int) -> Tensor:
        """The buffer `name` as an uninitialised tensor of this shape."""
        size = math.prod(shape)
        if name not in self.space or self.space[name].numel() < size:
            self.space[name] = self.like.new_empty(1 << (size - 1).bit_length())  # grows a few times only
        return self.space[name][:size].view(shape)


@dataclass
class Problems:
    """Some (head, tile) problems of one sequence that are computed together.

    Attributes:
        place: their slice of all problems in the order of `SequenceBlocks.batches`.
        index: `(P, n)` rows of the sequence's blocks, ascending, with a tile's own blocks last.
        later: bool `(P or 1, T, last keys)`, which of the last keys are after a row.
        whole: the last keys are `T` and the tiles have all rows, so that `later` is a triangle.
        bounded: `exp` of their scores can be summed without a shift, see `SequenceBlocks`.
    """

    place: slice
    index: Tensor
    later: Tensor
    whole: bool
    bounded: bool


@dataclass
class Piece:
    """A piece of the block lists of a batch.

    Attributes:
        index: `(P, n)` rows of the sequence's blocks.
        keys: `(P, n B, D)`.
        values: `(P, n B, Dv)`.
        scores: `(P, T, n B)`, scaled, also where a row may not attend.
        later, whole: as in `Problems`, for the last keys; None: every row attends to all keys.
    """

    index: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    later: Tensor | None
    whole: bool

    def hide(self, value: float) -> None:
        """Writes `value` where a row may not attend."""
        if self.later is None:
            return
        last = self.scores[:, :, -self.later.shape[2] :]
        if self.whole and value == 0.0:
            last.tril_()  # several times as fast as a mask
        else:
            last.masked_fill_(self.later, value)

    def hidden(self) -> Tensor | None:
        """Keys that a row may not attend to, bool `(P, T, n B)`; None: there are none."""
        if self.later is None:
            return None
        hidden = torch.zeros_like(self.scores, dtype=torch.bool)
        hidden[:, :, -self.later.shape[2] :] = self.later
        return hidden

    def weights(self, shift: Tensor | None) -> Tensor:
        """`exp(scores - shift)` in place of the scores, exactly 0 where a row may not attend.

        Without a shift, scores must be bounded.
        """
        if shift is None:
            self.scores.exp_()
        else:
            shifted_exp(self.scores, shift)
        self.hide(0.0)
        return self.scores


class SequenceBlocks:
    """One sequence's queries, keys and values, arranged for gathers, in the dtype of sums.

    A problem is *bounded* if the largest norms of its queries and of the head's keys show that `exp` of every
    score, and sums of many, are normal numbers. Then the softmax needs no maxima, an eighth of the time,
    unless `needs_shift` finds that values underflowed.

    Attributes:
        tile: at most the length of the sequence.
        block_size: at most the length of the sequence.
        q: `(H * tiles, T, D)` as in `sorted`, scaled.
        keys: `(HK * NB, B * D)`, zero after the end.
        values: `(HK * NB, B * Dv)`, zero after the end.
        chosen: bool `(H * tiles, NB)`.
        begin: `(tiles,)`, index of a tile's first row in this call among the sequence's queries.
        size: `(tiles,)`, number of a tile's rows in this call.
        position: `(tiles,)`, position of a tile's first row in this call.
        order: `(H * tiles,)`, the problems (`head * tiles + tile`) in the order of `batches`.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chosen: Tensor,
        rows: list[list[int]],
        tile: int,
        block_size: int,
        scale: float,
    ):
        self.dtype = accumulate_dtype(q.dtype)
        self.batch, first = rows[0][0], rows[0][1]
        self.queries = slice(first, rows[-1][2])
        self.slots = slice(rows[0][4], rows[0][5])
        self.length = self.slots.stop - self.slots.start
        # limit both sizes, so that a short sequence costs no more than its queries and keys
        self.tile, self.block_size = min(tile, self.length), min(block_size, self.length)
        self.num_heads, self.num_kv_heads = q.shape[1], k.shape[1]
        self.count = -(-self.length // self.block_size)
        table = torch.tensor(rows, device=q.device)
        self.begin, self.size = table[:, 1] - first, table[:, 2] - table[:, 1]
        self.position = table[:, 3]
        self.sizes = [row[2] - row[1] for row in rows]
        self.keys, self.values = (self._padded(x).reshape(self.num_kv_heads * self.count, -1) for x in (k, v))
        self.chosen = chosen.flatten(0, 1)
        queries = self._tiled(q[self.batch, :, self.queries], factor=scale)
        self._sort(queries)
        self.q = queries.index_select(0, self.order)
        self.scratch = Scratch(self.q)

    def _sort(self, queries: Tensor) -> None:
        """Orders the problems so that those that one batch may hold are neighbours."""
        head = torch.arange(self.num_heads, device=self.size.device)[:, None]
        kv_head = head // (self.num_heads // self.num_kv_heads)
        whole = (self.size == self.tile) & (self.tile % self.block_size == 0)
        kind = (self._bounded(queries, kv_head) * 2 + whole) * self.num_kv_heads + kv_head
        key = kind.flatten() * (self.count + 1) + self.chosen.sum(1)
        self.order = key.argsort(stable=True)
        self.sort_keys: list[int] = key[self.order].tolist()

    def _bounded(self, queries: Tensor, kv_head: Tensor) -> Tensor:
        """Which problems are bounded, `(H, tiles)`; none whose queries or keys are not finite."""
        keys = self.keys.view(self.num_kv_heads, self.count * self.block_size, -1)
        longest = torch.linalg.vector_norm(keys, dim=2).amax(1)
        norms = torch.linalg.vector_norm(queries, dim=2).amax(1).view(self.num_heads, -1)
        return norms * longest[kv_head] <= math.log(torch.finfo(self.dtype).max) - _HEADROOM

    def _runs(self) -> Iterator[tuple[slice, slice, int]]:
        """Yields runs of tiles with equally many rows: tiles, rows, and the number of rows of a tile."""
        tile, row = 0, 0
        for size, group in groupby(self.sizes):
            count = len(list(group))
            yield slice(tile, tile + count), slice(row, row + count * size), size
            tile, row = tile + count, row + count * size

    def _tiled(self, x: Tensor, fill: float = 0.0, factor: float = 1.0) -> Tensor:
        """`factor * x (H, M, ...)` by tile, `(H * tiles, T, ...)`, with `fill` where a tile has no row."""
        result = x.new_empty((len(x), len(self.sizes), self.tile, *x.shape[2:]), dtype=self.dtype)
        for tiles, rows, size in self._runs():
            part = x[:, rows].unflatten(1, (-1, size)).to(self.dtype)
            torch.mul(part, factor, out=result[:, tiles, :size])
            result[:, tiles, size:] = fill
        return result.flatten(0, 1)

    def sorted(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """`x (H, M, ...)` by problem in `order`, `(H * tiles, T, ...)`; `fill` where a tile has no row."""
        return self._tiled(x, fill).index_select(0, self.order)

    def unsorted(self, x: Tensor) -> Tensor:
        """The inverse of `sorted`."""
        x = torch.empty_like(x).index_copy_(0, self.order, x).unflatten(0, (self.num_heads, -1))
        return torch.cat([x[:, tiles, :size].flatten(1, 2) for tiles, _, size in self._runs()], 1)

    def _padded(self, x: Tensor) -> Tensor:
        """`x (batch, HK, slots, D)` as `(HK, NB * B, D)`."""
        part = x[self.batch, :, self.slots].to(self.dtype)
        missing = self.count * self.block_size - self.length
        return torch.nn.functional.pad(part, (0, 0, 0, missing)) if missing else part

    def places(self) -> Tensor:
        """Index of each query's row among the rows of all problems, `(H, M)`, in the order of `batches`."""
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(self.order), device=place.device)
        tile = torch.arange(len(self.size), device=place.device).repeat_interleave(self.size)
        lane = torch.arange(len(tile), device=place.device) - self.begin[tile]
        return place.view(self.num_heads, -1)[:, tile] * self.tile + lane

    def batches(self) -> Iterator[Problems]:
        """Yields all problems; those of a batch have the same kv head and equally many blocks."""
        lane = torch.arange(self.tile, device=self.order.device)
        triangle = (lane > lane[:, None])[None]
        step = max(1, _LIST_BUDGET // self.count)
        for start in range(0, len(self.order), step):
            sort_keys = self.sort_keys[start : start + step]
            ends = list(accumulate(key % (self.count + 1) for key in sort_keys))
            lists = self._lists(self.order[start : start + step])
            end = 0
            while end < len(sort_keys):
                begin = end
                kind, count = divmod(sort_keys[begin], self.count + 1)
                bounded, whole = divmod(kind // self.num_kv_heads, 2)
                most = self._most(count)
                end = bisect_right(sort_keys, sort_keys[begin], begin, min(len(sort_keys), begin + most))
                place = slice(start + begin, start + end)
                index = lists[ends[begin] - count : ends[end - 1]].view(-1, count)
                later = triangle if whole else self._later(self.order[place], index, lane)
                yield Problems(place, index, later, bool(whole), bool(bounded))

    def _most(self, count: int) -> int:
        """The most problems with `count` blocks in a batch."""
        scores = self.tile * min(count * self.block_size, _PIECE_KEYS)
        return max(1, budget(_SCORE_BUDGET, self.q) // scores)

    def _lists(self, problems: Tensor) -> Tensor:
        """The lists of `problems`, one after the other: rows of the sequence's blocks."""
        tiles, group = len(self.size), self.num_heads // self.num_kv_heads
        number, block = self.chosen[problems].nonzero().unbind(1)
        return block + (problems // (tiles * group) * self.count)[number]

    def _later(self, number: Tensor, index: Tensor, lane: Tensor) -> Tensor:
        """Which keys of the last blocks of `index (P, n)` are after a row, bool `(P, T, keys)`."""
        tile = number % len(self.size)
        row = torch.minimum(lane, (self.size[tile] - 1)[:, None])
        position = self.position[tile][:, None] + row
        own = (index % self.count)[:, self.tile // -self.block_size :, None]  # as many as a tile overlaps
        key = (own * self.block_size + torch.arange(self.block_size, device=own.device)).flatten(1)
        return key[:, None, :] > position[:, :, None]

    def pieces(self, problems: Problems) -> Iterator[Piece]:
        """Splits lists into pieces, starting with the last one, which has a key for every row.

        Pieces share their memory: one is valid until the next.
        """
        most = max(1, problems.later.shape[2] // self.block_size, _PIECE_KEYS // self.block_size)
        queries = self.q[problems.place]
        total = problems.index.shape[1]
        for end in range(total, 0, -most):
            index = problems.index[:, max(0, end - most) : end]
            keys, values = self._blocks("keys", self.keys, index), self._blocks("values", self.values, index)
            scores = self.scratch.room("scores", len(index), self.tile, keys.shape[1])
            torch.bmm(queries, keys.transpose(1, 2), out=scores)
            yield Piece(index, keys, values, scores, problems.later if end == total else None, problems.whole)

    def _blocks(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        """Blocks `index (P, n)` of `x (HK * NB, B * D)`, `(P, n B, D)`, in the buffer `name`."""
        gathered = self.scratch.room(name, index.numel(), x.shape[1])
        torch.index_select(x, 0, index.flatten(), out=gathered)
        return gathered.view(len(index), index.shape[1] * self.block_size, -1)


def each_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    sequences: Sequences,
    block_size: int,
    tile: int,
    scale: float,
) -> Iterator[SequenceBlocks]:
    for numbers, rows in sequence_tiles(sequences, q, tile):
        blocks = -(-(rows[0][5] - rows[0][4]) // block_size)
        chosen = unpack_blocks(block_mask[:, numbers], blocks)
        yield SequenceBlocks(q, k, v, chosen, rows, tile, block_size, scale)
