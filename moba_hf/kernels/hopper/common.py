"""Shared by the Gluon kernels for Hopper: finding rows, and attending a ring of key tiles.

A *ring* holds STAGES tiles of BLOCK_N keys and their values in shared memory. A producer warp fills it by
TMA, in the order in which the consumers use the tiles. A `ready` barrier signals that a tile has arrived, a
`free` barrier that all consumers have finished with it. Both sides count tiles in `step`, across all work.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moba_hf.kernels.layout import INFO_COLUMNS, RUN_BEGIN, RUN_END

# Gluon renamed these: thread_barrier until Triton 3.6, async_copy_global_to_shared until 3.7, _reinterpret
# until 3.8.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or (
    gl.shared_memory_descriptor._reinterpret
)
load_rows = (
    async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
)


@gluon.constexpr_function
def product_layout(n):
    """The layout in which a warpgroup holds the `(64, n)` result of a matrix product."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16])


@gluon.constexpr_function
def row_layout(dim):
    """The layout in which a warpgroup loads and stores rows of `dim` numbers, 8 to a thread."""
    return gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [4, 1], [1, 0])


@gluon.jit
def run_of_tiles(total):
    """The consecutive tiles `[first, last)` of this program; counts differ by at most one across programs."""
    each = total // gl.num_programs(0)
    rest = total % gl.num_programs(0)
    first = gl.program_id(0) * each + gl.minimum(gl.program_id(0), rest)
    return first, first + each + (gl.program_id(0) < rest).to(gl.int32)


@gluon.jit
def tile_rows(info_ptr, tile, total):
    """The range of pairs of a tile of `routing`; past the end, that of the last tile."""
    info = info_ptr + gl.minimum(tile, total - 1) * INFO_COLUMNS
    return gl.load(info + RUN_BEGIN), gl.load(info + RUN_END)


@gluon.jit
def load_pairs(pair_ptr, row, begin, end):
    """The pairs, int32, of rows `begin + row`; past the end of the tile, its last pair."""
    return gl.load(pair_ptr + gl.minimum(begin + row, end - 1)).to(gl.int32)


@gluon.jit
def query_offsets(
    pair,
    first_row,
    q_len,
    q_strides,
    SLOTS: gl.constexpr,
    HEADS: gl.constexpr,
    ONE_BATCH: gl.constexpr,
):
    """int64 element offsets of the pairs' query rows."""
    row_head = pair // SLOTS
    row = first_row + row_head // HEADS
    offset = (row_head % HEADS).to(gl.int64) * q_strides[1]
    if ONE_BATCH:
        return offset + row.to(gl.int64) * q_strides[2]
    else:
        offset += (row // q_len).to(gl.int64) * q_strides[0]
        return offset + (row % q_len).to(gl.int64) * q_strides[2]


@gluon.jit
def allocate_ring(
    k_desc,
    v_desc,
    dtype: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    """Shared memory and barriers of a ring: keys, values, then the ready and free barriers of each."""
    keys = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, DV], v_desc.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=CONSUMERS)
        mbarrier.init(v_free.index(i), count=CONSUMERS)
    fence_async_shared()
    return keys, values, k_ready, v_ready, k_free, v_free


