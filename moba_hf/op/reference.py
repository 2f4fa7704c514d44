"""Reference implementation of MoBA, as simple as possible, with one function per stage.

All faster paths are tested against this file. It implements arXiv 2502.13189, equations 1-6, for one
sequence: `q (q_len, num_heads, head_dim)`, `k (kv_len, num_kv_heads, head_dim)`, `v (kv_len, num_kv_heads,
v_dim)`, with the last query at the position of the last key. It computes in fp32 (fp64 for fp64 inputs) and
is differentiable by autograd. It needs a full `q_len x kv_len` score matrix per head, so it is only for
tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moba_hf.op.numerics import accumulate_dtype, default_scale, part_size, spread_dtype


def block_mean_ref(k: Tensor, block_size: int) -> Tensor:
    """Means of the complete blocks, `(kv_len // block_size, num_kv_heads, head_dim)`, in k's dtype.

    They are summed in fp32 and rounded to the key dtype. An incomplete last block can only be the own block
    of a query, which needs no score.
    """
    num_complete = k.shape[0] // block_size
    blocks = (
        k[: num_complete * block_size].to(accumulate_dtype(k.dtype)).unflatten(0, (num_complete, block_size))
    )
    return blocks.mean(dim=1).to(k.dtype)


def gate_ref(q: Tensor, block_mean: Tensor) -> Tensor:
    """Gate scores `q . block_mean`, unscaled, `(q_len, num_heads, num_blocks)` in fp32 (fp64)."""
    dtype = accumulate_dtype(q.dtype)
    group_size = q.shape[1] // block_mean.shape[1]
    means = block_mean.to(dtype).repeat_interleave(group_size, dim=1)
    return torch.einsum("qhd,bhd->qhb", q.to(dtype), means)


def mass_gate_ref(
    q: Tensor,
    k: Tensor,
    block_size: int,
    softmax_scale: float | None = None,
    rotary_pairs: str = "halves",
) -> Tensor:
    """Mass gate scores `(q_len, num_heads, kv_len // block_size)` in fp32 (fp64); see `moba_hf.op.gates`."""
    dtype, narrow = accumulate_dtype(q.dtype), spread_dtype(q.dtype)
    squares = q.to(dtype).square().to(narrow).to(dtype)
    scale = default_scale(q) if softmax_scale is None else softmax_scale
    group_size, size = q.shape[1] // k.shape[1], part_size(block_size)
    keys = k.to(dtype).repeat_interleave(group_size, dim=1)
    reach = 2 * math.log(size)
    dim, half = torch.arange(q.shape[2], device=q.device), q.shape[2] // 2
    mate = (dim + half) % q.shape[2] if rotary_pairs == "halves" else dim ^ 1
    columns = []
    for block in keys.split(block_size)[: k.shape[0] // block_size]:
        smallest = block.square().sum(2).argmin(0)
        terms = [torch.einsum("qhd,hd->qh", q.to(dtype), block[smallest, torch.arange(q.shape[1])]) * scale]
        for part in block.split(size):
            mean = part.mean(0).to(k.dtype).to(dtype)
            var = part.var(0, unbiased=False)
            var = ((var + var[..., mate]) / 2).to(narrow).to(dtype)
            spread = torch.einsum("qhd,hd->qh", squares, var) * scale**2
            normal, far = spread / 2, (reach * spread).sqrt() - reach / 2
            gain = torch.where(spread <= reach, normal, far)
            terms.append(torch.einsum("qhd,hd->qh", q.to(dtype), mean) * scale + gain + reach / 2)
        columns.append(torch.stack(terms).logsumexp(0))
    if not columns:
        return q.new_zeros(q.shape[0], q.shape[1], 0, dtype=dtype)
    return torch.stack(columns, dim=2)


def mean_gate_ref(
    q: Tensor, k: Tensor, block_size: int, _softmax_scale: float | None = None, _rotary_pairs: str = ""
) -> Tensor:
    """The paper's gate scores `(q_len, num_heads, kv_len // block_size)`: `gate_ref` of the block means."""
    return gate_ref(q, block_mean_ref(k, block_size))


