"""Means of the blocks that a later query may choose.

Legend: B block size, D head dim, HK kv heads, NB flat blocks (see `tiling`) or blocks of a cache.

One program per (block, kv head) adds up the rows of the block in fp32, in a fixed order (see
`_mean_of_block`), divides by B and rounds to the key dtype. The bits depend only on the keys and the block
size, not on how the kernel was compiled. A cache that is updated one block at a time therefore holds exactly
the means of a prefill. A prefill stores means as `(HK, NB, D)`, so that the gate reads a tile of blocks of
one head contiguously; a cache stores them as `(batch, HK, NB, D)`. Reference: `reference.block_mean_ref`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels.launch import cdiv, device_of, narrow, next_power_of_2, padded, rows_contiguous
from moba_hf.kernels.layout import (
    SEQ_BATCH,
    SEQ_COLUMNS,
    SEQ_K_BEGIN,
    completed_block,
    head_offset,
    row_offset,
)
from moba_hf.kernels.tiling import Tiling, bisect


def _rows(block_size: int) -> int:
    """Number of partial sums; it affects the order of summation, so it depends on the block size alone."""
    return min(64, next_power_of_2(block_size))


def block_mean(k: Tensor, tiling: Tiling) -> Tensor:
    """Block means `(HK, NB, D)` of `k (batch, HK, kv_len, D)`, in its dtype; unused rows stay unwritten."""
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
    """Writes the means of the blocks that the last `behind` tokens completed.

    Args:
        means: `(batch, HK, NB, D)`, last two dimensions contiguous; other blocks stay unchanged.
        k: `(batch, HK, >= length, D)`, any strides.
        kv_start: int64 `(batch,)`, slot of each row's first key; None: all 0.
        length: number of filled slots; a 0-d int64 tensor if it is known only on the device.
        behind: upper bound, known on the host, of the number of tokens whose blocks are not yet in `means`.
        block_size: keys in a block.
    """
    k = rows_contiguous(k)
    kv_start = None if kv_start is None else kv_start.to(torch.int64)
    batch, num_kv_heads, _, head_dim = k.shape
    windows = cdiv(min(behind, k.shape[2]), block_size)
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
    """Mean `(PADDED_DIM,)` of the `block_size` rows at `k_ptr`, in the dtype of the pointer `like`.

    `step` is the number of elements from one row to the next. Rows i, i + ROWS, i + 2 ROWS, ... are added in
    turn; then the ROWS sums are added in pairs, i and i + ROWS / 2, until one is left.
    """
    dim = tl.arange(0, PADDED_DIM)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for start in range(0, block_size, ROWS):
        mask = (start + row < block_size)[:, None] & (dim < HEAD_DIM)[None, :]
        offset = (start + row).to(tl.int64)[:, None] * step + dim[None, :]
        total += tl.load(k_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    for level in tl.static_range(LEVELS):  # a sum of two terms is the same in either order, in any layout
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
    """Handles one (window of new tokens, kv head, batch row): the block that ends in the window, if any."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start, block, complete = completed_block(start_ptr, batch, length, behind, block_size, ON_DEVICE)
    if complete & (block < mean_rows):
        k_ptr += head_offset(batch, head, k_strides) + (start + block * block_size) * k_strides[2]
        mean = _mean_of_block(k_ptr, k_strides[2], block_size, mean_ptr, HEAD_DIM, PADDED_DIM, ROWS, LEVELS)
        dim = tl.arange(0, PADDED_DIM)
        at = head_offset(batch, head, mean_strides) + block * HEAD_DIM + dim
        tl.store(mean_ptr + at, mean, mask=dim < HEAD_DIM)
