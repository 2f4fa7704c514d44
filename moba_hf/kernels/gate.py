"""The choice of blocks: gate scores and top-k in one kernel, never tokens x blocks in memory.

Legend: B block size, D head dim, G query heads of a program, K1 scored choices per query, W classes (columns
modulo the tile width), R levels kept per class.

1. A program takes one tile of queries (see `plan`; all share the own block c) for G heads of one kv head, as
   up to BLOCK_M rows, and scans the candidates [sinks, c - local) of its sequence, W blocks at a time.
2. A score becomes an int32 that sorts like it; the number of the tile replaces its lowest bits (reversed: of
   equal scores the earlier tile is larger). Per class the R largest are kept, by max and min alone. Where the
   first tile already has K1 positive scores for every row, no negative one can be chosen, and the bits of a
   float sort as they are.
3. K1 times, the largest class head (the lower class of equals) is taken and its class moves up: ties go to
   the lower block index, for negative scores too.
4. A row is exact unless a class had given all its R entries before the last choice was made. Such rows go
   to a list per kv head, and a second kernel scans for them again, below what was already taken, until done.
Scores that differ by less than 2^(bits - 23) relative count as equal; bits is 7 (2^-16) up to 8,192 blocks.
The list is filled by atomics, but its order changes no result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.block_mean import block_mean
from moba_hf.kernels.launch import device_of, dot, num_processors, padded, rows_contiguous
from moba_hf.kernels.levels import EMPTY, SPENT, filled, insert, sortable, sortable_positive, take, tile_bits
from moba_hf.kernels.plan import Plan, find_tile, head_split, make_plan


def select_blocks(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    topk: int,
    sink_blocks: int,
    local_blocks: int,
    levels: int | None = None,
) -> Tensor:
    """Chosen blocks, int32 `(batch, q_len, H, topk)`: own first, -1 last, -1 throughout for padding.

    Args:
        q: `(batch, H, q_len, D)`. k: `(batch, HK, kv_len, D)`. table: see `moba_hf.op.sequences`.
        max_seqlen_q, max_seqlen_k: bounds on the queries and keys of one sequence.
        levels: R; None: by `tuning.gate_levels`. Fewer send more rows to the second kernel.
    """
    q, k = rows_contiguous(q), rows_contiguous(k)
    choice = torch.full((q.shape[0], q.shape[2], q.shape[1], topk), -1, dtype=torch.int32, device=q.device)
    if choice.numel() == 0 or table.shape[0] == 0:
        return choice
    tile = tuning.gate_tile(padded(q.shape[3]), tuning.capability(q.device))
    _, tokens = head_split(q.shape[1] // k.shape[1], tile.m)
    plan = make_plan(q, k, table, max_seqlen_q, max_seqlen_k, block_size=block_size, tile=tokens)
    scored = topk > 1 + sink_blocks + local_blocks
    means = block_mean(k, plan) if scored else k.new_empty(k.shape[1], 1, k.shape[3])
    gate(q, means, plan, choice, sink_blocks, local_blocks, levels)
    return choice


def gate(
    q: Tensor,
    means: Tensor,
    plan: Plan,
    choice: Tensor,
    sink_blocks: int,
    local_blocks: int,
    levels: int | None = None,
) -> None:
    """Writes `choice (batch, q_len, H, topk)`, full of -1 before, from `means (HK, NB, D)`."""
    num_heads, head_dim, num_kv_heads = q.shape[1], q.shape[3], means.shape[0]
    topk, tile = choice.shape[3], tuning.gate_tile(padded(head_dim), tuning.capability(q.device))
    count = topk - 1 - sink_blocks - local_blocks
    known, exact = tuning.gate_levels(count, plan.max_blocks, tile.n)
    if levels is not None:
        known, exact = levels, levels >= min(count, triton.cdiv(plan.max_blocks, tile.n))
    heads, _ = head_split(num_heads // num_kv_heads, tile.m)
    splits = triton.cdiv(num_heads // num_kv_heads, heads)
    device = q.device
    counter = torch.zeros(num_kv_heads, dtype=torch.int32, device=device)
    listed = torch.empty(
        (num_kv_heads, 1 if exact else plan.num_rows * (num_heads // num_kv_heads)),
        dtype=torch.int32,
        device=device,
    )
    shared = (q, means, choice, counter, listed, plan.table, plan.block_offset)
    strides = (q.stride(0), q.stride(1), q.stride(2), means.shape[1], listed.shape[1])
    sizes = (q.shape[2], num_heads, num_heads // num_kv_heads, plan.block_size)
    constants = {
        "TOPK": topk,
        "SINK": sink_blocks,
        "LOCAL": local_blocks,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded(head_dim),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "LEVELS": known,
        "num_warps": 2 * tile.warps if known > 4 else tile.warps,
        "maxnreg": 168 if known == 2 else None,  # three programs to a processor instead of two
    }
    with device_of(q):
        _gate_fwd_kernel[(plan.max_tiles, num_kv_heads * splits)](
            *shared,
            plan.tile_offset,
            *strides,
            *sizes,
            plan.num_seqs,
            plan.num_rows,
            splits,
            TILE=plan.tile,
            TILES_PER_BLOCK=plan.tiles_per_block,
            HEADS=heads,
            TILE_BITS=tile_bits(triton.cdiv(plan.max_blocks, tile.n)),
            EXACT=exact,
            STAGES=tile.stages,
            **constants,
        )
        if not exact:
            programs = max(1, 2 * num_processors(q) // num_kv_heads)
            _gate_rest_kernel[(programs, num_kv_heads)](
                *shared,
                *strides,
                *sizes,
                TILE_BITS=tile_bits(triton.cdiv(plan.num_blocks, tile.n)),
                STAGES=tile.stages,
                **{**constants, "num_warps": 8},
            )


@triton.jit
def _load_means(at, dim, HEAD_DIM: tl.constexpr, EVEN_DIM: tl.constexpr):
    """A whole tile of means, zero beyond HEAD_DIM."""
    if EVEN_DIM:
        return tl.load(at)
    else:
        return tl.load(at, mask=(dim < HEAD_DIM)[:, None], other=0.0)


@triton.jit(do_not_specialize=["means_rows", "listed_rows", "q_len", "num_seqs", "num_rows", "block_size"])
def _gate_fwd_kernel(
    q_ptr,
    mean_ptr,
    choice_ptr,
    counter_ptr,
    listed_ptr,
    table_ptr,
    block_offset_ptr,
    tile_offset_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    means_rows,
    listed_rows,
    q_len,
    num_heads,
    group_size,
    block_size,
    num_seqs,
    num_rows,
    splits,
    TOPK: tl.constexpr,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
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
    EVEN_DIM: tl.constexpr = HEAD_DIM == PADDED_DIM
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
            first_block = tl.load(block_offset_ptr + seq) + sinks
            mean_ptr += (kv_head.to(tl.int64) * means_rows + first_block) * HEAD_DIM
            mean_offset = column[None, :] * HEAD_DIM + dim[:, None]
            levels = filled(EMPTY, LEVELS, BLOCK_M, BLOCK_N)
            whole = columns // BLOCK_N
            scanned = 0
            positive = False
            if whole > 0:
                scores = dot(q, _load_means(mean_ptr + mean_offset, dim, HEAD_DIM, EVEN_DIM))
                levels = insert(levels, sortable(scores, 0, TILE_BITS), LEVELS)
                found = tl.sum((scores > 0.0).to(tl.int32), 1)
                # as a matrix: for Blackwell, Triton cannot reduce a reduction of a product once more
                found = tl.reshape(tl.where(there, found, COUNT), (BLOCK_M // 16, 16))
                positive = tl.min(found) >= COUNT
                scanned = 1
            if positive:  # whole tiles need no masks, which would cost a sixth of the scan
                for tile in tl.range(1, whole, num_stages=STAGES):
                    at = mean_ptr + tile * (BLOCK_N * HEAD_DIM) + mean_offset
                    scores = dot(q, _load_means(at, dim, HEAD_DIM, EVEN_DIM))
                    levels = insert(levels, sortable_positive(scores, tile, TILE_BITS), LEVELS)
                scanned = whole
            for tile in tl.range(scanned, whole, num_stages=STAGES):
                at = mean_ptr + tile * (BLOCK_N * HEAD_DIM) + mean_offset
                scores = dot(q, _load_means(at, dim, HEAD_DIM, EVEN_DIM))
                levels = insert(levels, sortable(scores, tile, TILE_BITS), LEVELS)
            for tile in range(whole, tl.cdiv(columns, BLOCK_N)):
                inside = (tile * BLOCK_N + column < columns)[None, :]
                at = mean_ptr + tile * (BLOCK_N * HEAD_DIM) + mean_offset
                mean = tl.load(at, mask=inside & (dim < HEAD_DIM)[:, None], other=0.0)
                key = tl.where(inside, sortable(dot(q, mean), tile, TILE_BITS), EMPTY)
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
                    total = tl.sum(again, 0)
                    if total > 0:
                        # the second kernel reads the sequence from the last slot and overwrites it
                        tl.debug_barrier()
                        tl.store(out + TOPK - 1, seq, mask=again > 0)
                        at = tl.atomic_add(counter_ptr + kv_head, total) + tl.cumsum(again, 0) - again
                        listed = listed_ptr + kv_head.to(tl.int64) * listed_rows + at
                        tl.store(listed, flat.to(tl.int32), mask=again > 0)


@triton.jit(do_not_specialize=["means_rows", "listed_rows", "q_len", "block_size"])
def _gate_rest_kernel(
    q_ptr,
    mean_ptr,
    choice_ptr,
    counter_ptr,
    listed_ptr,
    table_ptr,
    block_offset_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    means_rows,
    listed_rows,
    q_len,
    num_heads,
    group_size,
    block_size,
    TOPK: tl.constexpr,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEVELS: tl.constexpr,
    TILE_BITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Chooses again for listed rows, of any sequence, in rounds; blocks are flat numbers here.

    A round scans for the best below `(limit, limit_class)`, what a row took last, and stops for a row when
    one of its classes is spent: at least LEVELS more are then certain.
    """
    COUNT: tl.constexpr = TOPK - 1 - SINK - LOCAL
    kv_head = tl.program_id(1)
    num_listed = tl.load(counter_ptr + kv_head)
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, PADDED_DIM)
    column = tl.arange(0, BLOCK_N)
    mean_ptr += kv_head.to(tl.int64) * means_rows * HEAD_DIM
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
        tl.debug_barrier()  # the last slot is read before it is written
        done = tl.where(there, 0, COUNT)
        limit = tl.full([BLOCK_M], 2147483647, tl.int32)
        limit_class = tl.full([BLOCK_M], -1, tl.int32)
        while tl.min(done, 0) < COUNT:
            levels = filled(EMPTY, LEVELS, BLOCK_M, BLOCK_N)
            for tile in tl.range(0, tiles, num_stages=STAGES):
                block = base + tile * BLOCK_N + column
                mean = tl.load(
                    mean_ptr + block[None, :].to(tl.int64) * HEAD_DIM + dim[:, None],
                    mask=(block < base + tiles * BLOCK_N)[None, :]
                    & (block < means_rows)[None, :]
                    & (dim < HEAD_DIM)[:, None],
                    other=0.0,
                )
                key = sortable(dot(q, mean), tile, TILE_BITS)
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
