"""Block summaries for the shared choice: the mass gate's vectors, with one variance per rotary pair.

Legend: B block size, D head dim, HK kv heads, NB flat blocks (see `shared_plan`), P parts of a block.

One program per (flat block, kv head) computes in fp32:
- per part of 16 keys, the mean of the keys, and their variance, averaged over the two coordinates that the
  rotary embedding rotates together;
- per block, the key with the smallest norm, the first one if several are equal.
`centers (HK, P + 1, NB, D)`, in the key dtype, holds the means and then the smallest key;
`spreads (HK, P, NB, D / 2)`, in `spread_dtype`, holds the variances. In this layout a tile of blocks is read
contiguously. A cache keeps the same vectors of each block next to each other, see `gates.KeptMass`.
Reference: `moba_hf.op.gates.MassGate`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels.launch import cdiv, device_of, narrow, padded, rows_contiguous
from moba_hf.kernels.layout import (
    SEQ_BATCH,
    SEQ_COLUMNS,
    SEQ_K_BEGIN,
    completed_block,
    head_offset,
    pair_coordinates,
    row_offset,
)
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
            k.stride()[:3],
            PARTS=parts,
            SIZE=size,
            HALF=head_dim // 2,
            PADDED_HALF=padded(head_dim // 2),
            HALVES=rotary_pairs == "halves",
            num_warps=1,
        )
    return centers, spreads


def update_kept_mass(
    kept: Tensor,
    k: Tensor,
    kv_start: Tensor | None,
    length: int | Tensor,
    behind: int,
    block_size: int,
    rotary_pairs: str,
) -> None:
    """Writes the summaries of the blocks that the last `behind` tokens completed, as `gates.KeptMass` does.

    Args:
        kept: `(batch, HK, NB, width)`, contiguous blocks; other blocks stay unchanged.
        k: `(batch, HK, >= length, D)`.
        kv_start, length, behind: see `block_mean.update_block_means`.
    """
    k = rows_contiguous(k)
    kv_start = None if kv_start is None else kv_start.to(torch.int64)
    batch, num_kv_heads, slots, head_dim = k.shape
    windows = cdiv(min(behind, slots), block_size)
    if k.numel() == 0 or windows == 0:
        return
    size = part_size(block_size)
    with device_of(k):
        _update_kept_mass_kernel[(windows, num_kv_heads, batch)](
            k,
            kept,
            kept.view(spread_dtype(kept.dtype)),
            kv_start,
            length,
            behind,
            kept.shape[2],
            kept.stride()[:3],
            k.stride()[:3],
            ON_DEVICE=isinstance(length, Tensor),
            PARTS=block_size // size,
            SIZE=size,
            HALF=head_dim // 2,
            PADDED_HALF=padded(head_dim // 2),
            HALVES=rotary_pairs == "halves",
            num_warps=1,
        )


@triton.jit
def _summarize(
    k_ptr,
    k_stride_n,
    center_at,
    center_step,
    spread_at,
    spread_step,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Writes the summary of the block at `k_ptr`; a step leads from one part to the next."""
    pair, low, high = pair_coordinates(HALF, PADDED_HALF, HALVES)
    inside = pair < HALF
    row = tl.arange(0, SIZE)
    spread_ptr = spread_at
    spread_at += pair
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
        tl.store(center_at + low, narrow(mean_a, center_at), mask=inside)
        tl.store(center_at + high, narrow(mean_b, center_at), mask=inside)
        tl.store(spread_at, narrow(spread, spread_ptr), mask=inside)
        center_at += center_step
        spread_at += spread_step
    k_ptr += tl.cast(smallest, tl.int64) * k_stride_n
    tl.store(center_at + low, tl.load(k_ptr + low, mask=inside, other=0.0), mask=inside)
    tl.store(center_at + high, tl.load(k_ptr + high, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["num_seqs", "blocks"])
def _shared_summary_kernel(
    k_ptr,
    center_ptr,
    spread_ptr,
    table_ptr,
    block_offset_ptr,
    num_seqs,
    blocks,
    k_strides,
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
        of_seq = table_ptr + seq * SEQ_COLUMNS
        first = tl.load(of_seq + SEQ_K_BEGIN).to(tl.int64) + block.to(tl.int64) * (PARTS * SIZE)
        k_ptr += head_offset(tl.load(of_seq + SEQ_BATCH), head, k_strides)
        k_ptr += first * k_strides[2]
        step = tl.cast(blocks, tl.int64)
        center_at = center_ptr + (head * (PARTS + 1) * blocks + number) * (2 * HALF)
        spread_at = spread_ptr + (head * PARTS * blocks + number) * HALF
        _summarize(
            k_ptr, k_strides[2], center_at, step * (2 * HALF), spread_at, step * HALF,
            PARTS, SIZE, HALF, PADDED_HALF, HALVES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "behind", "kept_rows"])
def _update_kept_mass_kernel(
    k_ptr,
    center_ptr,
    spread_ptr,
    start_ptr,
    length,
    behind,
    kept_rows,
    kept_strides,
    k_strides,
    ON_DEVICE: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Handles one (window of new tokens, kv head, batch row): the block that ends in the window, if any."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start, block, complete = completed_block(start_ptr, batch, length, behind, PARTS * SIZE, ON_DEVICE)
    if complete & (block < kept_rows):
        k_ptr += head_offset(batch, head, k_strides) + (start + block * (PARTS * SIZE)) * k_strides[2]
        at = row_offset(batch, head, block, kept_strides)
        spread_at = spread_ptr + at + (PARTS + 1) * (2 * HALF)
        _summarize(
            k_ptr, k_strides[2], center_ptr + at, 2 * HALF, spread_at, HALF,
            PARTS, SIZE, HALF, PADDED_HALF, HALVES,
        )  # fmt: skip
