"""What the backward does per query row: what it needs of a row before, and the sum of a row's parts after.

Legend: H query heads, T flat query rows (batch * q_len), K1 routed slots, D and DV head dims.

`row_stats` gathers in one place, `(T, H, 2)` fp32, the two numbers by which probabilities and their gradients
come from scores: `lse` in base 2 (+inf where no sequence covers the row, so that `exp2(score - lse)` is 0),
and `delta = sum(grad_out * out) - grad_lse`. `sum_partials` adds a row's K1 partial gradients in slot order.
A missing slot is known by its key alone: its partial gradient was never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels.launch import device_of, narrow, padded
from moba_hf.kernels.softmax import load_rows


def row_stats(out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor) -> Tensor:
    """`(batch * q_len, H, 2)` fp32: lse in base 2, delta.

    Args:
        out, grad_out: `(batch, q_len, H, DV)`, last dimensions contiguous.
        lse, grad_lse: `(batch, H, q_len)` fp32, natural.
    """
    batch, q_len, num_heads, v_dim = out.shape
    stats = torch.empty(batch * q_len, num_heads, 2, dtype=torch.float32, device=out.device)
    rows = batch * q_len * num_heads
    block_m = 32 if v_dim <= 128 else 16
    with device_of(out):
        _row_stats_kernel[(triton.cdiv(rows, block_m),)](
            out,
            grad_out,
            lse,
            grad_lse,
            stats,
            *out.stride()[:3],
            *grad_out.stride()[:3],
            *lse.stride(),
            *grad_lse.stride(),
            rows,
            q_len,
            num_heads,
            V_DIM=v_dim,
            PADDED_V=padded(v_dim),
            BLOCK_M=block_m,
            num_warps=4,
        )
    return stats


def sum_partials(grad_q: Tensor, partial: Tensor, keys: Tensor, no_bin: int, first_row: int) -> None:
    """Writes the routed part of `grad_q (batch, H, q_len, D)` for one chunk of rows.

    Args:
        partial: `(rows, H, K1, D)`.
        keys: `(rows, H, K1)` as `routing.pair_keys` gives; `no_bin` marks a missing slot.
        first_row: flat query row at which the chunk begins.
    """
    rows, num_heads, slots = keys.shape
    head_dim = grad_q.shape[3]
    block_m = 16 if head_dim <= 128 else 8
    with device_of(grad_q):
        _sum_partials_kernel[(triton.cdiv(rows * num_heads, block_m),)](
            grad_q,
            partial,
            keys,
            *grad_q.stride()[:3],
            no_bin,
            rows * num_heads,
            first_row,
            grad_q.shape[2],
            num_heads,
            SLOTS=slots,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded(head_dim),
            BLOCK_M=block_m,
            UNROLL=slots <= 16,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["num_rows", "q_len"])
def _row_stats_kernel(
    out_ptr,
    grad_ptr,
    lse_ptr,
    grad_lse_ptr,
    stats_ptr,
    out_stride_b,
    out_stride_n,
    out_stride_h,
    grad_stride_b,
    grad_stride_n,
    grad_stride_h,
    lse_stride_b,
    lse_stride_h,
    lse_stride_n,
    grad_lse_stride_b,
    grad_lse_stride_h,
    grad_lse_stride_n,
    num_rows,
    q_len,
    num_heads,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < num_rows
    head = (row % num_heads).to(tl.int64)
    query = row // num_heads
    batch = (query // q_len).to(tl.int64)
    query = (query % q_len).to(tl.int64)
    at = batch * out_stride_b + query * out_stride_n + head * out_stride_h
    grad_at = batch * grad_stride_b + query * grad_stride_n + head * grad_stride_h
    out = load_rows(out_ptr, at, there, V_DIM, PADDED_V, False).to(tl.float32)
    grad = load_rows(grad_ptr, grad_at, there, V_DIM, PADDED_V, False).to(tl.float32)
    lse_at = batch * lse_stride_b + head * lse_stride_h + query * lse_stride_n
    grad_lse_at = batch * grad_lse_stride_b + head * grad_lse_stride_h + query * grad_lse_stride_n
    lse = tl.load(lse_ptr + lse_at, mask=there, other=float("-inf"))
    grad_lse = tl.load(grad_lse_ptr + grad_lse_at, mask=there, other=0.0)
    covered = lse > float("-inf")
    delta = tl.where(covered, tl.sum(out * grad, 1) - grad_lse, 0.0)
    lse = tl.where(covered, lse * 1.4426950408889634, float("inf"))
    target = stats_ptr + row.to(tl.int64) * 2
    tl.store(target, lse, mask=there)
    tl.store(target + 1, delta, mask=there)


@triton.jit(do_not_specialize=["no_bin", "num_rows", "first_row", "q_len"])
def _sum_partials_kernel(
    grad_q_ptr,
    partial_ptr,
    key_ptr,
    stride_b,
    stride_h,
    stride_n,
    no_bin,
    num_rows,
    first_row,
    q_len,
    num_heads,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < num_rows
    pair = row.to(tl.int64) * SLOTS
    total = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    if UNROLL:
        for i in tl.static_range(SLOTS):
            total += _partial(partial_ptr, key_ptr, pair + i, there, no_bin, HEAD_DIM, PADDED_DIM)
    else:
        for i in tl.range(0, SLOTS, num_stages=2):
            total += _partial(partial_ptr, key_ptr, pair + i, there, no_bin, HEAD_DIM, PADDED_DIM)
    query = first_row + row // num_heads
    at = (query // q_len).to(tl.int64) * stride_b + (query % q_len).to(tl.int64) * stride_n
    at += (row % num_heads).to(tl.int64) * stride_h
    dim = tl.arange(0, PADDED_DIM)
    target = grad_q_ptr + at[:, None] + dim[None, :]
    tl.store(target, narrow(total, grad_q_ptr), mask=there[:, None] & (dim < HEAD_DIM)[None, :])


@triton.jit
def _partial(partial_ptr, key_ptr, pair, there, no_bin, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Partial gradients of `pair (M,)`, zero where the slot is missing."""
    chosen = there & (tl.load(key_ptr + pair, mask=there, other=0).to(tl.int32) != no_bin)
    return load_rows(partial_ptr, pair * HEAD_DIM, chosen, HEAD_DIM, PADDED_DIM, False).to(tl.float32)
