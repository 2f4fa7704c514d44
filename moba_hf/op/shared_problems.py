"""The problems of the shared choice in pure torch: what each tile attends, laid out for batched matmuls.

Legend: H query heads, HK kv heads, NB blocks, D head dim, B block size, T tile, M queries of a sequence, P
problems.

Every (head, tile) is one dense problem, its T rows against the keys of its blocks. Problems with like counts
are batched, their keys gathered block by block, and long lists are cut in pieces, so that scores stay in a
CPU's cache. The forward (`shared_portable`, `shared_cpu`) and the backward (`shared_portable_backward`) share
this layout.
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
_SCORE_BUDGET = 1 << 18
_FUSED_BUDGET = 1 << 20  # (row, key) pairs of a call of the fused kernel, which holds no scores
_PIECE_KEYS = 4096
_DEVICE_FACTOR = 64


def budget(elements: int, x: Tensor) -> int:
    """`elements`, or more of them where `x` is not on a CPU."""
    return elements if x.device.type == "cpu" else elements * _DEVICE_FACTOR


def shifted_exp(scores: Tensor, shift: Tensor) -> Tensor:
    """`exp(scores - shift)` in place; rounded up to normal numbers, as CPUs are slow at the smaller ones."""
    least = math.ceil(math.log(torch.finfo(scores.dtype).tiny))
    return scores.sub_(shift).clamp_(min=least).exp_()


@dataclass
class Problems:
    """Some (head, tile) problems of one sequence that are computed together.

    Attributes:
        row: `(P, T)` rows of the flattened `(H * M)` queries; `H * M` stands for none.
        position: `(P, T)` positions of these rows; the last real one for none.
        kv_head: `(P,)`.
        blocks: `(P, n)` ascending block numbers, -1 before the first, a tile's own blocks last.
        padded: whether `blocks` holds a -1.
    """

    row: Tensor
    position: Tensor
    kv_head: Tensor
    blocks: Tensor
    padded: bool


@dataclass
class Piece:
    """A piece of the lists of a batch.

    Attributes:
        index: `(P, n)` rows of the sequence's `keys` and `values`.
        keys, values: `(P, n B, D or Dv)`.
        scores: `(P, T, n B)`, scaled, -inf where a row may not attend.
        later: bool `(P, T, last columns)`, keys after a row; None: there are none.
        none: bool `(P, 1, n B)`, columns before the first block of a list; None: there are none.
    """

    index: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    later: Tensor | None
    none: Tensor | None

    def hide(self, value: float) -> None:
        """Writes `value` where a row may not attend."""
        if self.later is not None:
            self.scores[:, :, -self.later.shape[2] :].masked_fill_(self.later, value)
        if self.none is not None:
            self.scores.masked_fill_(self.none, value)

    def hidden(self) -> Tensor | None:
        """Where a row may not attend, bool `(P, T, n B)`; None: nowhere."""
        if self.later is None and self.none is None:
            return None
        hidden = torch.zeros_like(self.scores, dtype=torch.bool)
        if self.later is not None:
            hidden[:, :, -self.later.shape[2] :] = self.later
        return hidden if self.none is None else hidden | self.none

    def weights(self, shift: Tensor) -> Tensor:
        """`exp(scores - shift)` in place of the scores, exactly 0 where a row may not attend."""
        shifted_exp(self.scores, shift)
        self.hide(0.0)
        return self.scores


class SequenceBlocks:
    """One sequence's queries, keys and values, laid out for gathers.

    Attributes:
        tile, block_size: no more than the sequence is long.
        own: the most blocks that a tile overlaps.
        keys, values: `(HK * NB, B * D)` blocks, in the dtype that sums are held in, zero past the end.
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
        self.batch, self.first = rows[0][0], rows[0][1]
        self.queries = slice(rows[0][1], rows[-1][2])
        self.slots = slice(rows[0][4], rows[0][5])
        self.length = self.slots.stop - self.slots.start
        # a short sequence costs what its own queries and keys cost
        self.tile, self.block_size = min(tile, self.length), min(block_size, self.length)
        self.own = -(-self.tile // self.block_size)
        self.num_heads, self.num_kv_heads = q.shape[1], k.shape[1]
        self.count = -(-self.length // self.block_size)
        self.q = self.with_none((q[self.batch, :, self.queries].to(self.dtype) * scale).flatten(0, 1))
        self.keys, self.values = self._blocks(k), self._blocks(v)
        self.chosen = chosen.flatten(0, 1)  # (H * tiles, NB)
        self.space: dict[str, Tensor] = {}
        table = torch.tensor(rows, device=q.device)
        self.begin, self.size, self.position = (
            table[:, 1] - self.first,
            table[:, 2] - table[:, 1],
            table[:, 3],
        )

    @staticmethod
    def with_none(x: Tensor, fill: float = 0.0) -> Tensor:
        """`x (H * M, ...)` with a row of `fill` after the last, for rows that are none."""
        return torch.cat([x, x.new_full((1, *x.shape[1:]), fill)])

    def flat(self, x: Tensor) -> Tensor:
        """`x (H, M, ...)` with a row for none."""
        return self.with_none(x.to(self.dtype).flatten(0, 1))

    def _blocks(self, x: Tensor) -> Tensor:
        part = x[self.batch, :, self.slots].to(self.dtype)
        padded = torch.nn.functional.pad(part, (0, 0, 0, self.count * self.block_size - self.length))
        return padded.reshape(self.num_kv_heads * self.count, -1)

    def batches(self, *, alike: bool = False) -> Iterator[Problems]:
        """All problems, those with like counts of blocks together; only equal counts where `alike`."""
        counts = self.chosen.sum(1)
        order = counts.argsort(stable=True)
        sizes = counts[order].tolist()
        queries = self.queries.stop - self.queries.start
        head, tile = order // len(self.begin), order % len(self.begin)
        lane, size = torch.arange(self.tile, device=order.device), self.size[tile][:, None]
        row = (head * queries + self.begin[tile])[:, None] + lane
        row = row.masked_fill(lane >= size, len(self.q) - 1)
        position = self.position[tile][:, None] + torch.minimum(lane, size - 1)
        kv_head = head // (self.num_heads // self.num_kv_heads)
        at = 0
        while at < len(sizes):
            if alike:
                keys = self.tile * sizes[at] * self.block_size
                end = bisect_right(sizes, sizes[at], at, min(len(sizes), at + max(1, _FUSED_BUDGET // keys)))
            else:
                end = min(len(sizes), at + self._most(sizes[at]))
                end = min(end, at + self._most(sizes[end - 1]))  # the longest list counts
            blocks = self._lists(self.chosen[order[at:end]], sizes[at:end])
            padded = sizes[at] < sizes[end - 1]
            yield Problems(row[at:end], position[at:end], kv_head[at:end], blocks, padded)
            at = end

    def _most(self, blocks: int) -> int:
        """Problems with lists of so many blocks that fit the budget of scores."""
        keys = min(blocks * self.block_size, _PIECE_KEYS)
        return max(1, budget(_SCORE_BUDGET, self.q) // (self.tile * keys))

    @staticmethod
    def _lists(chosen: Tensor, sizes: list[int]) -> Tensor:
        """Block numbers `(P, n)` of `chosen (P, NB)`, ascending, -1 before the first."""
        numbers = chosen.nonzero()[:, 1]
        if sizes[0] == sizes[-1]:
            return numbers.view(len(sizes), -1)
        place = torch.arange(sizes[-1], device=chosen.device)
        missing = sizes[-1] - torch.tensor(sizes, device=chosen.device)
        lists = chosen.new_full((len(sizes), sizes[-1]), -1, dtype=torch.long)
        lists[place >= missing[:, None]] = numbers
        return lists

    def pieces(self, batch: Problems) -> Iterator[Piece]:
        """Cuts lists in pieces, the last first: it holds a key for every row."""
        most = max(self.own, _PIECE_KEYS // self.block_size)
        queries = self.gather(self.q, batch.row)
        inside = torch.arange(self.block_size, device=self.q.device)
        total = batch.blocks.shape[1]
        for end in range(total, 0, -most):
            blocks = batch.blocks[:, max(0, end - most) : end]
            index = batch.kv_head[:, None] * self.count + blocks.clamp(min=0)
            keys, values = self.take("keys", self.keys, index), self.take("values", self.values, index)
            scores = self.room("scores", (len(index), self.tile, keys.shape[1]))
            torch.bmm(queries, keys.transpose(1, 2), out=scores)
            later = none = None
            if end == total:
                key = (blocks[:, -self.own :, None] * self.block_size + inside).flatten(1)
                later = key[:, None, :] > batch.position[:, :, None]
            if batch.padded and bool((blocks < 0).any()):
                none = (blocks < 0).repeat_interleave(self.block_size, 1)[:, None]
            piece = Piece(index, keys, values, scores, later, none)
            piece.hide(-torch.inf)
            yield piece

    def take(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        """`x (HK * NB, B * D)` at `index (P, n)`, `(P, n B, D)`, in the memory `name`."""
        gathered = self.room(name, (index.numel(), x.shape[1]))
        torch.index_select(x, 0, index.flatten(), out=gathered)
        return gathered.view(len(index), index.shape[1] * self.block_size, -1)

    def room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory `name` that every piece reuses: touching new pages is slow."""
        size = math.prod(shape)
        if name not in self.space or self.space[name].numel() < size:
            self.space[name] = self.q.new_empty(size)
        return self.space[name][:size].view(shape)

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
