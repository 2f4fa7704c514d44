"""Block summaries for the shared choice: the mass gate's vectors, with one variance per rotary pair.

Legend: B block size, D head dim, HK kv heads, NB flat blocks (see `shared_plan`), P parts of a block.

One program per (flat block, kv head) computes in fp32:
- per part of 16 keys, the mean of the keys, and their variance, averaged over the two coordinates that the
  rotary embedding rotates together;
- per block, the key with the smallest norm, the first one if several are equal.
`centers (HK, P + 1, NB, D)`, in the key dtype, holds the means and then the smallest key;
`spreads (HK, P, NB, D / 2)`, in `spread_dtype`, holds the variances. In this layout a tile of blocks is read
contiguously. Reference: `moba_hf.op.gates.MassGate`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels.launch import device_of, narrow, padded
from moba_hf.kernels.shared_plan import SharedPlan
from moba_hf.kernels.tiling import bisect
from moba_hf.op.numerics import part_size, spread_dtype


def shared_summary(k: Tensor, plan: SharedPlan, rotary_pairs: str) -> tuple[Tensor, Tensor]:
    """`centers` and `spreads` of `k (batch, HK, kv_len, D)`; unused rows stay unwritten."""
    num_kv_heads, head_dim, size = k.shape[1], k.shape[3], part_size(plan.block_size)
    parts, blocks = plan.block_size // size, max(1, plan.num_blocks)
    centers = torch.empty(num_kv_heads, parts + 1, blocks, head_dim, dtype=k.dtype, device=k.device)
    spreads = torch.empty(
        num_kv_heads, parts, blocks, head_dim // 2, dtype=spread_dtype(k.dtype), device=k.device
    )
    if plan.num_blocks == 0:
        return centers, spreads
    with device_of(k):
        _shared_summary_kernel[(plan.num_blocks, num_kv_heads)](
            k,
            centers,
            spreads,
            plan.table,
            plan.block_offset,
            plan.num_seqs,
            blocks,
            *k.stride()[:3],
            PARTS=parts,
            SIZE=size,
            HALF=head_dim // 2,
            PADDED_HALF=padded(head_dim // 2),
            HALVES=rotary_pairs == "halves",
            num_warps=1,
        )
    return centers, spreads


@triton.jit(do_not_specialize=["num_seqs", "blocks"])
def _shared_summary_kernel(
    k_ptr,
    center_ptr,
    spread_ptr,
    table_ptr,
    block_offset_ptr,
    num_seqs,
    blocks,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    HALVES: tl.constexpr,
):
    number = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    if number < tl.load(block_offset_ptr + num_seqs):
        seq = bisect(block_offset_ptr, num_seqs, number)
        block = number - tl.load(block_offset_ptr + seq)
        first = tl.load(table_ptr + seq * 5 + 3).to(tl.int64) + block.to(tl.int64) * (PARTS * SIZE)
        k_ptr += tl.load(table_ptr + seq * 5).to(tl.int64) * k_stride_b + head * k_stride_h
        k_ptr += first * k_stride_n
        pair = tl.arange(0, PADDED_HALF)
        inside = pair < HALF
        low = pair if HALVES else 2 * pair
        high = pair + HALF if HALVES else 2 * pair + 1
        row = tl.arange(0, SIZE)
        center_at = center_ptr + (head * (PARTS + 1) * blocks + number) * (2 * HALF)
        spread_at = spread_ptr + (head * PARTS * blocks + number) * HALF + pair
        least = float("inf")
        smallest = 0
        for part in range(PARTS):
            at = (part * SIZE + row).to(tl.int64)[:, None] * k_stride_n
            a = tl.load(k_ptr + at + low[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
            b = tl.load(k_ptr + at + high[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
            norms = tl.sum(a * a + b * b, 1)
            norm = tl.min(norms, 0)
            where = tl.min(tl.where(norms == norm, row, SIZE), 0)
            smallest = tl.where(norm < least, part * SIZE + where, smallest)
            least = tl.minimum(norm, least)
            mean_a = tl.sum(a, 0) / SIZE
            mean_b = tl.sum(b, 0) / SIZE
            a = a - mean_a[None, :]
            b = b - mean_b[None, :]
            spread = tl.sum(a * a + b * b, 0) / (2 * SIZE)
            step = tl.cast(part, tl.int64) * blocks
            tl.store(center_at + step * (2 * HALF) + low, narrow(mean_a, center_ptr), mask=inside)
            tl.store(center_at + step * (2 * HALF) + high, narrow(mean_b, center_ptr), mask=inside)
            tl.store(spread_at + step * HALF, narrow(spread, spread_ptr), mask=inside)
        center_at += tl.cast(blocks, tl.int64) * (PARTS * 2 * HALF)
        k_ptr += tl.cast(smallest, tl.int64) * k_stride_n
        tl.store(center_at + low, tl.load(k_ptr + low, mask=inside, other=0.0), mask=inside)
        tl.store(center_at + high, tl.load(k_ptr + high, mask=inside, other=0.0), mask=inside)
