"""The choice of blocks for a few queries, from the means kept in a cache; the same choice as the gate's.

Legend: B block size, D head dim, G query heads per kv head, M queries per row, C block columns, K topk.

1. score: one program per (64 rows of M x G, kv head, 128 columns). Scores come from the same dot product as
   in the gate, in tiles of the same shape, and become the same sortable int32 keys (`levels.sortable`), with
   zeros in their lowest bits. So a decode step and a prefill choose the same blocks, even in near-ties.
   Columns that are not candidates get the smallest key.
2. choose: one program per (query, head). It searches for a threshold between the COUNT-th and the next
   largest key. Each step counts the keys at or above three trial thresholds: at first a little below the
   largest key, then at the quarters of the remaining interval. Keys at or above the threshold are taken;
   among equal keys, the lower blocks win. The cost depends on C, hardly on K.
Batch row r is one sequence, row r of the table. Nothing waits for the device: grids follow from shapes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.launch import cdiv, device_of, dot, next_power_of_2, padded, rows_contiguous
from moba_hf.kernels.layout import (
    SEQ_COLUMNS,
    SEQ_K_BEGIN,
    SEQ_K_END,
    SEQ_Q_BEGIN,
    SEQ_Q_END,
    Constant,
    head_offset,
    load_rows,
    row_offset,
)
from moba_hf.kernels.levels import sortable, tile_bits

_LEAST = Constant(-(2**31))
# Distance of the first trial from the largest key: an eighth of a power of two in the score.
_NEAR = Constant(1 << 20)
_MOST_BLOCKS = 1 << 21  # see `_reach`


def choose_blocks(
    q: Tensor,
    block_means: Tensor,
    table: Tensor,
    kv_len: int,
    block_size: int,
    topk: int,
    sink_blocks: int,
    local_blocks: int,
) -> Tensor:
    """Chosen blocks, int32 `(batch, M, H, topk)`: the own block first, -1 for empty slots and padding.

    Args:
        q: `(batch, H, M, D)`.
        block_means: `(batch, HK, C, D)`: the means of each row's complete blocks, then any finite values.
        table: int32 `(batch, 5)`, one sequence per batch row, in order.
        kv_len: number of key slots, filled or not.
        block_size, topk, sink_blocks, local_blocks: the rule.

    Raises:
        ValueError: too many blocks to count.
    """
    q, means = rows_contiguous(q), block_means
    if means.stride(3) != 1 or means.stride(2) != means.shape[3]:
        means = means.contiguous()
    table = table.contiguous()
    batch, num_heads, length, head_dim = q.shape
    num_kv_heads, columns = means.shape[1:3]
    group_size = num_heads // num_kv_heads
    choice = torch.empty(batch, length, num_heads, topk, dtype=torch.int32, device=q.device)
    if choice.numel() == 0:
        return choice
    if columns >= _MOST_BLOCKS:
        raise ValueError(f"at most {_MOST_BLOCKS} blocks can be counted, got {columns}: use longer ones")
    count = topk - 1 - sink_blocks - local_blocks
    scored = count > 0 and columns > 0
    room = 16 * cdiv(columns, 16) if scored else 16
    keys = torch.empty(batch, length, num_heads, room, dtype=torch.int32, device=q.device)
    tuned = tuning.choices_for(q)
    tile, width = tuned.mean_gate, tuned.choose_columns  # the gate's tile, so near-ties break the same way
    bits = tile_bits(cdiv(max(0, kv_len - 1) // block_size, tile.n))
    held = min(tuned.choose_held, max(64, next_power_of_2(columns)))
    with device_of(q):
        if scored:
            tiles = cdiv(length * group_size, tile.m)
            _score_kernel[(cdiv(columns, width), num_kv_heads, batch * tiles)](
                q,
                means,
                keys,
                table,
                q.stride()[:3],
                means.stride()[:2],
                length,
                group_size,
                columns,
                room,
                block_size,
                tiles,
                SINK=sink_blocks,
                LOCAL=local_blocks,
                HEAD_DIM=head_dim,
                PADDED_DIM=padded(head_dim),
                BLOCK_M=tile.m,
                BLOCK_N=tile.n,
                COLUMNS=width,
                BITS=bits,
                num_warps=tile.warps,
            )
        _choose_kernel[(batch * length, num_heads)](
            keys,
            choice,
            table,
            length,
            room,
            columns,
            block_size,
            TOPK=topk,
            SINK=sink_blocks,
            LOCAL=local_blocks,
            BITS=bits,
            HELD=held,
            ALL_HELD=columns <= held,
            num_warps=8 if held >= tuned.choose_many else 4,
        )
    return choice


@triton.jit(do_not_specialize=["length", "columns", "block_size", "tiles"])
def _score_kernel(
    q_ptr,
    mean_ptr,
    key_ptr,
    table_ptr,
    q_strides,
    mean_strides,
    length,
    group_size,
    columns,
    room,
    block_size,
    tiles,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
):
    """Writes the keys of BLOCK_M rows for COLUMNS columns, up to the last candidate of these rows."""
    batch = tl.program_id(2) // tiles
    kv_head = tl.program_id(1)
    seq = table_ptr + batch * SEQ_COLUMNS
    q_begin = tl.load(seq + SEQ_Q_BEGIN)
    q_end = tl.load(seq + SEQ_Q_END)
    shift = tl.load(seq + SEQ_K_END) - tl.load(seq + SEQ_K_BEGIN) - q_end
    row = tl.program_id(2) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // group_size
    head = kv_head * group_size + row % group_size
    mask = (query >= q_begin) & (query < q_end) & (query < length)
    own = tl.where(mask, (query + shift) // block_size, 0)
    end = tl.minimum(tl.max(own, 0) - LOCAL, columns)
    first = tl.program_id(0) * COLUMNS
    if first < end:
        dim = tl.arange(0, PADDED_DIM)
        wide = batch.to(tl.int64)
        q = load_rows(q_ptr, row_offset(wide, head, query, q_strides), mask, HEAD_DIM, PADDED_DIM, False)
        mean_ptr += head_offset(wide, kv_head, mean_strides)
        out = key_ptr + (wide * length + query) * (tl.num_programs(1) * group_size * room) + head * room
        for start in tl.static_range(0, COLUMNS, BLOCK_N):
            column = first + start + tl.arange(0, BLOCK_N)
            mean = tl.load(
                mean_ptr + column[None, :] * HEAD_DIM + dim[:, None],
                mask=(column < end)[None, :] & (dim < HEAD_DIM)[:, None],
                other=0.0,
            )
            key = sortable(dot(q, mean), (1 << BITS) - 1, BITS)
            candidate = (column[None, :] >= SINK) & (column[None, :] < (own - LOCAL)[:, None])
            key = tl.where(candidate, key, _LEAST)
            tl.store(out[:, None] + column[None, :], key, mask=mask[:, None] & (column < end)[None, :])


@triton.jit(do_not_specialize=["length", "columns", "block_size"])
def _choose_kernel(
    key_ptr,
    choice_ptr,
    table_ptr,
    length,
    room,
    columns,
    block_size,
    TOPK: tl.constexpr,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    BITS: tl.constexpr,
    HELD: tl.constexpr,
    ALL_HELD: tl.constexpr,
):
    """The choice of one (query, head)."""
    COUNT: tl.constexpr = TOPK - 1 - SINK - LOCAL
    PADDED_TOPK: tl.constexpr = triton.next_power_of_2(TOPK)
    query = tl.program_id(0) % length
    seq = table_ptr + tl.program_id(0) // length * SEQ_COLUMNS
    q_begin = tl.load(seq + SEQ_Q_BEGIN)
    q_end = tl.load(seq + SEQ_Q_END)
    position = query + tl.load(seq + SEQ_K_END) - tl.load(seq + SEQ_K_BEGIN) - q_end
    flat = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    out = choice_ptr + flat * TOPK
    slot = tl.arange(0, PADDED_TOPK)
    own = position // block_size
    # kept blocks: sinks, then those just before the own one; candidates lie in between
    sinks = tl.minimum(SINK, own)
    local = tl.maximum(sinks, own - LOCAL)
    free = 1 + sinks + own - local
    block = tl.where(slot == 0, own, tl.where(slot <= sinks, slot - 1, local + slot - 1 - sinks))
    # if the candidates fit the slots, all of them are taken
    block = tl.where(slot < free, block, sinks + slot - free)
    real = (query >= q_begin) & (query < q_end)
    mask = (slot < free) | (slot - free < local - sinks)
    tl.store(out + slot, tl.where(mask & real, block, -1), mask=slot < TOPK)
    found = local - sinks
    if COUNT > 0:
        if real & (found > COUNT):
            key_ptr += flat * room + sinks
            at = tl.arange(0, HELD)
            held = tl.load(key_ptr + at, mask=at < found, other=_LEAST) >> BITS
            low = tl.full([], _LEAST, tl.int32) >> BITS
            high = tl.max(held, 0) + 1
            if not ALL_HELD:
                for start in range(HELD, found, HELD):
                    more = tl.load(key_ptr + start + at, mask=start + at < found, other=_LEAST) >> BITS
                    high = tl.maximum(high, tl.max(more, 0) + 1)
            above = tl.zeros([], tl.int32)
            first = tl.maximum(high - (_NEAR >> BITS), low + 1)
            second = tl.maximum(high - 4 * (_NEAR >> BITS), low + 1)
            third = tl.maximum(high - 16 * (_NEAR >> BITS), low + 1)
            while high - low > 1:
                reach = _reach(held, first, second, third)
                if not ALL_HELD:
                    for start in range(HELD, found, HELD):
                        more = tl.load(key_ptr + start + at, mask=start + at < found, other=_LEAST) >> BITS
                        reach += _reach(more, first, second, third)
                low, high, above = _narrow(low, high, above, reach, first, second, third, COUNT)
                quarter = tl.maximum((high - low) >> 2, 1)
                first = tl.maximum(high - quarter, low + 1)
                second = tl.maximum(high - 2 * quarter, low + 1)
                third = tl.maximum(high - 3 * quarter, low + 1)
            tl.debug_barrier()  # the slots written above are overwritten below
            larger = tl.zeros([], tl.int32)
            equal = above
            for start in range(0, found if not ALL_HELD else HELD, HELD):
                more = held
                if not ALL_HELD:
                    more = tl.load(key_ptr + start + at, mask=start + at < found, other=_LEAST) >> BITS
                is_larger = more >= high
                is_equal = (more >= low) & (more < high) & (start + at < found)
                # both running totals in one scan: 16 bits are enough for HELD
                total = tl.cumsum(is_larger.to(tl.int32) + (is_equal.to(tl.int32) << 16), 0)
                place = tl.where(is_equal, equal + (total >> 16), larger + (total & 0xFFFF)) - 1
                taken = (is_larger | is_equal) & (place < COUNT)
                tl.store(out + free + place, sinks + start + at, mask=taken)
                larger += tl.sum(is_larger.to(tl.int32), 0)
                equal += tl.sum(is_equal.to(tl.int32), 0)


@triton.jit
def _reach(keys, first, second, third):
    """Number of keys at or above each of three thresholds, packed in 21 bits each to need one reduction."""
    one = (keys >= first).to(tl.int64)
    two = (keys >= second).to(tl.int64) << 21
    return tl.sum(one + two + ((keys >= third).to(tl.int64) << 42), 0)


@triton.jit
def _narrow(low, high, above, reach, first, second, third, COUNT: tl.constexpr):
    """New `low`, `high` and count of keys >= `high`; `high > first >= second >= third > low` were counted."""
    one = (reach & 0x1FFFFF).to(tl.int32)
    two = ((reach >> 21) & 0x1FFFFF).to(tl.int32)
    three = (reach >> 42).to(tl.int32)
    low = tl.where(three >= COUNT, third, low)
    low = tl.where(two >= COUNT, second, low)
    low = tl.where(one >= COUNT, first, low)
    above = tl.where(one < COUNT, one, above)
    high = tl.where(one < COUNT, first, high)
    above = tl.where(two < COUNT, two, above)
    high = tl.where(two < COUNT, second, high)
    above = tl.where(three < COUNT, three, above)
    high = tl.where(three < COUNT, third, high)
    # exactly COUNT keys >= `low`: these are the choice, and no ties need breaking
    exact = (one == COUNT) | (two == COUNT) | (three == COUNT)
    exactly = tl.where(one == COUNT, first, tl.where(two == COUNT, second, third))
    return tl.where(exact, exactly, low), tl.where(exact, exactly, high), tl.where(exact, COUNT, above)
