"""Attention of tiles over their lists of blocks for Hopper, in Gluon; computes the same as `shared_attend`.

Legend: T tile, B block size, D and DV head dims, G query heads of a kv head, S stages of the ring.

Persistent programs take (tile, head) items from a queue, one kv head after another, the longest lists first.
A producer warp streams the listed blocks, then the blocks that the tile overlaps, through the ring of
`hopper.common`. Two consumer warpgroups hold half of the tile's rows each. Items are drawn two ahead: while
one is attended, the queries of the next and the description of the one after it are loaded. A row's result
does not depend on which program draws it. A step has BLOCK_N keys: a part of a block, or two blocks. Tiles
that end within a step, or within a block if a step has two, are left to `shared_attend`, since keys past
their end must not be read.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
)

from moba_hf.kernels.hopper.common import allocate_ring, attend_ring, barrier, product_layout, row_layout
from moba_hf.kernels.layout import INFO_COLUMNS, LN_2, PLAN_BATCH, PLAN_POSITION, PLAN_Q_BEGIN, PLAN_Q_END
from moba_hf.kernels.shared_hopper_produce import place_of, produce, steps_of


@gluon.jit
def _item(pointers, item, first_tile, tiles, work, num_heads, G: gl.constexpr):
    """An item's batch row, query range (begin, end), position of its first query, head, number of blocks."""
    tile_ptr, list_ptr, count_ptr, counter_ptr = pointers
    tile, kv_head, in_group = place_of(gl.minimum(item, work - 1), tiles, G)
    info = tile_ptr + (first_tile + tile) * INFO_COLUMNS
    head = kv_head * G + in_group
    count = gl.load(count_ptr + tile.to(gl.int64) * num_heads + head)
    batch, q_begin = gl.load(info + PLAN_BATCH), gl.load(info + PLAN_Q_BEGIN)
    return batch, q_begin, gl.load(info + PLAN_Q_END), gl.load(info + PLAN_POSITION), head, count


@gluon.jit
def _rows(batch, q_begin, q_end, head, row, q_strides):
    """int64 element offsets of an item's query rows; rows past its end repeat the last one."""
    query = gl.minimum(q_begin + row, gl.maximum(q_end - 1, 0))
    offset = batch.to(gl.int64) * q_strides[0] + query.to(gl.int64) * q_strides[2]
    return offset + head.to(gl.int64) * q_strides[1]


