"""Attention of a few queries to their chosen blocks, split over blocks so that the device is filled.

Legend: B block size, H query heads, K topk, D and DV head dims of keys and values, P = K x segments.

One program per (query, head, slot, segment of the block) reads its keys and values once, in fp32 without
matrix units (one query row would waste them), and writes a partial output and log-sum-exp, -inf where there
is nothing to attend. The own block may stand in any slot: every slot is masked by the query's position. A
second kernel (`merge_parts`) adds up the P partials of a query, in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.launch import device_of, narrow, num_processors, padded
from moba_hf.kernels.softmax import load_rows


def num_segments(block_size: int, blocks: int = 0, processors: int = 0) -> int:
    """Parts that a block is split in, where `blocks` are attended in all on so many processors."""
    shortest, longest = tuning.DECODE_SEGMENTS
    least = int(triton.cdiv(block_size, longest))
    wanted = processors * tuning.DECODE_PROGRAMS // max(1, blocks)
    return max(least, min(wanted, int(triton.cdiv(block_size, shortest))))


def takes(q: Tensor, topk: int, max_seqlen_q: int, block_size: int) -> bool:
    """Whether so few queries are better served here than by regrouping them by block."""
    partials = q.shape[0] * q.shape[2] * q.shape[1] * topk * num_segments(block_size)
    few = min(max_seqlen_q, q.shape[2]) <= tuning.DECODE_QUERIES
    return few and partials <= tuning.DECODE_PARTIALS


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    choice: Tensor,
    table: Tensor,
    max_seqlen_q: int,
    block_size: int,
    softmax_scale: float,
    *,
    by_row: bool = False,
    segments: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`out (batch, q_len, H, DV)` and `lse (batch, H, q_len)` fp32, natural.

    Args:
        q: `(batch, H, q_len, D)`. k, v: `(batch, HK, kv_len, D or DV)`; last dimensions contiguous.
        choice: int32 `(batch, q_len, H, K)`, contiguous, own block in any slot.
        by_row: row r of the table is batch row r, for every r, which saves a pass over the partials.
        segments: parts that a block is split in; None: by `num_segments`.
    """
    batch, num_heads, q_len, head_dim = q.shape
    topk, v_dim = choice.shape[3], v.shape[3]
    if segments is None:
        segments = num_segments(block_size, choice.numel(), num_processors(q))
    segment = int(triton.cdiv(block_size, segments))
    block_n = min(64, triton.next_power_of_2(block_size))
    shape, device = (batch, q_len, num_heads, topk * segments), q.device
    partial = torch.empty(*shape, v_dim, dtype=torch.float32, device=device)
    # rows that no sequence covers are never visited: only there the first value stays
    partial_lse = (
        torch.empty(shape, dtype=torch.float32, device=device)
        if by_row
        else torch.full(shape, -torch.inf, dtype=torch.float32, device=device)
    )
    queries = q_len if by_row else max(1, min(max_seqlen_q, q_len))
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
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                q_len,
                num_heads // k.shape[1],
                queries,
                block_size,
                softmax_scale,
                BY_ROW=by_row,
                SEGMENTS=segments,
                SEGMENT=segment,
                HEAD_DIM=head_dim,
                PADDED_DIM=padded(head_dim),
                V_DIM=v_dim,
                PADDED_V=padded(v_dim),
                BLOCK_N=block_n,
                STAGES=1 if segment <= block_n else 2,
                num_warps=4,
            )
    return merge_parts(partial, partial_lse, q.dtype)


