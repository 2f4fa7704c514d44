"""The mass gate's summary of the blocks that a later query may choose.

Legend: B block size, D head dim, HK kv heads, NB flat blocks (see `tiling`), P parts of a block.

One program per (flat block, kv head) computes, in fp32 and in an order that depends only on the block size:
- per part, the mean of the keys, and their variance, averaged over each pair of coordinates that the rotary
  embedding rotates together;
- per block, the key with the smallest norm, the first one if several are equal.
`centers (HK, P + 1, NB, D)`, in the key dtype, holds the means and then the smallest key;
`spreads (HK, P, NB, D)`, in `spread_dtype`, holds the variances. In this layout the gate reads a tile of
blocks contiguously. Reference: `reference.mass_gate_ref`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels.launch import device_of, narrow, next_power_of_2, padded
from moba_hf.kernels.layout import SEQ_BATCH, SEQ_COLUMNS, SEQ_K_BEGIN, row_offset
from moba_hf.kernels.tiling import Tiling, bisect
from moba_hf.op.numerics import part_size, spread_dtype


def mass_summary(k: Tensor, tiling: Tiling, rotary_pairs: str = "halves") -> tuple[Tensor, Tensor]:
    """`centers` and `spreads` of `k (batch, HK, kv_len, D)`; unused rows stay unwritten."""
    num_kv_heads, head_dim, size = k.shape[1], k.shape[3], part_size(tiling.block_size)
    parts, blocks = tiling.block_size // size, max(1, tiling.num_blocks)
    shape = (num_kv_heads, parts, blocks, head_dim)
    centers = torch.empty(shape[0], parts + 1, *shape[2:], dtype=k.dtype, device=k.device)
    spreads = torch.empty(shape, dtype=spread_dtype(k.dtype), device=k.device)
    if tiling.num_blocks == 0:
        return centers, spreads
    with device_of(k):
        _mass_summary_kernel[(tiling.num_blocks, num_kv_heads)](
            k,
            centers,
            spreads,
            tiling.table,
            tiling.block_offset,
            tiling.num_seqs,
            blocks,
            k.stride()[:3],
            PARTS=parts,
            SIZE=size,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded(head_dim),
            HALVES=rotary_pairs == "halves",
            BLOCK_N=min(64, next_power_of_2(size)),
            num_warps=4 if size > 16 else 1,
        )
    return centers, spreads


@triton.jit(do_not_specialize=["num_seqs", "blocks"])
def _mass_summary_kernel(
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
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    number = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    if number < tl.load(block_offset_ptr + num_seqs):
        seq = bisect(block_offset_ptr, num_seqs, number)
        block = number - tl.load(block_offset_ptr + seq)
        of_seq = table_ptr + seq * SEQ_COLUMNS
        first = tl.load(of_seq + SEQ_K_BEGIN).to(tl.int64) + block.to(tl.int64) * (PARTS * SIZE)
        batch = tl.load(of_seq + SEQ_BATCH)
        k_ptr += row_offset(batch, head, first, k_strides)
        dim = tl.arange(0, PADDED_DIM)
        rows = tl.arange(0, BLOCK_N)
        # for each coordinate, the other one of its pair
        mate = tl.where(dim < HEAD_DIM // 2, dim + HEAD_DIM // 2, dim - HEAD_DIM // 2) if HALVES else dim ^ 1
        columns = (dim < HEAD_DIM)[None, :]
        center_at = center_ptr + (head * (PARTS + 1) * blocks + number) * HEAD_DIM + dim
        spread_at = spread_ptr + (head * PARTS * blocks + number) * HEAD_DIM + dim
        least = float("inf")
        smallest = tl.zeros([PADDED_DIM], tl.float32)
        for part in range(PARTS):
            total = tl.zeros([PADDED_DIM], tl.float32)
            total_mate = tl.zeros([PADDED_DIM], tl.float32)
            for start in range(0, SIZE, BLOCK_N):
                mask = start + rows < SIZE
                row_at = (part * SIZE + start + rows).to(tl.int64)[:, None] * k_strides[2]
                inside = mask[:, None] & columns
                keys = tl.load(k_ptr + row_at + dim[None, :], mask=inside, other=0.0).to(tl.float32)
                mates = tl.load(k_ptr + row_at + mate[None, :], mask=inside, other=0.0).to(tl.float32)
                total += tl.sum(keys, 0)
                total_mate += tl.sum(mates, 0)
                norms = tl.where(mask, tl.sum(keys * keys, 1), float("inf"))
                norm = tl.min(norms, 0)
                at = tl.min(tl.where(norms == norm, rows, BLOCK_N), 0)
                row = tl.sum(tl.where((rows == at)[:, None], keys, 0.0), 0)
                smallest = tl.where(norm < least, row, smallest)
                least = tl.minimum(norm, least)
            mean = total / SIZE
            mean_mate = total_mate / SIZE
            spread = tl.zeros([PADDED_DIM], tl.float32)
            spread_mate = tl.zeros([PADDED_DIM], tl.float32)
            for start in range(0, SIZE, BLOCK_N):
                mask = (start + rows < SIZE)[:, None]
                row_at = (part * SIZE + start + rows).to(tl.int64)[:, None] * k_strides[2]
                keys = tl.load(k_ptr + row_at + dim[None, :], mask=mask & columns, other=0.0).to(tl.float32)
                mates = tl.load(k_ptr + row_at + mate[None, :], mask=mask & columns, other=0.0).to(tl.float32)
                away = tl.where(mask, keys - mean[None, :], 0.0)
                spread += tl.sum(away * away, 0)
                away = tl.where(mask, mates - mean_mate[None, :], 0.0)
                spread_mate += tl.sum(away * away, 0)
            variance = (spread / SIZE + spread_mate / SIZE) * 0.5
            step = tl.cast(part, tl.int64) * blocks * HEAD_DIM
            tl.store(center_at + step, narrow(mean, center_ptr), mask=dim < HEAD_DIM)
            tl.store(spread_at + step, narrow(variance, spread_ptr), mask=dim < HEAD_DIM)
        step = tl.cast(blocks, tl.int64) * (PARTS * HEAD_DIM)
        tl.store(center_at + step, narrow(smallest, center_ptr), mask=dim < HEAD_DIM)
