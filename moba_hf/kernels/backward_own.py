"""Gradients through the own blocks. They complete dq, dk and dv, which already hold the routed part.

Legend: B block size, D and DV head dims of keys and values, G query heads per kv head.

All blocks of all sequences, including an incomplete last one, are numbered: block `i` of sequence `s` is
`block_offset[s] + s + i` (see `tiling`). The queries of a block are rows `token * G + head in the group`, so
the heads of a group share the keys, and their contributions are summed in place.
- `_own_gradients_kernel` holds a tile of keys and values and loops over the rows from the tile's first token
  to the end of the block. It adds the routed sums of the block and writes dk and dv; if the tile is the whole
  block, it writes dq too.
- `_own_dq_kernel`, for longer blocks, holds a tile of rows and loops over the keys up to its last token.
See `backward_routed` for the formulas.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import tuning
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
    row_offset,
    store_rows,
)
from moba_hf.kernels.tiling import Tiling


def own_gradients(
    rows: Rows,
    tiling: Tiling,
    sums: Tensor | None,
    bin_begin: Tensor | None,
    grad_q: Tensor | None,
    grad_k: Tensor,
    grad_v: Tensor,
    tile: tuning.Tile,
) -> None:
    """Writes `grad_k (batch, HK, kv_len, D)` and `grad_v (batch, HK, kv_len, DV)` for all sequences.

    Args:
        sums: the result of `backward_routed.pair_gradients`; None: there is no routed part.
        bin_begin: `routing.Routes.bin_begin` if `sums` is written only for bins with pairs; None: it is
            written for all.
        grad_q: `(batch, H, q_len, D)`, to be completed; it holds the routed part if there is one. The block
            must then fit `tile.n`. None: not computed.
    """
    q, k = rows.q, rows.k
    head_dim, v_dim, block_size = q.shape[3], rows.v.shape[3], tiling.block_size
    key_tiles = cdiv(block_size, tile.n)
    assert grad_q is None or key_tiles == 1
    blocks = tiling.num_blocks + tiling.num_seqs
    with device_of(q):
        _own_gradients_kernel[(blocks * key_tiles, k.shape[1])](
            q,
            k,
            rows.v,
            rows.grad_out,
            rows.stats,
            q if grad_q is None else grad_q,
            grad_k,
            grad_v,
            rows.stats if sums is None else sums,
            tiling.block_offset if bin_begin is None else bin_begin,
            tiling.table,
            tiling.block_offset,
            *rows.strides,
            (q if grad_q is None else grad_q).stride()[:3],
            grad_k.stride()[:3],
            grad_v.stride()[:3],
            q.shape[2],
            tiling.num_seqs,
            tiling.num_blocks,
            rows.softmax_scale,
            GROUP=q.shape[1] // k.shape[1],
            BLOCK_SIZE=block_size,
            KEY_TILES=key_tiles,
            WITH_DQ=grad_q is not None,
            ROUTED=sums is not None,
            GAPS=bin_begin is not None,
            **head_dims(head_dim, v_dim),
            **tile.arguments(),
        )


def own_dq(rows: Rows, tiling: Tiling, grad_q: Tensor, routed: bool, tile: tuning.Tile) -> None:
    """Completes `grad_q (batch, H, q_len, D)` for all sequences; `routed`: it holds the routed part."""
    q, k = rows.q, rows.k
    group_size = q.shape[1] // k.shape[1]
    row_tiles = cdiv(tiling.block_size * group_size, tile.m)
    blocks = tiling.num_blocks + tiling.num_seqs
    with device_of(q):
        _own_dq_kernel[(blocks * row_tiles, k.shape[1])](
            q,
            k,
            rows.v,
            rows.grad_out,
            rows.stats,
            grad_q,
            tiling.table,
            tiling.block_offset,
            *rows.strides,
            grad_q.stride()[:3],
            q.shape[2],
            tiling.num_seqs,
            row_tiles,
            rows.softmax_scale,
            GROUP=group_size,
            BLOCK_SIZE=tiling.block_size,
            ROUTED=routed,
            **head_dims(q.shape[3], rows.v.shape[3]),
            **tile.arguments(),
        )


@triton.jit
def _find_own_block(table_ptr, block_offset_ptr, num_seqs, number, BLOCK_SIZE: tl.constexpr):
    """Sequence, block, batch row, query at token 0, first token with a query, number of keys, first slot."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(block_offset_ptr + middle) + middle <= number
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    block = number - tl.load(block_offset_ptr + low) - low
    row = table_ptr + low * SEQ_COLUMNS
    q_end = tl.load(row + SEQ_Q_END)
    k_begin = tl.load(row + SEQ_K_BEGIN)
    k_len = tl.load(row + SEQ_K_END) - k_begin
    first_query = block * BLOCK_SIZE + q_end - k_len
    first_token = tl.maximum(0, tl.load(row + SEQ_Q_BEGIN) - first_query)
    num_keys = tl.minimum(BLOCK_SIZE, k_len - block * BLOCK_SIZE)
    first_key = k_begin.to(tl.int64) + block.to(tl.int64) * BLOCK_SIZE
    return low, block, tl.load(row + SEQ_BATCH).to(tl.int64), first_query, first_token, num_keys, first_key


