"""From the masses of sampled rows to the bit mask of the blocks that each tile attends.

Legend: B block size, R sampled rows of a tile, NB blocks; words of 32 blocks.

First, programs of some blocks of a (tile, head) turn the output of `shared_mass` into masses of the tile,
`mean over rows of mass / total`, in a scratch buffer (fp32). Then one program per (tile, head) takes every
block whose mass is at least `threshold` times the largest, the kept blocks, and the blocks that the tile
overlaps. A cap on the mass (`share`) or on the number of blocks (`topk`) is found by bisecting the bits of
the masses, since non-negative fp32 numbers sort like int32. Of equal masses, the lower block comes first.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels.launch import cdiv, device_of, next_power_of_2
from moba_hf.kernels.layout import (
    INFO_COLUMNS,
    LOWEST,
    PLAN_POSITION,
    PLAN_Q_BEGIN,
    PLAN_Q_END,
    TOTAL_COLUMNS,
    TOTAL_HIGH,
    TOTAL_MASS,
)
from moba_hf.kernels.shared_mass import Masses
from moba_hf.kernels.shared_plan import SharedPlan
from moba_hf.kernels.shared_tuning import ChooseTile, choose_tile
from moba_hf.op.shared import SharedRule

# Bits that replace every NaN mass. The bisection starts at -1, so its width must fit in int32.
NOT_A_NUMBER = tl.constexpr(0x7FFFFFFE)


def choose(
    masses: Masses,
    scratch: Tensor,
    plan: SharedPlan,
    rule: SharedRule,
    first_tile: int,
    block_mask: Tensor,
    shape: ChooseTile | None = None,
) -> None:
    """Writes `block_mask (H, num_tiles, words)` for the tiles of `masses`, from `first_tile` on.

    Args:
        scratch: temporary memory, fp32 `(C, H, NB)`, like `masses.mass` without its rows.
        shape: how to launch; None: `choose_tile`.
    """
    chunk, num_heads, rows, blocks = masses.mass.shape
    shape = choose_tile(blocks) if shape is None else shape
    tiles = min(chunk, plan.num_tiles - first_tile)
    columns = min(shape.columns, max(32, masses.step, next_power_of_2(blocks)))
    choice = min(shape.choice, max(32, next_power_of_2(blocks)))
    with device_of(scratch):
        _tile_masses_kernel[(cdiv(blocks, columns), tiles, num_heads)](
            masses.mass,
            masses.high,
            masses.total,
            scratch,
            plan.tiles,
            first_tile,
            blocks,
            rule.block_size,
            rule.dense_below,
            TILE=rule.tile,
            SAMPLE=rule.sample,
            ROWS=rows,
            BLOCK_N=columns,
            UNROLL=shape.unroll,
            STEP=masses.step,
            SLOTS=masses.slots,
            num_warps=max(1, columns // shape.per_warp),
        )
        _choose_kernel[(tiles, num_heads)](
            scratch,
            block_mask,
            plan.tiles,
            block_mask.stride()[:2],
            first_tile,
            blocks,
            plan.words,
            BLOCK_N=choice,
            **choice_arguments(rule),
            num_warps=max(1, choice // 256),
        )


def choice_arguments(rule: SharedRule) -> dict[str, Any]:
    """The arguments that the kernels which choose blocks take from a rule, by name."""
    return {
        "block_size": rule.block_size,
        "dense_below": rule.dense_below,
        "threshold": 1.0 if rule.threshold is None else rule.threshold,
        "share": 1.0 if rule.share is None else rule.share,
        "topk": 0 if rule.topk is None else rule.topk - rule.own_blocks,
        "sink_blocks": rule.sink_blocks,
        "local_blocks": rule.local_blocks,
        "TILE": rule.tile,
        "THRESHOLD": rule.threshold is not None,
        "SHARE": rule.share is not None,
        "TOPK": rule.topk is not None,
    }


@triton.jit
def _place(tile_ptr, number, block_size, dense_below, TILE: tl.constexpr):
    """Of a tile: its position in its sequence, that of its first row in the call, the end; its candidates.

    The last result is whether every candidate is taken, or there is none.
    """
    info = tile_ptr + number.to(tl.int64) * INFO_COLUMNS
    position = tl.load(info + PLAN_POSITION)
    end = position + tl.load(info + PLAN_Q_END) - tl.load(info + PLAN_Q_BEGIN)
    first = position // TILE * TILE
    columns = first // block_size
    return first, position, end, columns, (first < dense_below) | (columns == 0) | (end <= position)


@triton.jit
def bits_of(mass):
    """The bits of masses, int32; every NaN gets the same, largest bits, so that it drops no block."""
    return tl.where(mass == mass, mass.to(tl.int32, bitcast=True), NOT_A_NUMBER)


@triton.jit(do_not_specialize=["first_tile", "dense_below"])
def _tile_masses_kernel(
    mass_ptr,
    high_ptr,
    total_ptr,
    scratch_ptr,
    tile_ptr,
    first_tile,
    blocks,
    block_size,
    dense_below,
    TILE: tl.constexpr,
    SAMPLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    STEP: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Writes the means of the masses over a tile's rows, for BLOCK_N blocks, to `scratch_ptr`."""
    STEPS: tl.constexpr = BLOCK_N // STEP
    number = tl.program_id(1)
    first, position, end, columns, dense = _place(
        tile_ptr, first_tile + number, block_size, dense_below, TILE
    )
    start = tl.program_id(0) * BLOCK_N
    if (start < columns) & (not dense):
        first_row = (position - first) // SAMPLE
        last_row = (end - 1 - first) // SAMPLE + 1
        count = (last_row - first_row).to(tl.float32)
        item = number.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
        mass_ptr += item * ROWS * blocks  # so that the offsets below fit in 32 bits
        high_ptr += item * ROWS * (blocks // STEP)
        total_ptr += item * ROWS * TOTAL_COLUMNS
        # (steps, blocks of a step): all blocks of a step share one unit
        step = start // STEP + tl.arange(0, STEPS)
        slot = tl.arange(0, STEP)
        place = step[:, None] * STEP + slot[None, :]
        if SLOTS:
            # of 32 blocks, a thread of a matrix product holds two neighbours of every eight
            slot = slot // 32 * 32 + slot % 8 // 2 * 8 + slot % 32 // 8 * 2 + slot % 2
        column = step[:, None] * STEP + slot[None, :]
        mean = tl.zeros([STEPS, STEP], tl.float32)
        # a mask per step keeps loads wide; masses past the last column of a step were written too
        there = step * STEP < columns
        for row in tl.range(first_row, last_row, loop_unroll_factor=UNROLL):
            high = tl.load(total_ptr + row * TOTAL_COLUMNS + TOTAL_HIGH)
            total = tl.load(total_ptr + row * TOTAL_COLUMNS + TOTAL_MASS)
            unit = tl.load(high_ptr + row * (blocks // STEP) + step, mask=there, other=LOWEST)
            mass = tl.load(mass_ptr + row * blocks + place, mask=there[:, None], other=0.0)
            weight = tl.exp2(unit - high) * (1.0 / (total * count))
            mean += mass.to(tl.float32) * weight[:, None]
        mean = bits_of(mean).to(tl.float32, bitcast=True)
        tl.store(scratch_ptr + item * blocks + column, mean, mask=column < columns)


@triton.jit
def _largest(scratch_ptr, columns, BLOCK_N: tl.constexpr):
    """The largest mass of a tile; NaN if there is one."""
    result = tl.zeros([], tl.int32)
    for start in range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mass = tl.load(scratch_ptr + column, mask=column < columns, other=0.0)
        result = tl.maximum(result, tl.max(mass.to(tl.int32, bitcast=True), 0))
    return result.to(tl.float32, bitcast=True)


@triton.jit
def _tally(scratch_ptr, columns, bound, sink, local, COUNT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of the blocks with more mass than int32 bits `bound`: their mass, or (COUNT) how many are not kept."""
    result = 0.0
    for start in range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mass = tl.load(scratch_ptr + column, mask=column < columns, other=0.0)
        more = (mass.to(tl.int32, bitcast=True) > bound) & (column < columns)
        if COUNT:
            free = (column >= sink) & (column < columns - local)
            result += tl.sum((more & free).to(tl.float32), 0)
        else:
            result += tl.sum(tl.where(more, mass, 0.0), 0)
    return result


@triton.jit
def _bound(scratch_ptr, columns, limit, sink, local, COUNT: tl.constexpr, BLOCK_N: tl.constexpr):
    """The smallest bits with `_tally(bits) < limit`, and that tally."""
    low = -1
    high = tl.cast(NOT_A_NUMBER, tl.int32)
    while high - low > 1:
        middle = low + (high - low) // 2
        fits = _tally(scratch_ptr, columns, middle, sink, local, COUNT, BLOCK_N) < limit
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle)
    return high, _tally(scratch_ptr, columns, high, sink, local, COUNT, BLOCK_N)


@triton.jit
def write_choice(
    scratch_ptr,
    mask_ptr,
    largest,
    dense,
    columns,
    last_block,
    words,
    threshold,
    share,
    topk,
    sink,
    local,
    BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SHARE: tl.constexpr,
    TOPK: tl.constexpr,
):
    """Writes the bit mask of the blocks that a tile takes, from its masses; all candidates if `dense`.

    `columns` is the number of candidates. Blocks from there up to `last_block` are the tile's own.
    """
    bound = 0
    share_bits = 0
    share_before = 0.0
    count_bits = 0
    count_before = 0.0
    room = 0.0
    if not dense:
        if THRESHOLD:
            bound = tl.minimum((largest * threshold).to(tl.int32, bitcast=True), NOT_A_NUMBER)
        if SHARE:
            share_bits, share_before = _bound(scratch_ptr, columns, share, sink, local, False, BLOCK_N)
        if TOPK:
            # The cap counts blocks that pass the other tests; these are the heaviest ones not kept anyway.
            forced = sink + local - tl.maximum(0, sink + local - columns)
            room = (topk - forced).to(tl.float32)
            count_bits, count_before = _bound(scratch_ptr, columns, room, sink, local, True, BLOCK_N)
    share_ties = 0
    count_ties = 0
    for start in range(0, words * 32, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        candidate = column < columns
        taken = candidate
        if not dense:
            mass = tl.load(scratch_ptr + column, mask=candidate, other=0.0)
            bits = mass.to(tl.int32, bitcast=True)
            free = (column >= sink) & (column < columns - local)
            passes = candidate
            if THRESHOLD:
                passes = passes & (bits >= bound)
            if SHARE:
                tie = candidate & (bits == share_bits)
                rank = share_ties + tl.cumsum(tie.to(tl.int32), 0) - tie.to(tl.int32)
                share_ties += tl.sum(tie.to(tl.int32), 0)
                passes = passes & (
                    (bits > share_bits) | (tie & ~(share_before + rank.to(tl.float32) * mass >= share))
                )
            if TOPK:
                tie = candidate & free & (bits == count_bits)
                rank = count_ties + tl.cumsum(tie.to(tl.int32), 0) - tie.to(tl.int32)
                count_ties += tl.sum(tie.to(tl.int32), 0)
                passes = passes & ((bits > count_bits) | (tie & (count_before + rank.to(tl.float32) < room)))
            taken = candidate & (passes | (column < sink) | (column >= columns - local))
        taken = taken | ((column >= columns) & (column < last_block))
        bit = tl.arange(0, 32)
        word = tl.arange(0, BLOCK_N // 32)
        value = tl.sum(tl.reshape(taken.to(tl.int32), (BLOCK_N // 32, 32)) << bit[None, :], 1)
        tl.store(mask_ptr + start // 32 + word, value, mask=start // 32 + word < words)


@triton.jit(do_not_specialize=["first_tile", "words", "dense_below", "topk", "sink_blocks", "local_blocks"])
def _choose_kernel(
    scratch_ptr,
    mask_ptr,
    tile_ptr,
    mask_strides,
    first_tile,
    blocks,
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
    number = tl.program_id(0)
    head = tl.program_id(1)
    first, position, end, columns, dense = _place(
        tile_ptr, first_tile + number, block_size, dense_below, TILE
    )
    last_block = tl.where(end > position, tl.cdiv(end, block_size), 0)
    sink = tl.minimum(sink_blocks, columns)
    local = tl.minimum(local_blocks, columns)
    scratch_ptr += (number.to(tl.int64) * tl.num_programs(1) + head) * blocks
    largest = 0.0
    if not dense:
        largest = _largest(scratch_ptr, columns, BLOCK_N)
    mask_ptr += head.to(tl.int64) * mask_strides[0] + (first_tile + number).to(tl.int64) * mask_strides[1]
    write_choice(
        scratch_ptr, mask_ptr, largest, dense, columns, last_block, words,
        threshold, share, topk, sink, local, BLOCK_N, THRESHOLD, SHARE, TOPK,
    )  # fmt: skip
