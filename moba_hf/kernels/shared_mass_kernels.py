"""The Triton kernel that estimates masses of sampled rows; `shared_mass` launches it.

Legend: M rows of a program, N blocks of a step, P parts of a block, D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moba_hf.kernels.launch import dot, narrow
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
    pair_coordinates,
)


@triton.jit
def part_term(q, squares, center, spread, scale, square_scale, LOG2_SIZE: tl.constexpr):
    """log2 `(M, N)` of the estimated mass of one part, from its means and variances `(D, N)`."""
    moved = dot(squares, spread)
    far = tl.sqrt(moved * (2 * LOG2_SIZE * square_scale))
    near = moved * (0.5 * square_scale) + LOG2_SIZE
    return dot(q, center) * scale + tl.where(moved <= 2 * LOG2_SIZE / square_scale, near, far)


@triton.jit
def _tile_row(tile_ptr, tile, last_tile):
    """The rows of the tile table for the numbers `tile`; those from `last_tile` on repeat the last tile."""
    return tile_ptr + tl.minimum(tile, last_tile - 1).to(tl.int64) * INFO_COLUMNS


@triton.jit
def _sampled_rows(info, known, sampled, block_size, dense_below, TILE: tl.constexpr, SAMPLE: tl.constexpr):
    """Where sampled rows are, how many blocks each scores, and the flat number of its sequence's block 0.

    A sampled row is the last one, within the call, of each group of SAMPLE positions of a tile. Where it is:
    the tile's first query and that query's position, the row's position, and whether the row is in the call.
    """
    q_begin = tl.load(info + PLAN_Q_BEGIN)
    q_end = tl.load(info + PLAN_Q_END)
    position = tl.load(info + PLAN_POSITION)
    base = tl.load(info + PLAN_FIRST_BLOCK)
    first = position // TILE * TILE
    columns = tl.where(known & (first >= dense_below), first // block_size, 0)
    end = position + q_end - q_begin
    begin = first + sampled * SAMPLE
    at = tl.minimum(begin + SAMPLE, end) - 1
    there = known & (columns > 0) & (at >= position) & (begin < end)
    return (q_begin, position, at, there), tl.where(there, columns, 0), base


@triton.jit
def _load_queries(
    q_ptr,
    info,
    head,
    rows,
    q_strides,
    dim,
    like,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    HALVES: tl.constexpr,
):
    """The queries `(M, D)` of `_sampled_rows`, and the squared norms `(M, D / 2)` of their rotary pairs."""
    q_begin, position, at, there = rows
    query = tl.where(there, q_begin + at - position, 0).to(tl.int64)
    q_ptr += tl.load(info + PLAN_BATCH).to(tl.int64) * q_strides[0]
    q_ptr += tl.where(there, head, 0).to(tl.int64) * q_strides[1] + query * q_strides[2]
    q = tl.load(q_ptr[:, None] + dim[None, :], mask=there[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    pair, low, high = pair_coordinates(HEAD_DIM // 2, PADDED_HALF, HALVES)
    inside = there[:, None] & (pair < HEAD_DIM // 2)[None, :]
    a = tl.load(q_ptr[:, None] + low[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(q_ptr[:, None] + high[None, :], mask=inside, other=0.0).to(tl.float32)
    return q, narrow(a * a + b * b, like)


@triton.jit
def _load_vectors(at, valid, SIZE: tl.constexpr):
    """The vectors `(SIZE, N)` of blocks, padded with zeros; zeros for blocks outside `valid (1, N)`."""
    dim = tl.arange(0, at.shape[0])
    return tl.load(at, mask=valid & (dim < SIZE)[:, None], other=0.0)


@triton.jit
def _terms(
    operands, least, places, window, column, scales, step,
    PARTS: tl.constexpr, LOG2_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Terms of the smallest key and, as a tuple, of the parts, all `(M, N)`, and their maxima."""
    q, squares = operands
    center_at, spread_at = places
    start, last, seen, masked = window
    valid = (start + column < last)[None, :]
    if masked:
        least = tl.where((start + column)[None, :] < seen[:, None], least, LOWEST)
    terms = ()
    top = least
    for part in tl.static_range(PARTS):
        center = _load_vectors(center_at + part * step * HEAD_DIM, valid, HEAD_DIM)
        spread = _load_vectors(spread_at + part * step * (HEAD_DIM // 2), valid, HEAD_DIM // 2)
        term = part_term(q, squares, center, spread, scales[0], scales[1], LOG2_SIZE)
        if masked:
            term = tl.where((start + column)[None, :] < seen[:, None], term, LOWEST)
        terms = terms + (term,)  # type: ignore[assignment]
        top = tl.maximum(top, term)
    return least, terms, top


@triton.jit
def _wide_terms(
    operands, least, places, window, column, wide_column, scales,
    PARTS: tl.constexpr, LOG2_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Terms of the smallest key `(M, N)` and of the parts `(M, P, N)`, and their maxima `(M, N)`."""
    q, squares = operands
    center_at, spread_at = places
    start, last, seen, masked = window
    valid = (start + wide_column < last)[None, :]
    center = _load_vectors(center_at, valid, HEAD_DIM)
    spread = _load_vectors(spread_at, valid, HEAD_DIM // 2)
    term = part_term(q, squares, center, spread, scales[0], scales[1], LOG2_SIZE)
    if masked:
        term = tl.where((start + wide_column)[None, :] < seen[:, None], term, LOWEST)
        least = tl.where((start + column)[None, :] < seen[:, None], least, LOWEST)
    term = tl.reshape(term, (term.shape[0], PARTS, column.shape[0]))
    return least, term, tl.maximum(least, tl.max(term, 1))


@triton.jit
def _sequence_masses(
    operands,
    pointers,
    axes,
    here,
    seen,
    there,
    state,
    item,
    sizes,
    scales,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
    LOG2_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Stores the masses of the first `seen` blocks of each row, counted from flat block `here`.

    Returns the new `high (M,)` and `total (M, 8)` of the rows.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    center_ptr, spread_ptr, mass_ptr, high_ptr = pointers
    step, mass_blocks = sizes
    high, total = state
    dim, pair, column = axes
    center_at = center_ptr + (here + column)[None, :].to(tl.int64) * HEAD_DIM + dim[:, None]
    spread_at = spread_ptr + (here + column)[None, :].to(tl.int64) * HALF + pair[:, None]
    if WIDE:
        w = tl.arange(0, PARTS * BLOCK_N)
        wide_column = w % BLOCK_N
        w_at = (here + wide_column).to(tl.int64) + (w // BLOCK_N).to(tl.int64) * step
        wide_center_at = center_ptr + w_at[None, :] * HEAD_DIM + dim[:, None]
        wide_spread_at = spread_ptr + w_at[None, :] * HALF + pair[:, None]
    last = tl.max(seen, 0)
    unmasked = tl.min(tl.where(there, seen, last), 0)  # no row needs a mask below this block
    for start in tl.range(0, last, BLOCK_N, num_stages=STAGES):
        valid = (start + column < last)[None, :]
        c_at = center_at + start * HEAD_DIM
        least = dot(operands[0], _load_vectors(c_at + PARTS * step * HEAD_DIM, valid, HEAD_DIM)) * scales[0]
        window = (start, last, seen, start + BLOCK_N > unmasked)
        if WIDE:
            places = (wide_center_at + start * HEAD_DIM, wide_spread_at + start * HALF)
            least, terms, top = _wide_terms(
                operands, least, places, window, column, wide_column, scales, PARTS, LOG2_SIZE, HEAD_DIM
            )
        else:
            places = (c_at, spread_at + start * HALF)
            least, terms, top = _terms(
                operands, least, places, window, column, scales, step, PARTS, LOG2_SIZE, HEAD_DIM
            )
        new_high = tl.maximum(high, tl.max(top, 1))
        mass = tl.exp2(least - new_high[:, None])
        if WIDE:
            mass += tl.sum(tl.exp2(terms - new_high[:, None, None]), 1)
        else:
            for part in tl.static_range(PARTS):
                mass += tl.exp2(terms[part] - new_high[:, None])
        total *= tl.exp2(high - new_high)[:, None]
        total += tl.sum(tl.reshape(mass, (mass.shape[0], BLOCK_N // 8, 8)), 1)
        high = new_high
        in_tile = start < seen
        target = mass_ptr + item[:, None] * mass_blocks + (start + column)[None, :]
        tl.store(target, mass.to(tl.float16), mask=in_tile[:, None])
        tl.store(high_ptr + item * (mass_blocks // BLOCK_N) + start // BLOCK_N, high, mask=in_tile)
    return high, total


@triton.jit(do_not_specialize=["first_tile", "last_tile", "dense_below"])
def _row_masses_kernel(
    q_ptr,
    center_ptr,
    spread_ptr,
    mass_ptr,
    high_ptr,
    total_ptr,
    tile_ptr,
    q_strides,
    blocks,
    mass_blocks,
    first_tile,
    last_tile,
    num_heads,
    group_size,
    block_size,
    dense_below,
    scale,
    square_scale,
    TILE: tl.constexpr,
    SAMPLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    LOG2_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCK_M: tl.constexpr = TILES * BLOCK_ROWS * HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    SPLIT: tl.constexpr = ROWS // BLOCK_ROWS  # programs that share the rows of one tile
    splits = tl.cdiv(group_size, HEADS)
    number = (tl.num_programs(0) - 1 - tl.program_id(0)) // SPLIT * TILES  # the longest tiles come first
    kv_head = tl.program_id(1) // splits
    row = tl.arange(0, BLOCK_M)
    in_group = tl.program_id(1) % splits * HEADS + row % HEADS
    head = kv_head * group_size + in_group
    tile = first_tile + number + row // (HEADS * BLOCK_ROWS)
    sampled = row // HEADS % BLOCK_ROWS + tl.program_id(0) % SPLIT * BLOCK_ROWS
    known = (tile < last_tile) & (in_group < group_size)
    info = _tile_row(tile_ptr, tile, last_tile)
    rows, columns, base = _sampled_rows(info, known, sampled, block_size, dense_below, TILE, SAMPLE)
    if tl.max(columns, 0) > 0:
        there = rows[3]
        axes = (tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_HALF), tl.arange(0, BLOCK_N))
        operands = _load_queries(
            q_ptr, info, head, rows, q_strides, axes[0], spread_ptr, HEAD_DIM, PADDED_HALF, HALVES
        )
        step = tl.cast(blocks, tl.int64)
        center_ptr += kv_head.to(tl.int64) * (PARTS + 1) * step * HEAD_DIM
        spread_ptr += kv_head.to(tl.int64) * PARTS * step * HALF
        item = ((tile - first_tile).to(tl.int64) * num_heads + head) * ROWS + sampled
        high = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M, 8], tl.float32)  # the threads of a row are added up once, at the end
        pointers = (center_ptr, spread_ptr, mass_ptr, high_ptr)
        sizes = (step, mass_blocks)
        scales = (scale, square_scale)
        done = -1
        for i in range(TILES):
            # tiles of the same sequence share its blocks; each further sequence takes another pass
            here = tl.load(_tile_row(tile_ptr, first_tile + number + i, last_tile) + PLAN_FIRST_BLOCK)
            seen = tl.where(base == here, columns, 0)
            if here > done:
                done = here
                high, total = _sequence_masses(
                    operands, pointers, axes, here, seen, there, (high, total), item, sizes, scales, WIDE,
                    PARTS, LOG2_SIZE, HEAD_DIM, BLOCK_N, STAGES,
                )  # fmt: skip
        total_at = total_ptr + item * TOTAL_COLUMNS
        tl.store(total_at + TOTAL_HIGH, high, mask=there)
        tl.store(total_at + TOTAL_MASS, tl.sum(total, 1), mask=there)
