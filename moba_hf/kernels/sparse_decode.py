"""Attention of a few queries to their chosen blocks, split over the blocks to fill the device.

Legend: B block size, H query heads, K topk, D and DV head dims of keys and values, P = K x segments.

One program per (query, head, slot, segment of the block) reads its keys and values once and computes in fp32
without matrix units, which a single query row would waste. It writes a partial output and log-sum-exp (-inf
if there is nothing to attend). The own block may be in any slot, so every slot is masked by the query's
position. A second kernel (`merge_parts`) merges the P partial results of a query in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.launch import cdiv, device_of, head_dims, narrow, next_power_of_2, num_processors, padded
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
    row_offset,
)
from moba_hf.op.sequences import Sequences


def num_segments(tuned: tuning.Choices, block_size: int, blocks: int = 0, processors: int = 0) -> int:
    """Number of segments per block, if `blocks` blocks are attended in all on `processors` SMs."""
    shortest, longest = tuned.decode_segments
    least = cdiv(block_size, longest)
    wanted = processors * tuned.decode_programs // max(1, blocks)
    return max(least, min(wanted, cdiv(block_size, shortest)))


def takes(q: Tensor, topk: int, max_seqlen_q: int, block_size: int) -> bool:
    """Whether the queries are so few that this kernel is faster than regrouping them by block."""
    tuned = tuning.choices_for(q)
    partials = q.shape[0] * q.shape[2] * q.shape[1] * topk * num_segments(tuned, block_size)
    few = min(max_seqlen_q, q.shape[2]) <= tuning.DECODE_QUERIES
    return few and partials <= tuned.decode_partials


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    choice: Tensor,
    sequences: Sequences,
    block_size: int,
    softmax_scale: float,
    *,
    by_row: bool = False,
    segments: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`out (batch, q_len, H, DV)` in q's dtype and `lse (batch, H, q_len)`, fp32, natural logarithm.

    Args:
        q: `(batch, H, q_len, D)`, last dimension contiguous.
        k, v: `(batch, HK, kv_len, D or DV)`, last dimension contiguous.
        choice: int32 `(batch, q_len, H, K)`, contiguous, the own block in any slot.
        by_row: row r of the table is batch row r, for every r, which saves a pass over the partials.
        segments: number of segments per block; None: by `num_segments`.
    """
    batch, num_heads, q_len, head_dim = q.shape
    table = sequences.table
    topk, v_dim, tuned = choice.shape[3], v.shape[3], tuning.choices_for(q)
    if segments is None:
        segments = num_segments(tuned, block_size, choice.numel(), num_processors(q))
    segment = cdiv(block_size, segments)
    block_n = min(tuned.decode_keys, next_power_of_2(block_size))
    shape, device = (batch, q_len, num_heads, topk * segments), q.device
    partial = torch.empty(*shape, v_dim, dtype=torch.float32, device=device)
    # rows outside all sequences are not visited and must keep an initial -inf
    partial_lse = (
        torch.empty(shape, dtype=torch.float32, device=device)
        if by_row
        else torch.full(shape, -torch.inf, dtype=torch.float32, device=device)
    )
    queries = q_len if by_row else max(1, min(sequences.max_seqlen_q, q_len))
    with device_of(q):
        if table.shape[0] > 0:
            _decode_kernel[(table.shape[0] * queries, num_heads, topk * segments)](
                q,
                k,
                v,
                choice,
                partial,
                partial_lse,
                table.contiguous(),
                q.stride()[:3],
                k.stride()[:3],
                v.stride()[:3],
                q_len,
                num_heads // k.shape[1],
                queries,
                block_size,
                softmax_scale,
                BY_ROW=by_row,
                SEGMENTS=segments,
                SEGMENT=segment,
                BLOCK_N=block_n,
                STAGES=1 if segment <= block_n else 2,
                num_warps=4,
                **head_dims(head_dim, v_dim),
            )
    return merge_parts(partial, partial_lse, q.dtype)


