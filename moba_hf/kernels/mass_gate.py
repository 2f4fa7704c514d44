"""The choice of blocks by the mass gate (`moba_hf.op.gates`), as `gate` makes that by the mean.

Legend: B block size, D head dim, G query heads of a program, P parts of a block, K1 scored choices per query,
W classes (columns modulo the tile width), R levels kept per class.

The two kernels are those of `gate` in structure, with its helpers: class insertion of sortable scores, then a
second kernel for the few rows where a class gave all that it kept. Only the score of a block differs: instead
of `q . mean` it is, in log2 units, the log-sum-exp of P parts and of the smallest key,

    part = log2 n + scale' q . mean + f(scale'' (q * q) . variance),   f(v) = v / 2, but at most
                                                                      sqrt(2 v log2 n) - log2 n

from `2 P + 1` dot products with the vectors of `mass_summary`. They order as natural logarithms do.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.launch import device_of, dot, num_processors, padded, rows_contiguous
from moba_hf.kernels.levels import EMPTY, SPENT, filled, insert, sortable, take, tile_bits
from moba_hf.kernels.mass_summary import mass_summary
from moba_hf.kernels.plan import Plan, find_tile, head_split, make_plan
from moba_hf.op.numerics import part_size

_LOG2_E = math.log2(math.e)


def _tile(q: Tensor, block_size: int) -> tuning.Tile:
    parts = block_size // part_size(block_size)
    return tuning.mass_gate_tile(padded(q.shape[3]), q.element_size(), parts, tuning.capability(q.device))


def select_blocks_by_mass(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    topk: int,
    sink_blocks: int,
    local_blocks: int,
    softmax_scale: float,
    levels: int | None = None,
) -> Tensor:
    """Chosen blocks, int32 `(batch, q_len, H, topk)`; arguments as `gate.select_blocks`, and the scale."""
    q, k = rows_contiguous(q), rows_contiguous(k)
    choice = torch.full((q.shape[0], q.shape[2], q.shape[1], topk), -1, dtype=torch.int32, device=q.device)
    if choice.numel() == 0 or table.shape[0] == 0:
        return choice
    tile = _tile(q, block_size)
    _, tokens = head_split(q.shape[1] // k.shape[1], tile.m)
    plan = make_plan(q, k, table, max_seqlen_q, max_seqlen_k, block_size=block_size, tile=tokens)
    scored = topk > 1 + sink_blocks + local_blocks
    summary = mass_summary(k, plan) if scored else (k.new_empty(k.shape[1], 2, 1, k.shape[3]), k)
    mass_gate(q, summary, plan, choice, sink_blocks, local_blocks, softmax_scale, levels)
    return choice


def mass_gate(
    q: Tensor,
    summary: tuple[Tensor, Tensor],
    plan: Plan,
    choice: Tensor,
    sink_blocks: int,
    local_blocks: int,
    softmax_scale: float,
    levels: int | None = None,
) -> None:
    """Writes `choice (batch, q_len, H, topk)`, full of -1 before, from what `mass_summary` returns."""
    centers, spreads = summary
    num_heads, head_dim, num_kv_heads = q.shape[1], q.shape[3], centers.shape[0]
    topk, group = choice.shape[3], num_heads // num_kv_heads
    tile = _tile(q, plan.block_size)
    count = topk - 1 - sink_blocks - local_blocks
    known, exact = tuning.gate_levels(count, plan.max_blocks, tile.n)
    if levels is not None:
        known, exact = levels, levels >= min(count, triton.cdiv(plan.max_blocks, tile.n))
    heads, _ = head_split(group, tile.m)
    splits = triton.cdiv(group, heads)
    counter = torch.zeros(num_kv_heads, dtype=torch.int32, device=q.device)
    length = 1 if exact else plan.num_rows * group
    listed = torch.empty((num_kv_heads, length), dtype=torch.int32, device=q.device)
    shared = (q, centers, spreads, choice, counter, listed, plan.table, plan.block_offset)
    strides = (q.stride(0), q.stride(1), q.stride(2), centers.shape[2], length)
    sizes = (q.shape[2], num_heads, group, plan.block_size)
    scales = (softmax_scale * _LOG2_E, softmax_scale**2 * _LOG2_E)
    constants = {
        "TOPK": topk,
        "SINK": sink_blocks,
        "LOCAL": local_blocks,
        "PARTS": plan.block_size // part_size(plan.block_size),
        "LOG2_SIZE": math.log2(part_size(plan.block_size)),
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded(head_dim),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "LEVELS": known,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }
    with device_of(q):
        _mass_gate_fwd_kernel[(plan.max_tiles, num_kv_heads * splits)](
            *shared,
            plan.tile_offset,
            *strides,
            *sizes,
            *scales,
            plan.num_seqs,
            plan.num_rows,
            splits,
            TILE=plan.tile,
            TILES_PER_BLOCK=plan.tiles_per_block,
            HEADS=heads,
            TILE_BITS=tile_bits(triton.cdiv(plan.max_blocks, tile.n)),
            EXACT=exact,
            **constants,
        )
        if not exact:
            programs = max(1, 2 * num_processors(q) // num_kv_heads)
            _mass_gate_rest_kernel[(programs, num_kv_heads)](
                *shared,
                *strides,
                *sizes,
                *scales,
                TILE_BITS=tile_bits(triton.cdiv(plan.num_blocks, tile.n)),
                **{**constants, "LEVELS": min(known, 6)},  # beside the limits of its rounds more would spill
            )


@triton.jit
def _squares(q, like):
    """`q * q` rounded to the dtype that pointer `like` holds."""
    x = q.to(tl.float32)
    return (x * x).to(like.dtype.element_ty)


@triton.jit
def _part_mass(total, q, squares, center, spread, scale, square_scale, LOG2_SIZE: tl.constexpr):
    """log2 of `2^total` and the estimated mass of one part, from tiles of means and variances `(D, N)`."""
    moved = dot(squares, spread) * square_scale
    far = tl.sqrt(tl.maximum(moved, 0.0) * (2 * LOG2_SIZE)) - LOG2_SIZE
    mass = tl.where(moved <= 2 * LOG2_SIZE, moved * 0.5, far) + (dot(q, center) * scale + LOG2_SIZE)
    return tl.maximum(total, mass) + tl.log2(1.0 + tl.exp2(-tl.abs(total - mass)))


@triton.jit
def _block_mass(
    q,
    squares,
    center_at,
    spread_at,
    there,
    step,
    scale,
    square_scale,
    PARTS: tl.constexpr,
    LOG2_SIZE: tl.constexpr,
):
    """Scores `(M, N)` of a tile of blocks; `step`: elements from one vector of a summary to the next."""
    total = dot(q, tl.load(center_at + PARTS * step, mask=there, other=0.0)) * scale
    if PARTS <= 4:
        for part in tl.static_range(PARTS):
            center = tl.load(center_at + part * step, mask=there, other=0.0)
            spread = tl.load(spread_at + part * step, mask=there, other=0.0)
            total = _part_mass(total, q, squares, center, spread, scale, square_scale, LOG2_SIZE)
    else:
        for part in range(PARTS):
            center = tl.load(center_at + part * step, mask=there, other=0.0)
            spread = tl.load(spread_at + part * step, mask=there, other=0.0)
            total = _part_mass(total, q, squares, center, spread, scale, square_scale, LOG2_SIZE)
    return total


@triton.jit(do_not_specialize=["blocks", "listed_rows", "q_len", "num_seqs", "num_rows", "block_size"])
def _mass_gate_fwd_kernel(
    q_ptr,
    center_ptr,
    spread_ptr,
    choice_ptr,
    counter_ptr,
    listed_ptr,
    table_ptr,
    block_offset_ptr,
    tile_offset_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    blocks,
    listed_rows,
    q_len,
    num_heads,
    group_size,
    block_size,
    scale,
    square_scale,
    num_seqs,
    num_rows,
    splits,
    TOPK: tl.constexpr,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    PARTS: tl.constexpr,
    LOG2_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEVELS: tl.constexpr,
    TILE: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    TILE_BITS: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    COUNT: tl.constexpr = TOPK - 1 - SINK - LOCAL
    number = tl.program_id(0)
    kv_head = tl.program_id(1) // splits
    if number < tl.load(tile_offset_ptr + num_seqs):
        seq, batch, own, first, origin, low, high, k_begin, k_len = find_tile(
            table_ptr,
            tile_offset_ptr,
            num_seqs,
            q_len,
            0,
            num_rows,
            number,
            block_size,
            TILE,
            TILES_PER_BLOCK,
        )
        row = tl.arange(0, BLOCK_M)
        token = row // HEADS
        in_group = tl.program_id(1) % splits * HEADS + row % HEADS
        position = first + token
        query = position + origin
        there = (token < TILE) & (position < (own + 1) * block_size) & (query >= low) & (query < high)
        there = there & (in_group < group_size)
        head = kv_head * group_size + in_group
        flat = (batch.to(tl.int64) * q_len + query) * num_heads + head
        out = choice_ptr + flat * TOPK
        tl.store(out, own, mask=there)
        # forced blocks: sinks, then those just before the own one; candidates lie between
        sinks = tl.minimum(SINK, own)
        local = tl.maximum(sinks, own - LOCAL)
        for i in range(SINK):
            tl.store(out + 1 + i, i, mask=there & (i < sinks))
        for i in range(LOCAL):
            tl.store(out + 1 + sinks + i, local + i, mask=there & (local + i < own))
        slot = 1 + sinks + own - local
        columns = local - sinks
        if columns <= COUNT:
            for i in range(COUNT):
                tl.store(out + slot + i, sinks + i, mask=there & (i < columns))
        elif COUNT > 0:
            dim = tl.arange(0, PADDED_DIM)
            column = tl.arange(0, BLOCK_N)
            q_row = (
                batch.to(tl.int64) * q_stride_b
                + head.to(tl.int64) * q_stride_h
                + query.to(tl.int64) * q_stride_n
            )
            q = tl.load(
                q_ptr + q_row[:, None] + dim[None, :],
                mask=there[:, None] & (dim < HEAD_DIM)[None, :],
                other=0.0,
            )
            squares = _squares(q, spread_ptr)
            first_block = tl.load(block_offset_ptr + seq) + sinks
            step = tl.cast(blocks, tl.int64) * HEAD_DIM
            vector = column[None, :] * HEAD_DIM + dim[:, None] + first_block.to(tl.int64) * HEAD_DIM
            center_ptr += kv_head.to(tl.int64) * (PARTS + 1) * step
            spread_ptr += kv_head.to(tl.int64) * PARTS * step
            levels = filled(EMPTY, LEVELS, BLOCK_M, BLOCK_N)
            for tile in tl.range(0, tl.cdiv(columns, BLOCK_N), num_stages=STAGES):
                inside = (tile * BLOCK_N + column < columns)[None, :]
                at = tile * (BLOCK_N * HEAD_DIM) + vector
                score = _block_mass(
                    q,
                    squares,
                    center_ptr + at,
                    spread_ptr + at,
                    inside & (dim < HEAD_DIM)[:, None],
                    step,
                    scale,
                    square_scale,
                    PARTS,
                    LOG2_SIZE,
                )
                key = tl.where(inside, sortable(score, tile, TILE_BITS), EMPTY)
                levels = insert(levels, key, LEVELS)
            mask: tl.constexpr = (1 << TILE_BITS) - 1
            for i in range(COUNT - 1):
                best, chosen, levels = take(levels, there, column, BLOCK_N, LEVELS)
                tile_of = mask - (best & mask)
                tl.store(out + slot + i, sinks + tile_of * BLOCK_N + chosen, mask=there & (best > SPENT))
            spent = tl.max((levels[0] == SPENT).to(tl.int32), 1)
            best, chosen, levels = take(levels, there, column, BLOCK_N, LEVELS)
            tile_of = mask - (best & mask)
            last = sinks + tile_of * BLOCK_N + chosen
            tl.store(out + slot + COUNT - 1, last, mask=there & (best > SPENT))
            if not EXACT:
                if columns > LEVELS * BLOCK_N:
                    again = tl.where(there, spent, 0)
                    count = tl.sum(again, 0)
                    if count > 0:
                        # the second kernel reads the sequence from the last slot and overwrites it
                        tl.debug_barrier()
                        tl.store(out + TOPK - 1, seq, mask=again > 0)
                        at = tl.atomic_add(counter_ptr + kv_head, count) + tl.cumsum(again, 0) - again
                        listed = listed_ptr + kv_head.to(tl.int64) * listed_rows + at
                        tl.store(listed, flat.to(tl.int32), mask=again > 0)


@triton.jit(do_not_specialize=["blocks", "listed_rows", "q_len", "block_size"])
def _mass_gate_rest_kernel(
    q_ptr,
    center_ptr,
    spread_ptr,
    choice_ptr,
    counter_ptr,
    listed_ptr,
    table_ptr,
    block_offset_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    blocks,
    listed_rows,
    q_len,
    num_heads,
    group_size,
    block_size,
    scale,
    square_scale,
    TOPK: tl.constexpr,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    PARTS: tl.constexpr,
    LOG2_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEVELS: tl.constexpr,
    TILE_BITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Chooses again for listed rows, of any sequence, in rounds, as `gate._gate_rest_kernel` does."""
    COUNT: tl.constexpr = TOPK - 1 - SINK - LOCAL
    kv_head = tl.program_id(1)
    num_listed = tl.load(counter_ptr + kv_head)
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, PADDED_DIM)
    column = tl.arange(0, BLOCK_N)
    step = tl.cast(blocks, tl.int64) * HEAD_DIM
    center_ptr += kv_head.to(tl.int64) * (PARTS + 1) * step
    spread_ptr += kv_head.to(tl.int64) * PARTS * step
    listed_ptr += kv_head.to(tl.int64) * listed_rows
    item = tl.program_id(0)
    while item * BLOCK_M < num_listed:
        there = item * BLOCK_M + row < num_listed
        flat = tl.load(listed_ptr + item * BLOCK_M + row, mask=there, other=0)
        out = choice_ptr + flat.to(tl.int64) * TOPK
        own = tl.load(out, mask=there, other=0)
        seq = tl.load(out + TOPK - 1, mask=there, other=0)
        offset = tl.load(block_offset_ptr + seq, mask=there, other=0)
        begin = offset + SINK  # a listed row has more candidates than forced blocks before it
        end = offset + own - LOCAL
        base = tl.min(tl.where(there, begin, 2147483647), 0)
        tiles = tl.cdiv(tl.max(tl.where(there, end, 0), 0) - base, BLOCK_N)
        query = flat // num_heads
        q_row = (query // q_len).to(tl.int64) * q_stride_b + (query % q_len).to(tl.int64) * q_stride_n
        q_row += (flat % num_heads).to(tl.int64) * q_stride_h
        q = tl.load(
            q_ptr + q_row[:, None] + dim[None, :], mask=there[:, None] & (dim < HEAD_DIM)[None, :], other=0.0
        )
        squares = _squares(q, spread_ptr)
        tl.debug_barrier()  # the last slot is read before it is written
        done = tl.where(there, 0, COUNT)
        limit = tl.full([BLOCK_M], 2147483647, tl.int32)
        limit_class = tl.full([BLOCK_M], -1, tl.int32)
        while tl.min(done, 0) < COUNT:
            levels = filled(EMPTY, LEVELS, BLOCK_M, BLOCK_N)
            for tile in tl.range(0, tiles, num_stages=STAGES):
                block = base + tile * BLOCK_N + column
                known = (block < blocks)[None, :] & (dim < HEAD_DIM)[:, None]
                at = block[None, :].to(tl.int64) * HEAD_DIM + dim[:, None]
                score = _block_mass(
                    q,
                    squares,
                    center_ptr + at,
                    spread_ptr + at,
                    known,
                    step,
                    scale,
                    square_scale,
                    PARTS,
                    LOG2_SIZE,
                )
                key = sortable(score, tile, TILE_BITS)
                inside = (block[None, :] >= begin[:, None]) & (block[None, :] < end[:, None])
                below = (key < limit[:, None]) | (
                    (key == limit[:, None]) & (column[None, :] > limit_class[:, None])
                )
                levels = insert(levels, tl.where(inside & below, key, EMPTY), LEVELS)
            certain = done < COUNT
            for _ in range(COUNT):
                certain = certain & (tl.max((levels[0] == SPENT).to(tl.int32), 1) == 0) & (done < COUNT)
                best, chosen, levels = take(levels, certain, column, BLOCK_N, LEVELS)
                mask: tl.constexpr = (1 << TILE_BITS) - 1
                block = base + (mask - (best & mask)) * BLOCK_N + chosen
                block = tl.where(best > SPENT, block - offset, -1)
                tl.store(out + (TOPK - COUNT) + done, block, mask=certain)
                limit = tl.where(certain, best, limit)
                limit_class = tl.where(certain, chosen, limit_class)
                done += certain.to(tl.int32)
        item += tl.num_programs(0)
