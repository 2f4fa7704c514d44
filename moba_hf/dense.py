"""Full causal attention where a model wants it: full layers, decode, and where the rule covers everything.

Torch's own fused attention does the work. Grouped heads are folded into rows instead of repeating keys, and
masks are built for a chunk of queries at a time, so no `q_len x kv_len` mask is held at length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_hf.sequences import RowBounds

# Elements of one mask (bool): bounds the memory of a chunk of queries.
_MASK_BUDGET = 1 << 25


def causal_mask(bounds: RowBounds, q_begin: int, q_end: int, kv_len: int) -> Tensor:
    """Bool `(batch, 1, q_end - q_begin, kv_len)`, True where a query may attend; padding attends everything.

    Queries are numbered in the call; `bounds` says where they stand.
    """
    device = bounds.kv_start.device
    key = torch.arange(kv_len, device=device)
    slot = torch.arange(q_begin, q_end, device=device) + bounds.q_offset[:, None]
    start, end = bounds.kv_start[:, None, None], bounds.kv_end[:, None, None]
    mask = (key >= start) & (key < end) & (key <= slot[:, :, None])
    return (mask | ~bounds.real_queries(q_begin, q_end)[:, :, None])[:, None]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: RowBounds | None = None) -> Tensor:
    """Causal attention `(batch, q_len, num_heads, v_dim)`, the last query standing at the last key.

    Args:
        q: `(batch, num_heads, q_len, head_dim)`. k, v: `(batch, num_kv_heads, kv_len, ...)`, any strides.
        bounds: real keys and query slots of each row; None: all are real. Padding queries give zeros.
    """
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    if bounds is None and q_len == kv_len:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=num_heads != num_kv_heads
        )
        return out.transpose(1, 2)
    group_size = num_heads // num_kv_heads
    if bounds is None and q_len > 1:
        bounds = RowBounds.unpadded(q_len, kv_len, q.device)
    step = max(1, _MASK_BUDGET // (batch * group_size * kv_len))
    chunks = []
    for start in range(0, q_len, step):
        end = min(q_len, start + step)
        rows = q[:, :, start:end].reshape(batch, num_kv_heads, group_size * (end - start), head_dim)
        mask = None if bounds is None else causal_mask(bounds, start, end, kv_len)
        if mask is not None and group_size > 1:
            mask = mask.repeat(1, 1, group_size, 1)
        part = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
        part = part.reshape(batch, num_heads, end - start, v.shape[3]).transpose(1, 2)
        if bounds is not None:
            part = part.masked_fill(~bounds.real_queries(start, end)[:, :, None, None], 0.0)
        chunks.append(part)
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)


def dense_packed_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, spans: list[list[int]]) -> Tensor:
    """Causal attention inside each span `(batch row, begin, end)` of packed sequences.

    Shapes as in `dense_attention`, with as many queries as keys.
    """
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    for row, begin, end in spans:
        queries, keys, values = (x[row : row + 1, :, begin:end] for x in (q, k, v))
        out[row, begin:end] = dense_attention(queries, keys, values, scale)[0]
    return out
