"""Attention of tiles of queries over their lists of blocks, in Triton.

Legend: T tile, B block size, D and DV head dims, H query heads, G query heads of a kv head.

A program holds BLOCK_M rows of one (tile, head). It loops over the tile's list, BLOCK_N keys at a time,
without a mask, since all rows see all of these keys. Then it loops over the blocks that the tile overlaps,
masked by position. Programs of the same kv head run one after another, so that its keys stay in the cache.
The longest lists come first, so that short ones fill the gaps at the end. A row's result depends only on its
tile's list.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels.inputs import SharedInputs
from moba_hf.kernels.launch import cdiv, device_of, dot, head_dims, narrow, next_power_of_2
from moba_hf.kernels.layout import (
    LN_2,
    LOG2_E,
    SEQ_BATCH,
    SEQ_COLUMNS,
    SEQ_K_BEGIN,
    SEQ_K_END,
    SEQ_Q_BEGIN,
    SEQ_Q_END,
    load_rows,
    plan_tile,
    row_offset,
)
from moba_hf.kernels.shared_lists import Lists
from moba_hf.kernels.softmax import accumulate
from moba_hf.kernels.tuning import Tile


def attend_lists(
    inputs: SharedInputs,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    first_tile: int,
    tile: Tile,
    left_by: int = 0,
) -> None:
    """Writes `out (batch, q_len, H, DV)` and `lse (batch, H, q_len)` for the rows of the listed tiles.

    Args:
        lists: the lists of the tiles from `first_tile` on.
        left_by: handle only the tiles that the Hopper kernel leaves out: those that have, in the blocks that
            they overlap, a number of keys that is not a multiple of `left_by`. It divides T, so only the last
            tile of a sequence can be one of them. 0: all tiles.
    """
    assert not left_by or inputs.plan.tile % left_by == 0
    q, k, v, plan = inputs.q, inputs.k, inputs.v, inputs.plan
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    tiles = min(lists.counts.shape[0], plan.num_tiles - first_tile)
    parts = cdiv(plan.tile, tile.m)
    group = num_heads // num_kv_heads
    with device_of(q):
        _attend_lists_kernel[((plan.num_seqs if left_by else tiles) * group * parts, num_kv_heads)](
            q,
            k,
            v,
            out,
            lse,
            plan.tiles,
            plan.tile_offset,
            lists.blocks,
            lists.counts,
            q.stride()[:3],
            k.stride()[:3],
            v.stride()[:3],
            q.shape[2],
            first_tile,
            tiles,
            lists.blocks.shape[2],
            inputs.softmax_scale * LOG2_E.value,
            GROUP=group,
            TILE=plan.tile,
            BLOCK_SIZE=plan.block_size,
            LEFT_BY=left_by,
            **head_dims(q.shape[3], v.shape[3]),
            **tile.arguments(),
        )


def fill_outside(out: Tensor, lse: Tensor, table: Tensor) -> None:
    """Writes 0 and -inf to the rows of `out` and `lse` that belong to no sequence or precede its keys.

    GPU calls do not check that a sequence has at least as many keys as queries, since that would wait.

    Args:
        out: `(batch, q_len, H, DV)`, contiguous.
        lse: `(batch, H, q_len)`, contiguous.
        table: int32 `(S, 5)`, contiguous; see `moba_hf.op.sequences`.
    """
    batch, q_len, num_heads, v_dim = out.shape
    with device_of(out):
        _fill_outside_kernel[(cdiv(q_len, 64), batch)](
            out,
            lse,
            table,
            table.shape[0],
            q_len,
            num_heads,
            num_heads * v_dim,
            BLOCK_S=min(256, next_power_of_2(table.shape[0])),
        )


@triton.jit(do_not_specialize=["num_seqs", "q_len"])
def _fill_outside_kernel(
    out_ptr, lse_ptr, table_ptr, num_seqs, q_len, num_heads, width, BLOCK_S: tl.constexpr
):
    batch = tl.program_id(1)
    query = tl.program_id(0) * 64 + tl.arange(0, 64)
    covered = tl.zeros([64], tl.int32)
    for start in range(0, num_seqs, BLOCK_S):
        seq = start + tl.arange(0, BLOCK_S)
        there = seq < num_seqs
        row = table_ptr + seq * SEQ_COLUMNS
        there = there & (tl.load(row + SEQ_BATCH, mask=there, other=-1) == batch)
        q_begin = tl.load(row + SEQ_Q_BEGIN, mask=there, other=0)
        q_end = tl.load(row + SEQ_Q_END, mask=there, other=0)
        k_end = tl.load(row + SEQ_K_END, mask=there, other=0)
        k_len = k_end - tl.load(row + SEQ_K_BEGIN, mask=there, other=0)
        q_begin = tl.maximum(q_begin, q_end - k_len)
        inside = (query[:, None] >= q_begin[None, :]) & (query[:, None] < q_end[None, :])
        covered = tl.maximum(covered, tl.max(inside.to(tl.int32), 1))
    outside = (covered == 0) & (query < q_len)
    if tl.max(outside.to(tl.int32), 0) > 0:
        column = tl.arange(0, 128)
        out_row = out_ptr + (batch.to(tl.int64) * q_len + query) * width
        for start in range(0, width, 128):
            inside = outside[:, None] & (start + column < width)[None, :]
            tl.store(out_row[:, None] + start + column[None, :], 0.0, mask=inside)
        for head in range(num_heads):
            at = lse_ptr + (batch.to(tl.int64) * num_heads + head) * q_len + query
            tl.store(at, float("-inf"), mask=outside)


@triton.jit
def list_steps(count, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Number of steps for the keys of `count` listed blocks."""
    if BLOCK_SIZE >= BLOCK_N:
        return count * (BLOCK_SIZE // BLOCK_N)
    else:
        return tl.cdiv(count, BLOCK_N // BLOCK_SIZE)


@triton.jit
def first_blocks(list_ptr, count, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The listed block of step 0, or its blocks `(BLOCK_N,)`.

    Either a block is a whole number of steps, or a step is a whole number of blocks. Block numbers are loaded
    one step ahead, so that the loads of keys do not wait for them.
    """
    if BLOCK_SIZE >= BLOCK_N:
        return tl.load(list_ptr, mask=count > 0, other=0).to(tl.int32)
    else:
        at = tl.arange(0, BLOCK_N) // BLOCK_SIZE
        return tl.load(list_ptr + at, mask=at < count, other=0).to(tl.int32)


@triton.jit
def later_blocks(list_ptr, step, count, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Like `first_blocks`, for the step after `step`."""
    if BLOCK_SIZE >= BLOCK_N:
        per_block: tl.constexpr = BLOCK_SIZE // BLOCK_N
        return tl.load(list_ptr + tl.minimum((step + 1) // per_block, count - 1)).to(tl.int32)
    else:
        per_step: tl.constexpr = BLOCK_N // BLOCK_SIZE
        at = (step + 1) * per_step + tl.arange(0, BLOCK_N) // BLOCK_SIZE
        return tl.load(list_ptr + at, mask=at < count, other=0).to(tl.int32)


@triton.jit
def list_keys(block, step, count, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions `(BLOCK_N,)` of the keys of step `step` in the listed `block` or blocks, and which exist."""
    column = tl.arange(0, BLOCK_N)
    if BLOCK_SIZE >= BLOCK_N:
        per_block: tl.constexpr = BLOCK_SIZE // BLOCK_N
        return block * BLOCK_SIZE + step % per_block * BLOCK_N + column, column >= 0
    else:
        per_step: tl.constexpr = BLOCK_N // BLOCK_SIZE
        return block * BLOCK_SIZE + column % BLOCK_SIZE, step * per_step + column // BLOCK_SIZE < count


@triton.jit(do_not_specialize=["q_len", "first_tile", "tiles"])
def _attend_lists_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    tile_ptr,
    tile_offset_ptr,
    list_ptr,
    count_ptr,
    q_strides,
    k_strides,
    v_strides,
    q_len,
    first_tile,
    tiles,
    list_length,
    scale,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT_BY: tl.constexpr,
    STAGES: tl.constexpr,
):
    PARTS: tl.constexpr = (TILE + BLOCK_M - 1) // BLOCK_M
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest lists come first
    number = program // (GROUP * PARTS)
    if LEFT_BY > 0:  # the last tile of each sequence
        seq = tile_offset_ptr + number
        number = tl.load(seq + 1) - 1 - first_tile
        mine = (number >= tl.load(seq) - first_tile) & (number >= 0) & (number < tiles)
        number = tl.where(mine, number, 0)
    kv_head = tl.program_id(1).to(tl.int64)
    head = kv_head * GROUP + program // PARTS % GROUP
    num_heads = tl.num_programs(1) * GROUP
    batch, q_begin, q_end, position, k_begin = plan_tile(tile_ptr, first_tile + number)
    first = position // TILE * TILE
    row = program % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    query = q_begin + row
    mask = query < q_end
    wanted = q_begin + program % PARTS * BLOCK_M < q_end
    if LEFT_BY > 0:
        own = position + q_end - q_begin - first // BLOCK_SIZE * BLOCK_SIZE
        wanted = wanted & mine & (own % LEFT_BY != 0)
    if wanted:
        q = load_rows(q_ptr, row_offset(batch, head, query, q_strides), mask, HEAD_DIM, PADDED_DIM, False)
        k_ptr += row_offset(batch, kv_head, k_begin, k_strides)
        v_ptr += row_offset(batch, kv_head, k_begin, v_strides)
        item = number.to(tl.int64) * num_heads + head
        count = tl.load(count_ptr + item)
        list_ptr += item * list_length
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, PADDED_V], tl.float32)
        steps = list_steps(count, BLOCK_SIZE, BLOCK_N)
        ahead = first_blocks(list_ptr, count, BLOCK_SIZE, BLOCK_N)
        for step in tl.range(0, steps, num_stages=STAGES):
            key, known = list_keys(ahead, step, count, BLOCK_SIZE, BLOCK_N)
            ahead = later_blocks(list_ptr, step, count, BLOCK_SIZE, BLOCK_N)
            EVEN: tl.constexpr = BLOCK_SIZE >= BLOCK_N
            key = key.to(tl.int64)
            keys = load_rows(k_ptr, key * k_strides[2], known, HEAD_DIM, PADDED_DIM, EVEN)
            values = load_rows(v_ptr, key * v_strides[2], known, V_DIM, PADDED_V, EVEN)
            scores = dot(q, tl.trans(keys))
            if not EVEN:
                scores = tl.where(known[None, :], scores, float("-inf"))
            acc, m_i, l_i = accumulate(acc, m_i, l_i, scores, values, scale, v_ptr)
        end = position + q_end - q_begin
        for start in tl.range(first // BLOCK_SIZE * BLOCK_SIZE, end, BLOCK_N, num_stages=STAGES):
            key = start + tl.arange(0, BLOCK_N)
            keys = load_rows(k_ptr, key.to(tl.int64) * k_strides[2], key < end, HEAD_DIM, PADDED_DIM, False)
            values = load_rows(v_ptr, key.to(tl.int64) * v_strides[2], key < end, V_DIM, PADDED_V, False)
            seen = key[None, :] <= (position + row)[:, None]
            scores = tl.where(seen, dot(q, tl.trans(keys)), float("-inf"))
            acc, m_i, l_i = accumulate(acc, m_i, l_i, scores, values, scale, v_ptr)
        dim = tl.arange(0, PADDED_V)
        at = out_ptr + ((batch * q_len + query) * num_heads + head)[:, None] * V_DIM + dim[None, :]
        result = narrow(acc / l_i[:, None], out_ptr)
        tl.store(at, result, mask=mask[:, None] & (dim < V_DIM)[None, :])
        lse = (m_i + tl.log2(l_i)) * LN_2
        tl.store(lse_ptr + (batch * num_heads + head) * q_len + query, lse, mask=mask)
