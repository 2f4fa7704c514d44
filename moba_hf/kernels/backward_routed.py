"""Gradients through the routed blocks: dk and dv per block, dq per (query, block) pair.

Legend: B block size, D and DV head dims of keys and values, P pairs, R rows of a segment.

`scores = scale * q.k`, `p = exp2(scores - lse)`, `ds = p * (grad_out.v - delta)`; then `dv = p^T grad_out`,
`dk = scale * ds^T q`, `dq = scale * ds k`. No mask is needed: the block is complete and earlier than every
query. There are two kernels:
- `_pair_gradients_kernel` holds a tile of a block's keys and values and loops over the gathered (query,
  output gradient) rows of the pairs that chose the block, BLOCK_M at a time. It accumulates dk and dv; if the
  tile is the whole block, it also writes each pair's dq.
- `_pair_dq_kernel`, for longer blocks, holds one tile of pairs, loops over the block's keys and writes dq.
A bin's pairs are split into segments of R pairs, so that a popular block is shared by many programs. Segment
0 writes to the bin's sums; the others write to their own, which `_fold_kernel` adds in order. Since the sort
is stable, every run gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.backward_rows import load_stats
from moba_hf.kernels.launch import add_dot, cdiv, device_of, dot, head_dims, narrow
from moba_hf.kernels.layout import (
    INFO_COLUMNS,
    LOG2_E,
    RUN_BATCH,
    RUN_BEGIN,
    RUN_BIN,
    RUN_END,
    RUN_FIRST_KEY,
    RUN_KV_HEAD,
    RUN_PART,
    STAT_COLUMNS,
    STAT_DELTA,
    STAT_LSE,
    head_offset,
    load_rows,
    row_offset,
    store_rows,
)
from moba_hf.kernels.routing import Routes
from moba_hf.kernels.tiling import Tiling


@dataclass(frozen=True)
class Rows:
    """The inputs of the backward for a group of kv heads and their query heads; last dimensions contiguous.

    Attributes:
        q: `(batch, H, q_len, D)`.
        k: `(batch, HK, kv_len, D)`.
        v: `(batch, HK, kv_len, DV)`.
        grad_out: `(batch, q_len, H, DV)`.
        stats: `(batch * q_len, H, 2)`, the result of `backward_rows.row_stats`.
        softmax_scale: softmax scale of the forward; may have any sign.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    stats: Tensor
    softmax_scale: float

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        """Strides (batch, head, token) of q, k, v and grad_out."""
        batch, token, head = self.grad_out.stride()[:3]
        return self.q.stride()[:3], self.k.stride()[:3], self.v.stride()[:3], (batch, head, token)


@dataclass(frozen=True)
class BinSums:
    """Where the gradients of the keys and values of bins are summed.

    Attributes:
        sums: dk, then dv of each bin, fp32 `(bins, B * (D + DV))`.
        extra: temporary memory, fp32 `(P // R, B * (D + DV))`.
        fresh: overwrite `sums` instead of adding to it.
    """

    sums: Tensor
    extra: Tensor
    fresh: bool


def pair_gradients(
    rows: Rows,
    tiling: Tiling,
    routes: Routes,
    partial: Tensor | None,
    into: BinSums,
    slots: int,
    first_row: int,
    tile: tuning.Tile,
) -> None:
    """Adds each bin's unscaled dk and dv to `into.sums`; skips bins without pairs.

    Args:
        routes: the pairs, with `rows` = R, a multiple of `tile.m`.
        partial: `(P, D)`, receives dq of every pair with a bin; the block must then fit `tile.n`. None: dq is
            not computed.
        slots: K1.
        first_row: flat query row at which the chunk begins.
    """
    head_dim, v_dim, block_size = rows.q.shape[3], rows.v.shape[3], tiling.block_size
    key_tiles = cdiv(block_size, tile.n)
    assert partial is None or key_tiles == 1
    with device_of(rows.q):
        _pair_gradients_kernel[(routes.tile_info.shape[0] * key_tiles,)](
            rows.q,
            rows.k,
            rows.v,
            rows.grad_out,
            rows.stats,
            into.sums if partial is None else partial,
            into.sums,
            into.extra,
            routes.pairs,
            routes.bin_begin,
            routes.tile_info,
            *rows.strides,
            rows.q.shape[2],
            first_row,
            rows.softmax_scale,
            NUM_HEADS=rows.q.shape[1],
            SLOTS=slots,
            BLOCK_SIZE=block_size,
            ROWS=routes.rows,
            KEY_TILES=key_tiles,
            WITH_DQ=partial is not None,
            FRESH=into.fresh,
            ONE_ROW=rows.q.shape[0] == 1,
            **head_dims(head_dim, v_dim),
            **tile.arguments(),
        )
        size = into.sums.shape[1]
        fold = tuning.choices_for(into.sums).fold
        _fold_kernel[(routes.num_bins, cdiv(size, fold))](
            into.sums, into.extra, routes.bin_begin, SIZE=size, ROWS=routes.rows, BLOCK=fold, num_warps=4
        )


