"""Regroups the chosen (query, head, slot) pairs by (kv head, block), without reading sizes from the device.

Legend: H query heads, HK kv heads, K topk, K1 = K - 1 routed slots, NB flat blocks (see `tiling`), P pairs.

1. A pair's key is `kv_head * NB + flat block`, or one value past the last for missing slots and padding
   queries. The own block is dropped, whichever slot it is in, and the others close up to K1 slots. Pair
   number `(row * H + head) * K1 + slot` is also the place of its partial output.
2. A stable radix sort of the keys, in 16 bits if they fit, also gives the permutation. Bisection then finds
   the first pair of each bin. Since the sort is stable, the order, and so every sum, is the same in each run.
3. Each bin is split into tiles of `rows` pairs. A small kernel describes each tile, which it finds by
   bisecting the running totals. The number of tiles is at most P / rows + bins; surplus tiles are empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.launch import cdiv, device_of, next_power_of_2
from moba_hf.kernels.layout import (
    INFO_COLUMNS,
    RUN_BATCH,
    RUN_BEGIN,
    RUN_BIN,
    RUN_END,
    RUN_FIRST_KEY,
    RUN_KV_HEAD,
    RUN_PART,
    SEQ_BATCH,
    SEQ_COLUMNS,
    SEQ_K_BEGIN,
)
from moba_hf.kernels.tiling import Tiling, find_tile, head_split, tile_rows


@dataclass(frozen=True)
class Routes:
    """The pairs of one chunk, grouped by bin.

    Attributes:
        pairs: int64 `(P,)`, pair numbers sorted by bin; pairs without a bin come last.
        bin_begin: int32 `(num_bins + 1,)`, index in `pairs` of each bin's first pair.
        tile_begin: int32 `(num_bins + 1,)`, first tile of each bin; the last entry is the number of tiles.
        tile_info: int32 `(tiles, INFO_COLUMNS)`, description of each tile, see `layout`; surplus tiles are
            empty.
        num_bins: `HK * NB`; bin = kv head * NB + flat block.
        rows: maximum number of pairs in a tile.
    """

    pairs: Tensor
    bin_begin: Tensor
    tile_begin: Tensor
    tile_info: Tensor
    num_bins: int
    rows: int


def key_format(num_bins: int) -> tuple[torch.dtype, int]:
    """The narrowest integer dtype for `num_bins + 1` keys, and the key of bin 0."""
    return (torch.int16, -(2**15)) if num_bins < 2**16 else (torch.int32, 0)


def pair_keys(choice: Tensor, tiling: Tiling, chunk: int, num_kv_heads: int) -> Tensor:
    """Keys `(rows of the chunk, H, K1)` of `choice (batch, q_len, H, K)`; dtype as in `key_format`."""
    _, q_len, num_heads, topk = choice.shape
    first_row = chunk * tiling.chunk_rows
    rows = min(tiling.chunk_rows, tiling.num_rows - first_row)
    num_bins = num_kv_heads * tiling.num_blocks
    dtype, bias = key_format(num_bins)
    keys = torch.full((rows, num_heads, topk - 1), num_bins + bias, dtype=dtype, device=choice.device)
    heads, _ = head_split(num_heads // num_kv_heads, tuning.choices_for(choice).route_rows)
    splits = cdiv(num_heads // num_kv_heads, heads)
    with device_of(choice):
        _pair_key_kernel[(tiling.max_tiles, num_kv_heads * splits)](
            choice,
            keys,
            tiling.table,
            tiling.block_offset,
            tiling.tile_offset[chunk],
            tiling.num_seqs,
            q_len,
            first_row,
            rows,
            num_heads,
            num_heads // num_kv_heads,
            splits,
            tiling.num_blocks,
            bias,
            tiling.block_size,
            TOPK=topk,
            PADDED_TOPK=next_power_of_2(topk),
            TILE=tiling.tile,
            TILES_PER_BLOCK=tiling.tiles_per_block,
            HEADS=heads,
            BLOCK_M=next_power_of_2(tiling.tile * heads),
            num_warps=4,
        )
    return keys


def route(keys: Tensor, tiling: Tiling, num_kv_heads: int, rows: int) -> Routes:
    """Groups pairs by key, in tiles of `rows`; `keys` is the result of `pair_keys` and is not changed."""
    num_bins = num_kv_heads * tiling.num_blocks
    dtype, bias = key_format(num_bins)
    in_order, pairs = torch.sort(keys.reshape(-1), stable=True)
    bins = torch.arange(bias, num_bins + bias + 1, dtype=torch.int32, device=keys.device).to(dtype)
    bin_begin = torch.searchsorted(in_order, bins, out_int32=True)
    return _tiled(pairs, bin_begin, tiling, num_bins, rows)


def retile(routes: Routes, tiling: Tiling, rows: int) -> Routes:
    """The same groups, split into tiles of `rows`."""
    return _tiled(routes.pairs, routes.bin_begin, tiling, routes.num_bins, rows)


def _tiled(pairs: Tensor, bin_begin: Tensor, tiling: Tiling, num_bins: int, rows: int) -> Routes:
    device, num_pairs = pairs.device, pairs.numel()
    tiles = (bin_begin[1:] - bin_begin[:-1] + (rows - 1)) // rows
    tile_begin = torch.zeros(num_bins + 1, dtype=torch.int32, device=device)
    torch.cumsum(tiles, 0, dtype=torch.int32, out=tile_begin[1:])
    bound = max(1, min(num_pairs, num_pairs // rows + num_bins))
    tile_info = torch.empty(bound, INFO_COLUMNS.value, dtype=torch.int32, device=device)
    with device_of(pairs):
        block = tuning.choices_for(pairs).route_tiles
        _tile_info_kernel[(cdiv(bound, block),)](
            tile_info,
            bin_begin,
            tile_begin,
            tiling.table,
            tiling.block_offset,
            num_bins,
            tiling.num_blocks,
            tiling.num_seqs,
            tiling.block_size,
            bound,
            rows,
            BLOCK=block,
        )
    return Routes(pairs, bin_begin, tile_begin, tile_info, num_bins, rows)


@triton.jit
def _last_not_above(ptr, count, number):
    """For each `number`, the last `i < count` with `ptr[i] <= number`; `ptr` ascends and `ptr[0]` is 0."""
    low = tl.zeros_like(number)
    high = low + count
    while tl.max(high - low, 0) > 1:
        middle = (low + high) // 2
        below = tl.load(ptr + middle) <= number
        open = high - low > 1
        low = tl.where(open & below, middle, low)
        high = tl.where(open & (below == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["num_bins", "num_blocks", "num_seqs", "block_size", "num_tiles", "rows"])
def _tile_info_kernel(
    info_ptr,
    bin_begin_ptr,
    tile_begin_ptr,
    table_ptr,
    block_offset_ptr,
    num_bins,
    num_blocks,
    num_seqs,
    block_size,
    num_tiles,
    rows,
    BLOCK: tl.constexpr,
):
    """Writes the descriptions of BLOCK tiles."""
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tile < num_tiles
    bin = _last_not_above(tile_begin_ptr, num_bins, tile)
    mask = inside & (tile < tl.load(tile_begin_ptr + num_bins))
    part = tile - tl.load(tile_begin_ptr + bin)
    begin = tl.load(bin_begin_ptr + bin) + part * rows
    end = tl.minimum(tl.load(bin_begin_ptr + bin + 1), begin + rows)
    number = bin % num_blocks
    seq = _last_not_above(block_offset_ptr, num_seqs, number)
    first_key = tl.load(table_ptr + seq * SEQ_COLUMNS + SEQ_K_BEGIN)
    first_key += (number - tl.load(block_offset_ptr + seq)) * block_size
    row = info_ptr + tile.to(tl.int64) * INFO_COLUMNS
    tl.store(row + RUN_BEGIN, tl.where(mask, begin, 0), mask=inside)
    tl.store(row + RUN_END, tl.where(mask, end, 0), mask=inside)
    tl.store(row + RUN_BATCH, tl.load(table_ptr + seq * SEQ_COLUMNS + SEQ_BATCH), mask=inside)
    tl.store(row + RUN_KV_HEAD, bin // num_blocks, mask=inside)
    tl.store(row + RUN_FIRST_KEY, first_key, mask=inside)
    tl.store(row + RUN_BIN, bin, mask=inside)
    tl.store(row + RUN_PART, part, mask=inside)


@triton.jit(
    do_not_specialize=["num_seqs", "q_len", "first_row", "num_rows", "num_blocks", "bias", "block_size"]
)
def _pair_key_kernel(
    choice_ptr,
    key_ptr,
    table_ptr,
    block_offset_ptr,
    tile_offset_ptr,
    num_seqs,
    q_len,
    first_row,
    num_rows,
    num_heads,
    group_size,
    splits,
    num_blocks,
    bias,
    block_size,
    TOPK: tl.constexpr,
    PADDED_TOPK: tl.constexpr,
    TILE: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    number = tl.program_id(0)
    kv_head = tl.program_id(1) // splits
    if number < tl.load(tile_offset_ptr + num_seqs):
        seq, batch, own, first, origin, low, high, k_begin, k_len = find_tile(
            table_ptr,
            tile_offset_ptr,
            num_seqs,
            q_len,
            first_row,
            num_rows,
            number,
            block_size,
            TILE,
            TILES_PER_BLOCK,
        )
        slot = tl.arange(0, PADDED_TOPK)
        part = tl.program_id(1) % splits
        _, query, in_group, mask = tile_rows(
            own, first, origin, low, high, part, group_size, block_size, BLOCK_M, TILE, HEADS
        )
        flat = (batch.to(tl.int64) * q_len + query) * num_heads + kv_head * group_size + in_group
        source = choice_ptr + flat[:, None] * TOPK
        block = tl.load(source + slot[None, :], mask=mask[:, None] & (slot < TOPK)[None, :], other=-1)
        own_slot = tl.min(tl.where(block == own, slot[None, :], TOPK - 1), 1)
        shifted = slot[None, :] + (slot[None, :] >= own_slot[:, None]).to(tl.int32)
        kept = mask[:, None] & (slot < TOPK - 1)[None, :]
        block = tl.load(source + shifted, mask=kept, other=-1)
        # only earlier blocks are valid; anything else must never become an address
        valid = (block >= 0) & (block < own)
        key = kv_head * num_blocks + tl.load(block_offset_ptr + seq) + block
        key = tl.where(valid, key, tl.num_programs(1) // splits * num_blocks) + bias
        target = key_ptr + (flat - first_row.to(tl.int64) * num_heads)[:, None] * (TOPK - 1) + slot[None, :]
        tl.store(target, key.to(key_ptr.dtype.element_ty), mask=kept)