@gluon.jit
def _consume(
    q_smem,
    ring,
    queue,
    pointers,
    data,
    PART: gl.constexpr,
    G: gl.constexpr,
    TILE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attends rows `[64 * PART, 64 * PART + 64)` of every item."""
    items, drawn, taken = queue
    q_ptr, out_ptr, lse_ptr, first_tile, tiles, work, num_heads, q_len, q_strides, scale = data
    M: gl.constexpr = 64
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    s_layout: gl.constexpr = product_layout(BLOCK_N)
    o_layout: gl.constexpr = product_layout(DV)
    q_layout: gl.constexpr = row_layout(D)
    v_layout: gl.constexpr = row_layout(DV)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    q_row = PART * M + gl.arange(0, M, gl.SliceLayout(1, q_layout))
    v_row = PART * M + gl.arange(0, M, gl.SliceLayout(1, v_layout))
    s_row = PART * M + gl.arange(0, M, gl.SliceLayout(1, s_layout))
    q_column = gl.arange(0, D, gl.SliceLayout(0, q_layout))[None, :]
    v_column = gl.arange(0, DV, gl.SliceLayout(0, v_layout))[None, :]
    step = 0
    turn = 0
    item = gl.program_id(0)
    batch, q_begin, q_end, position, head, count = _item(
        pointers, item, first_tile, tiles, work, num_heads, G
    )
    q = gl.load(q_ptr + _rows(batch, q_begin, q_end, head, q_row, q_strides)[:, None] + q_column)
    following = item + gl.num_programs(0)
    next_batch, next_begin, next_end, next_position, next_head, next_count = _item(
        pointers, following, first_tile, tiles, work, num_heads, G
    )
    while item < work:
        barrier()  # all warps have finished with the previous queries
        q_smem.store(q)
        fence_async_shared()
        barrier()
        at = _rows(next_batch, next_begin, next_end, next_head, q_row, q_strides)
        q = gl.load(q_ptr + at[:, None] + q_column)
        slot = turn % 2
        mbarrier.wait(drawn.index(slot), turn // 2 & 1)
        later = gl.max(items.index(slot).load(one), 0)
        barrier()
        mbarrier.arrive(taken.index(slot), count=1)
        turn += 1
        later_batch, later_begin, later_end, later_position, later_head, later_count = _item(
            pointers, later, first_tile, tiles, work, num_heads, G
        )
        listed, total, first = steps_of(position, q_end - q_begin, count, TILE, BLOCK_SIZE, BLOCK_N)
        if total > 0:
            last_seen = count * BLOCK_SIZE + position - first + s_row
            acc, m_i, l_i, step = attend_ring(
                q_smem, ring, step, total, listed, last_seen, scale, BLOCK_N, D, DV, STAGES, True, True, True
            )
            out = acc * gl.convert_layout(1.0 / l_i, gl.SliceLayout(1, o_layout))[:, None]
            lse = (m_i + gl.log2(l_i)) * LN_2
            v_query = q_begin + v_row
            target = (batch.to(gl.int64) * q_len + v_query) * num_heads + head
            target = out_ptr + target[:, None] * DV + v_column
            gl.store(target, gl.convert_layout(out.to(dtype), v_layout), mask=(v_query < q_end)[:, None])
            s_query = q_begin + s_row
            row = (batch.to(gl.int64) * num_heads + head) * q_len + s_query
            gl.store(lse_ptr + row, lse, mask=s_query < q_end)
        item = following
        following = later
        batch, q_begin, q_end, position = next_batch, next_begin, next_end, next_position
        head, count = next_head, next_count
        next_batch, next_begin, next_end, next_position = later_batch, later_begin, later_end, later_position
        next_head, next_count = later_head, later_count


@gluon.jit(do_not_specialize=["q_len", "first_tile", "tiles"])
def attend_lists_kernel(
    q_ptr,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    tile_ptr,
    list_ptr,
    count_ptr,
    counter_ptr,
    first_tile,
    tiles,
    list_length,
    num_kv_heads,
    q_len,
    q_strides,
    scale,
    G: gl.constexpr,
    TILE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
):
    work = tiles * num_kv_heads * G
    num_heads = num_kv_heads * G
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    q0 = gl.allocate_shared_memory(dtype, [64, D], q_shared)
    q1 = gl.allocate_shared_memory(dtype, [64, D], q_shared)
    items = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    drawn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(drawn.index(i), count=1)
        mbarrier.init(taken.index(i), count=2)
    ring = allocate_ring(k_desc, v_desc, dtype, BLOCK_N, D, DV, STAGES, 2)
    queue = (items, drawn, taken)
    pointers = (tile_ptr, list_ptr, count_ptr, counter_ptr)
    data = (q_ptr, out_ptr, lse_ptr, first_tile, tiles, work, num_heads, q_len, q_strides, scale)
    if gl.program_id(0) < work:
        gl.warp_specialize(
            [
                (_consume, (q0, ring, queue, pointers, data, 0, G, TILE, BLOCK_SIZE, BLOCK_N, D, DV, STAGES)),
                (_consume, (q1, ring, queue, pointers, data, 1, G, TILE, BLOCK_SIZE, BLOCK_N, D, DV, STAGES)),
                (
                    produce,
                    (
                        k_desc,
                        v_desc,
                        ring,
                        queue,
                        pointers,
                        first_tile,
                        tiles,
                        work,
                        list_length,
                        num_heads,
                        G,
                        TILE,
                        BLOCK_SIZE,
                        BLOCK_N,
                        STAGES,
                    ),
                ),
            ],
            [4, 1],
            [232, 24],
        )