# The scores of each gate, from `(q, k, block_size, softmax_scale, rotary_pairs)`, by the gate's name.
GATES_REF: dict[str, Callable[[Tensor, Tensor, int, float | None, str], Tensor]] = {
    "mean": mean_gate_ref,
    "mass": mass_gate_ref,
}


def select_blocks_ref(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    topk: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    gate: str = "mean",
    softmax_scale: float | None = None,
    rotary_pairs: str = "halves",
) -> Tensor:
    """The blocks that each query attends to, int32 `(q_len, num_heads, topk)`, own block first, -1 last.

    A query gets its own block, then the sink and local blocks, then the earlier blocks with the highest
    scores; ties go to the lower index.

    Args:
        gate: a key of `GATES_REF`.
        softmax_scale: for gates that use it; None: `head_dim ** -0.5`.
        rotary_pairs: for gates that use it.
    """
    q_len, kv_len = q.shape[0], k.shape[0]
    scores = GATES_REF[gate](q.detach(), k.detach(), block_size, softmax_scale, rotary_pairs)
    own = (torch.arange(q_len, device=q.device) + kv_len - q_len) // block_size
    result = torch.full((q_len, q.shape[1], topk), -1, dtype=torch.int32, device=q.device)
    for i in range(q_len):
        current = int(own[i])
        forced = {*range(min(sink_blocks, current)), *range(max(0, current - local_blocks), current)}
        for h in range(q.shape[1]):
            order = torch.argsort(scores[i, h, :current], descending=True, stable=True).tolist()
            rest = [block for block in order if block not in forced]
            chosen = [current, *sorted(forced), *rest][:topk]
            result[i, h, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return result


def attend_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over all keys of the chosen blocks up to the query.

    Args:
        block_indices: int32 `(q_len, num_heads, topk)`, -1 for none.

    Returns:
        `out (q_len, num_heads, v_dim)` in q's dtype and `lse (num_heads, q_len)`, the natural logarithm of
        the softmax denominator, in fp32 (fp64).
    """
    dtype = accumulate_dtype(q.dtype)
    q_len, num_heads, _ = q.shape
    kv_len, num_kv_heads, _ = k.shape
    scale = default_scale(q) if softmax_scale is None else softmax_scale
    group_size = num_heads // num_kv_heads
    keys = k.to(dtype).repeat_interleave(group_size, dim=1)
    values = v.to(dtype).repeat_interleave(group_size, dim=1)
    key_index = torch.arange(kv_len, device=q.device)
    key_block = key_index // block_size
    position = torch.arange(q_len, device=q.device) + kv_len - q_len
    chosen = torch.zeros(q_len, num_heads, kv_len, dtype=torch.bool, device=q.device)
    for slot in range(block_indices.shape[2]):
        chosen |= block_indices[:, :, slot, None] == key_block
    chosen &= (key_index <= position[:, None])[:, None, :]
    of_key = "khd"
    if not all(
        bool(x.isfinite().all()) for x in (q, keys, values)
    ):  # 0 * NaN is NaN, so each query gets its own keys
        keys, values = (torch.where(chosen[..., None], x.transpose(0, 1), 0.0) for x in (keys, values))
        of_key = "qhkd"
    scores = torch.einsum(f"qhd,{of_key}->qhk", q.to(dtype), keys) * scale
    scores = scores.masked_fill(~chosen, -torch.inf)
    out = torch.einsum(f"qhk,{of_key}->qhd", scores.softmax(dim=-1), values)
    return out.to(q.dtype), scores.logsumexp(dim=-1).transpose(0, 1)


def moba_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    topk: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    gate: str = "mean",
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """MoBA for one sequence: select, then attend. Returns `(out, lse)` as `attend_ref`."""
    block_indices = select_blocks_ref(
        q,
        k,
        block_size=block_size,
        topk=topk,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        gate=gate,
        softmax_scale=softmax_scale,
    )
    return attend_ref(q, k, v, block_indices, block_size=block_size, softmax_scale=softmax_scale)
