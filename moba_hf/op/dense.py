"""Full causal attention where a model wants it: full layers, decode, and where the rule covers everything.

Torch's own fused attention does the work, but for a few queries on a GPU, where a kernel splits the keys over
the device. Grouped heads are folded into rows instead of repeating keys, and
masks are built for a chunk of queries at a time, so no `q_len x kv_len` mask is held at length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_hf.op.backends import choose_backend, load_backend
from moba_hf.op.sequences import RowBounds, batched_table

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
    if _few_on_gpu(q, k, v):
        table = batched_table(batch, q_len, kv_len, q.device) if bounds is None else bounds.table
        return dense_decode_op(q, k, v, table, scale)[0]
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


def _few_on_gpu(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether this is a decode step that the split-key kernel takes.

    Torch's kernels do not split the keys of a masked call, and the slots of a static cache need a mask.
    """
    if q.device.type == "cpu" or q.shape[2] == k.shape[2] or choose_backend("auto", q, k, v, 16) != "triton":
        return False
    few = q.shape[2] <= load_backend("triton").max_decode_queries
    return few and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))


@torch.library.custom_op("moba_hf::dense_decode", mutates_args=())
def dense_decode_op(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """`out (batch, q_len, num_heads, v_dim)`, `lse (batch, num_heads, q_len)` fp32, by the Triton kernel."""
    from moba_hf.kernels import dense_decode_attention

    return dense_decode_attention(q, k, v, table, softmax_scale)


@dense_decode_op.register_fake
def _(q, k, v, table, softmax_scale):  # type: ignore[no-untyped-def]
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def dense_packed_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, spans: list[list[int]]) -> Tensor:
    """Causal attention inside each span `(batch row, begin, end)` of packed sequences.

    Shapes as in `dense_attention`, with as many queries as keys.
    """
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    for row, begin, end in spans:
        queries, keys, values = (x[row : row + 1, :, begin:end] for x in (q, k, v))
        out[row, begin:end] = dense_attention(queries, keys, values, scale)[0]
    return out
