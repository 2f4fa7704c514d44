"""Attention of gathered queries to one earlier block each: partial outputs and their log-sum-exps.

Legend: B block size, D and DV head dims of keys and values, P pairs, S tiles of rows per program.

A program takes a run of pairs that chose the same block of one kv head (see `routing`), gathers their query
rows, and attends the block. It needs no mask, since the block is complete and earlier than every query. The
normalised outputs in q's dtype and the base-2 log-sum-exps are scattered to the places of their pairs.
There are two kernels. `_routed_kernel` holds one tile of rows and loops over the keys (any B).
`_resident_kernel` holds the keys and values of a small block and loops over S tiles of rows, which pipelines
the gather. A row's result depends only on its query and block, not on its place in the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.inputs import Inputs
from moba_hf.kernels.launch import _UPCAST, device_of, dot, head_dims, narrow
from moba_hf.kernels.layout import (
    INFO_COLUMNS,
    LOG2_E,
    RUN_BATCH,
    RUN_BEGIN,
    RUN_END,
    RUN_FIRST_KEY,
    RUN_KV_HEAD,
    load_rows,
    row_offset,
    store_rows,
)
from moba_hf.kernels.routing import Routes
from moba_hf.kernels.softmax import accumulate


def routed_attention(
    inputs: Inputs,
    routes: Routes,
    partial: Tensor,
    partial_lse: Tensor,
    first_row: int,
    tile: tuning.Tile,
    resident: bool,
) -> None:
    """Writes `partial (P, DV)` and `partial_lse (P,)`, fp32, base 2, for every pair with a bin.

    Args:
        first_row: flat query row at which the chunk begins.
        tile, resident: the result of `tuning.routed_tile`; `routes.rows` is a multiple of `tile.m`.
    """
    kernel = _resident_kernel if resident else _routed_kernel
    q, k, v, block_size = inputs.q, inputs.k, inputs.v, inputs.tiling.block_size
    head_dim, v_dim = q.shape[3], v.shape[3]
    slots = partial_lse.shape[-1]
    with device_of(q):
        kernel[(routes.tile_info.shape[0],)](
            q,
            k,
            v,
            partial,
            partial_lse,
            routes.pairs,
            routes.tile_info,
            q.stride()[:3],
            k.stride()[:3],
            v.stride()[:3],
            q.shape[2],
            first_row,
            inputs.softmax_scale,
            SLOTS=slots,
            HEADS=q.shape[1],
            ONE_BATCH=q.shape[0] == 1,
            BLOCK_SIZE=block_size,
            **head_dims(head_dim, v_dim),
            **tile.arguments(),
        )


@triton.jit
def _query_offsets(
    pair,
    first_row,
    q_len,
    q_strides,
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    ONE_BATCH: tl.constexpr,
):
    """int64 element offsets of the pairs' query rows; the divisors are compile-time constants."""
    row_head = pair // SLOTS
    row = first_row + row_head // HEADS
    offset = (row_head % HEADS).to(tl.int64) * q_strides[1]
    if ONE_BATCH:
        offset += row.to(tl.int64) * q_strides[2]
    else:
        offset += (row // q_len).to(tl.int64) * q_strides[0] + (row % q_len).to(tl.int64) * q_strides[2]
    return offset


@triton.jit
def _store_partial(out_ptr, lse_ptr, pair, mask, acc, m_i, l_i, V_DIM: tl.constexpr, PADDED_V: tl.constexpr):
    """Scatters the normalised outputs `acc / l_i` and their base-2 log-sum-exps to `pair (M,)`."""
    out = narrow(acc / l_i[:, None], out_ptr)
    store_rows(out_ptr, pair.to(tl.int64) * V_DIM, out, mask, V_DIM, PADDED_V)
    tl.store(lse_ptr + pair, m_i + tl.log2(l_i), mask=mask)


@triton.jit(do_not_specialize=["q_len", "first_row"])
def _routed_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    pair_ptr,
    info_ptr,
    q_strides,
    k_strides,
    v_strides,
    q_len,
    first_row,
    softmax_scale,
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    ONE_BATCH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attends one block from a tile of BLOCK_M pairs, BLOCK_N keys at a time."""
    info = info_ptr + tl.program_id(0) * INFO_COLUMNS
    begin = tl.load(info + RUN_BEGIN)
    end = tl.load(info + RUN_END)
    if begin < end:
        batch = tl.load(info + RUN_BATCH)
        kv_head = tl.load(info + RUN_KV_HEAD)
        first_key = tl.load(info + RUN_FIRST_KEY).to(tl.int64)
        place = begin + tl.arange(0, BLOCK_M)
        mask = place < end
        pair = tl.load(pair_ptr + place, mask=mask, other=0).to(tl.int32)
        q_offset = _query_offsets(pair, first_row, q_len, q_strides, SLOTS, HEADS, ONE_BATCH)
        q = load_rows(q_ptr, q_offset, mask, HEAD_DIM, PADDED_DIM, True)
        k_ptr += row_offset(batch, kv_head, first_key, k_strides)
        v_ptr += row_offset(batch, kv_head, first_key, v_strides)
        scale = softmax_scale * LOG2_E
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, PADDED_V], tl.float32)
        EVEN: tl.constexpr = BLOCK_SIZE % BLOCK_N == 0
        for start in tl.range(0, BLOCK_SIZE, BLOCK_N, num_stages=STAGES):
            key = start + tl.arange(0, BLOCK_N)
            inside = key < BLOCK_SIZE
            keys = load_rows(k_ptr, key.to(tl.int64) * k_strides[2], inside, HEAD_DIM, PADDED_DIM, EVEN)
            values = load_rows(v_ptr, key.to(tl.int64) * v_strides[2], inside, V_DIM, PADDED_V, EVEN)
            scores = dot(q, tl.trans(keys))
            if not EVEN:
                scores = tl.where(inside[None, :], scores, float("-inf"))
            acc, m_i, l_i = accumulate(acc, m_i, l_i, scores, values, scale, v_ptr)
        _store_partial(out_ptr, lse_ptr, pair, mask, acc, m_i, l_i, V_DIM, PADDED_V)


@triton.jit(do_not_specialize=["q_len", "first_row"])
def _resident_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    pair_ptr,
    info_ptr,
    q_strides,
    k_strides,
    v_strides,
    q_len,
    first_row,
    softmax_scale,
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    ONE_BATCH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Holds a block of at most BLOCK_N keys and loops over a run of pairs, BLOCK_M at a time."""
    info = info_ptr + tl.program_id(0) * INFO_COLUMNS
    begin = tl.load(info + RUN_BEGIN)
    end = tl.load(info + RUN_END)
    if begin < end:
        batch = tl.load(info + RUN_BATCH)
        kv_head = tl.load(info + RUN_KV_HEAD)
        first_key = tl.load(info + RUN_FIRST_KEY).to(tl.int64)
        k_ptr += row_offset(batch, kv_head, first_key, k_strides)
        v_ptr += row_offset(batch, kv_head, first_key, v_strides)
        EVEN: tl.constexpr = BLOCK_SIZE == BLOCK_N
        key = tl.arange(0, BLOCK_N)
        inside = key < BLOCK_SIZE
        keys = load_rows(k_ptr, key.to(tl.int64) * k_strides[2], inside, HEAD_DIM, PADDED_DIM, EVEN)
        values = load_rows(v_ptr, key.to(tl.int64) * v_strides[2], inside, V_DIM, PADDED_V, EVEN)
        keys = tl.trans(keys)
        if _UPCAST:
            values = values.to(tl.float32)
        scale = softmax_scale * LOG2_E
        for at in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
            place = at + tl.arange(0, BLOCK_M)
            mask = place < end
            pair = tl.load(pair_ptr + place, mask=mask, other=0).to(tl.int32)
            q_offset = _query_offsets(pair, first_row, q_len, q_strides, SLOTS, HEADS, ONE_BATCH)
            q = load_rows(q_ptr, q_offset, mask, HEAD_DIM, PADDED_DIM, True)
            scores = dot(q, keys)
            if not EVEN:
                scores = tl.where(inside[None, :], scores, float("-inf"))
            m_i = tl.max(scores, 1) * scale
            p = tl.exp2(scores * scale - m_i[:, None])
            l_i = tl.sum(p, 1)
            acc = dot(narrow(p, v_ptr), values)
            _store_partial(out_ptr, lse_ptr, pair, mask, acc, m_i, l_i, V_DIM, PADDED_V)
