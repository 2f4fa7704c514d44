"""Full attention for a few queries, split over the keys to fill the device (split-KV).

Legend: G query heads per kv head, M queries per row, D and DV head dims, S splits.

One program per (split, kv head, BLOCK_M rows of M x G). The heads of a group are rows of one tile, so keys
and values are read once for all of them. A split is an equal share of the filled slots (their number is read
on the device), not of the cache's capacity. It writes a partial output and log-sum-exp, -inf if a row attends
none of its keys. `sparse_decode.merge_parts` merges the S partial results in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.launch import (
    cdiv,
    device_of,
    dot,
    next_power_of_2,
    num_processors,
    padded,
    rows_contiguous,
)
from moba_hf.kernels.layout import (
    LOG2_E,
    SEQ_COLUMNS,
    SEQ_K_BEGIN,
    SEQ_K_END,
    SEQ_Q_BEGIN,
    SEQ_Q_END,
    head_offset,
    load_rows,
    row_offset,
)
from moba_hf.kernels.softmax import FLOOR, accumulate
from moba_hf.kernels.sparse_decode import merge_parts
from moba_hf.op.numerics import with_positive_scale


def dense_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    softmax_scale: float,
    tile: tuning.Tile | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention: `out (batch, M, H, DV)` in q's dtype, `lse (batch, H, M)` in fp32, natural logarithm.

    The last query is at the position of the last key.

    Args:
        q: `(batch, H, M, D)`.
        k, v: `(batch, HK, kv_len, D or DV)`, any strides.
        table: int32 `(batch, 5)`, one sequence per batch row, in order. Padding queries give zeros.
        tile: rows are at most `tile.m`; None: by `tuning.dense_decode_tile`.
        programs: number of programs per multiprocessor to aim for with the splits; None: by `tuning`.
    """
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    q, softmax_scale = with_positive_scale(q, softmax_scale)
    batch, num_heads, length, head_dim = q.shape
    num_kv_heads, v_dim = k.shape[1], v.shape[3]
    dims = (padded(head_dim), padded(v_dim))
    if tile is None:
        tile = tuning.dense_decode_tile(dims, q.element_size(), tuning.capability(q.device))
    rows = length * (num_heads // num_kv_heads)
    block_m = min(tile.m, max(16, next_power_of_2(rows)))
    tiles = cdiv(rows, block_m)
    groups = max(1, batch * num_kv_heads * tiles)
    tuned = tuning.choices_for(q)
    wanted = num_processors(q) * (programs or tuned.dense_decode_programs)
    splits = max(1, min(wanted // groups, tuned.dense_decode_splits))
    shape = (batch, length, num_heads, splits)
    partial = torch.empty(*shape, v_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    if q.numel() > 0:
        with device_of(q):
            _dense_decode_kernel[(splits, num_kv_heads, batch * tiles)](
                q,
                k,
                v,
                partial,
                partial_lse,
                table.contiguous(),
                q.stride()[:3],
                k.stride()[:3],
                v.stride()[:3],
                length,
                num_heads // num_kv_heads,
                tiles,
                softmax_scale,
                HEAD_DIM=head_dim,
                PADDED_DIM=dims[0],
                V_DIM=v_dim,
                PADDED_V=dims[1],
                BLOCK_M=block_m,
                BLOCK_N=tile.n,
                STAGES=tile.stages,
                num_warps=tile.warps,
            )
    return merge_parts(partial, partial_lse, q.dtype)


@triton.jit
def _attend_tile(
    acc,
    m_i,
    l_i,
    q,
    k_ptr,
    v_ptr,
    start,
    begin,
    end,
    last,
    k_strides,
    v_strides,
    scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Attends keys `[start, start + BLOCK_N)`; unless WHOLE, only those in `[begin, end)` up to `last`."""
    key = start + tl.arange(0, BLOCK_N)
    mask = (key >= begin) & (key < end)
    at = key.to(tl.int64)
    keys = load_rows(k_ptr, at * k_strides[2], mask, HEAD_DIM, PADDED_DIM, WHOLE)
    values = load_rows(v_ptr, at * v_strides[2], mask, V_DIM, PADDED_V, WHOLE)
    scores = dot(q, tl.trans(keys))
    if not WHOLE:
        scores = tl.where(mask[None, :] & (key[None, :] <= last[:, None]), scores, float("-inf"))
    return accumulate(acc, m_i, l_i, scores, values, scale, v_ptr)


@triton.jit(do_not_specialize=["length", "tiles"])
def _dense_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    partial_ptr,
    partial_lse_ptr,
    table_ptr,
    q_strides,
    k_strides,
    v_strides,
    length,
    group_size,
    tiles,
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Handles one (split, kv head, tile of rows)."""
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    batch = tl.program_id(2) // tiles
    seq = table_ptr + batch * SEQ_COLUMNS
    q_begin = tl.load(seq + SEQ_Q_BEGIN)
    q_end = tl.load(seq + SEQ_Q_END)
    k_begin = tl.load(seq + SEQ_K_BEGIN)
    k_end = tl.load(seq + SEQ_K_END)
    row = tl.program_id(2) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // group_size
    head = kv_head * group_size + row % group_size
    mask = (query >= q_begin) & (query < q_end)
    last = k_end - q_end + query  # the query's slot, which is the last one it attends
    wide = batch.to(tl.int64)
    q = load_rows(q_ptr, row_offset(wide, head, query, q_strides), mask, HEAD_DIM, PADDED_DIM, False)
    k_ptr += head_offset(wide, kv_head, k_strides)
    v_ptr += head_offset(wide, kv_head, v_strides)
    share = tl.cdiv(tl.cdiv(k_end - k_begin, tl.num_programs(0)), BLOCK_N) * BLOCK_N
    begin = k_begin + split * share
    end = tl.minimum(begin + share, k_end)
    # tiles that every row attends in full need no mask
    first = tl.min(tl.where(mask, last, k_end - 1), 0)
    whole = tl.maximum(0, tl.minimum(end, first + 1) - begin) // BLOCK_N * BLOCK_N
    scale = softmax_scale * LOG2_E
    m_i = tl.full([BLOCK_M], FLOOR, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_V], tl.float32)
    for start in tl.range(begin, begin + whole, BLOCK_N, num_stages=STAGES):
        acc, m_i, l_i = _attend_tile(
            acc, m_i, l_i, q, k_ptr, v_ptr, start, begin, end, last, k_strides, v_strides, scale,
            HEAD_DIM, PADDED_DIM, V_DIM, PADDED_V, BLOCK_N, True,
        )  # fmt: skip
    for start in range(begin + whole, end, BLOCK_N):
        acc, m_i, l_i = _attend_tile(
            acc, m_i, l_i, q, k_ptr, v_ptr, start, begin, end, last, k_strides, v_strides, scale,
            HEAD_DIM, PADDED_DIM, V_DIM, PADDED_V, BLOCK_N, False,
        )  # fmt: skip
    found = mask & (l_i > 0.0)
    at = (wide * length + query) * (tl.num_programs(1) * group_size) + head
    at = at * tl.num_programs(0) + split
    real = query < length
    lse = tl.where(found, m_i + tl.log2(tl.where(found, l_i, 1.0)), float("-inf"))
    tl.store(partial_lse_ptr + at, lse, mask=real)
    column = tl.arange(0, PADDED_V)
    tl.store(
        partial_ptr + at[:, None] * V_DIM + column[None, :],
        acc / tl.where(found, l_i, 1.0)[:, None],
        mask=(found & real)[:, None] & (column < V_DIM)[None, :],
    )
