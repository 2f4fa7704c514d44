"""The online softmax that every attention kernel runs, in base 2.

A row keeps its largest scaled score `high`, the sum `mass` of `exp2(score - high)`, and the same sum weighted
by values. `weight = exp2(score * scale - high)` is one fused multiply-add and one exp2 per score.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moba_hf.kernels.launch import _UPCAST, narrow


@triton.jit
def load_rows(ptr, offset, there, DIM: tl.constexpr, PADDED: tl.constexpr, EVEN: tl.constexpr):
    """Rows `(N, PADDED)` at element `offset (N,)`, zero beyond DIM and, unless EVEN, where not `there`."""
    dim = tl.arange(0, PADDED)
    at = ptr + offset[:, None] + dim[None, :]
    if EVEN and DIM == PADDED:
        return tl.load(at)
    elif EVEN:
        return tl.load(at, mask=(dim < DIM)[None, :], other=0.0)
    else:
        return tl.load(at, mask=there[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def accumulate(total, high, mass, scores, values, scale, like):
    """One step: `scores (M, N)` unscaled with -inf where masked, `values (N, D)`; `scale` > 0 in base 2.

    `like`: the pointer of the values; weights are rounded to its dtype.
    """
    new_high = tl.maximum(high, tl.max(scores, 1) * scale)
    weight = tl.exp2(scores * scale - new_high[:, None])
    shrink = tl.exp2(high - new_high)
    mass = mass * shrink + tl.sum(weight, 1)
    weight = narrow(weight, like)
    if _UPCAST:
        weight = weight.to(tl.float32)
        values = values.to(tl.float32)
    total = tl.dot(weight, values, total * shrink[:, None], input_precision="ieee")
    return total, new_high, mass
