"""Decode steps of the shared choice of blocks in pure torch: every query chooses for itself.

Legend: H query heads, HK kv heads, D head dim, M queries per row, B block size, C block columns, P queries
just before the call.

One batch row is one sequence; row r of `table` describes batch row r (see `moba_hf.op.sequences`).
1. choose: from cached summaries of complete blocks, the masses of the candidates for each query and the
   earlier rows of its tile, their mean, then the blocks that the rule takes (`moba_hf.op.shared`).
2. attend: gathers the keys and values of the chosen blocks only, as in `portable_decode`.
The number of blocks per query depends on the text. On CPUs, lists are as long as the longest one. On a GPU,
reading that length would wait for the device, so lists are as long as the rule allows; `topk` keeps them
short.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_hf.op.gates import PairedMassSummary
from moba_hf.op.numerics import full_precision
from moba_hf.op.portable_decode import attend_blocks, positions
from moba_hf.op.shared_portable import mass_step, row_masses, take_candidates
from moba_hf.op.shared_rule import SharedRule


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    table: Tensor,
    rule: SharedRule,
    softmax_scale: float,
    heard: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`out (batch, M, H, Dv)` and `lse (batch, H, M)` in fp32 (fp64) of one sequence per batch row.

    Args:
        q: `(batch, H, M, D)`, any strides.
        k: `(batch, HK, N, D)`, any strides.
        v: `(batch, HK, N, Dv)`, any strides.
        kept: `(batch, HK, C, width)`, see `SharedKernels.decode`.
        table: int32 `(batch, 5)`, one sequence per batch row, in order.
        heard: `(batch, H, P, D)`, the queries just before `q`; None: each query chooses alone.
    """
    position = positions(table, q.shape[2])
    with full_precision(q.device):
        summaries = kept[:, :, : k.shape[2] // rule.block_size]
        chosen = choose(q, summaries, position, rule, softmax_scale, heard)
        lists = _lists(chosen, _longest(rule, chosen.shape[3]))
        return attend_blocks(q, k, v, lists, position, table, rule.block_size, softmax_scale)


def choose(
    q: Tensor,
    kept: Tensor,
    position: Tensor,
    rule: SharedRule,
    softmax_scale: float,
    heard: Tensor | None = None,
) -> Tensor:
    """The blocks that each query attends to, bool `(batch, H, M, C + 1)`; none for padding.

    Args:
        q: `(batch, H, M, D)`.
        kept: `(batch, HK, C, width)`.
        position: `(batch, M)`, -1 for padding.
        heard: `(batch, H, P, D)`, the queries just before `q`; None: each query chooses alone.
    """
    batch, num_heads, length, dim = q.shape
    columns = kept.shape[2]
    block = torch.arange(columns + 1, device=q.device)
    start = position // rule.tile * rule.tile
    candidates = (start // rule.block_size).clamp(min=0)
    earlier = block < candidates[..., None]  # (batch, M, C + 1)
    own = ~earlier & (block <= (position // rule.block_size)[..., None])
    dense = ((start < rule.dense_below) & (position >= 0))[..., None]
    if columns == 0:
        return own[:, None].expand(-1, num_heads, -1, -1)
    chosen = torch.empty(batch, num_heads, length, columns + 1, dtype=torch.bool, device=q.device)
    step = mass_step(q, kept, rule)
    step = step if heard is None else max(step, rule.tile)
    for row in range(batch):
        gate = PairedMassSummary.of_kept(kept[row], dim, rule.block_size, softmax_scale, rule.rotary_pairs)
        for m in range(0, length, step):
            part = slice(m, m + step)
            if heard is None:
                mass = row_masses(q[row, :, part], gate, ~earlier[row, part, :columns], 0)
            else:
                known = torch.cat([heard[row], q[row, :, max(0, m - rule.tile + 1) : m]], 1)
                known = known[:, max(0, known.shape[1] - rule.tile + 1) :]
                mass = _heard_masses(q[row, :, part], known, gate, position[row, part], columns, rule)
            taken = torch.nn.functional.pad(take_candidates(mass, candidates[row, part], rule), (0, 1))
            chosen[row, :, part] = torch.where(dense[row, part], earlier[row, part], taken) | own[row, part]
    return chosen


def _heard_masses(
    q: Tensor, known: Tensor, gate: PairedMassSummary, position: Tensor, columns: int, rule: SharedRule
) -> Tensor:
    """Mean masses `(H, M, columns)` over the rows by which each of `q (H, M, D)` chooses.

    Args:
        known: `(H, P, D)`, the queries just before `q`.
        position: `(M,)`, -1 for padding.
    """
    before, count = known.shape[1], q.shape[1]
    row = torch.arange(-before, count, device=q.device)
    # positions of earlier rows follow from that of any real query; there is none if all are padding
    first = (position - row[before:]).masked_fill(position < 0, -before - count).amax()
    at = first + row
    tile = torch.where(at >= 0, at // rule.tile, -1)
    same = (tile == tile[before:, None]) & (tile >= 0) & (row <= row[before:, None])
    hears = same & ((at % rule.sample == rule.sample - 1) | (row == row[before:, None]))  # (M, P + M)
    asked = torch.cat([known, q], 1)
    if q.device.type == "cpu":  # elsewhere this would wait for the device
        some = hears.any(0).nonzero().flatten()
        asked, hears, tile = asked[:, some], hears[:, some], tile[some]
    hidden = torch.arange(columns, device=q.device) >= (tile * rule.tile // rule.block_size)[:, None]
    mass = row_masses(asked, gate, hidden, 0)
    weights = hears.to(mass.dtype)
    return torch.matmul(weights, mass) / weights.sum(1, keepdim=True).clamp(min=1)


def _longest(rule: SharedRule, columns: int) -> int:
    """The most blocks, out of `columns`, that a query may attend to."""
    if rule.topk is None:
        return columns
    return min(columns, max(rule.topk, -(-rule.dense_below // rule.block_size)))


def _lists(chosen: Tensor, longest: int) -> Tensor:
    """Block numbers `(batch, H, M, n)` of `chosen (..., columns)`, ascending, -1 after the last."""
    columns = chosen.shape[3]
    if chosen.device.type == "cpu":
        longest = min(longest, max(1, int(chosen.sum(3).max())))
    number = torch.arange(columns, device=chosen.device)
    order = torch.where(chosen, number, columns).sort(3).values[..., :longest]
    return order.masked_fill(order == columns, -1)
