"""Where the tiles of a shared choice are: the tile table of `moba_hf.op.shared`, built on the device.

Legend: S sequences, B block size, T tile.

The tile table is `op.shared.tile_table` with more columns (`PLAN_*` in `layout`), so that one row tells a
kernel all about a tile. `PLAN_FIRST_BLOCK` numbers the first block of the tile's sequence among the *flat
blocks*. These are the `(k_len - 1) // B` blocks of each sequence
that a later tile may choose, one sequence after the other. One kernel computes running totals of tiles and
blocks over the sequences, a second fills the rows. Nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels.launch import cdiv, device_of, next_power_of_2
from moba_hf.kernels.layout import (
    INFO_COLUMNS,
    PLAN_BATCH,
    PLAN_FIRST_BLOCK,
    PLAN_K_BEGIN,
    PLAN_K_END,
    PLAN_POSITION,
    PLAN_Q_BEGIN,
    PLAN_Q_END,
    SEQ_BATCH,
    SEQ_COLUMNS,
    SEQ_K_BEGIN,
    SEQ_K_END,
    SEQ_Q_BEGIN,
    SEQ_Q_END,
)
from moba_hf.op.shared import mask_words, tile_bound


@dataclass(frozen=True)
class SharedPlan:
    """The tiles and blocks of one call.

    Attributes:
        table: int32 `(S, 5)`, contiguous; see `moba_hf.op.sequences`.
        tiles: int32 `(num_tiles, INFO_COLUMNS)`, with the columns `PLAN_*` of `layout`; unused rows are zero.
        tile_offset: int32 `(S + 1,)`, number of each sequence's first tile.
        block_offset: int32 `(S + 1,)`, flat number of each sequence's block 0.
        num_seqs: S.
        num_tiles: number of rows in `tiles`, an upper bound known on the host.
        tile: T.
        block_size: B.
        num_blocks: upper bound, known on the host, of the number of flat blocks.
        max_blocks: the same for a single sequence.
        words: number of words in a block mask.
    """

    table: Tensor
    tiles: Tensor
    tile_offset: Tensor
    block_offset: Tensor
    num_seqs: int
    num_tiles: int
    tile: int
    block_size: int
    num_blocks: int
    max_blocks: int
    words: int


def make_shared_plan(
    q: Tensor, k: Tensor, table: Tensor, max_seqlen_q: int, max_seqlen_k: int, *, block_size: int, tile: int
) -> SharedPlan:
    """The plan of `q (batch, H, q_len, D)` and `k (batch, HK, kv_len, D)`; two kernel launches.

    Args:
        table: int32 `(S, 5)`, see `moba_hf.op.sequences`.
        max_seqlen_q, max_seqlen_k: upper bounds on the queries and keys of one sequence.
    """
    num_seqs = table.shape[0]
    num_tiles = tile_bound(num_seqs, max_seqlen_q, q.shape[0] * q.shape[2], tile)
    max_blocks = max(0, max_seqlen_k - 1) // block_size
    table = table.contiguous().detach()  # another object: a kept plan must not keep `table` alive
    offsets = torch.empty(2, num_seqs + 1, dtype=torch.int32, device=q.device)
    tiles = torch.empty(num_tiles, INFO_COLUMNS.value, dtype=torch.int32, device=q.device)
    with device_of(q):
        _offsets_kernel[(1,)](
            table,
            offsets,
            num_seqs,
            block_size,
            tile,
            BLOCK_S=min(1024, next_power_of_2(max(1, num_seqs))),
        )
        if num_tiles:
            _tiles_kernel[(cdiv(num_tiles, 128),)](
                table, offsets, tiles, num_seqs, num_tiles, tile, BLOCK=128, num_warps=4
            )
    return SharedPlan(
        table=table,
        tiles=tiles,
        tile_offset=offsets[0],
        block_offset=offsets[1],
        num_seqs=num_seqs,
        num_tiles=num_tiles,
        tile=tile,
        block_size=block_size,
        num_blocks=min(num_seqs * max_blocks, max(0, k.shape[0] * k.shape[2] - 1) // block_size),
        max_blocks=max_blocks,
        words=mask_words(max_seqlen_k, block_size),
    )


@triton.jit(do_not_specialize=["num_seqs", "block_size", "tile_size"])
def _offsets_kernel(table_ptr, offset_ptr, num_seqs, block_size, tile_size, BLOCK_S: tl.constexpr):
    """Running totals over the sequences, of tiles and of flat blocks."""
    num_tiles = tl.zeros([], tl.int32)
    num_blocks = tl.zeros([], tl.int32)
    for start in range(0, num_seqs, BLOCK_S):
        seq = start + tl.arange(0, BLOCK_S)
        there = seq < num_seqs
        row = table_ptr + seq * SEQ_COLUMNS
        q_len = tl.load(row + SEQ_Q_END, mask=there, other=0) - tl.load(
            row + SEQ_Q_BEGIN, mask=there, other=0
        )
        k_len = tl.load(row + SEQ_K_END, mask=there, other=0) - tl.load(
            row + SEQ_K_BEGIN, mask=there, other=0
        )
        q_len = tl.minimum(q_len, k_len)  # queries before the first key have no tile
        tiles = tl.where(q_len > 0, (k_len - 1) // tile_size - (k_len - q_len) // tile_size + 1, 0)
        blocks = tl.where(k_len > 0, (k_len - 1) // block_size, 0)
        tl.store(offset_ptr + seq, num_tiles + tl.cumsum(tiles, 0) - tiles, mask=there)
        tl.store(offset_ptr + num_seqs + 1 + seq, num_blocks + tl.cumsum(blocks, 0) - blocks, mask=there)
        num_tiles += tl.sum(tiles, 0)
        num_blocks += tl.sum(blocks, 0)
    tl.store(offset_ptr + num_seqs, num_tiles)
    tl.store(offset_ptr + 2 * num_seqs + 1, num_blocks)


@triton.jit(do_not_specialize=["num_seqs", "num_tiles", "tile_size"])
def _tiles_kernel(table_ptr, offset_ptr, tile_ptr, num_seqs, num_tiles, tile_size, BLOCK: tl.constexpr):
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = number < num_tiles
    used = number < tl.load(offset_ptr + num_seqs)
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + num_seqs
    while tl.max(high - low, 0) > 1:
        middle = (low + high) // 2
        below = tl.load(offset_ptr + middle) <= number
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    row = table_ptr + low * SEQ_COLUMNS
    q_end = tl.load(row + SEQ_Q_END)
    k_begin = tl.load(row + SEQ_K_BEGIN)
    k_len = tl.load(row + SEQ_K_END) - k_begin
    q_begin = tl.maximum(tl.load(row + SEQ_Q_BEGIN), q_end - k_len)
    first = k_len - (q_end - q_begin)  # position of the sequence's first query
    grid = first // tile_size + number - tl.load(offset_ptr + low)
    begin = tl.maximum(grid * tile_size, first)
    end = tl.minimum((grid + 1) * tile_size, k_len)
    out = tile_ptr + number.to(tl.int64) * INFO_COLUMNS
    tl.store(out + PLAN_BATCH, tl.where(used, tl.load(row + SEQ_BATCH), 0), mask=there)
    tl.store(out + PLAN_Q_BEGIN, tl.where(used, q_begin - first + begin, 0), mask=there)
    tl.store(out + PLAN_Q_END, tl.where(used, q_begin - first + end, 0), mask=there)
    tl.store(out + PLAN_POSITION, tl.where(used, begin, 0), mask=there)
    tl.store(out + PLAN_K_BEGIN, tl.where(used, k_begin, 0), mask=there)
    tl.store(out + PLAN_K_END, tl.where(used, k_begin + k_len, 0), mask=there)
    blocks = offset_ptr + num_seqs + 1
    tl.store(out + PLAN_FIRST_BLOCK, tl.where(used, tl.load(blocks + low), 0), mask=there)
    tl.store(out + (INFO_COLUMNS - 1), tl.zeros([BLOCK], tl.int32), mask=there)
