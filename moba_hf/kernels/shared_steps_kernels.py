"""The kernels that choose blocks for decode steps of the shared choice; `shared_steps` launches them.

Legend: as in `shared_steps`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moba_hf.kernels.launch import dot, narrow
from moba_hf.kernels.layout import (
    LOWEST,
    TOTAL_COLUMNS,
    TOTAL_HIGH,
    TOTAL_MASS,
    head_offset,
    pair_coordinates,
    row_offset,
    step_place,
)
from moba_hf.kernels.shared_choose import bits_of, write_choice
from moba_hf.kernels.shared_mass_kernels import part_term


@triton.jit
def _candidates(position, block_size, dense_below, TILE: tl.constexpr):
    """Position of the first row of the step's tile, and how many blocks the step scores."""
    first = tl.maximum(position, 0) // TILE * TILE
    return first, tl.where((position >= 0) & (first >= dense_below), first // block_size, 0)


@triton.jit
def _section_size(columns, SECTIONS: tl.constexpr, STEP: tl.constexpr):
    """Blocks per section, whole steps: at most `SECTIONS` sections cover all columns."""
    return tl.cdiv(tl.cdiv(columns, SECTIONS), STEP) * STEP


@triton.jit
def _heard(sampled, first, position, query, known, ROWS: tl.constexpr, SAMPLE: tl.constexpr):
    """Positions of the sampled rows of a tile up to `position`, and which of them are known."""
    begin = first + sampled * SAMPLE
    at = tl.minimum(begin + SAMPLE, position + 1) - 1
    return at, (sampled < ROWS) & (begin <= position) & (at >= position - query - known)


@triton.jit
def _query_values(q_ptr, heard_ptr, q_at, heard_at, in_call, before, dim, inside):
    """Values `dim` of query rows, which are in the call or just before it."""
    inside = inside[None, :]
    new = tl.load(q_ptr + q_at[:, None] + dim[None, :], mask=in_call[:, None] & inside, other=0.0)
    old = tl.load(heard_ptr + heard_at[:, None] + dim[None, :], mask=before[:, None] & inside, other=0.0)
    return tl.where(in_call[:, None], new, old)


@triton.jit(do_not_specialize=["first_item", "length", "known", "dense_below"])
def step_masses_kernel(
    q_ptr,
    heard_ptr,
    center_ptr,
    spread_ptr,
    mass_ptr,
    high_ptr,
    total_ptr,
    table_ptr,
    first_item,
    length,
    known,
    q_strides,
    heard_strides,
    kept_strides,
    stored,
    num_heads,
    group_size,
    block_size,
    dense_below,
    scale,
    square_scale,
    TILE: tl.constexpr,
    SAMPLE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    ROW_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    LOG2_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SECTIONS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Handles one (step, kv head and some rows, run of sections); without candidates it writes nothing."""
    HALF: tl.constexpr = HEAD_DIM // 2
    number = tl.program_id(0)
    batch, query, position, k_begin = step_place(table_ptr, first_item + number, length)
    first, columns = _candidates(position, block_size, dense_below, TILE)
    kv_head = tl.program_id(1) // ROW_PARTS
    row = tl.program_id(1) % ROW_PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    in_group = row % HEADS
    head = kv_head * group_size + in_group
    sampled = row // HEADS
    at, there = _heard(sampled, first, position, query, known, ROWS, SAMPLE)
    there = there & (in_group < group_size)
    if (columns > 0) & (tl.max(there.to(tl.int32), 0) > 0):
        dim = tl.arange(0, PADDED_DIM)
        pair, low, high_dim = pair_coordinates(HALF, PADDED_HALF, HALVES)
        source = query - position + at
        head = tl.where(there, head, 0)
        in_call = there & (source >= 0)
        before = there & (source < 0)
        q_at = row_offset(batch, head, tl.where(in_call, source, 0), q_strides)
        heard_at = row_offset(batch, head, tl.where(before, source + known, 0), heard_strides)
        q = _query_values(q_ptr, heard_ptr, q_at, heard_at, in_call, before, dim, dim < HEAD_DIM)
        a = _query_values(q_ptr, heard_ptr, q_at, heard_at, in_call, before, low, pair < HALF).to(tl.float32)
        b = _query_values(q_ptr, heard_ptr, q_at, heard_at, in_call, before, high_dim, pair < HALF)
        b = b.to(tl.float32)
        squares = narrow(a * a + b * b, spread_ptr)
        kept_at = head_offset(batch, kv_head, kept_strides)
        section_size = _section_size(columns, SECTIONS, BLOCK_N)
        share = tl.cdiv(tl.cdiv(columns, section_size), tl.num_programs(2)) * section_size
        begin = tl.program_id(2) * share
        end = tl.minimum(begin + share, columns)
        item = (number.to(tl.int64) * num_heads + head) * ROWS + sampled
        high = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            column = start + tl.arange(0, BLOCK_N)
            valid = (column < end)[None, :]
            section_begins = start % section_size == 0
            high = tl.where(section_begins, LOWEST, high)
            total = tl.where(section_begins, 0.0, total)
            block_at = kept_at + column.to(tl.int64) * kept_strides[2]
            c_at = center_ptr + block_at[None, :] + dim[:, None]
            s_at = spread_ptr + (block_at + (PARTS + 1) * HEAD_DIM)[None, :] + pair[:, None]
            c_mask = valid & (dim < HEAD_DIM)[:, None]
            s_mask = valid & (pair < HALF)[:, None]
            least = dot(q, tl.load(c_at + PARTS * HEAD_DIM, mask=c_mask, other=0.0)) * scale
            top = least
            terms = ()
            for part in tl.static_range(PARTS):
                center = tl.load(c_at + part * HEAD_DIM, mask=c_mask, other=0.0)
                spread = tl.load(s_at + part * HALF, mask=s_mask, other=0.0)
                term = part_term(q, squares, center, spread, scale, square_scale, LOG2_SIZE)
                terms = terms + (term,)  # type: ignore[assignment]
                top = tl.maximum(top, term)
            top = tl.where(valid, top, LOWEST)
            new_high = tl.maximum(high, tl.max(top, 1))
            mass = tl.exp2(least - new_high[:, None])
            for part in tl.static_range(PARTS):
                mass += tl.exp2(terms[part] - new_high[:, None])
            mass = tl.where(valid, mass, 0.0)
            total = total * tl.exp2(high - new_high) + tl.sum(mass, 1)
            high = new_high
            target = mass_ptr + item[:, None] * stored + column[None, :]
            tl.store(target, mass.to(tl.float16), mask=there[:, None])
            tl.store(high_ptr + item * (stored // BLOCK_N) + start // BLOCK_N, high, mask=there)
            section_ends = ((start + BLOCK_N) % section_size == 0) | (start + BLOCK_N >= end)
            total_at = total_ptr + (item * SECTIONS + start // section_size) * TOTAL_COLUMNS
            tl.store(total_at + TOTAL_HIGH, high, mask=there & section_ends)
            tl.store(total_at + TOTAL_MASS, total, mask=there & section_ends)


@triton.jit(do_not_specialize=["first_item", "length", "known", "dense_below"])
def step_means_kernel(
    mass_ptr,
    high_ptr,
    total_ptr,
    mean_ptr,
    table_ptr,
    first_item,
    length,
    known,
    stored,
    block_size,
    dense_below,
    TILE: tl.constexpr,
    SAMPLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SECTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
):
    """Handles one (step, head, run of columns)."""
    STEPS: tl.constexpr = BLOCK_N // STEP
    number = tl.program_id(0)
    _, query, position, _k_begin = step_place(table_ptr, first_item + number, length)
    first, columns = _candidates(position, block_size, dense_below, TILE)
    start = tl.program_id(2) * BLOCK_N
    if start < columns:
        item = number.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        step = start // STEP + tl.arange(0, STEPS)
        column = step[:, None] * STEP + tl.arange(0, STEP)[None, :]
        section = tl.arange(0, SECTIONS)
        scored = section * _section_size(columns, SECTIONS, STEP) < columns
        count = 0.0
        mean = tl.zeros([STEPS, STEP], tl.float32)
        for r in range(0, ROWS, BLOCK_R):
            sampled = r + tl.arange(0, BLOCK_R)
            _at, there = _heard(sampled, first, position, query, known, ROWS, SAMPLE)
            row = item * ROWS + sampled
            each = there[:, None] & scored[None, :]
            total_at = total_ptr + (row[:, None] * SECTIONS + section[None, :]) * TOTAL_COLUMNS
            highs = tl.load(total_at + TOTAL_HIGH, mask=each, other=LOWEST)
            high = tl.max(highs, 1)
            total = tl.load(total_at + TOTAL_MASS, mask=each, other=0.0) * tl.exp2(highs - high[:, None])
            total = tl.where(there, tl.sum(total, 1), 1.0)
            both = there[:, None] & (step * STEP < columns)[None, :]
            unit = tl.load(
                high_ptr + row[:, None] * (stored // STEP) + step[None, :], mask=both, other=LOWEST
            )
            weight = tl.exp2(unit - high[:, None]) / total[:, None]
            weight = tl.where(both, weight, 0.0)
            inside = there[:, None, None] & (column < columns)[None, :, :]
            mass_at = mass_ptr + row[:, None, None] * stored + column[None, :, :]
            mass = tl.load(mass_at, mask=inside, other=0.0)
            mean += tl.sum(mass.to(tl.float32) * weight[:, :, None], 0)
            count += tl.sum(there.to(tl.float32), 0)
        bits = bits_of(mean / count)
        tl.store(mean_ptr + item * stored + column, bits.to(tl.float32, bitcast=True), mask=column < columns)


@triton.jit(
    do_not_specialize=[
        "first_item", "length", "words", "dense_below", "topk", "sink_blocks", "local_blocks",
    ]
)  # fmt: skip
def choose_step_kernel(
    mean_ptr,
    mask_ptr,
    table_ptr,
    first_item,
    length,
    stored,
    words,
    block_size,
    dense_below,
    threshold,
    share,
    topk,
    sink_blocks,
    local_blocks,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SHARE: tl.constexpr,
    TOPK: tl.constexpr,
):
    """Handles one (step, head)."""
    number = tl.program_id(0)
    head = tl.program_id(1)
    _batch, _query, position, _k_begin = step_place(table_ptr, first_item + number, length)
    first, scored = _candidates(position, block_size, dense_below, TILE)
    columns = tl.where(position >= 0, first // block_size, 0)
    mean_ptr += (number.to(tl.int64) * tl.num_programs(1) + head) * stored
    largest = 0.0
    for start in range(0, scored, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        largest = tl.maximum(largest, tl.max(tl.load(mean_ptr + column, mask=column < scored, other=0.0), 0))
    write_choice(
        mean_ptr,
        mask_ptr + ((first_item + number).to(tl.int64) * tl.num_programs(1) + head) * words,
        largest,
        scored == 0,
        columns,
        tl.where(position >= 0, position // block_size + 1, 0),
        words,
        threshold,
        share,
        topk,
        tl.minimum(sink_blocks, columns),
        tl.minimum(local_blocks, columns),
        BLOCK_N,
        THRESHOLD,
        SHARE,
        TOPK,
    )
