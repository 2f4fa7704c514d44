"""Attention of decode steps to their chosen blocks, with blocks split over the device (split-KV).

Legend: B block size, G query heads of a kv head, M steps per batch row, NB blocks, D and DV head dims, S
splits.

The heads of a kv head choose different blocks, but a decode step takes as long as reading its keys does. So a
list has the blocks that any of the heads chose. A program reads each of them once, and its rows, one per
head, mask the blocks that their head did not choose. Only the device knows the length of the list; every
split takes an equal share of it. `sparse_decode.merge_parts` merges the S partial results of a row in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import shared_tuning, tuning
from moba_hf.kernels.launch import cdiv, device_of, dot, next_power_of_2, num_processors, padded
from moba_hf.kernels.layout import (
    LOG2_E,
    load_rows,
    row_offset,
    step_place,
)
from moba_hf.kernels.shared_attend import first_blocks, later_blocks, list_keys, list_steps
from moba_hf.kernels.softmax import FLOOR, accumulate
from moba_hf.kernels.sparse_decode import merge_parts

# Blocks that a program lists.
_LIST_PLACES = 1024


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    table: Tensor,
    block_size: int,
    softmax_scale: float,
    *,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`out (batch, M, H, DV)` in q's dtype and `lse (batch, H, M)`, fp32, natural logarithm.

    Args:
        q: `(batch, H, M, D)`, last dimension contiguous, as k and v.
        k, v: `(batch, HK, kv_len, D or DV)`.
        block_mask: int32 `(batch * M, H, words)`, a bit per block, contiguous.
        table: int32 `(batch, 5)`, one sequence per batch row, in order.
        softmax_scale: factor of the scores, positive.
        splits: S; None: enough to fill the device.
    """
    batch, num_heads, length, head_dim = q.shape
    num_kv_heads, v_dim, items = k.shape[1], v.shape[3], batch * length
    group = num_heads // num_kv_heads
    dims = (padded(head_dim), padded(v_dim))
    tile = shared_tuning.step_attend_tile(dims, q.element_size(), tuning.capability(q.device))
    block_m = min(tile.m, max(16, next_power_of_2(group)))
    row_parts = cdiv(group, block_m)
    if splits is None:
        wanted = num_processors(q) * shared_tuning.STEP_PROGRAMS
        most = min(shared_tuning.MOST_STEP_SPLITS, cdiv(k.shape[2], block_size))
        splits = max(1, min(wanted // max(1, items * num_kv_heads * row_parts), most))
    shape = (batch, length, num_heads, splits)
    partial = torch.empty(*shape, v_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    words = block_mask.shape[2]
    blocks = torch.empty(items, num_kv_heads, words * 32, dtype=torch.int32, device=q.device)
    counts = torch.empty(items, num_kv_heads, dtype=torch.int32, device=q.device)
    if q.numel() > 0:
        table = table.contiguous()
        with device_of(q):
            union_lists(block_mask, blocks, counts)
            _attend_steps_kernel[(splits, num_kv_heads * row_parts, items)](
                q, k, v, partial, partial_lse, blocks, counts, block_mask, table,
                q.stride()[:3], k.stride()[:3], v.stride()[:3], length, words, group,
                softmax_scale * LOG2_E.value,
                ROW_PARTS=row_parts, BLOCK_SIZE=block_size, HEAD_DIM=head_dim, PADDED_DIM=dims[0],
                V_DIM=v_dim, PADDED_V=dims[1], BLOCK_M=block_m, BLOCK_N=tile.n, STAGES=tile.stages,
                num_warps=tile.warps,
            )  # fmt: skip
    return merge_parts(partial, partial_lse, q.dtype)


def union_lists(block_mask: Tensor, blocks: Tensor, counts: Tensor) -> None:
    """Lists the blocks that any head of a kv head chose, ascending, and counts them.

    Args:
        block_mask: int32 `(steps, H, words)`, contiguous.
        blocks: int32 `(steps, HK, words * 32)`, contiguous; the rest of a list stays as it is.
        counts: int32 `(steps, HK)`, contiguous.
    """
    items, num_kv_heads = counts.shape
    _, num_heads, words = block_mask.shape
    with device_of(block_mask):
        _union_lists_kernel[(items, num_kv_heads, cdiv(words * 32, _LIST_PLACES))](
            block_mask, blocks, counts, words, num_heads // num_kv_heads,
            BLOCK=_LIST_PLACES, WORDS=256, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["words"])
def _union_lists_kernel(
    mask_ptr, list_ptr, count_ptr, words, group_size, BLOCK: tl.constexpr, WORDS: tl.constexpr
):
    """Lists, for one (step, kv head, run of blocks), those that any head of the group chose, ascending.

    It counts the chosen blocks before its own to know where its list begins.
    """
    item = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    mask_ptr += item * group_size * words
    list_ptr += item * words * 32
    first = tl.program_id(2) * BLOCK
    before = 0
    for start in range(0, first // 32, WORDS):
        at = start + tl.arange(0, WORDS)
        before += tl.sum(_num_bits(_any_head(mask_ptr, at, at < first // 32, words, group_size)), 0)
    place = first + tl.arange(0, BLOCK)
    bit = (_any_head(mask_ptr, place // 32, place < words * 32, words, group_size) >> (place % 32)) & 1
    tl.store(list_ptr + before + tl.cumsum(bit, 0) - bit, place, mask=bit != 0)
    if tl.program_id(2) == tl.num_programs(2) - 1:
        tl.store(count_ptr + item, before + tl.sum(bit, 0))


@triton.jit
def _any_head(mask_ptr, at, inside, words, group_size):
    """Words `at` of the blocks that any head of the group chose; 0 outside."""
    word = tl.zeros(at.shape, tl.int32)
    for head in range(group_size):
        word = word | tl.load(mask_ptr + head * words + at, mask=inside, other=0)
    return word


@triton.jit
def _num_bits(word):
    """The number of set bits of int32 words: sums of 2, 4, 8, 16 and 32 neighbouring bits."""
    word = (word & 0x55555555) + ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word & 0x0F0F0F0F) + ((word >> 4) & 0x0F0F0F0F)
    word = (word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)
    return (word & 0xFFFF) + ((word >> 16) & 0xFFFF)


@triton.jit(do_not_specialize=["length", "words"])
def _attend_steps_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    partial_ptr,
    partial_lse_ptr,
    list_ptr,
    count_ptr,
    mask_ptr,
    table_ptr,
    q_strides,
    k_strides,
    v_strides,
    length,
    words,
    group_size,
    scale,
    ROW_PARTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Handles one (split, kv head and some of its heads, step)."""
    number = tl.program_id(2)
    num_kv_heads = tl.num_programs(1) // ROW_PARTS
    kv_head = tl.program_id(1) // ROW_PARTS
    batch, query, position, k_begin = step_place(table_ptr, number, length)
    in_group = tl.program_id(1) % ROW_PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    head = kv_head * group_size + tl.minimum(in_group, group_size - 1)
    mask = in_group < group_size
    item = number.to(tl.int64) * num_kv_heads + kv_head
    count = tl.where(position >= 0, tl.load(count_ptr + item), 0)
    share = tl.cdiv(count, tl.num_programs(0))
    if BLOCK_SIZE < BLOCK_N:  # whole steps
        share = tl.cdiv(share, BLOCK_N // BLOCK_SIZE) * (BLOCK_N // BLOCK_SIZE)
    begin = tl.minimum(tl.program_id(0) * share, count)
    count = tl.minimum(count - begin, share)
    list_ptr += item * words * 32 + begin
    chosen_ptr = mask_ptr + (number.to(tl.int64) * num_kv_heads * group_size + head) * words
    q = load_rows(q_ptr, row_offset(batch, head, query, q_strides), mask, HEAD_DIM, PADDED_DIM, False)
    k_ptr += row_offset(batch, kv_head, k_begin, k_strides)
    v_ptr += row_offset(batch, kv_head, k_begin, v_strides)
    m_i = tl.full([BLOCK_M], FLOOR, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_V], tl.float32)
    steps = list_steps(count, BLOCK_SIZE, BLOCK_N)
    ahead = first_blocks(list_ptr, count, BLOCK_SIZE, BLOCK_N)
    for step in tl.range(0, steps, num_stages=STAGES):
        key, known = list_keys(ahead, step, count, BLOCK_SIZE, BLOCK_N)
        block = key // BLOCK_SIZE
        ahead = later_blocks(list_ptr, step, count, BLOCK_SIZE, BLOCK_N)
        known = known & (key <= position)
        keys = load_rows(k_ptr, key.to(tl.int64) * k_strides[2], known, HEAD_DIM, PADDED_DIM, False)
        values = load_rows(v_ptr, key.to(tl.int64) * v_strides[2], known, V_DIM, PADDED_V, False)
        word = tl.load(chosen_ptr[:, None] + (block // 32)[None, :], mask=known[None, :], other=0)
        attended = known[None, :] & (((word >> (block % 32)[None, :]) & 1) != 0)
        scores = tl.where(attended, dot(q, tl.trans(keys)), float("-inf"))
        acc, m_i, l_i = accumulate(acc, m_i, l_i, scores, values, scale, v_ptr)
    found = l_i != 0.0  # also if it is NaN
    at = (number.to(tl.int64) * num_kv_heads * group_size + head) * tl.num_programs(0) + tl.program_id(0)
    lse = tl.where(found, m_i + tl.log2(tl.where(found, l_i, 1.0)), float("-inf"))
    tl.store(partial_lse_ptr + at, lse, mask=mask)
    column = tl.arange(0, PADDED_V)
    tl.store(
        partial_ptr + at[:, None] * V_DIM + column[None, :],
        acc / tl.where(found, l_i, 1.0)[:, None],
        mask=(found & mask)[:, None] & (column < V_DIM)[None, :],
    )
