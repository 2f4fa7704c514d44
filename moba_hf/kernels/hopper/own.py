"""Attention of queries to their own blocks for Hopper, in Gluon; like `own`, but for complete blocks only.

Legend: D and DV head dims of keys and values, G query heads of a kv head, S stages of the ring.

With n persistent programs, each takes every n-th (query tile, kv head): up to 128 / G tokens of one block
times G heads (see `tiling`). A producer warp streams the block's keys and values, up to the tile's last
token, through the ring (`common`). Two consumer warpgroups hold 64 rows each. Key tiles that extend beyond
the tile's first token are masked by position. Incomplete blocks are left to `own`, since keys past their end
must not be read.
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
    product_layout,
    row_layout,
)
from moba_hf.kernels.layout import (
    INFO_COLUMNS,
    LN_2,
    LOG2_E,
    TILE_BATCH,
    TILE_BEFORE,
    TILE_COMPLETE,
    TILE_FIRST_KEY,
    TILE_HIGH,
    TILE_LOW,
    TILE_ORIGIN,
)


@gluon.jit
def _produce(
    k_desc,
    v_desc,
    ring,
    info_ptr,
    tiles,
    work,
    TILE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fills the ring with the keys that each tile sees."""
    step = 0
    for item in range(gl.program_id(0), work, gl.num_programs(0)):
        info = info_ptr + item % tiles * INFO_COLUMNS
        batch = gl.load(info + TILE_BATCH)
        seen = gl.minimum(gl.load(info + TILE_BEFORE) + TILE, BLOCK_SIZE)
        first = gl.load(info + TILE_FIRST_KEY)
        if gl.load(info + TILE_COMPLETE) != 0:
            step = fill_ring(k_desc, v_desc, ring, batch, item // tiles, first, seen, step, BLOCK_N, STAGES)


@gluon.jit
def _tile(info_ptr, item, tiles, work):
    """A tile's batch row, number of keys before it in its block, first query, query range, completeness."""
    info = info_ptr + gl.minimum(item, work - 1) % tiles * INFO_COLUMNS
    whole = gl.load(info + TILE_COMPLETE)
    return (
        gl.load(info + TILE_BATCH),
        gl.load(info + TILE_BEFORE),
        gl.load(info + TILE_ORIGIN),
        gl.load(info + TILE_LOW),
        gl.load(info + TILE_HIGH),
        whole,
    )


@gluon.jit
def _rows(batch, origin, low, high, head, row, q_strides, G: gl.constexpr):
    """int64 element offsets of a tile's query rows; rows past its end repeat a row inside."""
    query = gl.minimum(gl.maximum(origin + row // G, low), high - 1)
    offset = batch.to(gl.int64) * q_strides[0] + query.to(gl.int64) * q_strides[2]
    return offset + (head * G + row % G).to(gl.int64) * q_strides[1]


@gluon.jit
def _consume(
    q_smem,
    ring,
    data,
    PART: gl.constexpr,
    G: gl.constexpr,
    TILE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
    FINAL: gl.constexpr,
):
    """Attends rows `[64 * PART, 64 * PART + 64)` of every tile."""
    q_ptr, out_ptr, lse_ptr, info_ptr, tiles, work, num_heads, q_len, q_strides, scale = data
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
    batch, before, origin, low, high, whole = _tile(info_ptr, first, tiles, work)
    at = _rows(batch, origin, low, high, gl.minimum(first, work - 1) // tiles, q_row, q_strides, G)
    q = gl.load(q_ptr + at[:, None] + q_column)
    next_batch, next_before, next_origin, next_low, next_high, next_whole = _tile(
        info_ptr, first + each, tiles, work
    )
    for item in range(first, work, each):
        barrier()  # all warps have finished with the previous queries
        q_smem.store(q)
        fence_async_shared()
        barrier()
        next_head = gl.minimum(item + each, work - 1) // tiles
        at = _rows(next_batch, next_origin, next_low, next_high, next_head, q_row, q_strides, G)
        q = gl.load(q_ptr + at[:, None] + q_column)
        later = _tile(info_ptr, item + 2 * each, tiles, work)
        if whole != 0:
            seen = gl.minimum(before + TILE, BLOCK_SIZE)
            last_seen = before + s_row // G
            acc, m_i, l_i, step = attend_ring(
                q_smem, ring, step, seen, before, last_seen, scale, BLOCK_N, D, DV, STAGES, True, False, False
            )
            head = item // tiles
            out = acc * gl.convert_layout(1.0 / l_i, gl.SliceLayout(1, o_layout))[:, None]
            lse = m_i + gl.log2(l_i)
            if FINAL:
                lse = lse * LN_2
            v_query = origin + v_row // G
            v_there = (v_row // G < seen - before) & (v_query >= low) & (v_query < high)
            target = (batch.to(gl.int64) * q_len + v_query) * num_heads + head * G + v_row % G
            target = out_ptr + target[:, None] * DV + v_column
            gl.store(target, gl.convert_layout(out.to(dtype), v_layout), mask=v_there[:, None])
            s_query = origin + s_row // G
            s_there = (s_row // G < seen - before) & (s_query >= low) & (s_query < high)
            row = (batch.to(gl.int64) * num_heads + head * G + s_row % G) * q_len + s_query
            gl.store(lse_ptr + row, lse, mask=s_there)
        batch, before, origin, low, high, whole = (
            next_batch,
            next_before,
            next_origin,
            next_low,
            next_high,
            next_whole,
        )
        next_batch, next_before, next_origin, next_low, next_high, next_whole = later


@gluon.jit(do_not_specialize=["num_seqs", "q_len"])
def own_kernel(
    q_ptr,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    info_ptr,
    tile_offset_ptr,
    num_seqs,
    num_kv_heads,
    q_len,
    q_strides,
    softmax_scale,
    G: gl.constexpr,
    TILE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
    FINAL: gl.constexpr,
):
    tiles = gl.load(tile_offset_ptr + num_seqs)
    work = tiles * num_kv_heads
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    q0 = gl.allocate_shared_memory(dtype, [64, D], q_shared)
    q1 = gl.allocate_shared_memory(dtype, [64, D], q_shared)
    ring = allocate_ring(k_desc, v_desc, dtype, BLOCK_N, D, DV, STAGES, 2)
    scale = softmax_scale * LOG2_E
    data = (q_ptr, out_ptr, lse_ptr, info_ptr, tiles, work, num_kv_heads * G, q_len, q_strides, scale)
    if work > 0:
        gl.warp_specialize(
            [
                (_consume, (q0, ring, data, 0, G, TILE, BLOCK_SIZE, BLOCK_N, D, DV, STAGES, FINAL)),
                (_consume, (q1, ring, data, 1, G, TILE, BLOCK_SIZE, BLOCK_N, D, DV, STAGES, FINAL)),
                (_produce, (k_desc, v_desc, ring, info_ptr, tiles, work, TILE, BLOCK_SIZE, BLOCK_N, STAGES)),
            ],
            [4, 1],
            [232, 24],
        )
