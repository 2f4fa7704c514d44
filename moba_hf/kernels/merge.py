"""Merges a query's partial outputs, of own block and routed blocks, weighted by their softmax masses.

Legend: H query heads, K1 routed slots, DV value head dim, R rows (flat query rows of the chunk x H).

A program takes a few rows: it loads their K1 log-sum-exps (base 2) and keys, then adds up the K1 + 1 outputs
with weights `exp2(lse - largest)` in fp32, in slot order. It is memory-bound, and larger tiles would spill,
so rows are few. A missing slot is recognised by its key, since its output and log-sum-exp were never written.
A row outside all sequences has an lse of -inf and becomes zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.launch import cdiv, device_of, narrow, next_power_of_2, padded
from moba_hf.kernels.layout import LN_2


def merge(
    out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor, keys: Tensor, no_bin: int, first_row: int
) -> None:
    """Completes `out (batch, q_len, H, DV)` and `lse (batch, H, q_len)` in place for one chunk.

    Args:
        out, lse: hold the own blocks' part, `lse` in base 2; afterwards `lse` is the natural logarithm.
        partial: `(rows, H, K1, DV)`.
        partial_lse: fp32 `(rows, H, K1)`, base 2.
        keys: `(rows, H, K1)`, the result of `routing.pair_keys`.
        no_bin: the key that marks a missing slot.
        first_row: flat query row at which the chunk begins.
    """
    rows, num_heads, slots = keys.shape
    v_dim = out.shape[3]
    tile = tuning.choices_for(out).merge
    block_m = tile.rows(v_dim)
    with device_of(out):
        _merge_kernel[(cdiv(rows * num_heads, block_m),)](
            out,
            lse,
            partial,
            partial_lse,
            keys,
            no_bin,
            rows * num_heads,
            first_row,
            out.shape[1],
            num_heads,
            SLOTS=slots,
            PADDED_SLOTS=next_power_of_2(slots),
            V_DIM=v_dim,
            PADDED_V=padded(v_dim),
            BLOCK_M=block_m,
            UNROLL=slots if slots <= tile.unroll else tile.steps,
            num_warps=tile.warps,
        )


@triton.jit(do_not_specialize=["no_bin", "num_rows", "first_row", "q_len"])
def _merge_kernel(
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_lse_ptr,
    key_ptr,
    no_bin,
    num_rows,
    first_row,
    q_len,
    num_heads,
    SLOTS: tl.constexpr,
    PADDED_SLOTS: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tl.arange(0, PADDED_SLOTS)
    dim = tl.arange(0, PADDED_V)
    mask = row < num_rows
    query = first_row + row // num_heads
    lse_at = (query // q_len).to(tl.int64) * num_heads + row % num_heads
    lse_at = lse_ptr + lse_at * q_len + query % q_len
    out_at = (first_row.to(tl.int64) * num_heads + row)[:, None] * V_DIM + dim[None, :]
    columns = (dim < V_DIM)[None, :]
    pair = row.to(tl.int64) * SLOTS
    inside = mask[:, None] & (slot < SLOTS)[None, :]
    at = pair[:, None] + slot[None, :]
    chosen = tl.load(key_ptr + at, mask=inside, other=0).to(tl.int32) != no_bin
    each = tl.load(partial_lse_ptr + at, mask=inside & chosen, other=float("-inf"))
    own = tl.load(lse_at, mask=mask, other=float("-inf"))
    covered = mask & (own > float("-inf"))
    m_i = tl.maximum(own, tl.max(each, 1))
    safe = tl.where(covered, m_i, 0.0)
    weight = tl.exp2(own - safe)
    l_i = weight + tl.sum(tl.exp2(each - safe[:, None]), 1)
    l_i = tl.where(covered, l_i, 1.0)
    acc = tl.load(out_ptr + out_at, mask=covered[:, None] & columns, other=0.0).to(tl.float32)
    acc = acc * weight[:, None]
    # unrolled over a few slots, so that several loads are in flight at once
    for start in range(0, SLOTS - SLOTS % UNROLL, UNROLL):
        for i in tl.static_range(UNROLL):
            acc += _weighted(
                partial_ptr, partial_lse_ptr, key_ptr, pair + start + i, mask, no_bin, safe, dim, V_DIM
            )
    for i in tl.static_range(SLOTS - SLOTS % UNROLL, SLOTS):
        acc += _weighted(partial_ptr, partial_lse_ptr, key_ptr, pair + i, mask, no_bin, safe, dim, V_DIM)
    result = narrow(acc / l_i[:, None], out_ptr)
    tl.store(out_ptr + out_at, result, mask=mask[:, None] & columns)
    natural = (safe + tl.log2(l_i)) * LN_2
    tl.store(lse_at, tl.where(covered, natural, float("-inf")), mask=mask)


@triton.jit
def _weighted(partial_ptr, partial_lse_ptr, key_ptr, pair, mask, no_bin, m_i, dim, V_DIM: tl.constexpr):
    """Partial outputs of `pair (M,)` times their weights; zero for missing slots."""
    chosen = mask & (tl.load(key_ptr + pair, mask=mask, other=0).to(tl.int32) != no_bin)
    lse = tl.load(partial_lse_ptr + pair, mask=chosen, other=float("-inf"))
    at = partial_ptr + pair[:, None] * V_DIM + dim[None, :]
    value = tl.load(at, mask=chosen[:, None] & (dim < V_DIM)[None, :], other=0.0)
    return value.to(tl.float32) * tl.exp2(lse - m_i)[:, None]