def pair_dq(
    rows: Rows,
    tiling: Tiling,
    routes: Routes,
    partial: Tensor,
    slots: int,
    first_row: int,
    tile: tuning.Tile,
) -> None:
    """Writes `partial (P, D)`, dq of every pair with a bin; `routes.rows` must equal `tile.m`."""
    head_dim, v_dim = rows.q.shape[3], rows.v.shape[3]
    with device_of(rows.q):
        _pair_dq_kernel[(routes.tile_info.shape[0],)](
            rows.q,
            rows.k,
            rows.v,
            rows.grad_out,
            rows.stats,
            partial,
            routes.pairs,
            routes.tile_info,
            *rows.strides,
            rows.q.shape[2],
            first_row,
            rows.softmax_scale,
            NUM_HEADS=rows.q.shape[1],
            SLOTS=slots,
            BLOCK_SIZE=tiling.block_size,
            ONE_ROW=rows.q.shape[0] == 1,
            **head_dims(head_dim, v_dim),
            **tile.arguments(),
        )


@triton.jit
def _row_places(pair, first_row, q_len, NUM_HEADS: tl.constexpr, SLOTS: tl.constexpr, ONE_ROW: tl.constexpr):
    """Batch row, head and query of the pairs, int64, and the offsets of their stats."""
    row_head = pair // SLOTS
    query = first_row + row_head // NUM_HEADS
    head = (row_head % NUM_HEADS).to(tl.int64)
    stat = (first_row.to(tl.int64) * NUM_HEADS + row_head) * STAT_COLUMNS
    if ONE_ROW:
        return tl.zeros_like(head), head, query.to(tl.int64), stat
    else:
        return (query // q_len).to(tl.int64), head, (query % q_len).to(tl.int64), stat


@triton.jit(do_not_specialize=["q_len", "first_row"])
def _pair_gradients_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    stats_ptr,
    dq_ptr,
    sums_ptr,
    extra_ptr,
    pair_ptr,
    bin_begin_ptr,
    info_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    q_len,
    first_row,
    softmax_scale,
    NUM_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_TILES: tl.constexpr,
    WITH_DQ: tl.constexpr,
    FRESH: tl.constexpr,
    ONE_ROW: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Handles ROWS pairs of a bin and BLOCK_N of its keys; everything but dq is transposed, keys first."""
    tile = tl.program_id(0) // KEY_TILES
    info = info_ptr + tile * INFO_COLUMNS
    begin = tl.load(info + RUN_BEGIN)
    end = tl.load(info + RUN_END)
    if begin < end:
        batch = tl.load(info + RUN_BATCH).to(tl.int64)
        kv_head = tl.load(info + RUN_KV_HEAD).to(tl.int64)
        first_key = tl.load(info + RUN_FIRST_KEY).to(tl.int64)
        EVEN: tl.constexpr = BLOCK_SIZE % BLOCK_N == 0
        key = tl.program_id(0) % KEY_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = key < BLOCK_SIZE
        at = first_key + key
        k_ptr += head_offset(batch, kv_head, k_strides)
        v_ptr += head_offset(batch, kv_head, v_strides)
        keys = load_rows(k_ptr, at * k_strides[2], inside, HEAD_DIM, PADDED_DIM, EVEN)
        values = load_rows(v_ptr, at * v_strides[2], inside, V_DIM, PADDED_V, EVEN)
        scale = softmax_scale * LOG2_E
        dk = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
        dv = tl.zeros([BLOCK_N, PADDED_V], tl.float32)
        for at in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
            place = at + tl.arange(0, BLOCK_M)
            mask = place < end
            # rows past the end repeat the last one, so values are finite; lse = inf makes their p zero
            pair = tl.load(pair_ptr + tl.minimum(place, end - 1)).to(tl.int32)
            row, head, query, stat = _row_places(pair, first_row, q_len, NUM_HEADS, SLOTS, ONE_ROW)
            lse, delta = load_stats(stats_ptr + stat)
            lse = tl.where(mask, lse, float("inf"))
            q_at = row_offset(row, head, query, q_strides)
            q = load_rows(q_ptr, q_at, mask, HEAD_DIM, PADDED_DIM, True)
            grad_at = row_offset(row, head, query, grad_strides)
            grad = load_rows(grad_ptr, grad_at, mask, V_DIM, PADDED_V, True)
            p = tl.exp2(dot(keys, tl.trans(q)) * scale - lse[None, :])
            if not EVEN:
                p = tl.where(inside[:, None], p, 0.0)
            dp = dot(values, tl.trans(grad))
            dv = add_dot(dv, narrow(p, v_ptr), grad)
            ds = narrow(p * (dp - delta[None, :]), k_ptr)
            dk = add_dot(dk, ds, q)
            if WITH_DQ:
                dq = dot(tl.trans(ds), keys) * softmax_scale
                at_dq = pair.to(tl.int64) * HEAD_DIM
                store_rows(dq_ptr, at_dq, narrow(dq, dq_ptr), mask, HEAD_DIM, PADDED_DIM)
        SIZE: tl.constexpr = BLOCK_SIZE * (HEAD_DIM + V_DIM)
        bin = tl.load(info + RUN_BIN)
        part = tl.load(info + RUN_PART)
        target = sums_ptr + bin.to(tl.int64) * SIZE
        if part > 0:
            spare = tl.load(bin_begin_ptr + bin) // ROWS + part - 1  # see `_fold_kernel`
            target = extra_ptr + spare.to(tl.int64) * SIZE
        dim = tl.arange(0, PADDED_DIM)
        dk_at = target + key[:, None] * HEAD_DIM + dim[None, :]
        dk_there = inside[:, None] & (dim < HEAD_DIM)[None, :]
        dim = tl.arange(0, PADDED_V)
        dv_at = target + BLOCK_SIZE * HEAD_DIM + key[:, None] * V_DIM + dim[None, :]
        dv_there = inside[:, None] & (dim < V_DIM)[None, :]
        if not FRESH:
            added = part == 0
            dk += tl.load(dk_at, mask=dk_there & added, other=0.0)
            dv += tl.load(dv_at, mask=dv_there & added, other=0.0)
        tl.store(dk_at, dk, mask=dk_there)
        tl.store(dv_at, dv, mask=dv_there)


@triton.jit
def _fold_kernel(
    sums_ptr, extra_ptr, bin_begin_ptr, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds the sums of a bin's later segments to those of its first, in order.

    For bin `b` with `n` pairs they are at `bin_begin[b] // R + i`, `i < ceil(n / R) - 1 <= n // R`, so bins
    never overlap, and all indices are below `P // R`.
    """
    bin = tl.program_id(0)
    begin = tl.load(bin_begin_ptr + bin)
    count = (tl.load(bin_begin_ptr + bin + 1) - begin + ROWS - 1) // ROWS - 1
    if count > 0:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < SIZE
        target = sums_ptr + bin.to(tl.int64) * SIZE + at
        total = tl.load(target, mask=inside, other=0.0)
        source = extra_ptr + (begin // ROWS).to(tl.int64) * SIZE + at
        for _ in range(count):
            total += tl.load(source, mask=inside, other=0.0)
            source += SIZE
        tl.store(target, total, mask=inside)


@triton.jit(do_not_specialize=["q_len", "first_row"])
def _pair_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    stats_ptr,
    dq_ptr,
    pair_ptr,
    info_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    q_len,
    first_row,
    softmax_scale,
    NUM_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_ROW: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Handles one tile of BLOCK_M pairs and their block, BLOCK_N keys at a time."""
    tile = tl.program_id(0)
    info = info_ptr + tile * INFO_COLUMNS
    begin = tl.load(info + RUN_BEGIN)
    end = tl.load(info + RUN_END)
    if begin < end:
        batch = tl.load(info + RUN_BATCH).to(tl.int64)
        kv_head = tl.load(info + RUN_KV_HEAD).to(tl.int64)
        first_key = tl.load(info + RUN_FIRST_KEY).to(tl.int64)
        place = begin + tl.arange(0, BLOCK_M)
        mask = place < end
        pair = tl.load(pair_ptr + tl.minimum(place, end - 1)).to(tl.int32)
        row, head, query, stat = _row_places(pair, first_row, q_len, NUM_HEADS, SLOTS, ONE_ROW)
        lse = tl.load(stats_ptr + stat + STAT_LSE)
        delta = tl.load(stats_ptr + stat + STAT_DELTA)
        q_at = row_offset(row, head, query, q_strides)
        q = load_rows(q_ptr, q_at, mask, HEAD_DIM, PADDED_DIM, True)
        grad_at = row_offset(row, head, query, grad_strides)
        grad = load_rows(grad_ptr, grad_at, mask, V_DIM, PADDED_V, True)
        k_ptr += row_offset(batch, kv_head, first_key, k_strides)
        v_ptr += row_offset(batch, kv_head, first_key, v_strides)
        scale = softmax_scale * LOG2_E
        EVEN: tl.constexpr = BLOCK_SIZE % BLOCK_N == 0
        dq = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
        for start in tl.range(0, BLOCK_SIZE, BLOCK_N, num_stages=STAGES):
            key = start + tl.arange(0, BLOCK_N)
            inside = key < BLOCK_SIZE
            keys = load_rows(k_ptr, key.to(tl.int64) * k_strides[2], inside, HEAD_DIM, PADDED_DIM, EVEN)
            values = load_rows(v_ptr, key.to(tl.int64) * v_strides[2], inside, V_DIM, PADDED_V, EVEN)
            p = tl.exp2(dot(q, tl.trans(keys)) * scale - lse[:, None])
            if not EVEN:
                p = tl.where(inside[None, :], p, 0.0)
            dp = dot(grad, tl.trans(values))
            dq = add_dot(dq, narrow(p * (dp - delta[:, None]), k_ptr), keys)
        at_dq = pair.to(tl.int64) * HEAD_DIM
        store_rows(dq_ptr, at_dq, narrow(dq * softmax_scale, dq_ptr), mask, HEAD_DIM, PADDED_DIM)
