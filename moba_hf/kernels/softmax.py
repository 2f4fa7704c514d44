"""The online softmax of all attention kernels, in base 2.

A row keeps its largest scaled score `m_i`, the sum `l_i` of `exp2(score - m_i)`, and `acc`, the sum of the
values with these weights. `p = exp2(score * scale - m_i)` is one fused multiply-add and one exp2 per score.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moba_hf.kernels.launch import _UPCAST, add_dot, narrow

FEW_KEYS = tl.constexpr(16)


@triton.jit
def accumulate(acc, m_i, l_i, scores, values, scale, like):
    """One step with unscaled `scores (M, N)`, -inf where masked, and `values (N, D)`; returns acc, m_i, l_i.

    `scale` is positive and includes log2(e). The weights are rounded to the dtype of the pointer `like`.
    """
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    p = narrow(p, like)
    if _UPCAST:
        p = p.to(tl.float32)
        values = values.to(tl.float32)
    acc = tl.dot(p, values, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, l_i


# If a value is not finite, `accumulate` also makes rows NaN that do not attend to it, because 0 * NaN is NaN.
# Kernels that can afford it check their sums at the end. If one is not finite, they recompute the rows before
# that value, FEW_KEYS keys at a time to avoid spilling: `add_finite` over all keys, then `if_unseen`.


@triton.jit
def any_not_finite(acc, mask):
    """Whether a row of `acc (M, N)` in `mask (M,)` contains a NaN or an infinity; a scalar."""
    return tl.sum(tl.sum(tl.where(mask[:, None], acc, 0.0) * 0.0, 1), 0) != 0.0


@triton.jit
def add_finite(acc, first_odd, p, values, key, like):
    """Adds the product of `p (M, N)`, 0 where masked, and the finite ones of `values (N, D)`.

    `first_odd (D,)`, int32, is the smallest `key (N,)` whose value is not finite; its initial value is
    0x7FFFFFFF.
    """
    values = values.to(tl.float32)
    finite = values * 0.0 == 0.0
    first_odd = tl.minimum(first_odd, tl.min(tl.where(finite, 0x7FFFFFFF, key[:, None]), 0))
    return add_dot(acc, narrow(p, like), narrow(tl.where(finite, values, 0.0), like)), first_odd


@triton.jit
def if_unseen(result, first_odd, last_seen):
    """`result (M, D)` for rows whose keys, up to `last_seen (M,)`, are all finite; NaN for other rows."""
    return tl.where(first_odd[None, :] > last_seen[:, None], result, float("nan"))


@triton.jit
def store_numbers(ptr, offset, rows, mask, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Like `layout.store_rows`, but does not store NaNs of `rows (N, PADDED)`."""
    dim = tl.arange(0, PADDED)
    mask = mask[:, None] & (dim < DIM)[None, :] & (rows == rows)
    tl.store(ptr + offset[:, None] + dim[None, :], rows, mask=mask)
