"""The kernels that choose blocks, by inserting sortable scores into classes; `gate` launches them.

See `gate` for the algorithm and `gate_scores` for the scores, which are all that differs between gates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moba_hf.kernels.gate_scores import score_blocks, squares_of
from moba_hf.kernels.launch import dot
from moba_hf.kernels.layout import load_rows, row_offset
from moba_hf.kernels.levels import EMPTY, SPENT, filled, insert, sortable, sortable_positive, take
from moba_hf.kernels.tiling import find_tile, tile_rows


@triton.jit
def _load_means(at, dim, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """A full tile of means, zero beyond HEAD_DIM."""
    if HEAD_DIM == PADDED_DIM:
        return tl.load(at)
    else:
        return tl.load(at, mask=(dim < HEAD_DIM)[:, None], other=0.0)


@triton.jit
def _scan_means(
    levels,
    q,
    mean_ptr,
    vector,
    columns,
    mask,
    dim,
    COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEVELS: tl.constexpr,
    TILE_BITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scans all full tiles of means for the mean gate; returns `levels` and the number of tiles.

    Full tiles need no masks, which would take a sixth of the scan's time; positive scores need no sign bit.
    """
    whole = columns // BLOCK_N
    scanned = 0
    positive = False
    if whole > 0:
        scores = dot(q, _load_means(mean_ptr + vector, dim, HEAD_DIM, PADDED_DIM))
        levels = insert(levels, sortable(scores, 0, TILE_BITS), LEVELS)
        found = tl.sum((scores > 0.0).to(tl.int32), 1)
        # reshaped, since on Blackwell Triton cannot reduce the reduction of a product again
        found = tl.reshape(tl.where(mask, found, COUNT), (BLOCK_M // 16, 16))
        positive = tl.min(found) >= COUNT
        scanned = 1
    if positive:
        for tile in tl.range(1, whole, num_stages=STAGES):
            at = mean_ptr + tile * (BLOCK_N * HEAD_DIM) + vector
            scores = dot(q, _load_means(at, dim, HEAD_DIM, PADDED_DIM))
            levels = insert(levels, sortable_positive(scores, tile, TILE_BITS), LEVELS)
        scanned = whole
    for tile in tl.range(scanned, whole, num_stages=STAGES):
        at = mean_ptr + tile * (BLOCK_N * HEAD_DIM) + vector
        scores = dot(q, _load_means(at, dim, HEAD_DIM, PADDED_DIM))
        levels = insert(levels, sortable(scores, tile, TILE_BITS), LEVELS)
    return levels, whole


@triton.jit(do_not_specialize=["blocks", "listed_rows", "q_len", "num_seqs", "num_rows", "block_size"])
def gate_fwd_kernel(
    q_ptr,
    center_ptr,
    spread_ptr,
    choice_ptr,
    counter_ptr,
    listed_ptr,
    table_ptr,
    block_offset_ptr,
    tile_offset_ptr,
    q_strides,
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
        part = tl.program_id(1) % splits
        _, query, in_group, mask = tile_rows(
            own, first, origin, low, high, part, group_size, block_size, BLOCK_M, TILE, HEADS
        )
        head = kv_head * group_size + in_group
        flat = (batch.to(tl.int64) * q_len + query) * num_heads + head
        out = choice_ptr + flat * TOPK
        tl.store(out, own, mask=mask)
        # kept blocks: sinks, then those just before the own one; candidates lie in between
        sinks = tl.minimum(SINK, own)
        local = tl.maximum(sinks, own - LOCAL)
        for i in range(SINK):
            tl.store(out + 1 + i, i, mask=mask & (i < sinks))
        for i in range(LOCAL):
            tl.store(out + 1 + sinks + i, local + i, mask=mask & (local + i < own))
        slot = 1 + sinks + own - local
        columns = local - sinks
        if columns <= COUNT:
            for i in range(COUNT):
                tl.store(out + slot + i, sinks + i, mask=mask & (i < columns))
        elif COUNT > 0:
            dim = tl.arange(0, PADDED_DIM)
            column = tl.arange(0, BLOCK_N)
            q_row = row_offset(batch, head, query, q_strides)
            q = load_rows(q_ptr, q_row, mask, HEAD_DIM, PADDED_DIM, False)
            squares = squares_of(q, spread_ptr, PARTS)
            first_block = tl.load(block_offset_ptr + seq) + sinks
            step = tl.cast(blocks, tl.int64) * HEAD_DIM
            vector = column[None, :] * HEAD_DIM + dim[:, None]
            if PARTS == 0:
                center_ptr += (kv_head.to(tl.int64) * blocks + first_block) * HEAD_DIM
            else:  # first_block goes into the offsets: in the pointers it spills more registers
                center_ptr += kv_head.to(tl.int64) * (PARTS + 1) * step
                spread_ptr += kv_head.to(tl.int64) * PARTS * step
                vector += first_block.to(tl.int64) * HEAD_DIM
            levels = filled(EMPTY, LEVELS, BLOCK_M, BLOCK_N)
            scanned = 0
            if PARTS == 0:
                levels, scanned = _scan_means(
                    levels, q, center_ptr, vector, columns, mask, dim,
                    COUNT, HEAD_DIM, PADDED_DIM, BLOCK_M, BLOCK_N, LEVELS, TILE_BITS, STAGES,
                )  # fmt: skip
            REST_STAGES: tl.constexpr = STAGES if PARTS > 0 else None
            for tile in tl.range(scanned, tl.cdiv(columns, BLOCK_N), num_stages=REST_STAGES):
                inside = (tile * BLOCK_N + column < columns)[None, :]
                ahead = tile * (BLOCK_N * HEAD_DIM)
                center_at = center_ptr + ahead + vector if PARTS == 0 else center_ptr + (ahead + vector)
                spread_at = center_at if PARTS == 0 else spread_ptr + (ahead + vector)
                scores = score_blocks(
                    q, squares, center_at, spread_at, inside & (dim < HEAD_DIM)[:, None],
                    step, scale, square_scale, PARTS, LOG2_SIZE,
                )  # fmt: skip
                key = tl.where(inside, sortable(scores, tile, TILE_BITS), EMPTY)
                levels = insert(levels, key, LEVELS)
            TILE_MASK: tl.constexpr = (1 << TILE_BITS) - 1
            for i in range(COUNT - 1):
                best, chosen, levels = take(levels, mask, column, BLOCK_N, LEVELS)
                tile_of = TILE_MASK - (best & TILE_MASK)
                tl.store(out + slot + i, sinks + tile_of * BLOCK_N + chosen, mask=mask & (best > SPENT))
            spent = tl.max((levels[0] == SPENT).to(tl.int32), 1)
            best, chosen, levels = take(levels, mask, column, BLOCK_N, LEVELS)
            tile_of = TILE_MASK - (best & TILE_MASK)
            last = sinks + tile_of * BLOCK_N + chosen
            tl.store(out + slot + COUNT - 1, last, mask=mask & (best > SPENT))
            if not EXACT:
                if columns > LEVELS * BLOCK_N:
                    again = tl.where(mask, spent, 0)
                    total = tl.sum(again, 0)
                    if total > 0:
                        # the second kernel reads the sequence number from the last slot, then overwrites it
                        tl.debug_barrier()
                        tl.store(out + TOPK - 1, seq, mask=again > 0)
                        at = tl.atomic_add(counter_ptr + kv_head, total) + tl.cumsum(again, 0) - again
                        listed = listed_ptr + kv_head.to(tl.int64) * listed_rows + at
                        tl.store(listed, flat.to(tl.int32), mask=again > 0)


@triton.jit(do_not_specialize=["blocks", "listed_rows", "q_len", "block_size"])
def gate_rest_kernel(
    q_ptr,
    center_ptr,
    spread_ptr,
    choice_ptr,
    counter_ptr,
    listed_ptr,
    table_ptr,
    block_offset_ptr,
    q_strides,
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
    """Chooses again for the listed rows, of any sequence, in rounds; blocks are flat numbers here.

    A round scans for the best keys below `(limit, limit_class)`, the last one that a row took. It ends for a
    row when one of its classes is spent; by then at least LEVELS more choices are certain.
    """
    COUNT: tl.constexpr = TOPK - 1 - SINK - LOCAL
    kv_head = tl.program_id(1)
    num_listed = tl.load(counter_ptr + kv_head)
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, PADDED_DIM)
    column = tl.arange(0, BLOCK_N)
    step = tl.cast(blocks, tl.int64) * HEAD_DIM
    if PARTS == 0:
        center_ptr += kv_head.to(tl.int64) * blocks * HEAD_DIM
    else:
        center_ptr += kv_head.to(tl.int64) * (PARTS + 1) * step
        spread_ptr += kv_head.to(tl.int64) * PARTS * step
    listed_ptr += kv_head.to(tl.int64) * listed_rows
    item = tl.program_id(0)
    while item * BLOCK_M < num_listed:
        mask = item * BLOCK_M + row < num_listed
        flat = tl.load(listed_ptr + item * BLOCK_M + row, mask=mask, other=0)
        out = choice_ptr + flat.to(tl.int64) * TOPK
        own = tl.load(out, mask=mask, other=0)
        seq = tl.load(out + TOPK - 1, mask=mask, other=0)
        offset = tl.load(block_offset_ptr + seq, mask=mask, other=0)
        begin = offset + SINK  # a listed row has many candidates, so all its sinks exist
        end = offset + own - LOCAL
        base = tl.min(tl.where(mask, begin, 2147483647), 0)
        tiles = tl.cdiv(tl.max(tl.where(mask, end, 0), 0) - base, BLOCK_N)
        query = flat // num_heads
        q_row = row_offset(query // q_len, flat % num_heads, query % q_len, q_strides)
        q = load_rows(q_ptr, q_row, mask, HEAD_DIM, PADDED_DIM, False)
        squares = squares_of(q, spread_ptr, PARTS)
        tl.debug_barrier()  # read the last slot before it is overwritten
        done = tl.where(mask, 0, COUNT)
        limit = tl.full([BLOCK_M], 2147483647, tl.int32)
        limit_class = tl.full([BLOCK_M], -1, tl.int32)
        while tl.min(done, 0) < COUNT:
            levels = filled(EMPTY, LEVELS, BLOCK_M, BLOCK_N)
            for tile in tl.range(0, tiles, num_stages=STAGES):
                block = base + tile * BLOCK_N + column
                known = block < blocks
                if PARTS == 0:
                    known = (block < base + tiles * BLOCK_N) & known
                at = block[None, :].to(tl.int64) * HEAD_DIM + dim[:, None]
                spread_at = center_ptr if PARTS == 0 else spread_ptr + at
                scores = score_blocks(
                    q, squares, center_ptr + at, spread_at, known[None, :] & (dim < HEAD_DIM)[:, None],
                    step, scale, square_scale, PARTS, LOG2_SIZE,
                )  # fmt: skip
                key = sortable(scores, tile, TILE_BITS)
                inside = (block[None, :] >= begin[:, None]) & (block[None, :] < end[:, None])
                below = (key < limit[:, None]) | (
                    (key == limit[:, None]) & (column[None, :] > limit_class[:, None])
                )
                levels = insert(levels, tl.where(inside & below, key, EMPTY), LEVELS)
            certain = done < COUNT
            for _ in range(COUNT):
                certain = certain & (tl.max((levels[0] == SPENT).to(tl.int32), 1) == 0) & (done < COUNT)
                best, chosen, levels = take(levels, certain, column, BLOCK_N, LEVELS)
                TILE_MASK: tl.constexpr = (1 << TILE_BITS) - 1
                block = base + (TILE_MASK - (best & TILE_MASK)) * BLOCK_N + chosen
                block = tl.where(best > SPENT, block - offset, -1)
                tl.store(out + (TOPK - COUNT) + done, block, mask=certain)
                limit = tl.where(certain, best, limit)
                limit_class = tl.where(certain, chosen, limit_class)
                done += certain.to(tl.int32)
        item += tl.num_programs(0)
