"""Means of the blocks that a later query may choose.

Legend: B block size, D head dim, HK kv heads, NB flat blocks (see `plan`).

One program per (flat block, kv head): it adds up rows of the block in fp32, in an order that depends on the
block size only, divides by B and rounds to the key dtype. The result is stored flat, `(HK, NB, D)`, so that
a tile of blocks of one head is one contiguous read for the gate. Reference: `reference.block_mean_ref`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels.launch import device_of, narrow, padded
from moba_hf.kernels.plan import Plan, bisect


def block_mean(k: Tensor, plan: Plan) -> Tensor:
    """Block means `(HK, NB, D)` of `k (batch, HK, kv_len, D)`, in its dtype; spare rows stay unwritten."""
    num_kv_heads, head_dim = k.shape[1], k.shape[3]
    means = torch.empty(num_kv_heads, max(1, plan.num_blocks), head_dim, dtype=k.dtype, device=k.device)
    if plan.num_blocks == 0:
        return means
    with device_of(k):
        _block_mean_kernel[(plan.num_blocks, num_kv_heads)](
            k,
            means,
            plan.table,
            plan.block_offset,
            plan.num_seqs,
            plan.block_size,
            means.shape[1],
            k.stride(0),
            k.stride(1),
            k.stride(2),
            HEAD_DIM=head_dim,
            PADDED_DIM=padded(head_dim),
            BLOCK_N=min(64, triton.next_power_of_2(plan.block_size)),
            num_warps=4,
        )
    return means


@triton.jit(do_not_specialize=["num_seqs", "mean_stride_h"])
def _block_mean_kernel(
    k_ptr,
    mean_ptr,
    table_ptr,
    block_offset_ptr,
    num_seqs,
    block_size,
    mean_stride_h,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    number = tl.program_id(0)
    head = tl.program_id(1)
    if number < tl.load(block_offset_ptr + num_seqs):
        seq = bisect(block_offset_ptr, num_seqs, number)
        block = number - tl.load(block_offset_ptr + seq)
        first = tl.load(table_ptr + seq * 5 + 3).to(tl.int64) + block.to(tl.int64) * block_size
        k_ptr += tl.load(table_ptr + seq * 5).to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
        k_ptr += first * k_stride_n
        dim = tl.arange(0, PADDED_DIM)
        rows = tl.arange(0, BLOCK_N)
        total = tl.zeros([PADDED_DIM], tl.float32)
        for start in range(0, block_size, BLOCK_N):
            there = (start + rows < block_size)[:, None] & (dim < HEAD_DIM)[None, :]
            offset = (start + rows).to(tl.int64)[:, None] * k_stride_n + dim[None, :]
            total += tl.sum(tl.load(k_ptr + offset, mask=there, other=0.0).to(tl.float32), 0)
        mean = narrow(total / block_size, mean_ptr)
        at = (head.to(tl.int64) * mean_stride_h + number) * HEAD_DIM + dim
        tl.store(mean_ptr + at, mean, mask=dim < HEAD_DIM)
