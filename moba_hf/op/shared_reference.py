"""Reference implementation of the shared choice of blocks, as simple as possible, one function per stage.

The rule is defined in `moba_hf.op.shared`; it is not MoBA. All faster paths are tested against this file. It
handles one sequence: `q (q_len, num_heads, head_dim)`, `k (kv_len, num_kv_heads, head_dim)`, `v (kv_len,
num_kv_heads, v_dim)`, with the last query at the position of the last key. It computes in fp32 (fp64 for fp64
inputs), and the attention is differentiable by autograd.

If a sequence is read in several calls, tiles may be cut. `cuts` are the positions at which a further call
begins, so this is also the reference for chunks of a prefill. `shared_steps_ref` is that for decode steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moba_hf.op.gates import PairedMassSummary
from moba_hf.op.numerics import accumulate_dtype
from moba_hf.op.shared import SharedRule

# Positions [begin, end) of the rows of a tile that are in one call.
Tile = tuple[int, int]


def tiles_ref(q_len: int, kv_len: int, tile: int, cuts: Sequence[int] = ()) -> list[Tile]:
    """Positions `(begin, end)` of each tile's rows, in order."""
    first = kv_len - q_len
    edges = {first, kv_len, *range(0, kv_len, tile), *cuts}
    inside = sorted(edge for edge in edges if first <= edge <= kv_len)
    return list(pairwise(inside))


