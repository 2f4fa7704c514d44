"""Estimates each block's attention mass for the sampled rows of a tile: the expensive half of the choice.

Legend: T tile, B block size, D head dim, G query heads of a kv head, P parts of a block, R sampled rows of a
tile, N blocks of a step.

A program holds the sampled rows of a few tiles times the heads of one kv head, so that block summaries are
read once for all of them, and loops over the candidates, N at a time. A block's score is the log-sum-exp, in
log2 units, of its P parts and its smallest key (`moba_hf.op.gates`). With `high` the largest term of the row
so far, `sum of exp2(term - high)` is the block's unnormalised mass; it takes P + 1 exponentials and no
logarithm. The mass is stored in fp16 together with its `high`. `shared_choose` combines the rows of a tile
once their totals are known. Masses that underflow are below 2^-24 of the row's heaviest block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import shared_hopper
from moba_hf.kernels.launch import cdiv, device_of, dot, narrow, next_power_of_2, padded
from moba_hf.kernels.shared_plan import SharedPlan
from moba_hf.kernels.shared_tuning import MassTile
from moba_hf.op.numerics import part_size
from moba_hf.op.shared import SharedRule

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Masses:
    """Unnormalised masses of a chunk of tiles; the memory is reused for each chunk.

    Legend: C tiles of a chunk, H query heads, R sampled rows, NB blocks, N blocks of a step.

    Attributes:
        mass: fp16 `(C, H, R, NB)`, relative to the `high` of its step.
        high: fp32 `(C, H, R, NB / N)`, log2 of the unit of each step.
        total: fp32 `(C, H, R, 2)`, the final `high` and the sum of all masses relative to it.
        step: N.
        slots: the masses of a step are in the order of `shared_hopper_mass`, see `shared_choose`.
    """

    mass: Tensor
    high: Tensor
    total: Tensor
    step: int
    slots: bool = False

    @classmethod
    def empty(
        cls, chunk: int, num_heads: int, rows: int, blocks: int, step: int, like: Tensor, slots: bool = False
    ) -> Masses:
        """Uninitialised masses for `chunk` tiles."""
        blocks = cdiv(max(1, blocks), step) * step
        shape = (chunk, num_heads, rows)
        return cls(
            torch.empty(*shape, blocks, dtype=torch.float16, device=like.device),
            torch.empty(*shape, blocks // step, dtype=torch.float32, device=like.device),
            torch.empty(*shape, 2, dtype=torch.float32, device=like.device),
            step,
            slots,
        )

    @staticmethod
    def tile_bytes(num_heads: int, rows: int, blocks: int, step: int) -> int:
        """Bytes per tile."""
        return num_heads * rows * (2 * blocks + 4 * blocks // step + 8)


def row_masses(
    q: Tensor,
    summary: tuple[Tensor, Tensor],
    plan: SharedPlan,
    rule: SharedRule,
    softmax_scale: float,
    masses: Masses,
    first_tile: int,
    tile: MassTile,
) -> None:
    """Fills `masses` for the tiles from `first_tile` on, as many as it has room for; skips dense tiles.

    Args:
        q: `(batch, H, q_len, D)`, last dimension contiguous.
        summary: the result of `shared_summary`.
    """
    if tile.hopper:
        shared_hopper.row_masses(q, summary, plan, rule, softmax_scale, masses, first_tile, tile)
        return
    centers, spreads = summary
    num_heads, head_dim, num_kv_heads = q.shape[1], q.shape[3], centers.shape[0]
    group = num_heads // num_kv_heads
    rows = rule.tile // rule.sample
    heads, block_rows = heads_and_rows(group, rows, tile.m)
    tiles = tile.m // (heads * block_rows)
    chunk = masses.mass.shape[0]
    grid = (
        cdiv(chunk, tiles) * cdiv(rows, block_rows),
        num_kv_heads * cdiv(group, heads),
    )
    with device_of(q):
        _row_masses_kernel[grid](
            q,
            centers,
            spreads,
            masses.mass,
            masses.high,
            masses.total,
            plan.tiles,
            *q.stride()[:3],
            centers.shape[2],
            masses.mass.shape[3],
            first_tile,
            min(first_tile + chunk, plan.num_tiles),
            num_heads,
            group,
            rule.block_size,
            rule.dense_below,
            softmax_scale * _LOG2_E,
            softmax_scale**2 * _LOG2_E,
            TILE=rule.tile,
            SAMPLE=rule.sample,
            ROWS=rows,
            BLOCK_ROWS=block_rows,
            HEADS=heads,
            TILES=tiles,
            PARTS=rule.block_size // part_size(rule.block_size),
            LOG2_SIZE=math.log2(part_size(rule.block_size)),
            HEAD_DIM=head_dim,
            PADDED_DIM=padded(head_dim),
            PADDED_HALF=padded(head_dim // 2),
            HALVES=rule.rotary_pairs == "halves",
            BLOCK_N=tile.n,
            WIDE=tile.wide,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )


def heads_and_rows(group: int, rows: int, m: int) -> tuple[int, int]:
    """How many heads of a `group`, and how many of a tile's sampled `rows`, a program of `m` rows takes."""
    block_rows = min(rows, m)
    return min(next_power_of_2(group), m // block_rows), block_rows


@triton.jit
def part_term(q, squares, center, spread, scale, square_scale, LOG2_SIZE: tl.constexpr):
    """log2 `(M, N)` of the estimated mass of one part, from its means and variances `(D, N)`."""
    moved = dot(squares, spread)
    far = tl.sqrt(moved * (2 * LOG2_SIZE * square_scale))
    near = moved * (0.5 * square_scale) + LOG2_SIZE
    return dot(q, center) * scale + tl.where(moved <= 2 * LOG2_SIZE / square_scale, near, far)


@triton.jit(do_not_specialize=["first_tile", "last_tile", "dense_below"])
def _row_masses_kernel(
    q_ptr,
    center_ptr,
    spread_ptr,
    mass_ptr,
    high_ptr,
    total_ptr,
    tile_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_n,
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
    info = tile_ptr + tl.minimum(tile, last_tile - 1).to(tl.int64) * 8
    q_begin = tl.load(info + 1)
    q_end = tl.load(info + 2)
    position = tl.load(info + 3)
    base = tl.load(info + 6)
    first = position // TILE * TILE
    columns = tl.where(known & (first >= dense_below), first // block_size, 0)
    # the sampled row is the last one, within the call, of each group of SAMPLE positions
    end = position + q_end - q_begin
    begin = first + sampled * SAMPLE
    at = tl.minimum(begin + SAMPLE, end) - 1
    there = known & (columns > 0) & (at >= position) & (begin < end)
    columns = tl.where(there, columns, 0)
    if tl.max(columns, 0) > 0:
        dim = tl.arange(0, PADDED_DIM)
        pair = tl.arange(0, PADDED_HALF)
        column = tl.arange(0, BLOCK_N)
        query = tl.where(there, q_begin + at - position, 0).to(tl.int64)
        q_row = q_ptr + tl.load(info).to(tl.int64) * q_stride_b
        q_row += tl.where(there, head, 0).to(tl.int64) * q_stride_h + query * q_stride_n
        q = tl.load(q_row[:, None] + dim[None, :], mask=there[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        low = pair if HALVES else 2 * pair
        high_dim = pair + HALF if HALVES else 2 * pair + 1
        inside = there[:, None] & (pair < HALF)[None, :]
        a = tl.load(q_row[:, None] + low[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(q_row[:, None] + high_dim[None, :], mask=inside, other=0.0).to(tl.float32)
        squares = narrow(a * a + b * b, spread_ptr)
        step = tl.cast(blocks, tl.int64)
        center_ptr += kv_head.to(tl.int64) * (PARTS + 1) * step * HEAD_DIM
        spread_ptr += kv_head.to(tl.int64) * PARTS * step * HALF
        item = ((tile - first_tile).to(tl.int64) * num_heads + head) * ROWS + sampled
        high = tl.full([BLOCK_M], -1e30, tl.float32)
        total = tl.zeros([BLOCK_M, 8], tl.float32)  # the threads of a row are added up once, at the end
        done = -1
        for i in range(TILES):
            # tiles of the same sequence share its blocks; each further sequence takes another pass
            here = tl.load(tile_ptr + tl.minimum(first_tile + number + i, last_tile - 1).to(tl.int64) * 8 + 6)
            seen = tl.where(base == here, columns, 0)
            if here > done:
                done = here
                center_at = center_ptr + (here + column)[None, :].to(tl.int64) * HEAD_DIM + dim[:, None]
                spread_at = spread_ptr + (here + column)[None, :].to(tl.int64) * HALF + pair[:, None]
                if WIDE:
                    w = tl.arange(0, PARTS * BLOCK_N)
                    w_column = w % BLOCK_N
                    w_at = (here + w_column).to(tl.int64) + (w // BLOCK_N).to(tl.int64) * step
                    wide_c = center_ptr + w_at[None, :] * HEAD_DIM + dim[:, None]
                    wide_s = spread_ptr + w_at[None, :] * HALF + pair[:, None]
                last = tl.max(seen, 0)
                unmasked = tl.min(tl.where(there, seen, last), 0)  # no row needs a mask below this block
                for start in tl.range(0, last, BLOCK_N, num_stages=STAGES):
                    valid = (start + column < last)[None, :]
                    c_at = center_at + start * HEAD_DIM
                    s_at = spread_at + start * HALF
                    c_mask = valid & (dim < HEAD_DIM)[:, None]
                    s_mask = valid & (pair < HALF)[:, None]
                    least = dot(q, tl.load(c_at + PARTS * step * HEAD_DIM, mask=c_mask, other=0.0)) * scale
                    # a term of -1e30 adds nothing to a row that has candidates
                    masked = start + BLOCK_N > unmasked
                    if WIDE:
                        w_valid = (start + w_column < last)[None, :]
                        at_wide = wide_c + start * HEAD_DIM
                        center = tl.load(at_wide, mask=w_valid & (dim < HEAD_DIM)[:, None], other=0.0)
                        at_wide = wide_s + start * HALF
                        spread = tl.load(at_wide, mask=w_valid & (pair < HALF)[:, None], other=0.0)
                        term = part_term(q, squares, center, spread, scale, square_scale, LOG2_SIZE)
                        if masked:
                            term = tl.where((start + w_column)[None, :] < seen[:, None], term, -1e30)
                            least = tl.where((start + column)[None, :] < seen[:, None], least, -1e30)
                        term = tl.reshape(term, (BLOCK_M, PARTS, BLOCK_N))
                        top = tl.maximum(least, tl.max(term, 1))
                    else:
                        terms = ()
                        if masked:
                            least = tl.where((start + column)[None, :] < seen[:, None], least, -1e30)
                        top = least
                        for part in tl.static_range(PARTS):
                            center = tl.load(c_at + part * step * HEAD_DIM, mask=c_mask, other=0.0)
                            spread = tl.load(s_at + part * step * HALF, mask=s_mask, other=0.0)
                            each = part_term(q, squares, center, spread, scale, square_scale, LOG2_SIZE)
                            if masked:
                                each = tl.where((start + column)[None, :] < seen[:, None], each, -1e30)
                            terms = terms + (each,)  # type: ignore[assignment]
                            top = tl.maximum(top, each)
                    new_high = tl.maximum(high, tl.max(top, 1))
                    mass = tl.exp2(least - new_high[:, None])
                    if WIDE:
                        mass += tl.sum(tl.exp2(term - new_high[:, None, None]), 1)
                    else:
                        for part in tl.static_range(PARTS):
                            mass += tl.exp2(terms[part] - new_high[:, None])
                    total *= tl.exp2(high - new_high)[:, None]
                    total += tl.sum(tl.reshape(mass, (BLOCK_M, BLOCK_N // 8, 8)), 1)
                    high = new_high
                    in_tile = start < seen
                    target = mass_ptr + item[:, None] * mass_blocks + (start + column)[None, :]
                    tl.store(target, mass.to(tl.float16), mask=in_tile[:, None])
                    tl.store(
                        high_ptr + item * (mass_blocks // BLOCK_N) + start // BLOCK_N, high, mask=in_tile
                    )
        tl.store(total_ptr + item * 2, high, mask=there)
        tl.store(total_ptr + item * 2 + 1, tl.sum(total, 1), mask=there)
