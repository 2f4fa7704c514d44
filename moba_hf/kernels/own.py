"""Causal attention of every query to its own block: the part of the output that the merge then completes.

Legend: B block size, D and DV head dims of keys and values, G query heads of a program.

A program takes one tile of queries (see `tiling`; all share an own block) for G heads of one kv head, as up
to BLOCK_M rows. Keys before the tile's first position are visible to all rows and need no mask; keys from
there to its last position are masked by position. The output goes directly to `out`, and its log-sum-exp to
`lse`: in base 2, or as natural logarithm if no merge follows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.inputs import Inputs
from moba_hf.kernels.launch import cdiv, device_of, dot, head_dims, narrow
from moba_hf.kernels.layout import LN_2, LOG2_E, load_rows, row_offset, store_rows
from moba_hf.kernels.softmax import accumulate
from moba_hf.kernels.tiling import find_tile, head_split


def own_attention(
    inputs: Inputs,
    chunk: int,
    out: Tensor,
    lse: Tensor,
    tile: tuning.Tile,
    final: bool,
    only_partial: bool = False,
) -> None:
    """Writes `out (batch, q_len, H, DV)` and `lse (batch, H, q_len)` for the chunk's queries in sequences.

    Args:
        tile: its `m` must be at least the number of rows in a tile of `inputs.tiling`.
        final: no merge follows, so lse is the natural logarithm.
        only_partial: skip complete blocks, which `hopper` has already done.
    """
    q, k, v, tiling = inputs.q, inputs.k, inputs.v, inputs.tiling
    num_heads, num_kv_heads, head_dim, v_dim = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    heads, _ = head_split(num_heads // num_kv_heads, tile.m)
    splits = cdiv(num_heads // num_kv_heads, heads)
    first_row = chunk * tiling.chunk_rows
    with device_of(q):
        _own_kernel[(tiling.max_tiles, num_kv_heads * splits)](
            q,
            k,
            v,
            out,
            lse,
            tiling.table,
            tiling.tile_offset[chunk],
            q.stride()[:3],
            k.stride()[:3],
            v.stride()[:3],
            q.shape[2],
            num_heads,
            num_heads // num_kv_heads,
            splits,
            first_row,
            min(tiling.chunk_rows, tiling.num_rows - first_row),
            tiling.num_seqs,
            tiling.block_size,
            inputs.softmax_scale,
            TILE=tiling.tile,
            TILES_PER_BLOCK=tiling.tiles_per_block,
            HEADS=heads,
            FINAL=final,
            ONLY_PARTIAL=only_partial,
            **head_dims(head_dim, v_dim),
            **tile.arguments(),
        )


@triton.jit(do_not_specialize=["q_len", "splits", "first_row", "num_rows", "num_seqs", "block_size"])
def _own_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    table_ptr,
    tile_offset_ptr,
    q_strides,
    k_strides,
    v_strides,
    q_len,
    num_heads,
    group_size,
    splits,
    first_row,
    num_rows,
    num_seqs,
    block_size,
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    TILE: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FINAL: tl.constexpr,
    ONLY_PARTIAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    number = tl.program_id(0)
    kv_head = (tl.program_id(1) // splits).to(tl.int64)
    if number < tl.load(tile_offset_ptr + num_seqs):
        seq, batch, own, first, origin, low, high, k_begin, k_len = find_tile(
            table_ptr,
            tile_offset_ptr,
            num_seqs,
            q_len,
            first_row,
            num_rows,
            number,
            block_size,
            TILE,
            TILES_PER_BLOCK,
        )
        batch = batch.to(tl.int64)
        # like `tiling.tile_rows`, but relative to the block: absolute positions spill registers on Ampere
        row = tl.arange(0, BLOCK_M)
        token = row // HEADS
        in_group = tl.program_id(1) % splits * HEADS + row % HEADS
        before = first - own * block_size  # keys of the block before the tile
        query = first + token + origin
        mask = (token < TILE) & (before + token < block_size) & (query >= low) & (query < high)
        mask = mask & (in_group < group_size)
        if ONLY_PARTIAL:
            mask = mask & ((own + 1) * block_size > k_len)
        head = kv_head * group_size + in_group
        q_offset = row_offset(batch, head, query, q_strides)
        q = load_rows(q_ptr, q_offset, mask, HEAD_DIM, PADDED_DIM, False)
        first_key = k_begin.to(tl.int64) + own.to(tl.int64) * block_size
        k_ptr += row_offset(batch, kv_head, first_key, k_strides)
        v_ptr += row_offset(batch, kv_head, first_key, v_strides)
        scale = softmax_scale * LOG2_E
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, PADDED_V], tl.float32)
        seen_by_all = (before + 1) // BLOCK_N * BLOCK_N
        last = tl.minimum(tl.minimum(before + TILE, block_size), k_len - own * block_size)
        if ONLY_PARTIAL:
            left = ((own + 1) * block_size > k_len).to(tl.int32)
            seen_by_all *= left
            last *= left
        for start in tl.range(0, seen_by_all, BLOCK_N, num_stages=STAGES):
            key = start + tl.arange(0, BLOCK_N)
            keys = load_rows(k_ptr, key.to(tl.int64) * k_strides[2], key >= 0, HEAD_DIM, PADDED_DIM, True)
            values = load_rows(v_ptr, key.to(tl.int64) * v_strides[2], key >= 0, V_DIM, PADDED_V, True)
            acc, m_i, l_i = accumulate(acc, m_i, l_i, dot(q, tl.trans(keys)), values, scale, v_ptr)
        for start in tl.range(seen_by_all, last, BLOCK_N, num_stages=STAGES):
            key = start + tl.arange(0, BLOCK_N)
            inside = key < last
            keys = load_rows(k_ptr, key.to(tl.int64) * k_strides[2], inside, HEAD_DIM, PADDED_DIM, False)
            values = load_rows(v_ptr, key.to(tl.int64) * v_strides[2], inside, V_DIM, PADDED_V, False)
            visible = (key[None, :] <= (before + token)[:, None]) & inside[None, :]
            scores = tl.where(visible, dot(q, tl.trans(keys)), float("-inf"))
            acc, m_i, l_i = accumulate(acc, m_i, l_i, scores, values, scale, v_ptr)
        flat = (batch * q_len + query) * num_heads + head
        store_rows(out_ptr, flat * V_DIM, narrow(acc / l_i[:, None], out_ptr), mask, V_DIM, PADDED_V)
        lse = m_i + tl.log2(l_i)
        if FINAL:
            lse = lse * LN_2
        tl.store(lse_ptr + (batch * num_heads + head) * q_len + query, lse, mask=mask)
