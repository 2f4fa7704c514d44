"""MoBA for a few queries per row: chooses blocks from cached summaries and gathers only the chosen keys.

Legend: H query heads, HK kv heads, D head dim, M queries per row, B block size, K topk, C block columns.

One batch row is one sequence; row r of `table` describes batch row r (see `moba_hf.op.sequences`).
1. choose: scores of the blocks `(H, M, C)` from cached summaries; an integer sort key per block, in the order
   of the rule (own and kept blocks first, ties to the lower index); top-k of these sort keys.
2. gather: keys and values of the chosen blocks, `(H, M, K * B)` slots.
3. attend: one softmax over them, in fp32 (fp64).
All of this is tensor arithmetic, and shapes do not depend on values. So nothing waits for the device, and it
works inside CUDA graphs. Results equal those of `portable` up to rounding; the choice differs only in
near-ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_hf.op.gates import GATES
from moba_hf.op.layer_rule import LayerConfig
from moba_hf.op.numerics import accumulate_dtype, full_precision

# Most queries per row for which this path is used.
MAX_QUERIES = 16
# Number of gathered key elements at a time. Small on CPUs, where page faults cost more than the computation.
_GATHER_BUDGET, _GATHER_BUDGET_GPU = 1 << 18, 1 << 26
_LAST = torch.iinfo(torch.int64).max


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_means: Tensor,
    table: Tensor,
    rule: LayerConfig,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """`out (batch, M, H, Dv)` and `lse (batch, H, M)` in fp32 (fp64) of one sequence per batch row.

    Args:
        q: `(batch, H, M, D)`, any strides.
        k: `(batch, HK, N, D)`, any strides.
        v: `(batch, HK, N, Dv)`, any strides.
        block_means: `(batch, HK, C, width)`, the summaries of complete blocks for the rule's gate
            (`gates.Kept`), usually means with `width = D`; entries after the complete blocks are not read.
        table: int32 `(batch, 5)`, one sequence per batch row, in order.
    """
    position = positions(table, q.shape[2])
    with full_precision(q.device):
        kept = block_means[:, :, : k.shape[2] // rule.block_size]
        choice = choose(q, kept, position, rule, softmax_scale)
        return attend_blocks(q, k, v, choice, position, table, rule.block_size, softmax_scale)


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    choice: Tensor,
    position: Tensor,
    table: Tensor,
    block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over chosen blocks, a few heads and queries at a time; returns the same as `decode`.

    Args:
        choice: int64 `(batch, H, M, n)`, blocks of each query, -1 for none.
        position: `(batch, M)`, -1 for padding.
        table: see `decode`.
    """
    batch, num_heads, length, dim = q.shape
    dtype = accumulate_dtype(q.dtype)
    out = q.new_empty(batch, length, num_heads, v.shape[3])
    lse = torch.empty(batch, num_heads, length, dtype=dtype, device=q.device)
    kv_head = torch.arange(num_heads, device=q.device) // (num_heads // k.shape[1])
    budget = _GATHER_BUDGET if q.device.type == "cpu" else _GATHER_BUDGET_GPU
    size = min(block_size, k.shape[2])  # if a block is longer than the cache, there is only one
    pairs = max(1, budget // max(1, batch * choice.shape[3] * size * max(dim, v.shape[3])))
    step = min(pairs, num_heads)
    for m in range(0, length, max(1, pairs // num_heads)):
        part = slice(m, m + max(1, pairs // num_heads))
        for h in range(0, num_heads, step):
            some = slice(h, h + step)
            blocks = choice[:, some, part]
            if q.device.type == "cpu" and blocks.numel():
                blocks = blocks[..., : max(1, int((blocks >= 0).sum(3).max()))]
            out[:, part, some], lse[:, some, part] = _attend(
                q[:, some, part],
                k,
                v,
                kv_head[some],
                blocks,
                position[:, part],
                table[:, 3],
                size,
                softmax_scale,
            )
    return out, lse


def positions(table: Tensor, length: int) -> Tensor:
    """Position of each query in its sequence, int64 `(batch, M)`; -1 for padding."""
    _, q_begin, q_end, k_begin, k_end = table.long().unbind(1)
    query = torch.arange(length, device=table.device)
    position = query + (k_end - k_begin - q_end)[:, None]
    real = (query >= q_begin[:, None]) & (query < q_end[:, None])
    return position.masked_fill(~real, -1)


def choose(
    q: Tensor, block_means: Tensor, position: Tensor, rule: LayerConfig, softmax_scale: float = 1.0
) -> Tensor:
    """Chosen blocks int64 `(batch, H, M, min(topk, C + 1))`: own, forced, best first; -1 for none.

    Args:
        q: `(batch, H, M, D)`.
        block_means: `(batch, HK, C, width)`.
        position: `(batch, M)`, -1 for padding.
        softmax_scale: for gates that use it.
    """
    complete, gate = block_means.shape[2], GATES[rule.gate]
    scores = q.new_empty((*q.shape[:3], complete), dtype=accumulate_dtype(q.dtype))
    for row, kept in enumerate(block_means):
        summary = gate.summary_of(kept, q.shape[3], rule.block_size, softmax_scale, rule.rotary_pairs)
        scores[row] = summary.scores(q[row], complete)
    column = torch.arange(complete + 1, device=q.device)
    own = (position // rule.block_size).masked_fill(position < 0, -1)[:, None, :, None]
    forced = rule.forces(column, own)
    rank = torch.nn.functional.pad(_ranks(scores), (0, 1))
    rank = torch.where(forced, _LAST - 1 - column, rank)
    rank = torch.where(column == own, _LAST, rank).masked_fill(column > own, -1)
    best = rank.topk(min(rule.topk, complete + 1), dim=3)
    return best.indices.masked_fill(best.values < 0, -1)


def _ranks(scores: Tensor) -> Tensor:
    """Distinct int64 keys in `[0, 2^63)` that order the last dim: higher scores first, ties to lower indices.

    The bits of an fp32 score, mapped to an integer of the same order, form the upper bits and the index the
    lower bits. fp64 scores leave no bits for the index, so they are sorted.
    """
    index = torch.arange(scores.shape[-1], device=scores.device)
    if scores.dtype == torch.float64:
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        return torch.empty_like(order).scatter_(-1, order, (scores.shape[-1] - index).expand_as(order))
    # NaN ranks highest, whatever its sign bit; adding 0.0 makes -0.0 equal to 0.0
    bits = (scores + 0.0).view(torch.int32).masked_fill(scores.isnan(), torch.iinfo(torch.int32).max)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() + (1 << 31)
    return (ordered << 31) - index + (1 << 30)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_head: Tensor,
    choice: Tensor,
    position: Tensor,
    start: Tensor,
    block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of `q (batch, H, m, D)` over the blocks `choice (batch, H, m, K)`; padding gives zeros."""
    dtype, device = accumulate_dtype(q.dtype), q.device
    inside = choice[..., None] * block_size + torch.arange(block_size, device=device)
    valid = (choice[..., None] >= 0) & (inside <= position[:, None, :, None, None])
    # masked entries read the query's own slot instead, because slots after the queries may contain NaN
    inside = torch.where(valid, inside, position[:, None, :, None, None]).clamp(min=0)
    slot = (inside + start[:, None, None, None, None]).clamp(max=k.shape[2] - 1).flatten(3)
    keys = _gather(k, kv_head, slot).to(dtype)
    scores = torch.matmul(q.to(dtype)[..., None, :], keys.transpose(3, 4)).squeeze(3) * softmax_scale
    scores = scores.masked_fill(~valid.flatten(3), -torch.inf)
    high = scores.amax(3, keepdim=True).clamp(min=torch.finfo(dtype).min)
    weights = torch.exp(scores - high)
    total = weights.sum(3)
    out = (
        torch.matmul(weights[:, :, :, None], _gather(v, kv_head, slot).to(dtype)).squeeze(3)
        / total[..., None]
    )
    out = out.masked_fill((position < 0)[:, None, :, None], 0.0)
    return out.transpose(1, 2).to(q.dtype), high.squeeze(3) + total.log()


def _gather(x: Tensor, kv_head: Tensor, slot: Tensor) -> Tensor:
    """Gathers `x (batch, HK, N, D)` at `slot (batch, H, m, S)` and `kv_head (H,)`: `(batch, H, m, S, D)`.

    If the batch and head strides are multiples of the slot stride, as in a cache, it selects rows of the flat
    storage. On CPUs this is several times as fast as indexing with three tensors.
    """
    batch = slot.shape[0]
    rows = torch.arange(batch, device=x.device)[:, None, None, None]
    heads = kv_head[:, None, None]
    unit = x.stride(2)
    if x.stride(3) != 1 or unit < x.shape[3] or x.stride(0) % unit or x.stride(1) % unit:
        return x[rows, heads, slot]
    row_step, head_step = x.stride(0) // unit, x.stride(1) // unit
    count = (batch - 1) * row_step + (x.shape[1] - 1) * head_step + x.shape[2]
    flat = x.as_strided((count, x.shape[3]), (unit, 1))
    index = rows * row_step + heads * head_step + slot
    return flat.index_select(0, index.flatten()).view(*slot.shape, x.shape[3])
