"""The per-row steps of the backward: row statistics before it, the sum of a row's partial gradients after it.

Legend: H query heads, T flat query rows (batch * q_len), K1 routed slots, D and DV head dims.

`row_stats` stores side by side, fp32 `(T, H, 2)`, the two numbers that turn scores into probabilities and
their gradients: `lse` in base 2 (+inf for rows outside all sequences, so that `exp2(score - lse)` is 0), and
`delta = sum(grad_out * out) - grad_lse`. `sum_partials` adds a row's K1 partial gradients in slot order. It
skips missing slots by their key, since their partial gradients were never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.launch import cdiv, device_of, narrow, padded
from moba_hf.kernels.layout import (
    LOG2_E,
    STAT_COLUMNS,
    STAT_DELTA,
    STAT_LSE,
    load_rows,
    row_offset,
    store_rows,
)


def _by_head(x: Tensor) -> tuple[int, int, int]:
    """Strides (batch, head, token) of `x (batch, length, heads, dim)`."""
    return x.stride(0), x.stride(2), x.stride(1)


def row_stats(out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor) -> Tensor:
    """Row statistics, fp32 `(batch * q_len, H, 2)`: lse in base 2, and delta.

    Args:
        out, grad_out: `(batch, q_len, H, DV)`, last dimension contiguous.
        lse, grad_lse: fp32 `(batch, H, q_len)`, natural logarithm.
    """
    batch, q_len, num_heads, v_dim = out.shape
    stats = torch.empty(batch * q_len, num_heads, STAT_COLUMNS.value, dtype=torch.float32, device=out.device)
    rows = batch * q_len * num_heads
    tile = tuning.choices_for(out).row_stats
    block_m = tile.rows(v_dim)
    with device_of(out):
        _row_stats_kernel[(cdiv(rows, block_m),)](
            out,
            grad_out,
            lse,
            grad_lse,
            stats,
            _by_head(out),
            _by_head(grad_out),
            lse.stride(),
            grad_lse.stride(),
            rows,
            q_len,
            num_heads,
            V_DIM=v_dim,
            PADDED_V=padded(v_dim),
            BLOCK_M=block_m,
            num_warps=tile.warps,
        )
    return stats


def sum_partials(grad_q: Tensor, partial: Tensor, keys: Tensor, no_bin: int, first_row: int) -> None:
    """Writes the routed part of `grad_q (batch, H, q_len, D)` for one chunk of rows.

    Args:
        partial: `(rows, H, K1, D)`.
        keys: `(rows, H, K1)`, the result of `routing.pair_keys`.
        no_bin: the key that marks a missing slot.
        first_row: flat query row at which the chunk begins.
    """
    rows, num_heads, slots = keys.shape
    head_dim = grad_q.shape[3]
    tile = tuning.choices_for(grad_q).sum_partials
    block_m = tile.rows(head_dim)
    with device_of(grad_q):
        _sum_partials_kernel[(cdiv(rows * num_heads, block_m),)](
            grad_q,
            partial,
            keys,
            grad_q.stride()[:3],
            no_bin,
            rows * num_heads,
            first_row,
            grad_q.shape[2],
            num_heads,
            SLOTS=slots,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded(head_dim),
            BLOCK_M=block_m,
            UNROLL=slots <= tile.unroll,
            num_warps=tile.warps,
        )


@triton.jit(do_not_specialize=["num_rows", "q_len"])
def _row_stats_kernel(
    out_ptr,
    grad_ptr,
    lse_ptr,
    grad_lse_ptr,
    stats_ptr,
    out_strides,
    grad_strides,
    lse_strides,
    grad_lse_strides,
    num_rows,
    q_len,
    num_heads,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = row < num_rows
    head = (row % num_heads).to(tl.int64)
    query = row // num_heads
    batch = (query // q_len).to(tl.int64)
    query = (query % q_len).to(tl.int64)
    at = row_offset(batch, head, query, out_strides)
    grad_at = row_offset(batch, head, query, grad_strides)
    out = load_rows(out_ptr, at, mask, V_DIM, PADDED_V, False).to(tl.float32)
    grad = load_rows(grad_ptr, grad_at, mask, V_DIM, PADDED_V, False).to(tl.float32)
    lse_at = row_offset(batch, head, query, lse_strides)
    grad_lse_at = row_offset(batch, head, query, grad_lse_strides)
    lse = tl.load(lse_ptr + lse_at, mask=mask, other=float("-inf"))
    grad_lse = tl.load(grad_lse_ptr + grad_lse_at, mask=mask, other=0.0)
    covered = lse > float("-inf")
    delta = tl.where(covered, tl.sum(out * grad, 1) - grad_lse, 0.0)
    lse = tl.where(covered, lse * LOG2_E, float("inf"))
    target = stats_ptr + row.to(tl.int64) * STAT_COLUMNS
    tl.store(target + STAT_LSE, lse, mask=mask)
    tl.store(target + STAT_DELTA, delta, mask=mask)


@triton.jit(do_not_specialize=["no_bin", "num_rows", "first_row", "q_len"])
def _sum_partials_kernel(
    grad_q_ptr,
    partial_ptr,
    key_ptr,
    strides,
    no_bin,
    num_rows,
    first_row,
    q_len,
    num_heads,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = row < num_rows
    pair = row.to(tl.int64) * SLOTS
    total = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    if UNROLL:
        for i in tl.static_range(SLOTS):
            total += _partial(partial_ptr, key_ptr, pair + i, mask, no_bin, HEAD_DIM, PADDED_DIM)
    else:
        for i in tl.range(0, SLOTS, num_stages=2):
            total += _partial(partial_ptr, key_ptr, pair + i, mask, no_bin, HEAD_DIM, PADDED_DIM)
    query = first_row + row // num_heads
    at = row_offset(query // q_len, row % num_heads, query % q_len, strides)
    store_rows(grad_q_ptr, at, narrow(total, grad_q_ptr), mask, HEAD_DIM, PADDED_DIM)


@triton.jit
def _partial(partial_ptr, key_ptr, pair, mask, no_bin, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Partial gradients of `pair (M,)`; zero for missing slots."""
    chosen = mask & (tl.load(key_ptr + pair, mask=mask, other=0).to(tl.int32) != no_bin)
    return load_rows(partial_ptr, pair * HEAD_DIM, chosen, HEAD_DIM, PADDED_DIM, False).to(tl.float32)


@triton.jit
def load_stats(at):
    """lse and delta of the rows whose stats are at the pointers `at (M,)`.

    The reduction keeps the compiler from loading them again in the layout of the products, in which every
    thread would fetch a quarter of the rows.
    """
    which = tl.arange(0, STAT_COLUMNS)[None, :]
    both = tl.load(at[:, None] + which)
    lse = tl.sum(tl.where(which == STAT_LSE, both, 0.0), 1)
    return lse, tl.sum(tl.where(which == STAT_DELTA, both, 0.0), 1)
