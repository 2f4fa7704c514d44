"""The shared choice of blocks in pure torch on any device: block-sparse, differentiable, bounded memory.

Legend: H query heads, HK kv heads, D head dim, B block size, T tile, M queries and N keys of a sequence.

For each sequence:
1. select: masses of the candidates for the sampled rows of a run of tiles, then the blocks of each tile.
2. attend: the problems of `shared_problems`, one piece of their lists at a time; partial results are merged.
Sums are in fp32 (fp64 for fp64 inputs). Reading the tile table waits for the device, so this path is for
CPUs, MPS and GPUs without a kernel. The backward is in `shared_portable_backward`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moba_hf.op.gates import PairedMassSummary
from moba_hf.op.numerics import accumulate_dtype, all_finite, full_precision, masked_product, part_size
from moba_hf.op.sequences import Sequences
from moba_hf.op.shared import SharedRule, mask_words, num_tiles, pack_blocks, sequence_tiles
from moba_hf.op.shared_problems import Problems, Scratch, SequenceBlocks, budget, each_sequence

_MASS_BUDGET = 1 << 20  # elements that the terms of the masses of one step may hold, on a CPU


def select(
    q: Tensor,
    k: Tensor,
    sequences: Sequences,
    rule: SharedRule,
    softmax_scale: float,
) -> Tensor:
    """The choice of every tile, `block_mask` int32 `(H, num_tiles, words)`; see `moba_hf.op.shared`.

    Args:
        q: `(batch, H, q_len, D)`.
        k: `(batch, HK, kv_len, D)`.
    """
    words = mask_words(sequences.max_seqlen_k, rule.block_size)
    shape = (q.shape[1], num_tiles(sequences, q, rule.tile), words)
    result = torch.zeros(shape, dtype=torch.int32, device=q.device)
    with full_precision(q.device):
        for numbers, rows in sequence_tiles(sequences, q, rule.tile):
            batch, _, _, _, k_begin, k_end = rows[0]
            blocks = -(-(k_end - k_begin) // rule.block_size)
            gate = PairedMassSummary(
                k[batch, :, k_begin:k_end], rule.block_size, softmax_scale, rule.rotary_pairs
            )
            terms = q.shape[1] * (rule.tile // rule.sample) * blocks * gate.mean.shape[1]
            step, scratch = max(1, budget(_MASS_BUDGET, q) // terms), Scratch(gate.mean)
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                chosen = _choose_tiles(q[batch], gate, part, rule, scratch)
                place = slice(numbers.start + start, numbers.start + start + len(part))
                result[:, place] = pack_blocks(chosen, words)
    return result


def mass_step(q: Tensor, kept: Tensor, rule: SharedRule) -> int:
    """Number of queries per row whose masses over `kept (batch, HK, C, width)` fit the budget."""
    parts = rule.block_size // part_size(rule.block_size)
    return max(1, budget(_MASS_BUDGET, q) // (q.shape[1] * max(1, kept.shape[2]) * (parts + 1)))


def _choose_tiles(
    q: Tensor, gate: PairedMassSummary, rows: list[list[int]], rule: SharedRule, scratch: Scratch
) -> Tensor:
    """Blocks that a run of tiles attends to, bool `(H, tiles, blocks up to the last)`; q: `(H, q_len, D)`."""
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
    seen = int(candidates[0])  # number of candidates of all tiles
    hidden = ~earlier[:, None, seen:columns].expand(-1, at.shape[1], -1)
    weights = _term_weights(q[:, at.flatten()], gate, hidden.flatten(0, 1), seen, scratch)
    weights = weights.unflatten(1, at.shape)
    if not speaks.all():
        weights *= speaks[:, :, None, None]
    mass = weights.sum((2, 3)).div_(speaks.sum(1)[:, None])
    taken = take_candidates(mass, candidates, rule)
    taken = torch.nn.functional.pad(taken, (0, len(block) - columns))
    return torch.where(dense, earlier, taken) | own


def row_masses(q: Tensor, gate: PairedMassSummary, hidden: Tensor, seen: int) -> Tensor:
    """The softmax of the scores of `q (H, M, D)` over the first `seen` blocks and later ones not in `hidden`.

    A row without blocks gets zeros. Equals `gate.scores` and a softmax, but needs no logarithm per block.

    Args:
        hidden: bool `(M, further blocks)`.
    """
    return _term_weights(q, gate, hidden, seen, Scratch(gate.mean)).sum(2)


def _term_weights(q: Tensor, gate: PairedMassSummary, hidden: Tensor, seen: int, scratch: Scratch) -> Tensor:
    """The terms of `row_masses` of each part and smallest key of blocks: `(H, M, parts + 1, blocks)`."""
    kv_heads, parts = gate.mean.shape[:2]
    columns = seen + hidden.shape[1]
    queries = q.to(gate.mean.dtype).reshape(kv_heads, -1, q.shape[2])
    rows = queries.shape[1]
    # f(v) of `moba_hf.op.gates` is m (2 r - m), with r = sqrt(v / 2) and m = min(r, sqrt(log n))
    var = gate.var[:, :, :columns].flatten(1, 2).mul(2).transpose(1, 2)
    twice_r = scratch.room("roots", kv_heads, rows, parts * columns)
    torch.bmm(gate.squares(queries), var, out=twice_r).sqrt_()
    twice_m = scratch.room("least", kv_heads, rows, parts * columns)
    torch.clamp(twice_r, max=2 * math.sqrt(gate.log_size), out=twice_m)
    terms = scratch.room("terms", kv_heads, rows, (parts + 1) * columns)
    torch.bmm(queries, gate.centers[:, :, :columns].flatten(1, 2).transpose(1, 2), out=terms)
    terms[..., : parts * columns].addcmul_(twice_r.sub_(twice_m, alpha=0.5), twice_m, value=0.5)
    terms[..., parts * columns :].sub_(gate.log_size)  # instead of adding it to the parts
    split = terms.view(q.shape[0], q.shape[1], parts + 1, columns)
    split[..., seen:].masked_fill_(hidden[:, None], -torch.inf)
    torch.softmax(terms, 2, out=terms)
    if seen == 0:
        split.masked_fill_(hidden.all(1)[:, None, None], 0.0)
    return split


def _sampled_rows(begin: Tensor, count: Tensor, sample: int) -> tuple[Tensor, Tensor]:
    """Positions `(tiles, groups)` of the sampled rows of tiles, and which of them exist."""
    end = begin + count
    first = begin // sample
    groups = (end - 1) // sample + 1 - first
    number = torch.arange(int(groups.max()), device=begin.device)
    rows = torch.minimum((first[:, None] + number + 1) * sample, end[:, None]) - 1
    return rows, number < groups[:, None]


def take_candidates(mass: Tensor, candidates: Tensor, rule: SharedRule) -> Tensor:
    """Candidates that tiles attend to, bool `(H, tiles, columns)`, from masses of the same shape."""
    block = torch.arange(mass.shape[2], device=mass.device)
    earlier = block < candidates[:, None]
    forced = earlier & ((block < rule.sink_blocks) | (block >= (candidates - rule.local_blocks)[:, None]))
    wanted = earlier & ~forced
    if rule.threshold is not None:
        wanted = wanted & ~(mass < rule.threshold * mass.amax(2, keepdim=True))  # NaN drops no block
    if rule.share is not None:
        value, index = mass.sort(dim=2, descending=True, stable=True)
        before = value.cumsum(2) - value
        wanted = wanted & torch.zeros_like(wanted.expand_as(mass)).scatter_(2, index, ~(before >= rule.share))
    if rule.topk is not None:
        left = rule.topk - rule.own_blocks - forced.sum(1)
        order = mass.masked_fill(~wanted, -1.0).sort(dim=2, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(2, order, block.expand_as(order))
        wanted = wanted & (rank < left[:, None])
    return (wanted | forced).expand_as(mass)


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
        q: `(batch, H, q_len, D)`.
        k: `(batch, HK, kv_len, D)`.
        v: `(batch, HK, kv_len, Dv)`.
        block_mask: see `moba_hf.op.shared`.
    """
    batch, num_heads, q_len, _ = q.shape
    out = q.new_zeros(batch, q_len, num_heads, v.shape[3])
    dtype = accumulate_dtype(q.dtype)
    lse = torch.full((batch, num_heads, q_len), -torch.inf, dtype=dtype, device=q.device)
    with full_precision(q.device):
        for seq in each_sequence(q, k, v, block_mask, sequences, block_size, tile, softmax_scale):
            outs = seq.q.new_empty(len(seq.order), seq.tile, v.shape[3])
            lses = seq.q.new_empty(len(seq.order), seq.tile)
            for problems in seq.batches():
                _attend_batch(seq, problems, outs[problems.place], lses[problems.place])
            if not all_finite(outs):  # a weight of 0 may have been multiplied by a NaN
                for problems in seq.batches():
                    part = outs[problems.place]
                    if not all_finite(part):
                        _attend_not_finite(seq, problems, part, lses[problems.place])
            place = seq.places()
            rows = out[seq.batch, seq.queries].flatten(0, 1)
            _take(outs.flatten(0, 1), place.t().flatten(), rows)
            lse[seq.batch, :, seq.queries] = lses.flatten()[place]
    return out, lse


