"""The score of a block under each gate, selected at compile time: `PARTS` is 0 for the mean gate.

Legend: M rows of queries, N blocks of a tile, P parts of a block.

Mean gate: `q . mean`. Mass gate: the log-sum-exp, in log2 units, of P parts and of the smallest key,

    part = log2 n + scale' q . mean + f(scale'' (q * q) . variance),   f(v) = v / 2, but at most
                                                                      sqrt(2 v log2 n) - log2 n

from `2 P + 1` dot products with the vectors of `mass_summary`. Log2 units order like natural ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moba_hf.kernels.launch import dot


@triton.jit
def squares_of(q, like, PARTS: tl.constexpr):
    """`q * q` rounded to the dtype of the pointer `like`; q itself for the mean gate, which needs none."""
    if PARTS == 0:
        return q
    else:
        x = q.to(tl.float32)
        return (x * x).to(like.dtype.element_ty)


@triton.jit
def score_blocks(
    q,
    squares,
    center_at,
    spread_at,
    mask,
    step,
    scale,
    square_scale,
    PARTS: tl.constexpr,
    LOG2_SIZE: tl.constexpr,
):
    """Scores of a tile of blocks, fp32 `(M, N)`.

    `center_at` and `spread_at` are pointers `(D, N)` to the first vectors of the blocks; `step` is the number
    of elements from one vector of a summary to the next.
    """
    if PARTS == 0:
        return dot(q, tl.load(center_at, mask=mask, other=0.0))
    else:
        total = dot(q, tl.load(center_at + PARTS * step, mask=mask, other=0.0)) * scale
        if PARTS <= 4:
            for part in tl.static_range(PARTS):
                center = tl.load(center_at + part * step, mask=mask, other=0.0)
                spread = tl.load(spread_at + part * step, mask=mask, other=0.0)
                total = _add_part(total, q, squares, center, spread, scale, square_scale, LOG2_SIZE)
        else:
            for part in range(PARTS):
                center = tl.load(center_at + part * step, mask=mask, other=0.0)
                spread = tl.load(spread_at + part * step, mask=mask, other=0.0)
                total = _add_part(total, q, squares, center, spread, scale, square_scale, LOG2_SIZE)
        return total


@triton.jit
def _add_part(total, q, squares, center, spread, scale, square_scale, LOG2_SIZE: tl.constexpr):
    """log2 of `2^total` plus the estimated mass of one part, from tiles of means and variances `(D, N)`."""
    moved = dot(squares, spread) * square_scale
    far = tl.sqrt(tl.maximum(moved, 0.0) * (2 * LOG2_SIZE)) - LOG2_SIZE
    mass = tl.where(moved <= 2 * LOG2_SIZE, moved * 0.5, far) + (dot(q, center) * scale + LOG2_SIZE)
    return tl.maximum(total, mass) + tl.log2(1.0 + tl.exp2(-tl.abs(total - mass)))
