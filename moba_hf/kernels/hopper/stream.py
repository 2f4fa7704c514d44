"""Routed attention for Hopper, in Gluon, for long blocks; computes the same as `routed` and is compute-bound.

Legend: D and DV head dims of keys and values, S stages of the ring (see `common`).

With n persistent programs, each takes every n-th tile of 128 pairs that chose one block (see `routing`). A
producer warp streams the block's keys and values through the ring. Two consumer warpgroups hold 64 rows each,
so that the softmax of one overlaps the matrix products of the other. While a tile is attended, the query rows
of the next tile are gathered into registers and the pairs of the one after it are loaded. The normalised
outputs in q's dtype and the base-2 log-sum-exps are scattered to the places of their pairs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from moba_hf.kernels.hopper.common import (
    allocate_ring,
    attend_ring,
    barrier,
    fill_ring,
    load_pairs,
    product_layout,
    query_offsets,
    row_layout,
    tile_rows,
)
from moba_hf.kernels.layout import INFO_COLUMNS, LOG2_E, RUN_BATCH, RUN_FIRST_KEY, RUN_KV_HEAD


@gluon.jit
def _produce(
    k_desc,
    v_desc,
    ring,
    info_ptr,
    total,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fills the ring with each tile's block."""
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        info = info_ptr + tile * INFO_COLUMNS
        batch = gl.load(info + RUN_BATCH)
        head = gl.load(info + RUN_KV_HEAD)
        first = gl.load(info + RUN_FIRST_KEY)
        step = fill_ring(k_desc, v_desc, ring, batch, head, first, BLOCK_SIZE, step, BLOCK_N, STAGES)


@gluon.jit
def _consume(
    q_smem,
    ring,
    data,
    PART: gl.constexpr,
    SLOTS: gl.constexpr,
    HEADS: gl.constexpr,
    ONE_BATCH: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attends rows `[64 * PART, 64 * PART + 64)` of every tile."""
    q_ptr, out_ptr, lse_ptr, pair_ptr, info_ptr, total, first_row, q_len, q_strides, scale = data
    M: gl.constexpr = 64
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    s_layout: gl.constexpr = product_layout(BLOCK_N)
    o_layout: gl.constexpr = product_layout(DV)
    q_layout: gl.constexpr = row_layout(D)
    v_layout: gl.constexpr = row_layout(DV)
    q_row = PART * M + gl.arange(0, M, gl.SliceLayout(1, q_layout))
    v_row = PART * M + gl.arange(0, M, gl.SliceLayout(1, v_layout))
    s_row = PART * M + gl.arange(0, M, gl.SliceLayout(1, s_layout))
    q_column = gl.arange(0, D, gl.SliceLayout(0, q_layout))[None, :]
    v_column = gl.arange(0, DV, gl.SliceLayout(0, v_layout))[None, :]
    each = gl.num_programs(0)
    first = gl.program_id(0)
    step = 0
    begin, end = tile_rows(info_ptr, first, total)
    pair = load_pairs(pair_ptr, q_row, begin, end)
    offset = query_offsets(pair, first_row, q_len, q_strides, SLOTS, HEADS, ONE_BATCH)
    q = gl.load(q_ptr + offset[:, None] + q_column)
    next_begin, next_end = tile_rows(info_ptr, first + each, total)
    pair = load_pairs(pair_ptr, q_row, next_begin, next_end)
    for tile in range(first, total, each):
        barrier()  # all warps have finished with the previous queries
        q_smem.store(q)
        fence_async_shared()
        barrier()
        offset = query_offsets(pair, first_row, q_len, q_strides, SLOTS, HEADS, ONE_BATCH)
        q = gl.load(q_ptr + offset[:, None] + q_column)
        later_begin, later_end = tile_rows(info_ptr, tile + 2 * each, total)
        pair = load_pairs(pair_ptr, q_row, later_begin, later_end)
        acc, m_i, l_i, step = attend_ring(
            q_smem, ring, step, BLOCK_SIZE, 0, s_row, scale, BLOCK_N, D, DV, STAGES, False, True, False
        )
        v_pair = load_pairs(pair_ptr, v_row, begin, end)
        s_pair = load_pairs(pair_ptr, s_row, begin, end)
        out = acc * gl.convert_layout(1.0 / l_i, gl.SliceLayout(1, o_layout))[:, None]
        out = gl.convert_layout(out.to(dtype), v_layout)
        at = out_ptr + v_pair.to(gl.int64)[:, None] * DV + v_column
        gl.store(at, out, mask=(begin + v_row < end)[:, None])
        gl.store(lse_ptr + s_pair, m_i + gl.log2(l_i), mask=begin + s_row < end)
        begin, end = next_begin, next_end
        next_begin, next_end = later_begin, later_end


@gluon.jit(do_not_specialize=["first_row", "num_bins", "q_len"])
def stream_kernel(
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
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
):
    total = gl.load(tile_begin_ptr + num_bins)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    q0 = gl.allocate_shared_memory(dtype, [64, D], q_shared)
    q1 = gl.allocate_shared_memory(dtype, [64, D], q_shared)
    ring = allocate_ring(k_desc, v_desc, dtype, BLOCK_N, D, DV, STAGES, 2)
    scale = softmax_scale * LOG2_E
    data = (q_ptr, out_ptr, lse_ptr, pair_ptr, info_ptr, total, first_row, q_len, q_strides, scale)
    if total > 0:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (q0, ring, data, 0, SLOTS, HEADS, ONE_BATCH, BLOCK_SIZE, BLOCK_N, D, DV, STAGES),
                ),
                (
                    _consume,
                    (q1, ring, data, 1, SLOTS, HEADS, ONE_BATCH, BLOCK_SIZE, BLOCK_N, D, DV, STAGES),
                ),
                (_produce, (k_desc, v_desc, ring, info_ptr, total, BLOCK_SIZE, BLOCK_N, STAGES)),
            ],
            [4, 1],
            [232, 24],
        )