@triton.jit(do_not_specialize=["q_len", "num_seqs", "num_blocks"])
def _own_gradients_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    stats_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    sums_ptr,
    bin_begin_ptr,
    table_ptr,
    block_offset_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    dq_strides,
    dk_strides,
    dv_strides,
    q_len,
    num_seqs,
    num_blocks,
    softmax_scale,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_TILES: tl.constexpr,
    WITH_DQ: tl.constexpr,
    ROUTED: tl.constexpr,
    GAPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    number = tl.program_id(0) // KEY_TILES
    kv_head = tl.program_id(1)
    if number < tl.load(block_offset_ptr + num_seqs) + num_seqs:
        seq, block, batch, first_query, low, num_keys, first_key = _find_own_block(
            table_ptr, block_offset_ptr, num_seqs, number, BLOCK_SIZE
        )
        first = tl.program_id(0) % KEY_TILES * BLOCK_N
        key = first + tl.arange(0, BLOCK_N)
        inside = key < num_keys
        slot = first_key + key
        k_ptr += head_offset(batch, kv_head, k_strides)
        v_ptr += head_offset(batch, kv_head, v_strides)
        keys = load_rows(k_ptr, slot * k_strides[2], inside, HEAD_DIM, PADDED_DIM, False)
        values = load_rows(v_ptr, slot * v_strides[2], inside, V_DIM, PADDED_V, False)
        scale = softmax_scale * LOG2_E
        dk = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
        dv = tl.zeros([BLOCK_N, PADDED_V], tl.float32)
        dim = tl.arange(0, PADDED_DIM)
        v_dim = tl.arange(0, PADDED_V)
        if ROUTED:
            chosen = block < tl.load(block_offset_ptr + seq + 1) - tl.load(block_offset_ptr + seq)
            bin = kv_head * num_blocks + tl.load(block_offset_ptr + seq) + block
            if GAPS:
                pairs = bin_begin_ptr + tl.where(chosen, bin, 0)
                chosen = chosen & (tl.load(pairs + 1) > tl.load(pairs))
            summed = (inside & chosen)[:, None]
            sums_ptr += bin.to(tl.int64) * BLOCK_SIZE * (HEAD_DIM + V_DIM)
            at_dk = sums_ptr + key[:, None] * HEAD_DIM + dim[None, :]
            dk = tl.load(at_dk, mask=summed & (dim < HEAD_DIM)[None, :], other=0.0)
            at_dv = sums_ptr + BLOCK_SIZE * HEAD_DIM + key[:, None] * V_DIM + v_dim[None, :]
            dv = tl.load(at_dv, mask=summed & (v_dim < V_DIM)[None, :], other=0.0)
        end = num_keys * GROUP
        for at in tl.range(tl.maximum(low, first) * GROUP, end, BLOCK_M, num_stages=STAGES):
            row = at + tl.arange(0, BLOCK_M)
            mask = row < end
            row = tl.minimum(row, end - 1)  # rows past the end repeat the last one with lse = inf
            token = row // GROUP
            head = (kv_head * GROUP + row % GROUP).to(tl.int64)
            query = (first_query + token).to(tl.int64)
            stat = stats_ptr + ((batch * q_len + query) * (tl.num_programs(1) * GROUP) + head) * STAT_COLUMNS
            lse, delta = load_stats(stat)
            lse = tl.where(mask, lse, float("inf"))
            q_at = row_offset(batch, head, query, q_strides)
            q = load_rows(q_ptr, q_at, mask, HEAD_DIM, PADDED_DIM, True)
            grad_at = row_offset(batch, head, query, grad_strides)
            grad = load_rows(grad_ptr, grad_at, mask, V_DIM, PADDED_V, True)
            p = tl.exp2(dot(keys, tl.trans(q)) * scale - lse[None, :])
            # key <= token, without a division per row
            seen = (key * GROUP - at)[:, None] <= tl.arange(0, BLOCK_M)[None, :]
            p = tl.where(seen, p, 0.0)
            dp = dot(values, tl.trans(grad))
            dv = add_dot(dv, narrow(p, v_ptr), grad)
            ds = narrow(p * (dp - delta[None, :]), k_ptr)
            dk = add_dot(dk, ds, q)
            if WITH_DQ:
                dq = dot(tl.trans(ds), keys) * softmax_scale
                at_dq = row_offset(batch, head, query, dq_strides)
                _complete(dq_ptr, at_dq, dq, mask, HEAD_DIM, PADDED_DIM, ROUTED)
        at_dk = row_offset(batch, kv_head, slot, dk_strides)
        at_dv = row_offset(batch, kv_head, slot, dv_strides)
        store_rows(dk_ptr, at_dk, narrow(dk * softmax_scale, dk_ptr), inside, HEAD_DIM, PADDED_DIM)
        store_rows(dv_ptr, at_dv, narrow(dv, dv_ptr), inside, V_DIM, PADDED_V)