def sampled_rows_ref(begin: int, end: int, sample: int) -> list[int]:
    """Positions of the sampled rows among rows `[begin, end)`: the last of each group of `sample`."""
    groups = range(begin // sample, (end - 1) // sample + 1)
    return [min((group + 1) * sample, end) - 1 for group in groups]


def tile_masses_ref(
    q: Tensor,
    k: Tensor,
    rule: SharedRule,
    softmax_scale: float | None = None,
    cuts: Sequence[int] = (),
) -> list[Tensor]:
    """The masses `(num_heads, candidates)` of each tile's candidates, which sum to 1, in fp32 (fp64)."""
    q_len, kv_len = q.shape[0], k.shape[0]
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    gate = PairedMassSummary(
        k.detach().transpose(0, 1), rule.block_size, scale, rotary_pairs=rule.rotary_pairs
    )
    scores = gate.scores(q.detach().transpose(0, 1), kv_len // rule.block_size)  # (H, q_len, blocks)
    masses = []
    for begin, end in tiles_ref(q_len, kv_len, rule.tile, cuts):
        candidates = begin // rule.tile * rule.tile // rule.block_size
        rows = torch.tensor(sampled_rows_ref(begin, end, rule.sample), device=q.device) - (kv_len - q_len)
        masses.append(scores[:, rows, :candidates].softmax(2).mean(1))
    return masses


def chosen_candidates_ref(mass: Tensor, rule: SharedRule) -> list[int]:
    """The candidates that a tile of one head attends to, from their masses `(candidates,)`."""
    count = len(mass)
    sinks = set(range(min(rule.sink_blocks, count)))
    forced = sinks | set(range(max(0, count - rule.local_blocks), count))
    order = torch.argsort(mass, descending=True, stable=True).tolist()
    values = mass.tolist()
    wanted = []
    before = 0.0  # the mass of the heavier ones
    for block in order:
        # negated, so that NaN masses drop no block
        passes = rule.threshold is None or not values[block] < rule.threshold * values[order[0]]
        passes = passes and (rule.share is None or not before >= rule.share)
        if passes and block not in forced:
            wanted.append(block)
        before += values[block]
    if rule.topk is not None:
        wanted = wanted[: rule.topk - rule.own_blocks - len(forced)]
    return sorted(forced | set(wanted))


def select_shared_ref(
    q: Tensor,
    k: Tensor,
    rule: SharedRule,
    softmax_scale: float | None = None,
    cuts: Sequence[int] = (),
) -> Tensor:
    """The blocks that each tile attends to, including its own: bool `(num_heads, tiles, blocks)`."""
    q_len, kv_len, num_heads = q.shape[0], k.shape[0], q.shape[1]
    tiles = tiles_ref(q_len, kv_len, rule.tile, cuts)
    blocks = -(-kv_len // rule.block_size)
    chosen = torch.zeros(num_heads, len(tiles), blocks, dtype=torch.bool, device=q.device)
    masses = tile_masses_ref(q, k, rule, softmax_scale, cuts)
    for number, ((begin, end), mass) in enumerate(zip(tiles, masses, strict=True)):
        candidates, last = mass.shape[1], -(-end // rule.block_size)
        chosen[:, number, candidates:last] = True
        for head in range(num_heads):
            dense = begin // rule.tile * rule.tile < rule.dense_below
            taken = list(range(candidates)) if dense else chosen_candidates_ref(mass[head], rule)
            chosen[head, number, taken] = True
    return chosen


def attend_shared_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    *,
    block_size: int,
    tile: int,
    softmax_scale: float | None = None,
    cuts: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Softmax attention over all keys of a tile's blocks up to the row itself.

    Args:
        chosen: bool `(num_heads, tiles, blocks)`.

    Returns:
        `out (q_len, num_heads, v_dim)` in q's dtype and `lse (num_heads, q_len)`, the natural logarithm of
        the softmax denominator, in fp32 (fp64).
    """
    dtype = accumulate_dtype(q.dtype)
    q_len, num_heads, head_dim = q.shape
    kv_len = k.shape[0]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    keys, values = (x.to(dtype).repeat_interleave(num_heads // k.shape[1], dim=1) for x in (k, v))
    attended = torch.zeros(num_heads, q_len, kv_len, dtype=torch.bool, device=q.device)
    key = torch.arange(kv_len, device=q.device)
    for number, (begin, end) in enumerate(tiles_ref(q_len, kv_len, tile, cuts)):
        rows = torch.arange(begin, end, device=q.device)
        in_block = chosen[:, number, key // block_size]
        attended[:, rows - (kv_len - q_len)] = in_block[:, None] & (key <= rows[:, None])
    of_key = "khd"
    if not all(bool(x.isfinite().all()) for x in (q, keys, values)):  # 0 * NaN is NaN: separate keys per row
        hidden = ~attended[..., None]
        keys, values = (x.transpose(0, 1)[:, None].masked_fill(hidden, 0.0) for x in (keys, values))
        of_key = "hqkd"
    scores = torch.einsum(f"qhd,{of_key}->hqk", q.to(dtype), keys) * scale
    scores = scores.masked_fill(~attended, -torch.inf)
    out = torch.einsum(f"hqk,{of_key}->qhd", scores.softmax(dim=-1), values)
    return out.to(q.dtype), scores.logsumexp(dim=-1)


def shared_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: SharedRule,
    softmax_scale: float | None = None,
    cuts: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence with a shared choice: select, then attend. Returns `(out, lse)`."""
    chosen = select_shared_ref(q, k, rule, softmax_scale, cuts)
    limits = {"block_size": rule.block_size, "tile": rule.tile}
    return attend_shared_ref(q, k, v, chosen, **limits, softmax_scale=softmax_scale, cuts=cuts)


def shared_steps_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: SharedRule,
    softmax_scale: float | None = None,
    heard: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode steps of one sequence: a step's list is that of its tile if the tile ended with the step.

    Args:
        heard: number of rows at the start of `q` that are not steps and only help to choose. None: there are
            none, and each step chooses by its own query alone.

    Returns:
        `out (steps, num_heads, v_dim)` and `lse (num_heads, steps)`, as `attend_shared_ref`.
    """
    limits: dict[str, Any] = {
        "block_size": rule.block_size,
        "tile": rule.tile,
        "softmax_scale": softmax_scale,
    }
    outs, lses = [], []
    for row in range(heard or 0, q.shape[0]):
        keys, values = (x[: k.shape[0] - q.shape[0] + row + 1] for x in (k, v))
        asking = q[row : row + 1] if heard is None else q[: row + 1]
        chosen = select_shared_ref(asking, keys, rule, softmax_scale)[:, -1:]
        out, lse = attend_shared_ref(q[row : row + 1], keys, values, chosen, **limits)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1)
