"""Turns bit masks into lists of block numbers, over which the attention kernels loop.

Legend: C tiles of a chunk, H query heads, NB blocks of the longest sequence.

One program per row of words writes the positions of the set bits in order, using a running count. A list for
attention has a tile's chosen blocks, but not the blocks that the tile overlaps, which need no list. For the
backward, the tiles of all heads of a kv head that chose a block are listed in the same way, from a column of
bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels.launch import device_of, next_power_of_2
from moba_hf.kernels.layout import (
    INFO_COLUMNS,
    PLAN_POSITION,
    SEQ_COLUMNS,
    SEQ_K_BEGIN,
    SEQ_K_END,
    SEQ_Q_BEGIN,
    SEQ_Q_END,
)
from moba_hf.kernels.shared_plan import SharedPlan


@dataclass(frozen=True)
class Lists:
    """The lists of a chunk of tiles.

    Attributes:
        blocks: int16 or int32 `(C, H, NB)`, the chosen blocks of each (tile, head), ascending; for
            `tile_lists`, see there.
        counts: int32 `(C, H)`, the length of each list.
    """

    blocks: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, chunk: int, num_heads: int, blocks: int, like: Tensor) -> Lists:
        """Uninitialised lists for `chunk` tiles."""
        dtype = torch.int16 if blocks < 1 << 15 else torch.int32
        shape = (chunk, num_heads, max(1, blocks))
        return cls(
            torch.empty(shape, dtype=dtype, device=like.device),
            torch.empty(shape[:2], dtype=torch.int32, device=like.device),
        )

    @staticmethod
    def tile_bytes(num_heads: int, blocks: int) -> int:
        """Bytes per tile."""
        return num_heads * (max(1, blocks) * (2 if blocks < 1 << 15 else 4) + 4)


def block_lists(block_mask: Tensor, plan: SharedPlan, first_tile: int, lists: Lists) -> None:
    """Fills `lists` for the tiles from `first_tile` on, as many as it has room for.

    Args:
        block_mask: int32 `(H, num_tiles, words)`.
    """
    chunk, num_heads, blocks = lists.blocks.shape
    with device_of(block_mask):
        _block_lists_kernel[(min(chunk, plan.num_tiles - first_tile), num_heads)](
            block_mask,
            lists.blocks,
            lists.counts,
            plan.tiles,
            block_mask.stride()[:2],
            first_tile,
            num_heads,
            blocks,
            plan.block_size,
            TILE=plan.tile,
            BLOCK=min(1024, max(64, next_power_of_2(blocks))),
            num_warps=4 if blocks > 256 else 1,
        )


@triton.jit
def _write_list(mask_ptr, list_ptr, length, BLOCK: tl.constexpr):
    """Writes the positions, below `length`, of the set bits at `mask_ptr`; returns their number."""
    count = 0
    for start in range(0, length, BLOCK):
        place = start + tl.arange(0, BLOCK)
        word = tl.load(mask_ptr + place // 32, mask=place < length, other=0)
        bit = (word >> (place % 32)) & 1
        bit = tl.where(place < length, bit, 0)
        at = count + tl.cumsum(bit, 0) - bit
        tl.store(list_ptr + at, place.to(list_ptr.dtype.element_ty), mask=bit != 0)
        count += tl.sum(bit, 0)
    return count


@triton.jit(do_not_specialize=["first_tile"])
def _block_lists_kernel(
    mask_ptr,
    list_ptr,
    count_ptr,
    tile_ptr,
    mask_strides,
    first_tile,
    num_heads,
    blocks,
    block_size,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0)
    head = tl.program_id(1)
    tile = (first_tile + number).to(tl.int64)
    columns = tl.load(tile_ptr + tile * INFO_COLUMNS + PLAN_POSITION) // TILE * TILE // block_size
    mask_ptr += head.to(tl.int64) * mask_strides[0] + tile * mask_strides[1]
    item = number.to(tl.int64) * num_heads + head
    count = _write_list(mask_ptr, list_ptr + item * blocks, columns, BLOCK)
    tl.store(count_ptr + item, count)


def tile_lists(block_mask: Tensor, plan: SharedPlan, group: int, first_block: int, lists: Lists) -> None:
    """Writes, for each (block, kv head), which tiles of which query heads of the group chose the block.

    An entry is `tile * group + head in the group`, with tiles counted from the sequence's first one. Tiles
    that overlap the block are left out. All blocks of a sequence are numbered, including an incomplete last
    one: block `i` of sequence `s` has number `block_offset[s] + s + i`.

    Args:
        lists: `blocks (C, HK, group * tiles)`, for the blocks from number `first_block` on.
    """
    chunk, num_kv_heads, length = lists.blocks.shape
    blocks = min(chunk, plan.num_blocks + plan.num_seqs - first_block)
    with device_of(block_mask):
        _tile_lists_kernel[(blocks, num_kv_heads)](
            block_mask,
            lists.blocks,
            lists.counts,
            plan.table,
            plan.tile_offset,
            plan.block_offset,
            block_mask.stride()[:2],
            plan.num_seqs,
            first_block,
            length,
            GROUP=group,
            TILE=plan.tile,
            BLOCK_SIZE=plan.block_size,
            BLOCK=min(1024, max(64, next_power_of_2(plan.num_tiles))),
            num_warps=4 if plan.num_tiles > 256 else 1,
        )


@triton.jit
def find_block(table_ptr, block_offset_ptr, num_seqs, number):
    """Sequence and block index of block `number`, with incomplete blocks numbered too."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(block_offset_ptr + middle) + middle <= number
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low, number - tl.load(block_offset_ptr + low) - low


@triton.jit(do_not_specialize=["num_seqs", "first_block"])
def _tile_lists_kernel(
    mask_ptr,
    list_ptr,
    count_ptr,
    table_ptr,
    tile_offset_ptr,
    block_offset_ptr,
    mask_strides,
    num_seqs,
    first_block,
    length,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = first_block + tl.program_id(0)
    kv_head = tl.program_id(1)
    item = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + kv_head
    count = 0
    if number < tl.load(block_offset_ptr + num_seqs) + num_seqs:
        seq, block = find_block(table_ptr, block_offset_ptr, num_seqs, number)
        row = table_ptr + seq * SEQ_COLUMNS
        position = tl.load(row + SEQ_K_END) - tl.load(row + SEQ_K_BEGIN)
        position = tl.maximum(position - tl.load(row + SEQ_Q_END) + tl.load(row + SEQ_Q_BEGIN), 0)
        first_tile = tl.load(tile_offset_ptr + seq)
        tiles = tl.load(tile_offset_ptr + seq + 1) - first_tile
        # the first tile that begins after the block
        begin = tl.maximum(((block + 1) * BLOCK_SIZE + TILE - 1) // TILE - position // TILE, 0)
        list_ptr += item * length
        for in_group in range(GROUP):
            column = mask_ptr + (kv_head * GROUP + in_group).to(tl.int64) * mask_strides[0] + block // 32
            for start in range(begin, tiles, BLOCK):
                tile = start + tl.arange(0, BLOCK)
                at = (first_tile + tile).to(tl.int64) * mask_strides[1]
                word = tl.load(column + at, mask=tile < tiles, other=0)
                bit = (word >> (block % 32)) & 1
                to = count + tl.cumsum(bit, 0) - bit
                entry = tile * GROUP + in_group
                tl.store(list_ptr + to, entry.to(list_ptr.dtype.element_ty), mask=bit != 0)
                count += tl.sum(bit, 0)
    tl.store(count_ptr + item, count)
