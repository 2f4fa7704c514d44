"""Means of the blocks that a later query may choose.

Legend: B block size, D head dim, HK kv heads, NB flat blocks (see `tiling`) or blocks of a cache.

One program per (block, kv head): rows of the block are added up in fp32 in an order that is written out (see
`_mean_of_block`), so that the bits depend on the keys and the block size only, never on how a kernel was
compiled: a cache that takes one block at a time holds exactly the means that a prefill takes. The sum is
divided by B and rounded to the key dtype. Prefill stores them flat, `(HK, NB, D)`, so that a tile of blocks
of one head is one contiguous read for the gate; a cache, `(batch, HK, NB, D)`. Reference:
`reference.block_mean_ref`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels.launch import device_of, narrow, padded, rows_contiguous
from moba_hf.kernels.layout import SEQ_BATCH, SEQ_COLUMNS, SEQ_K_BEGIN, head_offset, row_offset
from moba_hf.kernels.tiling import Tiling, bisect


def _rows(block_size: int) -> int:
    """Rows that are added up side by side: part of the order of summation, so set by the block size alone."""
    return min(64, int(triton.next_power_of_2(block_size)))


def block_mean(k: Tensor, tiling: Tiling) -> Tensor:
    """Block means `(HK, NB, D)` of `k (batch, HK, kv_len, D)`, in its dtype; spare rows stay unwritten."""
    num_kv_heads, head_dim = k.shape[1], k.shape[3]
    means = torch.empty(num_kv_heads, max(1, tiling.num_blocks), head_dim, dtype=k.dtype, device=k.device)
    if tiling.num_blocks == 0:
        return means
    with device_of(k):
        _block_mean_kernel[(tiling.num_blocks, num_kv_heads)](
            k,
            means,
            tiling.table,
            tiling.block_offset,
            tiling.num_seqs,
            tiling.block_size,
            means.shape[1],
            k.stride()[:3],
            HEAD_DIM=head_dim,
            PADDED_DIM=padded(head_dim),
            ROWS=_rows(tiling.block_size),
            LEVELS=_rows(tiling.block_size).bit_length() - 1,
            num_warps=4,
        )
    return means


def update_block_means(
    means: Tensor, k: Tensor, kv_start: Tensor | None, length: int | Tensor, behind: int, block_size: int
) -> None:
    """Writes into `means (batch, HK, NB, D)` those of the blocks that the last `behind` tokens completed.

    Args:
        means: its last two dimensions contiguous; blocks that are not complete stay as they are.
        k: `(batch, HK, >= length, D)`, any strides.
        kv_start: int64 `(batch,)`, slot of each row's first key; None: all 0.
        length: slots that are written; a 0-d int64 tensor where only the device knows.
        behind: host bound on the tokens whose blocks are not in `means` yet.
    """
    k = rows_contiguous(k)
    kv_start = None if kv_start is None else kv_start.to(torch.int64)
    batch, num_kv_heads, _, head_dim = k.shape
    windows = int(triton.cdiv(min(behind, k.shape[2]), block_size))
    if k.numel() == 0 or windows == 0:
        return
    on_device = isinstance(length, Tensor)
    with device_of(k):
        _update_means_kernel[(windows, num_kv_heads, batch)](
            k,
            means,
            kv_start,
            length,
            behind,
            block_size,
            means.shape[2],
            means.stride()[:2],
            k.stride()[:3],
            ON_DEVICE=on_device,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded(head_dim),
            ROWS=_rows(block_size),
            LEVELS=_rows(block_size).bit_length() - 1,
            num_warps=4,
        )


@triton.jit
def _mean_of_block(
    k_ptr,
    step,
    block_size,
    like,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Mean `(PADDED_DIM,)` of the `block_size` rows at `k_ptr`, in the dtype of pointer `like`.

    `step`: elements from one row to the next. Rows i, i + ROWS, i + 2 ROWS, ... are added in turn, then the
    ROWS sums in pairs, i and i + ROWS / 2.
    """
    dim = tl.arange(0, PADDED_DIM)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for start in range(0, block_size, ROWS):
        mask = (start + row < block_size)[:, None] & (dim < HEAD_DIM)[None, :]
        offset = (start + row).to(tl.int64)[:, None] * step + dim[None, :]
        total += tl.load(k_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    for level in tl.static_range(LEVELS):  # a sum of two has no order: no layout can change the result
        half = tl.reshape(total, (2, ROWS >> (level + 1), PADDED_DIM))
        total = tl.sum(half, 0)
    return narrow(tl.reshape(total, (PADDED_DIM,)) / block_size, like)


@triton.jit(do_not_specialize=["num_seqs", "mean_rows"])
def _block_mean_kernel(
    k_ptr,
    mean_ptr,
    table_ptr,
    block_offset_ptr,
    num_seqs,
    block_size,
    mean_rows,
    k_strides,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    number = tl.program_id(0)
    head = tl.program_id(1)
    if number < tl.load(block_offset_ptr + num_seqs):
        seq = bisect(block_offset_ptr, num_seqs, number)
        block = number - tl.load(block_offset_ptr + seq)
        row = table_ptr + seq * SEQ_COLUMNS
        first = tl.load(row + SEQ_K_BEGIN).to(tl.int64) + block.to(tl.int64) * block_size
        batch = tl.load(row + SEQ_BATCH)
        k_ptr += row_offset(batch, head, first, k_strides)
        mean = _mean_of_block(k_ptr, k_strides[2], block_size, mean_ptr, HEAD_DIM, PADDED_DIM, ROWS, LEVELS)
        dim = tl.arange(0, PADDED_DIM)
        at = (head.to(tl.int64) * mean_rows + number) * HEAD_DIM + dim
        tl.store(mean_ptr + at, mean, mask=dim < HEAD_DIM)


@triton.jit(do_not_specialize=["length", "behind", "mean_rows"])
def _update_means_kernel(
    k_ptr,
    mean_ptr,
    start_ptr,
    length,
    behind,
    block_size,
    mean_rows,
    mean_strides,
    k_strides,
    ON_DEVICE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """One (window of new tokens, kv head, batch row): the block that ends in it, if one does."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = batch * 0
    if start_ptr is not None:
        start = tl.load(start_ptr + batch).to(tl.int64)
    if ON_DEVICE:
        length = tl.load(length)
    tokens = length.to(tl.int64) - start
    block = tl.maximum(tokens - behind, 0) // block_size + tl.program_id(0)
    if ((block + 1) * block_size <= tokens) & (block < mean_rows):
        k_ptr += head_offset(batch, head, k_strides) + (start + block * block_size) * k_strides[2]
        mean = _mean_of_block(k_ptr, k_strides[2], block_size, mean_ptr, HEAD_DIM, PADDED_DIM, ROWS, LEVELS)
        dim = tl.arange(0, PADDED_DIM)
        at = head_offset(batch, head, mean_strides) + block * HEAD_DIM + dim
        tl.store(mean_ptr + at, mean, mask=dim < HEAD_DIM)
