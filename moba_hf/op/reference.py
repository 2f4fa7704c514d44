"""What MoBA computes, one function per stage, as plainly as it can be written.

Every faster path is tested against this file. It follows arXiv 2502.13189, equations 1-6, for one sequence:
`q (q_len, num_heads, head_dim)`, `k (kv_len, num_kv_heads, head_dim)`, `v (kv_len, num_kv_heads, v_dim)`,
the last query standing at the last key. It computes in fp32 (fp64 for fp64 inputs), is differentiable by
autograd, and holds a full `q_len x kv_len` score matrix per head: it is for checking, not for use at length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are held in: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Runs the body without autocast and without TF32 or bf16 matmuls: scores decide a choice of blocks.

    The per-backend switches are used where torch has them (2.9): it refuses to read the older global one
    after they were set one by one.
    """
    switches: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    newer = all(hasattr(switch, "fp32_precision") for switch in switches)
    previous = [switch.fp32_precision for switch in switches] if newer else []
    older = "" if newer else torch.get_float32_matmul_precision()
    try:
        if newer:
            for switch in switches:
                switch.fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, value in zip(switches, previous, strict=False):
            switch.fp32_precision = value
        if not newer:
            torch.set_float32_matmul_precision(older)


def block_mean_ref(k: Tensor, block_size: int) -> Tensor:
    """Means of the complete blocks, `(kv_len // block_size, num_kv_heads, head_dim)`, in k's dtype.

    Summed in fp32, then rounded to the key dtype. An incomplete last block can only be a query's own block,
    which needs no score.
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


def part_size(block_size: int) -> int:
    """Keys in one part of a block under the mass gate: 16 where that divides the block, else all of it."""
    return 16 if block_size % 16 == 0 else block_size


def spread_dtype(dtype: torch.dtype) -> torch.dtype:
    """What variances of keys and squares of queries are rounded to; bf16 for fp16, whose range they leave."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def mass_gate_ref(q: Tensor, k: Tensor, block_size: int, softmax_scale: float | None = None) -> Tensor:
    """Mass gate scores `(q_len, num_heads, kv_len // block_size)` in fp32 (fp64); see `moba_hf.op.gates`."""
    dtype, narrow = accumulate_dtype(q.dtype), spread_dtype(q.dtype)
    squares = q.to(dtype).square().to(narrow).to(dtype)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    group_size, size = q.shape[1] // k.shape[1], part_size(block_size)
    keys = k.to(dtype).repeat_interleave(group_size, dim=1)
    reach = 2 * math.log(size)
    columns = []
    for block in keys.split(block_size)[: k.shape[0] // block_size]:
        smallest = block.square().sum(2).argmin(0)
        terms = [torch.einsum("qhd,hd->qh", q.to(dtype), block[smallest, torch.arange(q.shape[1])]) * scale]
        for part in block.split(size):
            mean = part.mean(0).to(k.dtype).to(dtype)
            var = part.var(0, unbiased=False).to(narrow).to(dtype)
            spread = torch.einsum("qhd,hd->qh", squares, var) * scale**2
            normal, far = spread / 2, (reach * spread).sqrt() - reach / 2
            gain = torch.where(spread <= reach, normal, far)
            terms.append(torch.einsum("qhd,hd->qh", q.to(dtype), mean) * scale + gain + reach / 2)
        columns.append(torch.stack(terms).logsumexp(0))
    if not columns:
        return q.new_zeros(q.shape[0], q.shape[1], 0, dtype=dtype)
    return torch.stack(columns, dim=2)


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
) -> Tensor:
    """The blocks each query attends, int32 `(q_len, num_heads, topk)`, own block first, -1 last.

    Own block, then forced blocks, then the best-scoring earlier blocks; ties go to the lower index.
    `gate`: "mean", the paper's, or "mass", which also needs the `softmax_scale` (None: `head_dim ** -0.5`).
    """
    q_len, kv_len = q.shape[0], k.shape[0]
    if gate == "mass":
        scores = mass_gate_ref(q.detach(), k.detach(), block_size, softmax_scale)
    else:
        scores = gate_ref(q.detach(), block_mean_ref(k.detach(), block_size))
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
    """Softmax over all keys of the chosen blocks up to the query itself, times their values.

    Args:
        block_indices: int32 `(q_len, num_heads, topk)`, -1 for none.

    Returns:
        `out (q_len, num_heads, v_dim)` in q's dtype and `lse (num_heads, q_len)`, the natural logarithm of
        the softmax denominator, in fp32 (fp64).
    """
    dtype = accumulate_dtype(q.dtype)
    q_len, num_heads, head_dim = q.shape
    kv_len, num_kv_heads, _ = k.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
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
    scores = torch.einsum("qhd,khd->qhk", q.to(dtype), keys) * scale
    scores = scores.masked_fill(~chosen, -torch.inf)
    out = torch.einsum("qhk,khd->qhd", scores.softmax(dim=-1), values)
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
    """MoBA of one sequence: select, then attend. Returns `(out, lse)` as `attend_ref`."""
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
