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
from moba_hf.kernels.launch import cdiv, device_of, dot, narrow, padded
from moba_hf.kernels.layout import load_rows
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
        left_by: handle only tiles whose keys in overlapped blocks are not a multiple of this number; the
            Hopper kernel skips these. 0: handle all tiles.
    """
    q, k, v, plan = inputs.q, inputs.k, inputs.v, inputs.plan
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    tiles = min(lists.counts.shape[0], plan.num_tiles - first_tile)
    parts = cdiv(plan.tile, tile.m)
    group = num_heads // num_kv_heads
    with device_of(q):
        _attend_lists_kernel[(tiles * group * parts, num_kv_heads)](
            q,
            k,
            v,
            out,
            lse,
            plan.tiles,
            lists.blocks,
            lists.counts,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            q.shape[2],
            first_tile,
            lists.blocks.shape[2],
            inputs.softmax_scale * 1.4426950408889634,
            GROUP=group,
            TILE=plan.tile,
            BLOCK_SIZE=plan.block_size,
            HEAD_DIM=q.shape[3],
            PADDED_DIM=padded(q.shape[3]),
            V_DIM=v.shape[3],
            PADDED_V=padded(v.shape[3]),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            LEFT_BY=left_by,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )


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


@triton.jit(do_not_specialize=["q_len", "first_tile"])
def _attend_lists_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    tile_ptr,
    list_ptr,
    count_ptr,
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
    first_tile,
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
    kv_head = tl.program_id(1).to(tl.int64)
    head = kv_head * GROUP + program // PARTS % GROUP
    num_heads = tl.num_programs(1) * GROUP
    info = tile_ptr + (first_tile + number).to(tl.int64) * 8
    batch = tl.load(info).to(tl.int64)
    q_begin = tl.load(info + 1)
    q_end = tl.load(info + 2)
    position = tl.load(info + 3)
    k_begin = tl.load(info + 4).to(tl.int64)
    first = position // TILE * TILE
    row = program % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    query = q_begin + row
    there = query < q_end
    wanted = q_begin + program % PARTS * BLOCK_M < q_end
    if LEFT_BY > 0:
        own = position + q_end - q_begin - first // BLOCK_SIZE * BLOCK_SIZE
        wanted = wanted & (own % LEFT_BY != 0)
    if wanted:
        q_at = batch * q_stride_b + head * q_stride_h + query.to(tl.int64) * q_stride_n
        q = load_rows(q_ptr, q_at, there, HEAD_DIM, PADDED_DIM, False)
        k_ptr += batch * k_stride_b + kv_head * k_stride_h + k_begin * k_stride_n
        v_ptr += batch * v_stride_b + kv_head * v_stride_h + k_begin * v_stride_n
        item = number.to(tl.int64) * num_heads + head
        count = tl.load(count_ptr + item)
        list_ptr += item * list_length
        high = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M, PADDED_V], tl.float32)
        if BLOCK_SIZE >= BLOCK_N:
            steps = count * (BLOCK_SIZE // BLOCK_N)
        else:
            steps = tl.cdiv(count, BLOCK_N // BLOCK_SIZE)
        ahead = first_blocks(list_ptr, count, BLOCK_SIZE, BLOCK_N)
        for step in tl.range(0, steps, num_stages=STAGES):
            key, known = list_keys(ahead, step, count, BLOCK_SIZE, BLOCK_N)
            ahead = later_blocks(list_ptr, step, count, BLOCK_SIZE, BLOCK_N)
            EVEN: tl.constexpr = BLOCK_SIZE >= BLOCK_N
            key = key.to(tl.int64)
            keys = load_rows(k_ptr, key * k_stride_n, known, HEAD_DIM, PADDED_DIM, EVEN)
            values = load_rows(v_ptr, key * v_stride_n, known, V_DIM, PADDED_V, EVEN)
            scores = dot(q, tl.trans(keys))
            if not EVEN:
                scores = tl.where(known[None, :], scores, float("-inf"))
            total, high, mass = accumulate(total, high, mass, scores, values, scale, v_ptr)
        end = position + q_end - q_begin
        for start in tl.range(first // BLOCK_SIZE * BLOCK_SIZE, end, BLOCK_N, num_stages=STAGES):
            key = start + tl.arange(0, BLOCK_N)
            keys = load_rows(k_ptr, key.to(tl.int64) * k_stride_n, key < end, HEAD_DIM, PADDED_DIM, False)
            values = load_rows(v_ptr, key.to(tl.int64) * v_stride_n, key < end, V_DIM, PADDED_V, False)
            seen = key[None, :] <= (position + row)[:, None]
            scores = tl.where(seen, dot(q, tl.trans(keys)), float("-inf"))
            total, high, mass = accumulate(total, high, mass, scores, values, scale, v_ptr)
        dim = tl.arange(0, PADDED_V)
        at = out_ptr + ((batch * q_len + query) * num_heads + head)[:, None] * V_DIM + dim[None, :]
        result = narrow(total / mass[:, None], out_ptr)
        tl.store(at, result, mask=there[:, None] & (dim < V_DIM)[None, :])
        lse = (high + tl.log2(mass)) * 0.6931471805599453
        tl.store(lse_ptr + (batch * num_heads + head) * q_len + query, lse, mask=there)