@triton.jit
def _complete(
    dq_ptr, offset, dq, mask, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROUTED: tl.constexpr
):
    """Stores `dq (M, D)` at the element offsets `offset (M,)`, plus the routed part if there is one."""
    if ROUTED:
        dq += load_rows(dq_ptr, offset, mask, HEAD_DIM, PADDED_DIM, False).to(tl.float32)
    store_rows(dq_ptr, offset, narrow(dq, dq_ptr), mask, HEAD_DIM, PADDED_DIM)


@triton.jit(do_not_specialize=["q_len", "num_seqs", "row_tiles"])
def _own_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    stats_ptr,
    dq_ptr,
    table_ptr,
    block_offset_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    dq_strides,
    q_len,
    num_seqs,
    row_tiles,
    softmax_scale,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROUTED: tl.constexpr,
    STAGES: tl.constexpr,
):
    number = tl.program_id(0) // row_tiles
    kv_head = tl.program_id(1)
    if number < tl.load(block_offset_ptr + num_seqs) + num_seqs:
        seq, block, batch, first_query, low, num_keys, first_key = _find_own_block(
            table_ptr, block_offset_ptr, num_seqs, number, BLOCK_SIZE
        )
        begin = tl.program_id(0) % row_tiles * BLOCK_M
        end = tl.minimum(begin + BLOCK_M, num_keys * GROUP)
        begin = tl.maximum(begin, low * GROUP)
        if begin < end:
            row = begin + tl.arange(0, BLOCK_M)
            mask = row < end
            row = tl.minimum(row, end - 1)
            token = row // GROUP
            head = (kv_head * GROUP + row % GROUP).to(tl.int64)
            query = (first_query + token).to(tl.int64)
            stat = stats_ptr + ((batch * q_len + query) * (tl.num_programs(1) * GROUP) + head) * STAT_COLUMNS
            lse = tl.load(stat + STAT_LSE)
            delta = tl.load(stat + STAT_DELTA)
            q_at = row_offset(batch, head, query, q_strides)
            q = load_rows(q_ptr, q_at, mask, HEAD_DIM, PADDED_DIM, True)
            grad_at = row_offset(batch, head, query, grad_strides)
            grad = load_rows(grad_ptr, grad_at, mask, V_DIM, PADDED_V, True)
            k_ptr += row_offset(batch, kv_head, first_key, k_strides)
            v_ptr += row_offset(batch, kv_head, first_key, v_strides)
            scale = softmax_scale * LOG2_E
            dq = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
            seen_by_all = (begin // GROUP + 1) // BLOCK_N * BLOCK_N
            for start in tl.range(0, seen_by_all, BLOCK_N, num_stages=STAGES):
                key = start + tl.arange(0, BLOCK_N)
                keys = load_rows(k_ptr, key.to(tl.int64) * k_strides[2], key >= 0, HEAD_DIM, PADDED_DIM, True)
                values = load_rows(v_ptr, key.to(tl.int64) * v_strides[2], key >= 0, V_DIM, PADDED_V, True)
                p = tl.exp2(dot(q, tl.trans(keys)) * scale - lse[:, None])
                dp = dot(grad, tl.trans(values))
                dq = add_dot(dq, narrow(p * (dp - delta[:, None]), k_ptr), keys)
            last = (end - 1) // GROUP + 1
            for start in tl.range(seen_by_all, last, BLOCK_N, num_stages=STAGES):
                key = start + tl.arange(0, BLOCK_N)
                inside = key < last
                keys = load_rows(k_ptr, key.to(tl.int64) * k_strides[2], inside, HEAD_DIM, PADDED_DIM, False)
                values = load_rows(v_ptr, key.to(tl.int64) * v_strides[2], inside, V_DIM, PADDED_V, False)
                p = tl.exp2(dot(q, tl.trans(keys)) * scale - lse[:, None])
                seen = (key * GROUP)[None, :] <= row[:, None]
                p = tl.where(seen, p, 0.0)
                dp = dot(grad, tl.trans(values))
                dq = add_dot(dq, narrow(p * (dp - delta[:, None]), k_ptr), keys)
            at_dq = row_offset(batch, head, query, dq_strides)
            _complete(dq_ptr, at_dq, dq * softmax_scale, mask, HEAD_DIM, PADDED_DIM, ROUTED)
