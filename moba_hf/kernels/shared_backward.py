"""Gradients through the attention of tiles over their lists, with the choice held fixed.

Legend: T tile, B block size, D and DV head dims, H query heads, G query heads of a kv head.

`scores = scale * q.k`, `p = exp2(scores - lse)`, `ds = p * (grad_out.v - delta)`; then `dv = p^T grad_out`,
`dk = scale * ds^T q`, `dq = scale * ds k`. There are two kernels, as in dense attention:
- `_dq_kernel` holds rows of a tile and loops over the tile's list of blocks, then over the blocks that the
  tile overlaps.
- `_dkv_kernel` holds keys of a block and loops over the tiles that overlap it, then over the list of tiles,
  of all heads of the kv head, that chose it. Block 0 comes first, since the list of a sink is the longest.
The inputs fix the order of every sum, so two runs agree bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels.backward_routed import Rows
from moba_hf.kernels.backward_rows import load_stats
from moba_hf.kernels.launch import add_dot, cdiv, device_of, dot, head_dims, narrow
from moba_hf.kernels.layout import (
    LOG2_E,
    SEQ_BATCH,
    SEQ_COLUMNS,
    SEQ_K_BEGIN,
    SEQ_K_END,
    SEQ_Q_BEGIN,
    SEQ_Q_END,
    STAT_COLUMNS,
    STAT_DELTA,
    STAT_LSE,
    head_offset,
    load_rows,
    plan_tile,
    row_offset,
)
from moba_hf.kernels.shared_attend import first_blocks, later_blocks, list_keys, list_steps
from moba_hf.kernels.shared_lists import Lists, find_block
from moba_hf.kernels.shared_plan import SharedPlan
from moba_hf.kernels.tuning import Tile


def dq_of_lists(
    rows: Rows, plan: SharedPlan, lists: Lists, first_tile: int, grad_q: Tensor, tile: Tile
) -> None:
    """Writes `grad_q (batch, H, q_len, D)` for the rows of the listed tiles."""
    q, k, v = rows.q, rows.k, rows.v
    group = q.shape[1] // k.shape[1]
    tiles = min(lists.counts.shape[0], plan.num_tiles - first_tile)
    with device_of(q):
        _dq_kernel[(tiles * group * cdiv(plan.tile, tile.m), k.shape[1])](
            q,
            k,
            v,
            rows.grad_out,
            rows.stats,
            grad_q,
            plan.tiles,
            lists.blocks,
            lists.counts,
            *rows.strides,
            grad_q.stride()[:3],
            q.shape[2],
            first_tile,
            lists.blocks.shape[2],
            rows.softmax_scale,
            GROUP=group,
            TILE=plan.tile,
            BLOCK_SIZE=plan.block_size,
            **head_dims(q.shape[3], v.shape[3]),
            **tile.arguments(),
        )


def dkv_of_lists(
    rows: Rows, plan: SharedPlan, lists: Lists, first_block: int, grad_k: Tensor, grad_v: Tensor, tile: Tile
) -> None:
    """Writes `grad_k (batch, HK, kv_len, D)` and `grad_v (batch, HK, kv_len, DV)` for the listed blocks.

    Args:
        lists: the result of `shared_lists.tile_lists`, from block number `first_block` on.
        tile: its `n` must divide the block size, its `m` the tile of queries.
    """
    q, k, v = rows.q, rows.k, rows.v
    blocks = min(lists.counts.shape[0], plan.num_blocks + plan.num_seqs - first_block)
    parts = cdiv(plan.block_size, tile.n)
    with device_of(q):
        _dkv_kernel[(blocks * parts, k.shape[1])](
            q,
            k,
            v,
            rows.grad_out,
            rows.stats,
            grad_k,
            grad_v,
            plan.table,
            plan.block_offset,
            lists.blocks,
            lists.counts,
            *rows.strides,
            grad_k.stride()[:3],
            grad_v.stride()[:3],
            q.shape[2],
            plan.num_seqs,
            first_block,
            lists.blocks.shape[2],
            rows.softmax_scale,
            GROUP=q.shape[1] // k.shape[1],
            TILE=plan.tile,
            BLOCK_SIZE=plan.block_size,
            **head_dims(q.shape[3], v.shape[3]),
            **tile.arguments(),
        )


@triton.jit(do_not_specialize=["q_len", "first_tile"])
def _dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    stats_ptr,
    dq_ptr,
    tile_ptr,
    list_ptr,
    count_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    dq_strides,
    q_len,
    first_tile,
    list_length,
    softmax_scale,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    PARTS: tl.constexpr = (TILE + BLOCK_M - 1) // BLOCK_M
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest lists come first
    number = program // (GROUP * PARTS)
    kv_head = tl.program_id(1).to(tl.int64)
    head = kv_head * GROUP + program // PARTS % GROUP
    num_heads = tl.num_programs(1) * GROUP
    batch, q_begin, q_end, position, k_begin = plan_tile(tile_ptr, first_tile + number)
    row = program % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    there = q_begin + row < q_end
    if q_begin + program % PARTS * BLOCK_M < q_end:
        query = tl.minimum(q_begin + row, q_end - 1).to(tl.int64)
        q = load_rows(q_ptr, row_offset(batch, head, query, q_strides), there, HEAD_DIM, PADDED_DIM, True)
        grad = load_rows(grad_ptr, row_offset(batch, head, query, grad_strides), there, V_DIM, PADDED_V, True)
        stat = stats_ptr + ((batch * q_len + query) * num_heads + head) * STAT_COLUMNS
        lse = tl.load(stat + STAT_LSE)
        delta = tl.load(stat + STAT_DELTA)
        k_ptr += row_offset(batch, kv_head, k_begin, k_strides)
        v_ptr += row_offset(batch, kv_head, k_begin, v_strides)
        item = number.to(tl.int64) * num_heads + head
        count = tl.load(count_ptr + item)
        list_ptr += item * list_length
        scale = softmax_scale * LOG2_E
        dq = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
        steps = list_steps(count, BLOCK_SIZE, BLOCK_N)
        EVEN: tl.constexpr = BLOCK_SIZE >= BLOCK_N
        ahead = first_blocks(list_ptr, count, BLOCK_SIZE, BLOCK_N)
        for step in tl.range(0, steps, num_stages=STAGES):
            key, known = list_keys(ahead, step, count, BLOCK_SIZE, BLOCK_N)
            ahead = later_blocks(list_ptr, step, count, BLOCK_SIZE, BLOCK_N)
            key = key.to(tl.int64)
            keys = load_rows(k_ptr, key * k_strides[2], known, HEAD_DIM, PADDED_DIM, EVEN)
            values = load_rows(v_ptr, key * v_strides[2], known, V_DIM, PADDED_V, EVEN)
            p = tl.exp2(dot(q, tl.trans(keys)) * scale - lse[:, None])
            if not EVEN:
                p = tl.where(known[None, :], p, 0.0)
            dp = dot(grad, tl.trans(values))
            dq = add_dot(dq, narrow(p * (dp - delta[:, None]), k_ptr), keys)
        end = position + q_end - q_begin
        first = position // TILE * TILE // BLOCK_SIZE * BLOCK_SIZE
        for start in tl.range(first, end, BLOCK_N, num_stages=STAGES):
            key = start + tl.arange(0, BLOCK_N)
            keys = load_rows(k_ptr, key.to(tl.int64) * k_strides[2], key < end, HEAD_DIM, PADDED_DIM, False)
            values = load_rows(v_ptr, key.to(tl.int64) * v_strides[2], key < end, V_DIM, PADDED_V, False)
            p = tl.exp2(dot(q, tl.trans(keys)) * scale - lse[:, None])
            p = tl.where(key[None, :] <= (position + row)[:, None], p, 0.0)
            dp = dot(grad, tl.trans(values))
            dq = add_dot(dq, narrow(p * (dp - delta[:, None]), k_ptr), keys)
        dim = tl.arange(0, PADDED_DIM)
        at = dq_ptr + row_offset(batch, head, query, dq_strides)[:, None] + dim[None, :]
        tl.store(at, narrow(dq * softmax_scale, dq_ptr), mask=there[:, None] & (dim < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["q_len", "num_seqs", "first_block"])
def _dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    stats_ptr,
    dk_ptr,
    dv_ptr,
    table_ptr,
    block_offset_ptr,
    list_ptr,
    count_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    dk_strides,
    dv_strides,
    q_len,
    num_seqs,
    first_block,
    list_length,
    softmax_scale,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    PARTS: tl.constexpr = BLOCK_SIZE // BLOCK_N
    PER_TILE: tl.constexpr = TILE // BLOCK_M
    number = tl.program_id(0) // PARTS
    kv_head = tl.program_id(1).to(tl.int64)
    if first_block + number < tl.load(block_offset_ptr + num_seqs) + num_seqs:
        seq, block = find_block(table_ptr, block_offset_ptr, num_seqs, first_block + number)
        info = table_ptr + seq * SEQ_COLUMNS
        batch = tl.load(info + SEQ_BATCH).to(tl.int64)
        k_begin = tl.load(info + SEQ_K_BEGIN)
        k_len = tl.load(info + SEQ_K_END) - k_begin
        shift = tl.load(info + SEQ_Q_END) - k_len  # from positions to queries
        first = tl.maximum(
            tl.load(info + SEQ_Q_BEGIN) - shift, 0
        )  # position of the first query that sees a key
        key = block * BLOCK_SIZE + tl.program_id(0) % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = key < k_len
        slot = (k_begin + key).to(tl.int64)
        k_ptr += head_offset(batch, kv_head, k_strides)
        v_ptr += head_offset(batch, kv_head, v_strides)
        keys = load_rows(k_ptr, slot * k_strides[2], inside, HEAD_DIM, PADDED_DIM, False)
        values = load_rows(v_ptr, slot * v_strides[2], inside, V_DIM, PADDED_V, False)
        q_ptr += batch * q_strides[0] + kv_head * GROUP * q_strides[1]
        grad_ptr += batch * grad_strides[0] + kv_head * GROUP * grad_strides[1]
        stats_ptr += (batch * q_len * tl.num_programs(1) * GROUP + kv_head * GROUP) * STAT_COLUMNS
        stat_stride = tl.num_programs(1) * GROUP * STAT_COLUMNS
        scale = softmax_scale * LOG2_E
        dk = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
        dv = tl.zeros([BLOCK_N, PADDED_V], tl.float32)
        # the tiles that overlap the block, masked by position
        begin = tl.maximum(block * BLOCK_SIZE, first)
        end = tl.minimum((block * BLOCK_SIZE + BLOCK_SIZE - 1) // TILE * TILE + TILE, k_len)
        steps = tl.maximum(tl.cdiv(end - begin, BLOCK_M), 0) * GROUP
        for step in tl.range(0, steps, num_stages=STAGES):
            start = begin + step // GROUP * BLOCK_M
            position = start + tl.arange(0, BLOCK_M)
            q, grad, lse, delta = _load_queries(
                q_ptr,
                grad_ptr,
                stats_ptr,
                start,
                shift,
                begin,
                end,
                step % GROUP,
                q_strides,
                grad_strides,
                stat_stride,
                BLOCK_M,
                HEAD_DIM,
                PADDED_DIM,
                V_DIM,
                PADDED_V,
            )
            p = tl.exp2(dot(keys, tl.trans(q)) * scale - lse[None, :])
            p = tl.where(key[:, None] <= position[None, :], p, 0.0)
            dp = dot(values, tl.trans(grad))
            dv = add_dot(dv, narrow(p, v_ptr), grad)
            dk = add_dot(dk, narrow(p * (dp - delta[None, :]), k_ptr), q)
        item = number.to(tl.int64) * tl.num_programs(1) + kv_head
        list_ptr += item * list_length
        steps = tl.load(count_ptr + item) * PER_TILE
        # loaded one step ahead, so that the loads of queries do not wait for it
        next_entry = tl.load(list_ptr, mask=steps > 0, other=0).to(tl.int32)
        for step in tl.range(0, steps, num_stages=STAGES):
            entry = next_entry
            next_entry = tl.load(list_ptr + tl.minimum(step + 1, steps - 1) // PER_TILE).to(tl.int32)
            start = (first // TILE + entry // GROUP) * TILE + step % PER_TILE * BLOCK_M
            q, grad, lse, delta = _load_queries(
                q_ptr,
                grad_ptr,
                stats_ptr,
                start,
                shift,
                first,
                k_len,
                entry % GROUP,
                q_strides,
                grad_strides,
                stat_stride,
                BLOCK_M,
                HEAD_DIM,
                PADDED_DIM,
                V_DIM,
                PADDED_V,
            )
            p = tl.exp2(dot(keys, tl.trans(q)) * scale - lse[None, :])
            dp = dot(values, tl.trans(grad))
            dv = add_dot(dv, narrow(p, v_ptr), grad)
            dk = add_dot(dk, narrow(p * (dp - delta[None, :]), k_ptr), q)
        dim = tl.arange(0, PADDED_DIM)
        at = dk_ptr + row_offset(batch, kv_head, slot, dk_strides)[:, None]
        mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
        tl.store(at + dim[None, :], narrow(dk * softmax_scale, dk_ptr), mask=mask)
        dim = tl.arange(0, PADDED_V)
        at = dv_ptr + row_offset(batch, kv_head, slot, dv_strides)[:, None]
        mask = inside[:, None] & (dim < V_DIM)[None, :]
        tl.store(at + dim[None, :], narrow(dv, dv_ptr), mask=mask)


@triton.jit
def _load_queries(
    q_ptr,
    grad_ptr,
    stats_ptr,
    start,
    shift,
    begin,
    end,
    in_group,
    q_strides,
    grad_strides,
    stat_stride,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
):
    """Queries, output gradients, lse and delta of BLOCK_M rows from position `start` on.

    Rows outside `[begin, end)` get lse = inf, so that they contribute nothing. Offsets from the first row are
    int32 to save registers.
    """
    head = tl.cast(in_group, tl.int64)
    first = (start + shift).to(tl.int64)
    position = start + tl.arange(0, BLOCK_M)
    there = (position >= begin) & (position < end)
    row = tl.minimum(tl.maximum(position, begin), end - 1) - start
    q_ptr += head * q_strides[1] + first * q_strides[2]
    grad_ptr += head * grad_strides[1] + first * grad_strides[2]
    q = load_rows(q_ptr, row * q_strides[2], there, HEAD_DIM, PADDED_DIM, True)
    grad = load_rows(grad_ptr, row * grad_strides[2], there, V_DIM, PADDED_V, True)
    lse, delta = load_stats(stats_ptr + head * STAT_COLUMNS + first * stat_stride + row * stat_stride)
    return q, grad, tl.where(there, lse, float("inf")), delta