@gluon.jit
def fill_ring(
    k_desc, v_desc, ring, batch, head, first, num_keys, step, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):
    """Copies the tiles of keys `first` to `first + num_keys`, and their values; returns the next step."""
    keys, values, k_ready, v_ready, k_free, v_free = ring
    for start in range(0, num_keys, BLOCK_N):
        stage = step % STAGES
        phase = (step // STAGES & 1) ^ 1
        mbarrier.wait(k_free.index(stage), phase)
        mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
        load_tile(k_desc, [batch, head, first + start, 0], k_ready.index(stage), keys.index(stage))
        mbarrier.wait(v_free.index(stage), phase)
        mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
        load_tile(v_desc, [batch, head, first + start, 0], v_ready.index(stage), values.index(stage))
        step += 1
    return step


@gluon.jit
def _weights(
    s,
    m_i,
    l_i,
    scale,
    last_seen,
    seen_by_all,
    start,
    dtype: gl.constexpr,
    p_layout: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Softmax weights of a tile's scores, the factor that rescales earlier tiles, and new `m_i` and `l_i`."""
    if MASKED:
        if seen_by_all < start + s.shape[1]:
            column = start + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
            s = gl.where(column[None, :] <= last_seen[:, None], s, float("-inf"))
    m_new = gl.maximum(m_i, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - m_new[:, None])
    alpha = gl.exp2(m_i - m_new)
    l_i = l_i * alpha + gl.sum(p, 1)
    return gl.convert_layout(p.to(dtype), p_layout), alpha, m_new, l_i


@gluon.jit
def attend_ring(
    q_smem,
    ring,
    step,
    count,
    seen_by_all,
    last_seen,
    scale,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    OVERLAP: gl.constexpr,
    TILES: gl.constexpr,
):
    """Attends `count` > 0 keys of the ring from 64 query rows; every row must see the first key.

    The scores of tile j + 1 and the output of tile j are issued together. With OVERLAP, the weights of tile
    j + 1 are computed while the output of tile j is still in flight; this helps routed blocks but not masked
    own blocks.

    Args:
        last_seen: `(64,)`, the last key that each row sees; with MASKED, applied to tiles that extend beyond
            `seen_by_all`.
        TILES: `count` and `seen_by_all` are numbers of tiles, not of keys.

    Returns:
        `acc (64, DV)`, fp32, not normalised; `m_i` and `l_i`, `(64,)`, in base 2; the next step.
    """
    keys, values, k_ready, v_ready, k_free, v_free = ring
    M: gl.constexpr = 64
    EACH: gl.constexpr = 1 if TILES else BLOCK_N
    MASKED_LATER: gl.constexpr = MASKED and not TILES
    dtype: gl.constexpr = q_smem.dtype
    s_layout: gl.constexpr = product_layout(BLOCK_N)
    o_layout: gl.constexpr = product_layout(DV)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    m_i = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    l_i = gl.full([M], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
    acc = gl.full([M, DV], 0.0, gl.float32, o_layout)
    zeros = gl.full([M, BLOCK_N], 0.0, gl.float32, s_layout)
    stage = step % STAGES
    phase = step // STAGES & 1
    mbarrier.wait(k_ready.index(stage), phase)
    key_tile = keys.index(stage).reshape([BLOCK_N, D]).permute((1, 0))
    s = warpgroup_mma(q_smem, key_tile, zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    barrier()
    mbarrier.arrive(k_free.index(stage), count=1)
    unmasked = seen_by_all * (BLOCK_N // EACH)
    p, alpha, m_i, l_i = _weights(s, m_i, l_i, scale, last_seen, unmasked, 0, dtype, p_layout, MASKED)
    for at in range(EACH, count, EACH):
        later = (step + 1) % STAGES
        later_phase = (step + 1) // STAGES & 1
        mbarrier.wait(k_ready.index(later), later_phase)
        key_tile = keys.index(later).reshape([BLOCK_N, D]).permute((1, 0))
        s = warpgroup_mma(q_smem, key_tile, zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(stage), phase)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
        acc = warpgroup_mma(p, values.index(stage).reshape([BLOCK_N, DV]), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        if not OVERLAP:
            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            mbarrier.arrive(k_free.index(later), count=1)
            mbarrier.arrive(v_free.index(stage), count=1)
        if MASKED and TILES:
            if at >= seen_by_all:
                column = at * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
                s = gl.where(column[None, :] <= last_seen[:, None], s, float("-inf"))
        next_p, alpha, m_i, l_i = _weights(
            s, m_i, l_i, scale, last_seen, unmasked, at * (BLOCK_N // EACH), dtype, p_layout, MASKED_LATER
        )
        if OVERLAP:
            # returns immediately; its branch keeps ptxas from moving the wgmma wait ahead of the softmax
            mbarrier.wait(k_ready.index(later), later_phase)
            acc, next_p = warpgroup_mma_wait(0, deps=[acc, next_p])
            barrier()
            mbarrier.arrive(k_free.index(later), count=1)
            mbarrier.arrive(v_free.index(stage), count=1)
        p = next_p
        step += 1
        stage = later
        phase = later_phase
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
    mbarrier.wait(v_ready.index(stage), phase)
    acc = warpgroup_mma(p, values.index(stage).reshape([BLOCK_N, DV]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    barrier()
    mbarrier.arrive(v_free.index(stage), count=1)
    return acc, m_i, l_i, step + 1