def _take(x: Tensor, index: Tensor, out: Tensor) -> None:
    """Writes the rows `index` of `x` to `out`, rounded to its dtype."""
    if x.dtype == out.dtype:
        torch.index_select(x, 0, index, out=out)
    else:
        out.copy_(x.index_select(0, index))


def _attend_batch(seq: SequenceBlocks, problems: Problems, out: Tensor, lse: Tensor) -> None:
    """Writes the outputs `(P, T, Dv)` and the logarithms of the denominators `(P, T)`."""
    top, mass = None, lse  # the largest scores so far, and the sums of weights
    for number, piece in enumerate(seq.pieces(problems)):
        if not problems.bounded:
            piece.hide(-torch.inf)
            high = piece.scores.amax(2, keepdim=True)
            if top is not None:
                high = torch.maximum(high, top)
                shrink = (top - high).exp_()
                out.mul_(shrink)
                mass.mul_(shrink[..., 0])
            top = high
        weights = piece.weights(top)
        if number == 0:
            torch.bmm(weights, piece.values, out=out)
            torch.sum(weights, 2, out=mass)
        else:
            out.baddbmm_(weights, piece.values)
            mass += weights.sum(2)
    out.div_(mass[..., None])
    mass.log_()
    if top is not None:
        lse += top[..., 0]


def _attend_not_finite(seq: SequenceBlocks, problems: Problems, out: Tensor, lse: Tensor) -> None:
    """`_attend_batch` for inputs that are not finite, which must not affect rows that do not see them."""
    out.zero_()
    lse.fill_(-torch.inf)
    for piece in seq.pieces(problems):
        piece.hide(-torch.inf)
        top = piece.scores.amax(2)
        nothing = top == -torch.inf  # every score of the row is -inf
        weights = torch.softmax(piece.scores, 2).masked_fill_(nothing[..., None], 0.0)
        part = masked_product(weights, piece.values, piece.hidden())
        log = (top - weights.amax(2).log_()).masked_fill_(nothing, -torch.inf)
        total = torch.logaddexp(lse, log)
        base = total.clamp(min=torch.finfo(seq.dtype).min)
        out.mul_((lse - base).exp_()[..., None])
        out += part.mul_((log - base).exp_()[..., None])
        lse.copy_(total)
    out.masked_fill_((lse == -torch.inf)[..., None], torch.nan)
