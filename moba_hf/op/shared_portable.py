"""The shared choice of blocks in pure torch on any device: block-sparse, differentiable, bounded memory.

Legend: H query heads, HK kv heads, D head dim, B block size, T tile, M queries and N keys of a sequence.

For each sequence:
1. select: masses of the candidates for the sampled rows of a run of tiles, then what each tile takes.
2. attend: every (head, tile) is one dense problem, its T rows against the keys of its blocks. Problems with
   like counts are batched, their keys gathered block by block, and long lists are cut in pieces whose partial
   results are merged, so that scores stay in a CPU's cache.
Sums are taken in fp32 (fp64 for fp64 inputs). Reading the tile table waits for the device, so this path is
for CPUs, MPS and GPUs without a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_hf.op.gates import MassSummary
from moba_hf.op.numerics import accumulate_dtype, full_precision
from moba_hf.op.sequences import Attended, Sequences
from moba_hf.op.shared import SharedRule, mask_words, num_tiles, pack_blocks, sequence_tiles, unpack_blocks

# Elements that the terms of masses, and the scores, of one step may hold, and keys in one piece of a list.
# Elsewhere than on CPUs so many times more elements, since launches are dear there.
_MASS_BUDGET = 1 << 20
_SCORE_BUDGET = 1 << 18
_PIECE_KEYS = 4096
_DEVICE_FACTOR = 64


def _budget(elements: int, x: Tensor) -> int:
    """`elements`, or more of them where `x` is not on a CPU."""
    return elements if x.device.type == "cpu" else elements * _DEVICE_FACTOR


def select(
    q: Tensor,
    k: Tensor,
    sequences: Sequences,
    rule: SharedRule,
    softmax_scale: float,
) -> Tensor:
    """The choice of every tile, `block_mask` int32 `(H, num_tiles, words)`; see `moba_hf.op.shared`.

    Args:
        q: `(batch, H, q_len, D)`. k: `(batch, HK, kv_len, D)`.
    """
    words = mask_words(sequences.max_seqlen_k, rule.block_size)
    shape = (q.shape[1], num_tiles(sequences, q, rule.tile), words)
    result = torch.zeros(shape, dtype=torch.int32, device=q.device)
    with full_precision(q.device):
        for numbers, rows in sequence_tiles(sequences, q, rule.tile):
            batch, _, _, _, k_begin, k_end = rows[0]
            blocks = -(-(k_end - k_begin) // rule.block_size)
            gate = MassSummary(k[batch, :, k_begin:k_end], rule.block_size, softmax_scale, rule.rotary_pairs)
            terms = q.shape[1] * (rule.tile // rule.sample) * blocks * gate.mean.shape[1]
            step = max(1, _budget(_MASS_BUDGET, q) // terms)
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                chosen = _choose_tiles(q[batch], gate, part, rule)
                place = slice(numbers.start + start, numbers.start + start + len(part))
                result[:, place] = pack_blocks(chosen, words)
    return result


def _choose_tiles(q: Tensor, gate: MassSummary, rows: list[list[int]], rule: SharedRule) -> Tensor:
    """Blocks that a run of tiles attends, bool `(H, tiles, blocks up to the last)`; q is `(H, q_len, D)`."""
    device = q.device
    table = torch.tensor(rows, device=device)
    begin, count = table[:, 3], table[:, 2] - table[:, 1]
    start = begin // rule.tile * rule.tile
    candidates = start // rule.block_size
    columns = int(candidates[-1])
    last = (begin + count - 1) // rule.block_size + 1
    block = torch.arange(int(last[-1]), device=device)
    own = (block >= candidates[:, None]) & (block < last[:, None])
    earlier = block < candidates[:, None]
    dense = (start < rule.dense_below)[:, None]
    if columns == 0 or bool(dense.all()):
        return (own | (earlier & dense)).expand(q.shape[0], -1, -1)
    sampled, speaks = _sampled_rows(begin, count, rule.sample)
    at = table[:, 1, None] + sampled - begin[:, None]  # (tiles, groups), queries of the batch row
    hidden = ~earlier[:, None, :columns].expand(-1, at.shape[1], -1)
    masses = _row_masses(q[:, at.flatten()], gate, hidden.flatten(0, 1)).unflatten(1, at.shape)
    mass = (masses * speaks[:, :, None]).sum(2) / speaks.sum(1)[:, None]
    taken = _take(mass, candidates, rule)
    taken = torch.nn.functional.pad(taken, (0, len(block) - columns))
    return torch.where(dense, earlier, taken) | own


def _row_masses(q: Tensor, gate: MassSummary, hidden: Tensor) -> Tensor:
    """The softmax of the scores of `q (H, M, D)` over blocks that are not `hidden (M, columns)`.

    A row without blocks gets zeros. The same as `gate.scores` and a softmax, without a logarithm per block.
    """
    kv_heads, columns = gate.mean.shape[0], hidden.shape[1]
    queries = q.to(gate.mean.dtype).reshape(kv_heads, 1, -1, q.shape[2])
    spread = gate.squares(queries) @ gate.var[:, :, :columns].transpose(2, 3)
    # f(v) of `moba_hf.op.gates` is m (2 r - m), with r = sqrt(v / 2) and m = min(r, sqrt(log n))
    root = spread.mul_(0.5).sqrt_()
    least = root.clamp(max=math.sqrt(gate.log_size))
    terms = queries @ gate.mean[:, :, :columns].transpose(2, 3)
    terms += root.mul_(2).sub_(least).mul_(least).add_(gate.log_size)
    single = queries @ gate.smallest[:, None, :columns].transpose(2, 3)
    terms = torch.cat([terms, single], 1).view(kv_heads, terms.shape[1] + 1, -1, *hidden.shape)
    terms.masked_fill_(hidden, -torch.inf)
    high = terms.amax((1, 4), keepdim=True).clamp_(min=torch.finfo(terms.dtype).min)
    mass = _weights(terms, high).masked_fill_(hidden, 0.0).sum(1)
    return mass.div_(mass.sum(3, keepdim=True).clamp_(min=torch.finfo(mass.dtype).tiny)).flatten(0, 1)


def _weights(scores: Tensor, shift: Tensor) -> Tensor:
    """`exp(scores - shift)` in place; rounded up to normal numbers, as CPUs are slow at the smaller ones."""
    least = math.ceil(math.log(torch.finfo(scores.dtype).tiny))
    return scores.sub_(shift).clamp_(min=least).exp_()


def _sampled_rows(begin: Tensor, count: Tensor, sample: int) -> tuple[Tensor, Tensor]:
    """Positions `(tiles, groups)` of the rows that speak for tiles, and which of these there are."""
    end = begin + count
    first = begin // sample
    groups = (end - 1) // sample + 1 - first
    number = torch.arange(int(groups.max()), device=begin.device)
    rows = torch.minimum((first[:, None] + number + 1) * sample, end[:, None]) - 1
    return rows, number < groups[:, None]


def _take(mass: Tensor, candidates: Tensor, rule: SharedRule) -> Tensor:
    """Candidates that tiles attend, bool `(H, tiles, columns)`, from their masses of the same shape."""
    block = torch.arange(mass.shape[2], device=mass.device)
    earlier = block < candidates[:, None]
    forced = earlier & ((block < rule.sink_blocks) | (block >= (candidates - rule.local_blocks)[:, None]))
    wanted = earlier & ~forced
    if rule.threshold is not None:
        wanted = wanted & (mass >= rule.threshold * mass.amax(2, keepdim=True))
    if rule.share is not None:
        value, index = mass.sort(dim=2, descending=True, stable=True)
        before = value.cumsum(2) - value
        wanted = wanted & torch.zeros_like(wanted.expand_as(mass)).scatter_(2, index, before < rule.share)
    if rule.topk is not None:
        left = rule.topk - rule.own_blocks - forced.sum(1)
        order = mass.masked_fill(~wanted, -1.0).sort(dim=2, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(2, order, block.expand_as(order))
        wanted = wanted & (rank < left[:, None])
    return (wanted | forced).expand_as(mass)


@dataclass
class _Batch:
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
class _Piece:
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

    def weights(self, shift: Tensor) -> Tensor:
        """`exp(scores - shift)` in place of the scores, exactly 0 where a row may not attend."""
        _weights(self.scores, shift)
        self.hide(0.0)
        return self.scores


class _Sequence:
    """One sequence's queries, keys and values, laid out for gathers.

    Attributes:
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
        self.dtype, self.tile, self.block_size = accumulate_dtype(q.dtype), tile, block_size
        self.batch, self.first = rows[0][0], rows[0][1]
        self.queries = slice(rows[0][1], rows[-1][2])
        self.slots = slice(rows[0][4], rows[0][5])
        self.length = self.slots.stop - self.slots.start
        self.num_heads, self.num_kv_heads = q.shape[1], k.shape[1]
        self.count = -(-self.length // block_size)
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

    def batches(self) -> Iterator[_Batch]:
        """All problems, those with like counts of blocks together."""
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
            end = min(len(sizes), at + self._most(sizes[at]))
            end = min(end, at + self._most(sizes[end - 1]))  # the longest list counts
            blocks = self._lists(self.chosen[order[at:end]], sizes[at:end])
            padded = sizes[at] < sizes[end - 1]
            yield _Batch(row[at:end], position[at:end], kv_head[at:end], blocks, padded)
            at = end

    def _most(self, blocks: int) -> int:
        """Problems with lists of so many blocks that fit the budget of scores."""
        keys = min(blocks * self.block_size, _PIECE_KEYS)
        return max(1, _budget(_SCORE_BUDGET, self.q) // (self.tile * keys))

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

    def pieces(self, batch: _Batch) -> Iterator[_Piece]:
        """Cuts lists in pieces, the last first: it holds a key for every row."""
        own = max(1, self.tile // self.block_size)
        most = max(own, _PIECE_KEYS // self.block_size)
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
                key = (blocks[:, -own:, None] * self.block_size + inside).flatten(1)
                later = key[:, None, :] > batch.position[:, :, None]
            if batch.padded and bool((blocks < 0).any()):
                none = (blocks < 0).repeat_interleave(self.block_size, 1)[:, None]
            piece = _Piece(index, keys, values, scores, later, none)
            piece.hide(-torch.inf)
            yield piece

    def take(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        """`x (HK * NB, B * D)` at `index (P, n)`, `(P, n B, D)`, in the memory `name`."""
        gathered = self.room(name, (index.numel(), x.shape[1]))
        torch.index_select(x, 0, index.flatten(), out=gathered)
        return gathered.view(len(index), index.shape[1] * self.block_size, -1)

    def room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory `name` that every piece uses anew: fresh pages are dear."""
        size = math.prod(shape)
        if name not in self.space or self.space[name].numel() < size:
            self.space[name] = self.q.new_empty(size)
        return self.space[name][:size].view(shape)

    @staticmethod
    def gather(x: Tensor, row: Tensor) -> Tensor:
        """`x (H * M + 1, D)` at `row (P, T)`, `(P, T, D)`."""
        return x.index_select(0, row.flatten()).view(*row.shape, -1)


def _each_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    sequences: Sequences,
    block_size: int,
    tile: int,
    scale: float,
) -> Iterator[_Sequence]:
    for numbers, rows in sequence_tiles(sequences, q, tile):
        blocks = -(-(rows[0][5] - rows[0][4]) // block_size)
        chosen = unpack_blocks(block_mask[:, numbers], blocks)
        yield _Sequence(q, k, v, chosen, rows, tile, block_size, scale)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    sequences: Sequences,
    *,
    block_size: int,
    tile: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over chosen blocks: `out (batch, q_len, H, Dv)`, `lse (batch, H, q_len)` in fp32 (fp64).

    Args:
        q: `(batch, H, q_len, D)`. k: `(batch, HK, kv_len, D)`. v: `(batch, HK, kv_len, Dv)`.
        block_mask: see `moba_hf.op.shared`.
    """
    batch, num_heads, q_len, _ = q.shape
    out = q.new_zeros(batch, q_len, num_heads, v.shape[3])
    dtype = accumulate_dtype(q.dtype)
    lse = torch.full((batch, num_heads, q_len), -torch.inf, dtype=dtype, device=q.device)
    with full_precision(q.device):
        for seq in _each_sequence(q, k, v, block_mask, sequences, block_size, tile, softmax_scale):
            outs = seq.q.new_empty(len(seq.q), v.shape[3])
            lses = seq.q.new_empty(len(seq.q))
            for problems in seq.batches():
                part, part_lse = _attend_batch(seq, problems)
                outs.index_copy_(0, problems.row.flatten(), part.flatten(0, 1))
                lses.index_copy_(0, problems.row.flatten(), part_lse.flatten())
            at = seq.batch, seq.queries
            out[at] = outs[:-1].unflatten(0, (num_heads, -1)).transpose(0, 1).to(out.dtype)
            lse[seq.batch, :, seq.queries] = lses[:-1].unflatten(0, (num_heads, -1))
    return out, lse


def _attend_batch(seq: _Sequence, problems: _Batch) -> tuple[Tensor, Tensor]:
    """Outputs `(P, T, Dv)` and log denominators `(P, T)`."""
    so_far: tuple[Tensor, Tensor, Tensor] | None = None
    for piece in seq.pieces(problems):
        top = piece.scores.amax(2, keepdim=True)
        if so_far is not None:
            top = torch.maximum(top, so_far[0])
        weights = piece.weights(top)
        mass, part = weights.sum(2, keepdim=True), torch.bmm(weights, piece.values)
        if so_far is not None:
            high, total, out = so_far
            shrink = torch.exp(high - top)
            mass, part = mass + total * shrink, part + out * shrink
        so_far = (top, mass, part)
    assert so_far is not None
    high, total, out = so_far
    return out.div_(total), (high + total.log())[:, :, 0]


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    saved: Attended,
    sequences: Sequences,
    *,
    block_size: int,
    tile: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v with the choice held fixed, from `lse`; shapes as in `attend`."""
    q, k, v, out, lse, block_mask = saved
    dtype = accumulate_dtype(q.dtype)
    grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (k, v))
    with full_precision(q.device):
        delta = (grad_out.to(dtype) * out.to(dtype)).sum(3).transpose(1, 2) - grad_lse.to(dtype)
        for seq in _each_sequence(q, k, v, block_mask, sequences, block_size, tile, softmax_scale):
            d_out = seq.flat(grad_out[seq.batch, seq.queries].transpose(0, 1))
            d_row = seq.flat(delta[seq.batch, :, seq.queries, None])
            lse_row = seq.with_none(lse[seq.batch, :, seq.queries].reshape(-1, 1), fill=torch.inf)
            d_q, d_keys, d_values = (torch.zeros_like(x) for x in (seq.q, seq.keys, seq.values))
            for problems in seq.batches():
                d_tile, d_sum, log = (seq.gather(x, problems.row) for x in (d_out, d_row, lse_row))
                queries = seq.gather(seq.q, problems.row)
                part = torch.zeros_like(queries)
                for piece in seq.pieces(problems):
                    weights = piece.weights(log)
                    d_scores = torch.bmm(d_tile, piece.values.transpose(1, 2)).sub_(d_sum).mul_(weights)
                    part.baddbmm_(d_scores, piece.keys)
                    _add_blocks(d_keys, piece.index, torch.bmm(d_scores.transpose(1, 2), queries))
                    _add_blocks(d_values, piece.index, torch.bmm(weights.transpose(1, 2), d_tile))
                d_q.index_copy_(0, problems.row.flatten(), part.flatten(0, 1))
            d_q = (d_q[:-1] * softmax_scale).unflatten(0, (q.shape[1], -1))
            grad_q[seq.batch, :, seq.queries] = d_q.to(q.dtype)
            for total, grad in ((grad_k, d_keys), (grad_v, d_values)):
                blocks = grad.view(seq.num_kv_heads, seq.count * block_size, -1)
                total[seq.batch, :, seq.slots] += blocks[:, : seq.length]
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _add_blocks(total: Tensor, index: Tensor, grad: Tensor) -> None:
    """Adds `grad (P, n B, D)` to rows `index (P, n)` of `total (HK * NB, B * D)`, in a fixed order."""
    rows = grad.reshape(index.numel(), -1)
    if total.device.type == "cpu":
        total.index_add_(0, index.flatten(), rows)
    else:  # index_add_ is not deterministic on GPUs
        total.index_put_((index.flatten(),), rows, accumulate=True)
