"""The choice of blocks in pure torch on any device: the first step of `portable`.

Legend: as in `portable`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_hf.op.gates import GATES, Summary
from moba_hf.op.layer_rule import LayerConfig
from moba_hf.op.numerics import full_precision
from moba_hf.op.sequences import rows_of

# Maximum number of elements of score matrices on a CPU; see `budget`.
_SCORE_BUDGET = 1 << 24
_DEVICE_FACTOR = 16


def budget(elements: int, x: Tensor) -> int:
    """`elements`, or more if `x` is not on a CPU, where launches dominate instead of page faults."""
    return elements if x.device.type == "cpu" else elements * _DEVICE_FACTOR


def select(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    rule: LayerConfig,
    softmax_scale: float,
    block_means: Tensor | None = None,
) -> Tensor:
    """Chosen blocks, int32 `(batch, q_len, H, topk)`: own first, -1 last; all -1 for padding.

    Args:
        q: `(batch, H, q_len, D)`.
        k: `(batch, HK, kv_len, D)`.
        table: see `moba_hf.op.sequences`.
        rule: how blocks are chosen.
        softmax_scale: for gates that use it.
        block_means: `(batch, HK, >= complete blocks, width)` from a cache, one sequence per row; None:
            computed here.
    """
    batch, num_heads, q_len, _ = q.shape
    gate = GATES[rule.gate]
    result = torch.full((batch, q_len, num_heads, rule.topk), -1, dtype=torch.int32, device=q.device)
    with full_precision(q.device):
        for row, q_begin, q_end, k_begin, k_end in rows_of(table):
            if q_end - q_begin and k_end - k_begin <= rule.block_size:  # one block, so there is no choice
                result[row, q_begin:q_end, :, 0] = 0
                continue
            if q_end == q_begin:
                continue
            queries, keys = q[row, :, q_begin:q_end], k[row, :, k_begin:k_end]
            means = None if block_means is None else block_means[row]
            summary = gate.summary(keys, rule.block_size, softmax_scale, means, rule.rotary_pairs)
            blocks = keys.shape[1] // rule.block_size
            chunk = max(1, budget(_SCORE_BUDGET, q) // (num_heads * max(1, blocks)))
            first = keys.shape[1] - queries.shape[1]
            for start in range(0, queries.shape[1], chunk):
                part = queries[:, start : start + chunk]
                position = torch.arange(part.shape[1], device=q.device) + first + start
                chosen = _select_chunk(part, summary, position // rule.block_size, rule)
                result[row, q_begin + start : q_begin + start + part.shape[1]] = chosen.transpose(0, 1)
    return result


def _select_chunk(q: Tensor, summary: Summary, own: Tensor, rule: LayerConfig) -> Tensor:
    """The choice `(H, M, topk)` for `q (H, M, D)` with own blocks `own (M,)`."""
    num_heads, topk = q.shape[0], rule.topk
    forced = _forced_blocks(own, rule.sink_blocks, rule.local_blocks)
    free = topk - 1 - (forced >= 0).sum(1)
    columns = int(own[-1])
    head = [own[:, None], forced]
    slots = torch.cat(head, 1).to(torch.int32).expand(num_heads, -1, -1)
    count = min(topk - 1, columns)
    if count > 0 and int(free.max()) > 0:
        scores = summary.scores(q, columns)
        column = torch.arange(columns, device=q.device)
        excluded = column >= own[:, None]
        for j in range(forced.shape[1]):
            excluded |= column == forced[:, j, None]
        best = _stable_topk(scores.masked_fill_(excluded, -torch.inf), excluded, count, free)
        slots = torch.cat([slots, best], 2)
    if bool((forced < 0).any()):  # close the gaps of missing kept blocks
        order = torch.argsort((slots < 0).to(torch.uint8), dim=2, stable=True)
        slots = slots.gather(2, order)
    if slots.shape[2] < topk:
        return torch.nn.functional.pad(slots, (0, topk - slots.shape[2]), value=-1)
    return slots[:, :, :topk]


def _forced_blocks(own: Tensor, sink_blocks: int, local_blocks: int) -> Tensor:
    """The sink and local blocks before `own (M,)`, `(M, sink_blocks + local_blocks)`, each once; -1: none."""
    sinks = torch.arange(sink_blocks, device=own.device).expand(own.shape[0], -1)
    sinks = sinks.masked_fill(sinks >= own[:, None], -1)
    local = own[:, None] - 1 - torch.arange(local_blocks, device=own.device)
    local = local.masked_fill(local < sink_blocks, -1)  # before the start, or already a sink block
    return torch.cat([sinks, local], 1)


def _stable_topk(scores: Tensor, excluded: Tensor, count: int, free: Tensor) -> Tensor:
    """Indices int32 `(H, M, count)` of the largest scores; NaN ranks highest, ties go to the lower index.

    `torch.topk` breaks ties arbitrarily. So rows are sorted again with a stable sort if the last chosen and
    the first rejected score are equal, or if they choose a score of -inf, which excluded columns have too.

    Args:
        scores: `(H, M, columns)`, -inf where `excluded`.
        excluded: `(M, columns)`, columns that must not be chosen.
        count: number of slots.
        free: `(M,)`, how many a row may choose; the remaining slots are -1.
    """
    width = min(count + 1, scores.shape[2])
    values, indices = scores.topk(width, dim=2)
    taken = torch.minimum(free, (~excluded).sum(1))
    last = (taken - 1).clamp(0, width - 1).expand(scores.shape[0], -1)[..., None]
    after = free.clamp(0, width - 1).expand(scores.shape[0], -1)[..., None]
    at_last, at_after = values.gather(2, last)[..., 0], values.gather(2, after)[..., 0]
    equal = (at_last == at_after) | (at_last.isnan() & at_after.isnan())
    again = ((last != after)[..., 0] & equal | (at_last == -torch.inf)) & (taken > 0)
    indices = indices[:, :, :count].to(torch.int32)
    if bool(again.any()):
        order = scores[again].argsort(dim=1, descending=True, stable=True)
        out = excluded.expand(scores.shape)[again].gather(1, order)
        indices[again] = order.gather(1, out.to(torch.uint8).argsort(dim=1, stable=True))[:, :count].int()
    return indices.masked_fill(torch.arange(count, device=scores.device) >= taken[:, None], -1)
