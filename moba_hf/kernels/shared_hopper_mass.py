"""Masses of sampled rows for Hopper, in Gluon; computes the same as `shared_mass`.

Legend: B block size, D head dim, P parts of a block, N blocks of a step, S stages of the ring.

A program holds sampled rows of one tile and some heads of its kv head, 64 in each of two warpgroups. A
producer warp streams the summaries of N blocks at a time through a ring of S stages. While one warpgroup
waits for its matrix products, the other computes exponentials. All rows of a program have the same
candidates, so only the last step is masked. The masses of 32 blocks are stored in the order in which threads
hold them (`slots`).

`mass_step` cannot compute rows whose masses differ by more than about 2^140. A program with such a row starts
again, with `checked_step`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from moba_hf.kernels.hopper.common import barrier, load_tile, product_layout, row_layout
from moba_hf.kernels.layout import (
    INFO_COLUMNS,
    LOWEST,
    PLAN_BATCH,
    PLAN_FIRST_BLOCK,
    PLAN_POSITION,
    PLAN_Q_BEGIN,
    PLAN_Q_END,
    TOTAL_COLUMNS,
    TOTAL_HIGH,
    TOTAL_MASS,
)
from moba_hf.kernels.shared_hopper_mass_steps import checked_step, mass_step, reference_of

# From this total on, a program starts again.
_MOST = gl.constexpr(2.0**100)


@gluon.jit
def _produce(
    center_desc,
    spread_desc,
    ring,
    again,
    kv_head,
    base,
    columns,
    P: gl.constexpr,
    N: gl.constexpr,
    S: gl.constexpr,
):
    """Streams the summaries of the first `columns` blocks, counted from flat block `base`, into the ring.

    Does so a second time if a consumer asks for it.
    """
    centers, spreads, ready, free = ring
    SIZE: gl.constexpr = (P + 1) * center_desc.block_type.nbytes + P * spread_desc.block_type.nbytes
    steps = (columns + N - 1) // N
    end = steps
    step = 0
    while step < end:
        stage = step % S
        first = base + step % steps * N
        mbarrier.wait(free.index(stage), (step // S & 1) ^ 1)
        mbarrier.expect(ready.index(stage), SIZE)
        for part in gl.static_range(P):
            at = [kv_head, part, first, 0]
            load_tile(spread_desc, at, ready.index(stage), spreads.index(stage * P + part))
            load_tile(center_desc, at, ready.index(stage), centers.index(stage * (P + 1) + part))
        load_tile(center_desc, [kv_head, P, first, 0], ready.index(stage), centers.index(stage * (P + 1) + P))
        step += 1
        if step == steps:
            end += steps * _asked(again, 1)


@gluon.jit
def _ask(again, bad, PART: gl.constexpr):
    """Tells the other partitions of the program whether some row `bad (64,)` of this one is not done."""
    flags, verdict = again
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    flags.index(PART).store(gl.full([1], 0, gl.int32, layout) + gl.max(bad.to(gl.int32), 0))
    barrier()
    mbarrier.arrive(verdict, count=1)


@gluon.jit
def _asked(again, WARPS: gl.constexpr):
    """Waits for both consumers; returns 1 if the program starts again, otherwise 0."""
    flags, verdict = again
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    mbarrier.wait(verdict, 0)
    return gl.max(gl.maximum(flags.index(0).load(layout), flags.index(1).load(layout)), 0)


@gluon.jit
def _load_queries(
    q_smem,
    square_smem,
    q_ptr,
    place,
    q_strides,
    group_size,
    PART: gl.constexpr,
    SAMPLE: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    HEADS: gl.constexpr,
    HALVES: gl.constexpr,
):
    """Fills shared memory: queries `(64, D)`, and the squared norms `(64, D / 2)` of their rotary pairs."""
    D: gl.constexpr = q_smem.shape[1]
    SPLIT: gl.constexpr = ROWS // BLOCK_ROWS
    q_layout: gl.constexpr = row_layout(D)
    pair_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    offset, there, head, sampled = _rows(
        place, q_strides, group_size, PART, SAMPLE, BLOCK_ROWS, HEADS, SPLIT, q_layout
    )
    dim = gl.arange(0, D, gl.SliceLayout(0, q_layout))[None, :]
    q_smem.store(gl.load(q_ptr + offset[:, None] + dim, mask=there[:, None], other=0.0))
    offset, there, head, sampled = _rows(
        place, q_strides, group_size, PART, SAMPLE, BLOCK_ROWS, HEADS, SPLIT, pair_layout
    )
    pair = gl.arange(0, D // 2, gl.SliceLayout(0, pair_layout))[None, :]
    low = pair if HALVES else 2 * pair
    beside = pair + D // 2 if HALVES else 2 * pair + 1
    at = q_ptr + offset[:, None]
    a = gl.load(at + low, mask=there[:, None], other=0.0).to(gl.float32)
    b = gl.load(at + beside, mask=there[:, None], other=0.0).to(gl.float32)
    square_smem.store((a * a + b * b).to(square_smem.dtype))
    fence_async_shared()
    barrier()


@gluon.jit
def _consume(
    q_smem,
    square_smem,
    PART: gl.constexpr,
    ring,
    again,
    pointers,
    place,
    sizes,
    q_strides,
    scales,
    SAMPLE: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    HEADS: gl.constexpr,
    LOG2_SIZE: gl.constexpr,
    P: gl.constexpr,
    HALVES: gl.constexpr,
    N: gl.constexpr,
    S: gl.constexpr,
):
    """Handles rows `[64 * PART, 64 * PART + 64)` of a program."""
    q_ptr, mass_ptr, high_ptr, total_ptr = pointers
    batch, q_begin, q_end, position, first, number, kv_head, columns = place
    group_size, num_heads, mass_blocks = sizes
    SPLIT: gl.constexpr = ROWS // BLOCK_ROWS
    layout: gl.constexpr = product_layout(N)
    _load_queries(
        q_smem,
        square_smem,
        q_ptr,
        place,
        q_strides,
        group_size,
        PART,
        SAMPLE,
        ROWS,
        BLOCK_ROWS,
        HEADS,
        HALVES,
    )
    offset, there, head, sampled = _rows(
        place, q_strides, group_size, PART, SAMPLE, BLOCK_ROWS, HEADS, SPLIT, layout
    )
    item = gl.where(there, (number * num_heads + head) * ROWS + sampled, -1)
    places = (mass_ptr, high_ptr, mass_blocks, item)
    operands = (q_smem, square_smem)
    steps = (columns + N - 1) // N
    high = reference_of(q_smem, ring, scales[0], columns, LOG2_SIZE, N)
    total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, layout))
    for step in range(steps - 1):
        total = mass_step(
            operands, ring, step, scales, (high, total), places, columns, LOG2_SIZE, P, N, S, False
        )
    total = mass_step(
        operands, ring, steps - 1, scales, (high, total), places, columns, LOG2_SIZE, P, N, S, True
    )
    _ask(again, gl.where(total < _MOST, 0, 1), PART)  # NaN is not less
    if _asked(again, 4) > 0:
        high = gl.full([64], LOWEST, gl.float32, gl.SliceLayout(1, layout))
        total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, layout))
        for step in range(steps):
            high, total = checked_step(
                operands, ring, step, steps, scales, (high, total), places, columns, LOG2_SIZE, P, N, S
            )
    total_at = total_ptr + item.to(gl.int64) * TOTAL_COLUMNS
    gl.store(total_at + TOTAL_HIGH, high, mask=item >= 0)
    gl.store(total_at + TOTAL_MASS, total, mask=item >= 0)


@gluon.jit
def _rows(
    place,
    q_strides,
    group_size,
    PART: gl.constexpr,
    SAMPLE: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    HEADS: gl.constexpr,
    SPLIT: gl.constexpr,
    layout: gl.constexpr,
):
    """Of each row: offset of its query, whether it is in the call, its head, its number in the tile."""
    batch, q_begin, q_end, position, first, number, kv_head, columns = place
    splits = (group_size + HEADS - 1) // HEADS
    row = 64 * PART + gl.arange(0, 64, gl.SliceLayout(1, layout))
    in_group = gl.program_id(1) % splits * HEADS + row % HEADS
    head = kv_head * group_size + in_group
    sampled = row // HEADS + gl.program_id(0) % SPLIT * BLOCK_ROWS
    end = position + q_end - q_begin
    begin = first + sampled * SAMPLE
    at = gl.minimum(begin + SAMPLE, end) - 1
    there = (in_group < group_size) & (at >= position) & (begin < end)
    query = gl.where(there, q_begin + at - position, 0).to(gl.int64)
    offset = batch.to(gl.int64) * q_strides[0] + gl.where(there, head, 0).to(gl.int64) * q_strides[1]
    return offset + query * q_strides[2], there, head, sampled


@gluon.jit(do_not_specialize=["first_tile", "last_tile", "dense_below"])
def row_masses_kernel(
    q_ptr,
    center_desc,
    spread_desc,
    mass_ptr,
    high_ptr,
    total_ptr,
    tile_ptr,
    q_strides,
    mass_blocks,
    first_tile,
    last_tile,
    num_heads,
    group_size,
    block_size,
    dense_below,
    scale,
    square_scale,
    TILE: gl.constexpr,
    SAMPLE: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    HEADS: gl.constexpr,
    PARTS: gl.constexpr,
    LOG2_SIZE: gl.constexpr,
    D: gl.constexpr,
    HALVES: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
):
    SPLIT: gl.constexpr = ROWS // BLOCK_ROWS  # programs that share the rows of one tile
    number = (gl.num_programs(0) - 1 - gl.program_id(0)) // SPLIT  # the longest tiles come first
    tile = first_tile + number
    info = tile_ptr + gl.minimum(tile, last_tile - 1).to(gl.int64) * INFO_COLUMNS
    position = gl.load(info + PLAN_POSITION)
    first = position // TILE * TILE
    columns = gl.where((tile < last_tile) & (first >= dense_below), first // block_size, 0)
    kv_head = gl.program_id(1) // ((group_size + HEADS - 1) // HEADS)
    if columns > 0:
        dtype: gl.constexpr = q_ptr.dtype.element_ty
        spread_dtype: gl.constexpr = spread_desc.dtype
        q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
        square_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D // 2], spread_dtype)
        queries = gl.allocate_shared_memory(dtype, [2, 64, D], q_shared)
        squares = gl.allocate_shared_memory(spread_dtype, [2, 64, D // 2], square_shared)
        centers = gl.allocate_shared_memory(dtype, [STAGES * (PARTS + 1), 1, 1, N, D], center_desc.layout)
        spreads = gl.allocate_shared_memory(
            spread_dtype, [STAGES * PARTS, 1, 1, N, D // 2], spread_desc.layout
        )
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(ready.index(i), count=1)
            mbarrier.init(free.index(i), count=2)
        flags = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        verdict = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(verdict, count=2)
        fence_async_shared()
        again = (flags, verdict)
        ring = (centers, spreads, ready, free)
        pointers = (q_ptr, mass_ptr, high_ptr, total_ptr)
        place = (
            gl.load(info + PLAN_BATCH),
            gl.load(info + PLAN_Q_BEGIN),
            gl.load(info + PLAN_Q_END),
            position,
            first,
            number,
            kv_head,
            columns,
        )
        sizes = (group_size, num_heads, mass_blocks)
        scales = (scale, square_scale, 2 * LOG2_SIZE / square_scale, gl.sqrt(2 * LOG2_SIZE * square_scale))
        base = gl.load(info + PLAN_FIRST_BLOCK)
        shared = (ring, again, pointers, place, sizes, q_strides, scales)
        shape: gl.constexpr = (SAMPLE, ROWS, BLOCK_ROWS, HEADS, LOG2_SIZE, PARTS, HALVES, N, STAGES)
        gl.warp_specialize(
            [
                (_consume, (queries.index(0), squares.index(0), 0) + shared + shape),
                (_consume, (queries.index(1), squares.index(1), 1) + shared + shape),
                (_produce, (center_desc, spread_desc, ring, again, kv_head, base, columns, PARTS, N, STAGES)),
            ],
            [4, 1],
            [232, 24],
        )