def merge_parts(partial: Tensor, partial_lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Merges P partial results into `out (batch, q_len, H, DV)` and `lse (batch, H, q_len)`.

    `out` has dtype `dtype`; `lse` is fp32, natural logarithm. If all partials are -inf, the results are zeros
    and -inf.

    Args:
        partial: fp32 `(batch, q_len, H, P, DV)`; not read where `partial_lse` is -inf.
        partial_lse: fp32 `(batch, q_len, H, P)`, base 2.
    """
    batch, q_len, num_heads, parts, v_dim = partial.shape
    least, most = tuning.choices_for(partial).decode_parts
    out = torch.empty(batch, q_len, num_heads, v_dim, dtype=dtype, device=partial.device)
    lse = torch.empty(batch, num_heads, q_len, dtype=torch.float32, device=partial.device)
    with device_of(partial):
        _decode_merge_kernel[(batch * q_len, num_heads)](
            partial,
            partial_lse,
            out,
            lse,
            q_len,
            PARTS=parts,
            PADDED_PARTS=next_power_of_2(parts),
            V_DIM=v_dim,
            PADDED_V=padded(v_dim),
            BLOCK_P=min(most, max(least, next_power_of_2(parts))),
            num_warps=4,
        )
    return out, lse


@triton.jit(do_not_specialize=["q_len", "queries", "block_size"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    choice_ptr,
    partial_ptr,
    partial_lse_ptr,
    table_ptr,
    q_strides,
    k_strides,
    v_strides,
    q_len,
    group_size,
    queries,
    block_size,
    softmax_scale,
    BY_ROW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Handles one (query, head, slot, segment)."""
    seq = table_ptr + tl.program_id(0) // queries * SEQ_COLUMNS
    head = tl.program_id(1)
    part = tl.program_id(2)
    q_begin = tl.load(seq + SEQ_Q_BEGIN)
    q_end = tl.load(seq + SEQ_Q_END)
    query = tl.program_id(0) % queries
    if not BY_ROW:
        query += q_begin
    real = (query >= q_begin) & (query < q_end)
    if real | BY_ROW:
        batch = tl.load(seq + SEQ_BATCH).to(tl.int64)
        k_begin = tl.load(seq + SEQ_K_BEGIN)
        k_end = tl.load(seq + SEQ_K_END)
        row = (batch * q_len + query) * tl.num_programs(1) + head
        block = tl.load(choice_ptr + row * (tl.num_programs(2) // SEGMENTS) + part // SEGMENTS)
        position = query + (k_end - k_begin) - q_end
        begin = part % SEGMENTS * SEGMENT
        end = tl.minimum(begin + SEGMENT, tl.minimum(block_size, position + 1 - block * block_size))
        at = row * tl.num_programs(2) + part
        if real & (block >= 0) & (begin < end):
            dim = tl.arange(0, PADDED_DIM)
            q_ptr += row_offset(batch, head, query, q_strides)
            q = tl.load(q_ptr + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
            kv_head = (head // group_size).to(tl.int64)
            first_key = k_begin.to(tl.int64) + block.to(tl.int64) * block_size
            k_ptr += row_offset(batch, kv_head, first_key, k_strides)
            v_ptr += row_offset(batch, kv_head, first_key, v_strides)
            scale = softmax_scale * LOG2_E
            m_i = tl.full([], float("-inf"), tl.float32)
            l_i = tl.zeros([], tl.float32)
            acc = tl.zeros([PADDED_V], tl.float32)
            for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
                key = start + tl.arange(0, BLOCK_N)
                inside = key < end
                keys = load_rows(k_ptr, key.to(tl.int64) * k_strides[2], inside, HEAD_DIM, PADDED_DIM, False)
                values = load_rows(v_ptr, key.to(tl.int64) * v_strides[2], inside, V_DIM, PADDED_V, False)
                scores = tl.sum(keys.to(tl.float32) * q[None, :], 1) * scale
                scores = tl.where(inside, scores, float("-inf"))
                m_new = tl.maximum(m_i, tl.max(scores, 0))
                p = tl.exp2(scores - m_new)
                alpha = tl.exp2(m_i - m_new)
                l_i = l_i * alpha + tl.sum(p, 0)
                acc = acc * alpha + tl.sum(p[:, None] * values.to(tl.float32), 0)
                m_i = m_new
            column = tl.arange(0, PADDED_V)
            tl.store(partial_ptr + at * V_DIM + column, acc / l_i, mask=column < V_DIM)
            tl.store(partial_lse_ptr + at, m_i + tl.log2(l_i))
        else:
            tl.store(partial_lse_ptr + at, float("-inf"))


@triton.jit(do_not_specialize=["q_len"])
def _decode_merge_kernel(
    partial_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    q_len,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Merges the partial outputs of one (query, head); writes zeros and -inf if there are none."""
    query = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = query * tl.num_programs(1) + head
    part = tl.arange(0, PADDED_PARTS)
    every = tl.load(partial_lse_ptr + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    m_i = tl.max(every, 0)
    safe = tl.where(m_i > float("-inf"), m_i, 0.0)
    l_i = tl.sum(tl.exp2(every - safe), 0)
    column = tl.arange(0, PADDED_V)
    acc = tl.zeros([PADDED_V], tl.float32)
    for start in range(0, PARTS, BLOCK_P):
        some = start + tl.arange(0, BLOCK_P)
        lse = tl.load(partial_lse_ptr + row * PARTS + some, mask=some < PARTS, other=float("-inf"))
        mask = (lse != float("-inf"))[:, None] & (column < V_DIM)[None, :]
        at = partial_ptr + (row * PARTS + some)[:, None] * V_DIM + column[None, :]
        acc += tl.sum(tl.load(at, mask=mask, other=0.0) * tl.exp2(lse - safe)[:, None], 0)
    found = tl.max((every != float("-inf")).to(tl.int32), 0) > 0  # NaNs count, so that they stay visible
    result = acc / tl.where(found, l_i, 1.0)
    tl.store(out_ptr + row * V_DIM + column, narrow(result, out_ptr), mask=column < V_DIM)
    natural = (safe + tl.log2(tl.where(found, l_i, 1.0))) * LN_2
    lse_at = (query // q_len * tl.num_programs(1) + head) * q_len + query % q_len
    tl.store(lse_ptr + lse_at, tl.where(found, natural, float("-inf")))
