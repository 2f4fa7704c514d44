"""The attention problems of the shared choice in pure torch, arranged for batched matmuls.

Legend: H query heads, HK kv heads, NB blocks, D head dim, B block size, T tile, M queries of a sequence, P
problems.

Every (head, tile) is one dense problem: its T rows attend to the keys of its blocks. Problems with equally
many blocks are batched and their keys gathered block by block. Long lists of blocks are split into pieces, so
that scores stay in a CPU's cache. The forward (`shared_portable`) and the backward
(`shared_portable_backward`) both use this.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_hf.op.numerics import accumulate_dtype
from moba_hf.op.sequences import Sequences
from moba_hf.op.shared import sequence_tiles, unpack_blocks

# Elements that the scores of one step may hold, and keys in one piece of a list.
# Off the CPU the budgets are multiplied by `_DEVICE_FACTOR`: there launches dominate, not page faults.
_SCORE_BUDGET = 1 << 20
_PIECE_KEYS = 4096
_DEVICE_FACTOR = 64


def budget(elements: int, x: Tensor) -> int:
    """`elements`, or more if `x` is not on a CPU."""
    return elements if x.device.type == "cpu" else elements * _DEVICE_FACTOR


def shifted_exp(scores: Tensor, shift: Tensor) -> Tensor:
    """`exp(scores - shift)` in place, limited from below so that its products are not subnormal.

    CPUs compute slowly with subnormal numbers.
    """
    least = math.ceil(math.log(torch.finfo(scores.dtype).tiny)) + 20
    return scores.sub_(shift).clamp_(min=least).exp_()


class Scratch:
    """Named buffers of one dtype that steps reuse, because touching new pages is slow."""

    def __init__(self, like: Tensor):
        self.like, self.space = like, dict[str, Tensor]()

    def room(self, name: str, *shape: int) -> Tensor:
        """The buffer `name` as an uninitialised tensor of this shape."""
        size = math.prod(shape)
        if name not in self.space or self.space[name].numel() < size:
            self.space[name] = self.like.new_empty(size)
        return self.space[name][:size].view(shape)


@dataclass
class Problems:
    """Some (head, tile) problems of one sequence that are computed together.

    Attributes:
        place: their slice of all problems in the order of `SequenceBlocks.batches`.
        row: `(P, T)` rows of the flattened `(H * M)` queries; `H * M` means no row.
        blocks: `(P, n)` rows of the sequence's blocks, ascending, with a tile's own blocks last.
        later: bool `(P or 1, T, last keys)`, which of the last keys are after a row.
    """

    place: slice
    row: Tensor
    blocks: Tensor
    later: Tensor


@dataclass
class Piece:
    """A piece of the block lists of a batch.

    Attributes:
        index: `(P, n)` rows of the sequence's blocks.
        keys: `(P, D, n B)`.
        values: `(P, n B, Dv)`.
        scores: `(P, T, n B)`, scaled, -inf where a row may not attend.
        later: as in `Problems`, for the last keys; None: every row attends to all keys.
    """

    index: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    later: Tensor | None

    def hide(self, value: float) -> None:
        """Writes `value` where a row may not attend."""
        if self.later is not None:
            self.scores[:, :, -self.later.shape[2] :].masked_fill_(self.later, value)

    def hidden(self) -> Tensor | None:
        """Keys that a row may not attend to, bool `(P, T, n B)`; None: there are none."""
        if self.later is None:
            return None
        hidden = torch.zeros_like(self.scores, dtype=torch.bool)
        hidden[:, :, -self.later.shape[2] :] = self.later
        return hidden

    def weights(self, shift: Tensor) -> Tensor:
        """`exp(scores - shift)` in place of the scores, exactly 0 where a row may not attend."""
        shifted_exp(self.scores, shift)
        self.hide(0.0)
        return self.scores


class SequenceBlocks:
    """One sequence's queries, keys and values, arranged for gathers, in the dtype of sums.

    Attributes:
        tile: at most the length of the sequence.
        block_size: at most the length of the sequence.
        q: `(H * M + 1, D)`, scaled; the last row is zero, for "no row".
        keys: `(D, HK * NB, B)`, zero after the end; products with this layout are a quarter faster.
        values: `(HK * NB, B * Dv)`, zero after the end.
        chosen: bool `(H * tiles, NB)`.
        begin: `(tiles,)`, index of a tile's first row in this call among the sequence's queries.
        size: `(tiles,)`, number of a tile's rows in this call.
        position: `(tiles,)`, position of a tile's first row in this call.
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
        self.q = self.flat(q[self.batch, :, self.queries], factor=scale)
        across = self._padded(k).permute(2, 0, 1).contiguous()
        self.keys = across.view(-1, self.num_kv_heads * self.count, self.block_size)
        self.values = self._padded(v).reshape(self.num_kv_heads * self.count, -1)
        self.chosen = chosen.flatten(0, 1)
        self.scratch = Scratch(self.q)
        table = torch.tensor(rows, device=q.device)
        self.begin, self.size, self.position = (
            table[:, 1] - first,
            table[:, 2] - table[:, 1],
            table[:, 3],
        )
        counts = self.chosen.sum(1)
        self.order = counts.argsort(stable=True)
        self.counts: list[int] = counts[self.order].tolist()

    def flat(self, x: Tensor, fill: float = 0.0, factor: float = 1.0) -> Tensor:
        """`factor * x (H, M, ...)` as `(H * M + 1, ...)`, with a last row of `fill` for "no row"."""
        rows = x.shape[0] * x.shape[1]
        result = x.new_empty((rows + 1, *x.shape[2:]), dtype=self.dtype)
        torch.mul(x.to(self.dtype), factor, out=result[:rows].view(x.shape))
        result[rows] = fill
        return result

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
        """Yields all problems, grouped by their number of blocks."""
        tiles, group = len(self.begin), self.num_heads // self.num_kv_heads
        queries, end = self.queries.stop - self.queries.start, 0
        lane = torch.arange(self.tile, device=self.order.device)
        whole = (self.size == self.tile).tolist()
        alike = lane > lane[:, None] if self.tile % self.block_size == 0 else None
        while end < len(self.counts):
            begin, count = end, self.counts[end]
            keys = min(count * self.block_size, _PIECE_KEYS)
            most = max(1, budget(_SCORE_BUDGET, self.q) // (self.tile * keys))
            end = bisect_right(self.counts, count, begin, min(len(self.counts), begin + most))
            problems = self.order[begin:end]
            head, tile = problems // tiles, problems % tiles
            row = (head * queries + self.begin[tile])[:, None] + lane
            blocks = self.chosen[problems].nonzero()[:, 1].view(len(problems), count)
            if alike is not None and all(whole[x] for x in tile.tolist()):
                later = alike[None]
            else:
                size = self.size[tile][:, None]
                row.masked_fill_(lane >= size, len(self.q) - 1)
                later = self._later(blocks, self.position[tile][:, None] + torch.minimum(lane, size - 1))
            index = (head // group * self.count)[:, None] + blocks
            yield Problems(slice(begin, end), row, index, later)

    def _later(self, blocks: Tensor, position: Tensor) -> Tensor:
        """Which keys of a tile's own blocks, the last of `blocks (P, n)`, are after `position (P, T)`."""
        own = blocks[:, self.tile // -self.block_size :, None]  # as many as a tile overlaps
        key = (own * self.block_size + torch.arange(self.block_size, device=own.device)).flatten(1)
        return key[:, None, :] > position[:, :, None]

    def pieces(self, problems: Problems) -> Iterator[Piece]:
        """Splits lists into pieces, starting with the last one, which has a key for every row."""
        most = max(1, problems.later.shape[2] // self.block_size, _PIECE_KEYS // self.block_size)
        queries = self.gather(self.q, problems.row)
        total = problems.blocks.shape[1]
        for end in range(total, 0, -most):
            index = problems.blocks[:, max(0, end - most) : end]
            keys, values = self._keys(index), self._values(index)
            scores = self.scratch.room("scores", len(index), self.tile, keys.shape[2])
            torch.bmm(queries, keys, out=scores)
            piece = Piece(index, keys, values, scores, problems.later if end == total else None)
            piece.hide(-torch.inf)
            yield piece

    def _keys(self, index: Tensor) -> Tensor:
        """Keys of blocks `index (P, n)`, `(P, D, n B)`, in memory that is used again."""
        dim = self.keys.shape[0]
        gathered = self.scratch.room("keys", dim, index.numel(), self.block_size)
        torch.index_select(self.keys, 1, index.flatten(), out=gathered)
        return gathered.view(dim, len(index), -1).transpose(0, 1)

    def _values(self, index: Tensor) -> Tensor:
        """Values of blocks `index (P, n)`, `(P, n B, Dv)`, in memory that is used again."""
        gathered = self.scratch.room("values", index.numel(), self.values.shape[1])
        torch.index_select(self.values, 0, index.flatten(), out=gathered)
        return gathered.view(len(index), index.shape[1] * self.block_size, -1)

    @staticmethod
    def gather(x: Tensor, row: Tensor) -> Tensor:
        """`x (H * M + 1, D)` at `row (P, T)`, `(P, T, D)`."""
        return x.index_select(0, row.flatten()).view(*row.shape, -1)


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
