"""Masses of sampled rows for Hopper, in Gluon; computes the same as `shared_mass`.

Legend: B block size, D head dim, P parts of a block, N blocks of a step, S stages of the ring.

A program holds sampled rows of one tile and some heads of its kv head, 64 in each of two warpgroups. A
producer warp streams the summaries of N blocks at a time through a ring of S stages. While one warpgroup
waits for its matrix products, the other computes exponentials. All rows of a program have the same
candidates, so only the last step is masked. The masses of a step are stored in the order in which threads
hold them (`slots`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

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


@gluon.constexpr_function
def _slot_layout(n):
    """The layout in which a thread holds `n // 4` contiguous slots of two rows, as it does of products."""
    slots = [[0, 1 << i] for i in range((n // 4).bit_length() - 1)]
    lanes = [[0, n // 4], [0, n // 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([*slots, [8, 0]], lanes, [[16, 0], [32, 0]], [], [64, n])


@gluon.jit
def _produce(
    center_desc, spread_desc, ring, kv_head, base, columns, P: gl.constexpr, N: gl.constexpr, S: gl.constexpr
):
    """Streams the summaries of the first `columns` blocks, counted from flat block `base`, into the ring."""
    centers, spreads, ready, free = ring
    SIZE: gl.constexpr = (P + 1) * center_desc.block_type.nbytes + P * spread_desc.block_type.nbytes
    for start in range(0, columns, N):
        step = start // N
        stage = step % S
        mbarrier.wait(free.index(stage), (step // S & 1) ^ 1)
        mbarrier.expect(ready.index(stage), SIZE)
        for part in gl.static_range(P):
            at = [kv_head, part, base + start, 0]
            load_tile(spread_desc, at, ready.index(stage), spreads.index(stage * P + part))
            load_tile(center_desc, at, ready.index(stage), centers.index(stage * (P + 1) + part))
        at = [kv_head, P, base + start, 0]
        load_tile(center_desc, at, ready.index(stage), centers.index(stage * (P + 1) + P))


@gluon.jit
def _terms(
    operands, ring, step, scales, LOG2_SIZE: gl.constexpr, P: gl.constexpr, N: gl.constexpr, S: gl.constexpr
):
    """log2 `(64, N)` of the estimated masses of the parts of a step's blocks, then of their smallest keys."""
    q, squares = operands
    scale, square_scale, limit = scales
    centers, spreads, ready, free = ring
    D: gl.constexpr = q.shape[1]
    layout: gl.constexpr = product_layout(N)
    zeros = gl.full([64, N], 0.0, gl.float32, layout)
    stage = step % S
    mbarrier.wait(ready.index(stage), step // S & 1)
    products = ()
    for part in gl.static_range(P):
        spread = spreads.index(stage * P + part).reshape([N, D // 2]).permute((1, 0))
        center = centers.index(stage * (P + 1) + part).reshape([N, D]).permute((1, 0))
        moved = warpgroup_mma(squares, spread, zeros, use_acc=False, is_async=True)
        both = (moved, warpgroup_mma(q, center, zeros, use_acc=False, is_async=True))
        products = products + both  # type: ignore[assignment]
    center = centers.index(stage * (P + 1) + P).reshape([N, D]).permute((1, 0))
    least = warpgroup_mma(q, center, zeros, use_acc=False, is_async=True)
    terms = ()
    for part in gl.static_range(P):
        pair = [products[2 * part], products[2 * part + 1]]
        moved, near_center = warpgroup_mma_wait(2 * (P - part) - 1, deps=pair)
        far = gl.sqrt(moved * (2 * LOG2_SIZE * square_scale))
        near = moved * (0.5 * square_scale) + LOG2_SIZE
        term = near_center * scale + gl.where(moved <= limit, near, far)
        terms = terms + (term,)  # type: ignore[assignment]
    least = warpgroup_mma_wait(0, deps=[least])
    barrier()
    mbarrier.arrive(free.index(stage), count=1)
    return terms + (least * scale,)


@gluon.jit
def _step(
    operands,
    ring,
    step,
    scales,
    state,
    places,
    columns,
    LOG2_SIZE: gl.constexpr,
    P: gl.constexpr,
    N: gl.constexpr,
    S: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Stores the masses of a step and their unit; returns the new `high` and `total` of the rows."""
    high, total = state
    mass_at, high_at, there = places
    terms = _terms(operands, ring, step, scales, LOG2_SIZE, P, N, S)
    layout: gl.constexpr = product_layout(N)
    if MASKED:
        inside = (step * N + gl.arange(0, N, gl.SliceLayout(0, layout)) < columns)[None, :]
        masked = ()
        for part in gl.static_range(P + 1):
            term = gl.where(inside, terms[part], LOWEST)
            masked = masked + (term,)  # type: ignore[assignment]
        terms = masked
    top = terms[P]
    for part in gl.static_range(P):
        top = gl.maximum(top, terms[part])
    new_high = gl.maximum(high, gl.max(top, 1))
    mass = gl.exp2(terms[P] - new_high[:, None])
    for part in gl.static_range(P):
        mass += gl.exp2(terms[part] - new_high[:, None])
    total = total * gl.exp2(high - new_high) + gl.sum(mass, 1)
    slots = gl.reshape(mass.to(gl.float16), [64, N // 8, 4, 2])
    slots = gl.reshape(gl.permute(slots, (0, 2, 1, 3)), [64, N])
    s_layout: gl.constexpr = _slot_layout(N)
    slots = gl.convert_layout(slots, s_layout)
    column = step * N + gl.arange(0, N, gl.SliceLayout(0, s_layout))
    row = gl.convert_layout(mass_at, gl.SliceLayout(1, s_layout))
    kept = gl.convert_layout(there, gl.SliceLayout(1, s_layout))
    gl.store(row[:, None] + column[None, :], slots, mask=kept[:, None])
    gl.store(high_at + step, new_high, mask=there)
    return new_high, total


@gluon.jit
def _consume(
    q_smem,
    square_smem,
    PART: gl.constexpr,
    ring,
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
    D: gl.constexpr = q_smem.shape[1]
    HALF: gl.constexpr = D // 2
    SPLIT: gl.constexpr = ROWS // BLOCK_ROWS
    layout: gl.constexpr = product_layout(N)
    q_layout: gl.constexpr = row_layout(D)
    pair_layout: gl.constexpr = row_layout(D // 2)
    splits = (group_size + HEADS - 1) // HEADS
    q_rows = _rows(place, q_strides, group_size, splits, PART, SAMPLE, BLOCK_ROWS, HEADS, SPLIT, q_layout)
    pair_rows = _rows(
        place, q_strides, group_size, splits, PART, SAMPLE, BLOCK_ROWS, HEADS, SPLIT, pair_layout
    )
    rows = _rows(place, q_strides, group_size, splits, PART, SAMPLE, BLOCK_ROWS, HEADS, SPLIT, layout)
    dim = gl.arange(0, D, gl.SliceLayout(0, q_layout))[None, :]
    q_smem.store(gl.load(q_ptr + q_rows[0][:, None] + dim, mask=q_rows[1][:, None], other=0.0))
    pair = gl.arange(0, HALF, gl.SliceLayout(0, pair_layout))[None, :]
    low = pair if HALVES else 2 * pair
    beside = pair + HALF if HALVES else 2 * pair + 1
    pair_at = q_ptr + pair_rows[0][:, None]
    a = gl.load(pair_at + low, mask=pair_rows[1][:, None], other=0.0).to(gl.float32)
    b = gl.load(pair_at + beside, mask=pair_rows[1][:, None], other=0.0).to(gl.float32)
    square_smem.store((a * a + b * b).to(square_smem.dtype))
    fence_async_shared()
    barrier()
    there = rows[1]
    item = (number.to(gl.int64) * num_heads + rows[2]) * ROWS + rows[3]
    places = (mass_ptr + item * mass_blocks, high_ptr + item * (mass_blocks // N), there)
    high = gl.full([64], LOWEST, gl.float32, gl.SliceLayout(1, layout))
    total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, layout))
    operands = (q_smem, square_smem)
    for step in range(columns // N):
        high, total = _step(
            operands, ring, step, scales, (high, total), places, columns, LOG2_SIZE, P, N, S, False
        )
    if columns % N > 0:
        high, total = _step(
            operands, ring, columns // N, scales, (high, total), places, columns, LOG2_SIZE, P, N, S, True
        )
    total_at = total_ptr + item * TOTAL_COLUMNS
    gl.store(total_at + TOTAL_HIGH, high, mask=there)
    gl.store(total_at + TOTAL_MASS, total, mask=there)


@gluon.jit
def _rows(
    place,
    q_strides,
    group_size,
    splits,
    PART: gl.constexpr,
    SAMPLE: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    HEADS: gl.constexpr,
    SPLIT: gl.constexpr,
    layout: gl.constexpr,
):
    """Of each row: offset of its query, whether it is in the call, its head, its number in the tile."""
    batch, q_begin, q_end, position, first, number, kv_head, columns = place
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
        fence_async_shared()
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
        scales = (scale, square_scale, 2 * LOG2_SIZE / square_scale)
        base = gl.load(info + PLAN_FIRST_BLOCK)
        shared = (ring, pointers, place, sizes, q_strides, scales)
        shape: gl.constexpr = (SAMPLE, ROWS, BLOCK_ROWS, HEADS, LOG2_SIZE, PARTS, HALVES, N, STAGES)
        gl.warp_specialize(
            [
                (_consume, (queries.index(0), squares.index(0), 0) + shared + shape),
                (_consume, (queries.index(1), squares.index(1), 1) + shared + shape),
                (_produce, (center_desc, spread_desc, ring, kv_head, base, columns, PARTS, N, STAGES)),
            ],
            [4, 1],
            [232, 24],
        )
