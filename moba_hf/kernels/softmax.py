"""The online softmax of all attention kernels, in base 2.

A row keeps its largest scaled score `m_i`, the sum `l_i` of `exp2(score - m_i)`, and `acc`, the sum of the
values with these weights. `p = exp2(score * scale - m_i)` is one fused multiply-add and one exp2 per score.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moba_hf.kernels.launch import _UPCAST, narrow
from moba_hf.kernels.layout import Constant

# An initial `m_i` that is finite, so that a step in which a row attends no key changes nothing.
FLOOR = Constant(-1e38)


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
