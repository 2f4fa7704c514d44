"""The shared choice of blocks in pure torch on any device: block-sparse, differentiable, bounded memory.

Legend: H query heads, HK kv heads, D head dim, B block size, T tile, M queries and N keys of a sequence.

For each sequence:
1. select: masses of the candidates for the sampled rows of a run of tiles, then what each tile takes.
2. attend: the problems of `shared_problems`, a piece of their lists at a time; partial results are merged.
Sums are taken in fp32 (fp64 for fp64 inputs). Reading the tile table waits for the device, so this path is
for CPUs, MPS and GPUs without a kernel. The backward is in `shared_portable_backward`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moba_hf.op import shared_cpu
from moba_hf.op.gates import PairedMassSummary
from moba_hf.op.numerics import accumulate_dtype, all_finite, full_precision, masked_product, part_size
from moba_hf.op.sequences import Sequences
from moba_hf.op.shared import SharedRule, mask_words, num_tiles, pack_blocks, sequence_tiles
from moba_hf.op.shared_problems import Problems, SequenceBlocks, budget, each_sequence, shifted_exp

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
        q: `(batch, H, q_len, D)`. k: `(batch, HK, kv_len, D)`.
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
            step = max(1, budget(_MASS_BUDGET, q) // terms)
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                chosen = _choose_tiles(q[batch], gate, part, rule)
                place = slice(numbers.start + start, numbers.start + start + len(part))
                result[:, place] = pack_blocks(chosen, words)
    return result


def mass_step(q: Tensor, kept: Tensor, rule: SharedRule) -> int:
    """Queries per row whose masses fit the budget, over blocks `kept (batch, HK, C, width)`."""
    parts = rule.block_size // part_size(rule.block_size)
    return max(1, budget(_MASS_BUDGET, q) // (q.shape[1] * max(1, kept.shape[2]) * (parts + 1)))


def _choose_tiles(q: Tensor, gate: PairedMassSummary, rows: list[list[int]], rule: SharedRule) -> Tensor:
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
    seen = int(candidates[0])  # all rows see so many
    hidden = ~earlier[:, None, seen:columns].expand(-1, at.shape[1], -1)
    masses = row_masses(q[:, at.flatten()], gate, hidden.flatten(0, 1), seen).unflatten(1, at.shape)
    if not speaks.all():
        masses *= speaks[:, :, None]
    mass = masses.sum(2).div_(speaks.sum(1)[:, None])
    taken = take_candidates(mass, candidates, rule)
    taken = torch.nn.functional.pad(taken, (0, len(block) - columns))
    return torch.where(dense, earlier, taken) | own


def row_masses(q: Tensor, gate: PairedMassSummary, hidden: Tensor, seen: int) -> Tensor:
    """The softmax of the scores of `q (H, M, D)` over `seen` blocks and those after that are not `hidden`.

    A row without blocks gets zeros. The same as `gate.scores` and a softmax, without a logarithm per block.

    Args:
        hidden: bool `(M, further blocks)`.
    """
    kv_heads, columns = gate.mean.shape[0], seen + hidden.shape[1]
    queries = q.to(gate.mean.dtype).reshape(kv_heads, 1, -1, q.shape[2])
    spread = gate.squares(queries) @ gate.var[:, :, :columns].transpose(2, 3)
    # f(v) of `moba_hf.op.gates` is m (2 r - m), with r = sqrt(v / 2) and m = min(r, sqrt(log n))
    root = spread.mul_(0.5).sqrt_()
    least = root.clamp(max=math.sqrt(gate.log_size))
    terms = queries @ gate.centers[:, :, :columns].transpose(2, 3)  # of parts, then of the smallest key
    terms[:, :-1] += root.mul_(2).sub_(least).mul_(least).add_(gate.log_size)
    terms = terms.view(kv_heads, terms.shape[1], -1, hidden.shape[0], columns)
    terms[..., seen:].masked_fill_(hidden, -torch.inf)
    high = terms.amax((1, 4), keepdim=True).clamp_(min=torch.finfo(terms.dtype).min)
    mass = shifted_exp(terms, high).sum(1)
    mass[..., seen:].masked_fill_(hidden, 0.0)
    return mass.div_(mass.sum(3, keepdim=True).clamp_(min=torch.finfo(mass.dtype).tiny)).flatten(0, 1)


def _sampled_rows(begin: Tensor, count: Tensor, sample: int) -> tuple[Tensor, Tensor]:
    """Positions `(tiles, groups)` of the rows that speak for tiles, and which of these there are."""
    end = begin + count
    first = begin // sample
    groups = (end - 1) // sample + 1 - first
    number = torch.arange(int(groups.max()), device=begin.device)
    rows = torch.minimum((first[:, None] + number + 1) * sample, end[:, None]) - 1
    return rows, number < groups[:, None]


def take_candidates(mass: Tensor, candidates: Tensor, rule: SharedRule) -> Tensor:
    """Candidates that tiles attend, bool `(H, tiles, columns)`, from their masses of the same shape."""
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
        q: `(batch, H, q_len, D)`. k: `(batch, HK, kv_len, D)`. v: `(batch, HK, kv_len, Dv)`.
        block_mask: see `moba_hf.op.shared`.
    """
    batch, num_heads, q_len, _ = q.shape
    out = q.new_zeros(batch, q_len, num_heads, v.shape[3])
    dtype, fast = accumulate_dtype(q.dtype), shared_cpu.fused(q, v)
    lse = torch.full((batch, num_heads, q_len), -torch.inf, dtype=dtype, device=q.device)
    with full_precision(q.device):
        for seq in each_sequence(q, k, v, block_mask, sequences, block_size, tile, softmax_scale):
            outs = seq.q.new_empty(len(seq.q), v.shape[3])
            lses = seq.q.new_empty(len(seq.q))
            for problems in seq.batches(alike=fast):
                part, part_lse = (shared_cpu.attend_batch if fast else _attend_batch)(seq, problems)
                if not all_finite(part):  # a weight of 0 may have met a NaN
                    part, part_lse = _attend_batch(seq, problems, finite=False)
                outs.index_copy_(0, problems.row.flatten(), part.flatten(0, 1))
                lses.index_copy_(0, problems.row.flatten(), part_lse.flatten())
            at = seq.batch, seq.queries
            out[at] = outs[:-1].unflatten(0, (num_heads, -1)).transpose(0, 1).to(out.dtype)
            lse[seq.batch, :, seq.queries] = lses[:-1].unflatten(0, (num_heads, -1))
    return out, lse


def _attend_batch(seq: SequenceBlocks, problems: Problems, *, finite: bool = True) -> tuple[Tensor, Tensor]:
    """Outputs `(P, T, Dv)` and log denominators `(P, T)`.

    Args:
        finite: there is nothing but finite numbers, so that a weight of 0 hides a value.
    """
    lowest = torch.finfo(seq.dtype).min
    so_far: tuple[Tensor, Tensor, Tensor] | None = None
    for piece in seq.pieces(problems):
        top = piece.scores.amax(2, keepdim=True).clamp_(min=lowest)  # all may be -inf
        if so_far is not None:
            top = torch.maximum(top, so_far[0])
        weights = piece.weights(top)
        part = masked_product(weights, piece.values, None if finite else piece.hidden())
        mass = weights.sum(2, keepdim=True)
        if so_far is not None:
            high, total, out = so_far
            shrink = torch.exp(high - top)
            mass, part = mass + total * shrink, part + out * shrink
        so_far = (top, mass, part)
    assert so_far is not None
    high, total, out = so_far
    nothing = high == lowest
    lse = (high + total.log()).masked_fill_(nothing, -torch.inf)
    return out.div_(total.masked_fill_(nothing, torch.nan)), lse[:, :, 0]
