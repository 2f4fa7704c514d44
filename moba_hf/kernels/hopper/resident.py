"""Routed attention for Hopper, in Gluon, for blocks of at most 128 keys; memory-bound, so it overlaps waits.

Legend: D head dim of keys and values, C consumer warpgroups.

A persistent program takes a run of consecutive tiles of 64 * C pairs (see `routing`). A producer warp copies
the keys and values of each block in the run by TMA, one block ahead. Each consumer warpgroup handles 64 rows
of every tile:
1. query rows of the tile after next are gathered into shared memory by asynchronous copies;
2. scores, softmax and output of a tile take one step each, since the block is a single tile of keys;
3. the output goes through the tile's own query buffer, so that each thread stores 16 bytes at a time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moba_hf.kernels.hopper.common import (
    barrier,
    load_pairs,
    load_rows,
    load_tile,
    product_layout,
    query_offsets,
    row_layout,
    run_of_tiles,
    tile_rows,
)
from moba_hf.kernels.layout import INFO_COLUMNS, LOG2_E, RUN_BATCH, RUN_BIN, RUN_FIRST_KEY, RUN_KV_HEAD


@gluon.jit
def _produce(
    k_desc,
    v_desc,
    shared,
    info_ptr,
    total,
):
    """Copies the block of each tile whose block differs from the previous tile's."""
    k_ring, v_ring, ready, free = shared
    first, last = run_of_tiles(total)
    step = 0
    present = -1
    for tile in range(first, last):
        info = info_ptr + tile * INFO_COLUMNS
        bin = gl.load(info + RUN_BIN)
        if bin != present:
            stage = step % 2
            coordinates = [
                gl.load(info + RUN_BATCH),
                gl.load(info + RUN_KV_HEAD),
                gl.load(info + RUN_FIRST_KEY),
                0,
            ]
            mbarrier.wait(free.index(stage), (step // 2 & 1) ^ 1)
            mbarrier.expect(ready.index(stage), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            load_tile(k_desc, coordinates, ready.index(stage), k_ring.index(stage))
            load_tile(v_desc, coordinates, ready.index(stage), v_ring.index(stage))
            step += 1
        present = bin


@gluon.jit
def _consume(
    q_ring,
    shared,
    data,
    PART: gl.constexpr,
    SLOTS: gl.constexpr,
    HEADS: gl.constexpr,
    ONE_BATCH: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    D: gl.constexpr,
):
    """Attends rows `[64 * PART, 64 * PART + 64)` of every tile of the run."""
    k_ring, v_ring, ready, free = shared
    q_ptr, out_ptr, lse_ptr, pair_ptr, info_ptr, total, first_row, q_len, q_strides, scale = data
    M: gl.constexpr = 64
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    s_layout: gl.constexpr = product_layout(BLOCK_SIZE)
    o_layout: gl.constexpr = product_layout(D)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows_layout: gl.constexpr = row_layout(D)
    row = PART * M + gl.arange(0, M, gl.SliceLayout(1, rows_layout))
    s_row = PART * M + gl.arange(0, M, gl.SliceLayout(1, s_layout))
    column = gl.arange(0, D, gl.SliceLayout(0, rows_layout))
    first, last = run_of_tiles(total)
    begin, end = tile_rows(info_ptr, first, total)
    pair = load_pairs(pair_ptr, row, begin, end)
    offset = query_offsets(pair, first_row, q_len, q_strides, SLOTS, HEADS, ONE_BATCH)
    load_rows(q_ring.index(0), q_ptr + offset[:, None] + column[None, :])
    async_copy.commit_group()
    next_begin, next_end = tile_rows(info_ptr, first + 1, total)
    next_pair = load_pairs(pair_ptr, row, next_begin, next_end)
    offset = query_offsets(next_pair, first_row, q_len, q_strides, SLOTS, HEADS, ONE_BATCH)
    load_rows(q_ring.index(1), q_ptr + offset[:, None] + column[None, :])
    async_copy.commit_group()
    third_begin, third_end = tile_rows(info_ptr, first + 2, total)
    third_pair = load_pairs(pair_ptr, row, third_begin, third_end)
    fourth_begin, fourth_end = tile_rows(info_ptr, first + 3, total)
    zeros = gl.full([M, BLOCK_SIZE], 0.0, gl.float32, s_layout)
    nothing = gl.full([M, D], 0.0, gl.float32, o_layout)
    step = -1
    present = -1
    buffer = 0
    for tile in range(first, last):
        bin = gl.load(info_ptr + tile * INFO_COLUMNS + RUN_BIN)
        s_pair = load_pairs(pair_ptr, s_row, begin, end)
        if bin != present:
            if step >= 0:
                mbarrier.arrive(free.index(step % 2), count=1)
            step += 1
            mbarrier.wait(ready.index(step % 2), step // 2 & 1)
        present = bin
        stage = step % 2
        async_copy.wait_group(1)
        fence_async_shared()
        barrier()
        q_smem = q_ring.index(buffer)
        keys = k_ring.index(stage).reshape([BLOCK_SIZE, D]).permute((1, 0))
        s = warpgroup_mma(q_smem, keys, zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        m_i = gl.max(s, 1) * scale
        p = gl.exp2(s * scale - m_i[:, None])
        l_i = gl.sum(p, 1)
        p = gl.convert_layout(p.to(dtype), p_layout)
        values = v_ring.index(stage).reshape([BLOCK_SIZE, D])
        acc = warpgroup_mma(p, values, nothing, use_acc=False, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        out = acc * gl.convert_layout(1.0 / l_i, gl.SliceLayout(1, o_layout))[:, None]
        barrier()  # all warps have computed their scores, so the query buffer can be reused
        q_smem.store(out.to(dtype))
        gl.store(lse_ptr + s_pair, m_i + gl.log2(l_i), mask=begin + s_row < end)
        barrier()
        rows = q_smem.load(rows_layout)
        at = out_ptr + pair.to(gl.int64)[:, None] * D + column[None, :]
        gl.store(at, rows, mask=(begin + row < end)[:, None])
        offset = query_offsets(third_pair, first_row, q_len, q_strides, SLOTS, HEADS, ONE_BATCH)
        barrier()
        load_rows(q_smem, q_ptr + offset[:, None] + column[None, :])
        async_copy.commit_group()
        buffer = buffer ^ 1
        begin, end, pair = next_begin, next_end, next_pair
        next_begin, next_end, next_pair = third_begin, third_end, third_pair
        third_begin, third_end = fourth_begin, fourth_end
        third_pair = load_pairs(pair_ptr, row, third_begin, third_end)
        fourth_begin, fourth_end = tile_rows(info_ptr, tile + 4, total)
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["first_row", "num_bins", "q_len"])
def resident_kernel(
    q_ptr,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    pair_ptr,
    info_ptr,
    tile_begin_ptr,
    num_bins,
    first_row,
    q_len,
    q_strides,
    softmax_scale,
    SLOTS: gl.constexpr,
    HEADS: gl.constexpr,
    ONE_BATCH: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    D: gl.constexpr,
    CONSUMERS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    total = gl.load(tile_begin_ptr + num_bins)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    k_ring = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK_SIZE, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK_SIZE, D], v_desc.layout)
    q0 = gl.allocate_shared_memory(dtype, [2, 64, D], q_shared)
    q1 = gl.allocate_shared_memory(dtype, [2, 64, D], q_shared)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)
    fence_async_shared()
    scale = softmax_scale * LOG2_E
    if total > 0:
        shared = (k_ring, v_ring, ready, free)
        data = (q_ptr, out_ptr, lse_ptr, pair_ptr, info_ptr, total, first_row, q_len, q_strides, scale)
        if CONSUMERS == 2:
            gl.warp_specialize(
                [
                    (_consume, (q0, shared, data, 0, SLOTS, HEADS, ONE_BATCH, BLOCK_SIZE, D)),
                    (_consume, (q1, shared, data, 1, SLOTS, HEADS, ONE_BATCH, BLOCK_SIZE, D)),
                    (_produce, (k_desc, v_desc, shared, info_ptr, total)),
                ],
                [4, 1],
                [REGISTERS, 24],
            )
        else:
            q2 = gl.allocate_shared_memory(dtype, [2, 64, D], q_shared)
            gl.warp_specialize(
                [
                    (_consume, (q0, shared, data, 0, SLOTS, HEADS, ONE_BATCH, BLOCK_SIZE, D)),
                    (_consume, (q1, shared, data, 1, SLOTS, HEADS, ONE_BATCH, BLOCK_SIZE, D)),
                    (_consume, (q2, shared, data, 2, SLOTS, HEADS, ONE_BATCH, BLOCK_SIZE, D)),
                    (_produce, (k_desc, v_desc, shared, info_ptr, total)),
                ],
                [4, 4, 1],
                [REGISTERS, REGISTERS, 24],
            )
