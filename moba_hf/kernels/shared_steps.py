"""Decode steps of the shared choice: chooses blocks from the summaries of a cache, then attends to them.

Legend: B block size, H query heads, HK kv heads, P parts of a block, NB blocks, M steps per batch row, R
sampled rows of a tile.

A step takes blocks by the mean mass over the rows of its tile up to itself (`moba_hf.op.shared`):
1. masses: unnormalised masses of blocks, as in `shared_mass`. A program scores some sections of the blocks
   for sampled rows of the tile and the heads of a kv head, so that summaries are read once for all of them.
2. means: the sections' totals are merged and the rows averaged, for some columns per program.
3. choose: the second half of `shared_choose`, which writes a bit mask per head.
4. list and attend: `shared_steps_attend`.
Masses of earlier rows are recomputed at every step. They cost no bytes of device memory beyond the summaries,
which the step's own row needs anyway, whereas kept sums of masses could not be cropped with the cache.

The sections follow from the number of candidates alone, and each has its own units and total. So the choice
depends neither on how many programs share the sections nor on the number of slots of the cache.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import shared_tuning, tuning
from moba_hf.kernels.launch import (
    cdiv,
    device_of,
    dot,
    narrow,
    next_power_of_2,
    num_processors,
    padded,
    rows_contiguous,
)
from moba_hf.kernels.layout import (
    LOG2_E,
    SEQ_COLUMNS,
    SEQ_K_BEGIN,
    SEQ_K_END,
    SEQ_Q_BEGIN,
    SEQ_Q_END,
    head_offset,
    row_offset,
)
from moba_hf.kernels.shared_choose import NOT_A_NUMBER, write_choice
from moba_hf.kernels.shared_mass import Masses, part_term
from moba_hf.kernels.shared_steps_attend import attend
from moba_hf.op.numerics import part_size, spread_dtype
from moba_hf.op.shared_rule import SharedRule

_LOWEST = tl.constexpr(-1e30)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    table: Tensor,
    rule: SharedRule,
    softmax_scale: float,
    heard: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`out (batch, M, H, DV)` in q's dtype and `lse (batch, H, M)` fp32; see `SharedKernels.decode`.

    Args:
        q: `(batch, H, M, D)`.
        k, v: `(batch, HK, kv_len, D or DV)`.
        kept: `(batch, HK, NB, width)`.
        table: int32 `(batch, 5)`, one sequence per batch row, in order.
        heard: `(batch, H, rows, D)`, the queries just before `q`; None: every step asks alone.
    """
    if softmax_scale <= 0:  # attention takes the maximum before scaling
        sign = -1 if softmax_scale < 0 else 0
        q, heard = q * sign, None if heard is None else heard * sign
        softmax_scale = -softmax_scale or 1.0
    q, k, v, kept = (rows_contiguous(x) for x in (q, k, v, kept))
    block_mask = choose(q, kept[:, :, : k.shape[2] // rule.block_size], table, rule, softmax_scale, heard)
    return attend(q, k, v, block_mask, table, rule.block_size, softmax_scale)


def choose(
    q: Tensor,
    kept: Tensor,
    table: Tensor,
    rule: SharedRule,
    softmax_scale: float,
    heard: Tensor | None,
    *,
    workspace: int | None = None,
    splits: int | None = None,
) -> Tensor:
    """The choice of every step, bits int32 `(batch * M, H, words)`; arguments as for `decode`.

    Args:
        workspace: maximum bytes for the masses; None: `shared_tuning.MASS_WORKSPACE`. It changes no result.
        splits: number of programs that share the blocks; None: enough to fill the device. It changes no
            result.
    """
    batch, num_heads, length, head_dim = q.shape
    items, blocks = batch * length, kept.shape[2]
    words = blocks // 32 + 1
    block_mask = torch.empty(items, num_heads, words, dtype=torch.int32, device=q.device)
    if block_mask.numel() == 0:
        return block_mask
    if heard is None:  # the step is the only row of its tile that is sampled
        rule, known = dataclasses.replace(rule, sample=rule.tile), 0
        heard = q
    else:
        heard, known = rows_contiguous(heard), heard.shape[2]
    parts = rule.block_size // part_size(rule.block_size)
    tile = shared_tuning.step_mass_tile(
        padded(head_dim), q.element_size(), parts, tuning.capability(q.device)
    )
    rows, group = rule.tile // rule.sample, num_heads // kept.shape[1]
    heads = next_power_of_2(group)
    block_m = max(16, min(tile.m, heads * rows))
    row_parts = cdiv(heads * rows, block_m)
    programs = items * kept.shape[1] * row_parts
    if splits is None:
        wanted = num_processors(q) * shared_tuning.STEP_PROGRAMS // programs
        splits = max(1, min(wanted, cdiv(blocks, tile.n), shared_tuning.STEP_SECTIONS))
    columns, sections = shared_tuning.STEP_COLUMNS, shared_tuning.STEP_SECTIONS
    each = Masses.tile_bytes(num_heads, rows, blocks + tile.n, tile.n)
    each += 4 * num_heads * (blocks + tile.n + 2 * rows * sections)
    budget = shared_tuning.MASS_WORKSPACE if workspace is None else workspace
    chunk = max(1, min(items, budget // each))
    masses = Masses.empty(chunk, num_heads, rows, blocks, tile.n, q)
    stored = masses.mass.shape[3]
    totals = torch.empty(chunk, num_heads, rows, sections, 2, dtype=torch.float32, device=q.device)
    means = torch.empty(chunk, num_heads, stored, dtype=torch.float32, device=q.device)
    table = table.contiguous()
    for first in range(0, items, chunk):
        count = min(chunk, items - first)
        shared = (table, first, length, known)
        with device_of(q):
            _step_masses_kernel[(count, kept.shape[1] * row_parts, splits)](
                q, heard, kept, kept.view(spread_dtype(kept.dtype)), masses.mass, masses.high, totals,
                *shared,
                q.stride()[:3], heard.stride()[:3], kept.stride()[:3], stored, num_heads, group,
                rule.block_size, rule.dense_below, softmax_scale * LOG2_E.value,
                softmax_scale**2 * LOG2_E.value,
                TILE=rule.tile, SAMPLE=rule.sample, ROWS=rows, HEADS=heads, ROW_PARTS=row_parts, PARTS=parts,
                LOG2_SIZE=math.log2(part_size(rule.block_size)), HEAD_DIM=head_dim,
                PADDED_DIM=padded(head_dim), PADDED_HALF=padded(head_dim // 2),
                HALVES=rule.rotary_pairs == "halves", BLOCK_M=block_m, BLOCK_N=tile.n, SECTIONS=sections,
                STAGES=tile.stages, num_warps=tile.warps,
            )  # fmt: skip
            _step_means_kernel[(count, num_heads, cdiv(stored, columns))](
                masses.mass, masses.high, totals, means, *shared, stored, rule.block_size, rule.dense_below,
                TILE=rule.tile, SAMPLE=rule.sample, ROWS=rows, BLOCK_R=min(rows, shared_tuning.STEP_ROWS),
                SECTIONS=sections, BLOCK_N=columns, STEP=tile.n, num_warps=4,
            )  # fmt: skip
            _choose_step_kernel[(count, num_heads)](
                means, block_mask, *shared[:3], stored, words, rule.block_size, rule.dense_below,
                1.0 if rule.threshold is None else rule.threshold,
                1.0 if rule.share is None else rule.share,
                0 if rule.topk is None else rule.topk - rule.own_blocks,
                rule.sink_blocks, rule.local_blocks, TILE=rule.tile,
                BLOCK_N=shared_tuning.STEP_CHOICE_COLUMNS, THRESHOLD=rule.threshold is not None,
                SHARE=rule.share is not None, TOPK=rule.topk is not None, num_warps=4,
            )  # fmt: skip
    return block_mask


@triton.jit
def step_place(table_ptr, item, length):
    """Batch row (int64), query, position (-1 for padding) and first slot of step `item`."""
    batch = item // length
    query = item % length
    seq = table_ptr + batch * SEQ_COLUMNS
    q_begin = tl.load(seq + SEQ_Q_BEGIN)
    q_end = tl.load(seq + SEQ_Q_END)
    k_begin = tl.load(seq + SEQ_K_BEGIN)
    real = (query >= q_begin) & (query < q_end)
    position = tl.where(real, query + tl.load(seq + SEQ_K_END) - k_begin - q_end, -1)
    return batch.to(tl.int64), query, position, k_begin


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
def _step_masses_kernel(
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
        pair = tl.arange(0, PADDED_HALF)
        low = pair if HALVES else 2 * pair
        high_dim = pair + HALF if HALVES else 2 * pair + 1
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
        high = tl.full([BLOCK_M], _LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            column = start + tl.arange(0, BLOCK_N)
            valid = (column < end)[None, :]
            section_begins = start % section_size == 0
            high = tl.where(section_begins, _LOWEST, high)
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
            top = tl.where(valid, top, _LOWEST)
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
            total_at = total_ptr + (item * SECTIONS + start // section_size) * 2
            tl.store(total_at, high, mask=there & section_ends)
            tl.store(total_at + 1, total, mask=there & section_ends)


@triton.jit(do_not_specialize=["first_item", "length", "known", "dense_below"])
def _step_means_kernel(
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
            total_at = total_ptr + (row[:, None] * SECTIONS + section[None, :]) * 2
            highs = tl.load(total_at, mask=each, other=_LOWEST)
            high = tl.max(highs, 1)
            total = tl.load(total_at + 1, mask=each, other=0.0) * tl.exp2(highs - high[:, None])
            total = tl.where(there, tl.sum(total, 1), 1.0)
            both = there[:, None] & (step * STEP < columns)[None, :]
            unit = tl.load(
                high_ptr + row[:, None] * (stored // STEP) + step[None, :], mask=both, other=_LOWEST
            )
            weight = tl.exp2(unit - high[:, None]) / total[:, None]
            weight = tl.where(both, weight, 0.0)
            inside = there[:, None, None] & (column < columns)[None, :, :]
            mass_at = mass_ptr + row[:, None, None] * stored + column[None, :, :]
            mass = tl.load(mass_at, mask=inside, other=0.0)
            mean += tl.sum(mass.to(tl.float32) * weight[:, :, None], 0)
            count += tl.sum(there.to(tl.float32), 0)
        mean = mean / count
        # all NaNs get the same bits, which are the largest, so that no block is dropped because of a NaN
        bits = tl.where(mean == mean, mean.to(tl.int32, bitcast=True), NOT_A_NUMBER)
        tl.store(mean_ptr + item * stored + column, bits.to(tl.float32, bitcast=True), mask=column < columns)


@triton.jit(
    do_not_specialize=[
        "first_item", "length", "words", "dense_below", "topk", "sink_blocks", "local_blocks",
    ]
)  # fmt: skip
def _choose_step_kernel(
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