def merge_parts(partial: Tensor, partial_lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`out (batch, q_len, H, DV)` in `dtype` and `lse (batch, H, q_len)` fp32, natural, from P partials.

    Args:
        partial: fp32 `(batch, q_len, H, P, DV)`. partial_lse: fp32 `(batch, q_len, H, P)`, base 2; where it
            is -inf, `partial` is not read. All -inf gives zeros and -inf.
    """
    batch, q_len, num_heads, parts, v_dim = partial.shape
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
            PADDED_PARTS=triton.next_power_of_2(parts),
            V_DIM=v_dim,
            PADDED_V=padded(v_dim),
            BLOCK_P=min(32, max(16, triton.next_power_of_2(parts))),
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
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
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
    """One (query, head, slot, segment)."""
    seq = table_ptr + tl.program_id(0) // queries * 5
    head = tl.program_id(1)
    part = tl.program_id(2)
    q_begin = tl.load(seq + 1)
    q_end = tl.load(seq + 2)
    query = tl.program_id(0) % queries
    if not BY_ROW:
        query += q_begin
    real = (query >= q_begin) & (query < q_end)
    if real | BY_ROW:
        batch = tl.load(seq).to(tl.int64)
        k_begin = tl.load(seq + 3)
        k_end = tl.load(seq + 4)
        row = (batch * q_len + query) * tl.num_programs(1) + head
        block = tl.load(choice_ptr + row * (tl.num_programs(2) // SEGMENTS) + part // SEGMENTS)
        position = query + (k_end - k_begin) - q_end
        begin = part % SEGMENTS * SEGMENT
        end = tl.minimum(begin + SEGMENT, tl.minimum(block_size, position + 1 - block * block_size))
        at = row * tl.num_programs(2) + part
        if real & (block >= 0) & (begin < end):
            dim = tl.arange(0, PADDED_DIM)
            q_ptr += batch * q_stride_b + head.to(tl.int64) * q_stride_h + query.to(tl.int64) * q_stride_n
            q = tl.load(q_ptr + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
            kv_head = (head // group_size).to(tl.int64)
            first_key = k_begin.to(tl.int64) + block.to(tl.int64) * block_size
            k_ptr += batch * k_stride_b + kv_head * k_stride_h + first_key * k_stride_n
            v_ptr += batch * v_stride_b + kv_head * v_stride_h + first_key * v_stride_n
            scale = softmax_scale * 1.4426950408889634
            high = tl.full([], float("-inf"), tl.float32)
            mass = tl.zeros([], tl.float32)
            total = tl.zeros([PADDED_V], tl.float32)
            for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
                key = start + tl.arange(0, BLOCK_N)
                inside = key < end
                keys = load_rows(k_ptr, key.to(tl.int64) * k_stride_n, inside, HEAD_DIM, PADDED_DIM, False)
                values = load_rows(v_ptr, key.to(tl.int64) * v_stride_n, inside, V_DIM, PADDED_V, False)
                scores = tl.sum(keys.to(tl.float32) * q[None, :], 1) * scale
                scores = tl.where(inside, scores, float("-inf"))
                new_high = tl.maximum(high, tl.max(scores, 0))
                weight = tl.exp2(scores - new_high)
                shrink = tl.exp2(high - new_high)
                mass = mass * shrink + tl.sum(weight, 0)
                total = total * shrink + tl.sum(weight[:, None] * values.to(tl.float32), 0)
                high = new_high
            column = tl.arange(0, PADDED_V)
            tl.store(partial_ptr + at * V_DIM + column, total / mass, mask=column < V_DIM)
            tl.store(partial_lse_ptr + at, high + tl.log2(mass))
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
    """Adds up the partial outputs of one (query, head); zeros and -inf where there are none."""
    query = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = query * tl.num_programs(1) + head
    part = tl.arange(0, PADDED_PARTS)
    every = tl.load(partial_lse_ptr + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    high = tl.max(every, 0)
    safe = tl.where(high > float("-inf"), high, 0.0)
    mass = tl.sum(tl.exp2(every - safe), 0)
    column = tl.arange(0, PADDED_V)
    total = tl.zeros([PADDED_V], tl.float32)
    for start in range(0, PARTS, BLOCK_P):
        some = start + tl.arange(0, BLOCK_P)
        lse = tl.load(partial_lse_ptr + row * PARTS + some, mask=some < PARTS, other=float("-inf"))
        there = (lse > float("-inf"))[:, None] & (column < V_DIM)[None, :]
        at = partial_ptr + (row * PARTS + some)[:, None] * V_DIM + column[None, :]
        total += tl.sum(tl.load(at, mask=there, other=0.0) * tl.exp2(lse - safe)[:, None], 0)
    found = high > float("-inf")
    result = total / tl.where(found, mass, 1.0)
    tl.store(out_ptr + row * V_DIM + column, narrow(result, out_ptr), mask=column < V_DIM)
    natural = (safe + tl.log2(tl.where(found, mass, 1.0))) * 0.6931471805599453
    lse_at = (query // q_len * tl.num_programs(1) + head) * q_len + query % q_len
    tl.store(lse_ptr + lse_at, tl.where(found, natural, float("-inf")))
