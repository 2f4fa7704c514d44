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
from dataclasses import replace

import torch
from torch import Tensor

from moba_hf.op.gates import PairedMassSummary
from moba_hf.op.numerics import accumulate_dtype, all_finite, full_precision, masked_product, part_size
from moba_hf.op.sequences import Sequences
from moba_hf.op.shared import SharedRule, mask_words, num_tiles, pack_blocks, sequence_tiles
from moba_hf.op.shared_problems import (
    Problems,
    Scratch,
    SequenceBlocks,
    budget,
    each_sequence,
    needs_shift,
)

# Elements that the terms of the masses of one step may hold for each thread, and masses of a run of tiles.
_TERM_BUDGET = 1 << 19
_MASS_BUDGET = 1 << 20


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
            gate = PairedMassSummary(
                k[batch, :, k_begin:k_end], rule.block_size, softmax_scale, rule.rotary_pairs
            )
            step = max(1, budget(_MASS_BUDGET, q) // (q.shape[1] * -(-(k_end - k_begin) // rule.block_size)))
            scratch = Scratch(gate.mean)
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                chosen = _choose_tiles(q[batch], gate, part, rule, scratch)
                place = slice(numbers.start + start, numbers.start + start + len(part))
                result[:, place] = pack_blocks(chosen, words)
    return result


def mass_step(q: Tensor, kept: Tensor, rule: SharedRule) -> int:
    """Number of queries per row whose masses over `kept (batch, HK, C, width)` fit the budget."""
    parts = rule.block_size // part_size(rule.block_size)
    return max(1, budget(_TERM_BUDGET, q) // (q.shape[1] * max(1, kept.shape[2]) * (parts + 1)))


def _choose_tiles(
    q: Tensor, gate: PairedMassSummary, rows: list[list[int]], rule: SharedRule, scratch: Scratch
) -> Tensor:
    """Blocks that a run of tiles attends to, bool `(H, tiles, blocks up to the last)`; q: `(H, q_len, D)`."""
    device = q.device
    table = torch.tensor(rows, device=device)
    begin, count = table[:, 3], table[:, 2] - table[:, 1]
    start = begin // rule.tile * rule.tile
    candidates = start // rule.block_size
    last = (begin + count - 1) // rule.block_size + 1
    block = torch.arange(int(last[-1]), device=device)
    own = (block >= candidates[:, None]) & (block < last[:, None])
    earlier = block < candidates[:, None]
    first = sum(row[3] // rule.tile * rule.tile < rule.dense_below for row in rows)  # number of dense tiles
    columns = int(candidates[-1])
    if columns == 0 or first == len(rows):
        return (own | earlier).expand(q.shape[0], -1, -1)
    sampled, speaks = _sampled_rows(begin[first:], count[first:], rule.sample)
    at = table[first:, 1, None] + sampled - begin[first:, None]  # (tiles, groups), queries of the batch row
    mass = _tile_masses(q, gate, at, speaks, candidates[first:], scratch)
    taken = take_candidates(mass, candidates[first:], rule)
    taken = torch.nn.functional.pad(taken, (0, len(block) - columns))
    return torch.cat([earlier[:first].expand(len(q), -1, -1), taken], 1) | own


def _tile_masses(
    q: Tensor, gate: PairedMassSummary, at: Tensor, speaks: Tensor, candidates: Tensor, scratch: Scratch
) -> Tensor:
    """The masses of the candidates of a run of tiles, `(H, tiles, candidates of the last)`, 0 for others.

    Args:
        q: `(H, q_len, D)`.
        at: `(tiles, S)`, the sampled rows of `q`.
        speaks: bool `(tiles, S)`, which of them exist.
        candidates: `(tiles,)`, the number of candidates of each tile, rising.
    """
    heads, (tiles, groups), parts = len(q), at.shape, gate.mean.shape[1]
    counts: list[int] = candidates.tolist()
    result = gate.mean.new_zeros(heads, tiles, counts[-1])
    share = (speaks / speaks.sum(1, keepdim=True)).to(result.dtype)
    most = budget(_TERM_BUDGET, q) // (heads * groups * (parts + 1))  # blocks of the tiles of a step
    end = 0
    while end < tiles:
        begin, end = end, end + 1
        while end < tiles and (end + 1 - begin) * counts[end] <= most:
            end += 1
        seen, columns = counts[begin], counts[end - 1]  # all tiles of the step have the first `seen`
        hidden = torch.arange(seen, columns, device=q.device) >= candidates[begin:end, None]
        hidden = hidden[:, None].expand(-1, groups, -1).flatten(0, 1)
        terms = _terms(q[:, at[begin:end].flatten()], gate, hidden, seen, scratch)
        weights = share[begin:end].repeat(heads, 1)[:, None]  # (H * tiles, 1, S)
        means = torch.bmm(weights, terms.view(len(weights), groups, -1))
        result[:, begin:end, :columns] = _sum_terms(means, parts).view(heads, end - begin, columns)
    return result


def row_masses(q: Tensor, gate: PairedMassSummary, hidden: Tensor, seen: int) -> Tensor:
    """The softmax of the scores of `q (H, M, D)` over the first `seen` blocks and later ones not in `hidden`.

    A row without blocks gets zeros. Equals `gate.scores` and a softmax, but needs no logarithm per block.

    Args:
        hidden: bool `(M, further blocks)`.
    """
    terms = _terms(q, gate, hidden, seen, Scratch(gate.mean)).view(*q.shape[:2], -1)
    return _sum_terms(terms, gate.mean.shape[1])


def _sum_terms(terms: Tensor, parts: int) -> Tensor:
    """The sums of the terms `(..., (parts + 1) * columns)` of each block, `(..., columns)`; see `_terms`."""
    columns = terms.shape[-1] // (parts + 1)
    of_parts, of_smallest = terms.split([parts * columns, columns], -1)
    return of_parts.unflatten(-1, (columns, parts)).sum(-1) + of_smallest


def _terms(q: Tensor, gate: PairedMassSummary, hidden: Tensor, seen: int, scratch: Scratch) -> Tensor:
    """The softmax over all terms of `row_masses`, `(HK, H / HK * M, (parts + 1) * blocks)`.

    Terms of the parts come first, block by block, then those of the smallest keys.
    """
    kv_heads, parts = gate.mean.shape[:2]
    columns = seen + hidden.shape[1]
    queries = q.to(gate.mean.dtype).reshape(kv_heads, -1, q.shape[2])
    mean, var = (
        x[:, :, :columns].transpose(1, 2).flatten(1, 2).transpose(1, 2) for x in (gate.mean, gate.var)
    )
    terms = scratch.room("terms", *queries.shape[:2], (parts + 1) * columns)
    of_parts, of_least = terms.split([parts * columns, columns], 2)
    # with r = sqrt(v), f(v) of `moba_hf.op.gates` is m (r - m / 2), where m = min(r, sqrt(2 log n))
    roots = scratch.room("roots", *of_parts.shape)
    torch.bmm(gate.squares(queries), var, out=roots).sqrt_()
    torch.clamp(roots, max=math.sqrt(2 * gate.log_size), out=of_parts)
    of_parts.mul_(roots.sub_(of_parts, alpha=0.5))
    of_parts.baddbmm_(queries, mean)
    torch.bmm(queries, gate.smallest[:, :columns].transpose(1, 2), out=of_least)
    of_least.sub_(gate.log_size)  # instead of adding it to the parts
    if hidden.shape[1]:
        for x in (of_parts, of_least):
            blocks = x.view(*q.shape[:2], columns, -1)
            blocks[:, :, seen:].masked_fill_(hidden[..., None], -torch.inf)
    torch.softmax(terms, 2, out=terms)
    if seen == 0:
        terms.view(*q.shape[:2], -1).masked_fill_(hidden.all(1)[:, None], 0.0)
    return terms


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
            if needs_shift(lses):
                _attend_shifted(seq, outs, lses)
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


def _attend_shifted(seq: SequenceBlocks, outs: Tensor, lses: Tensor) -> None:
    """Repeats `_attend_batch` with a shift where all scores of a row are so low that values underflowed."""
    for problems in seq.batches():
        lse = lses[problems.place]
        if problems.bounded and needs_shift(lse):
            _attend_batch(seq, replace(problems, bounded=False), outs[problems.place], lse)


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
