"""Full causal attention: for full layers, for decode steps, and for sequences that the rule covers entirely.

Torch's fused attention is used, except for a few queries on a GPU, where a kernel splits the keys over the
SMs. Grouped heads are folded into rows instead of repeating keys, and masks are built for one chunk of
queries at a time, so a full `q_len x kv_len` mask never exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from moba_hf.op.backends import choose_backend, load_backend
from moba_hf.op.numerics import has_tangent
from moba_hf.op.operators import dense_decode_op
from moba_hf.op.sequences import Sequences, batched_table

# Number of elements of one (bool) mask; bounds the memory of a chunk of queries.
_MASK_BUDGET = 1 << 25
# Use the decode kernel for at most this many launches per call, because each of them reads all keys.
_MOST_STEPS = 16


def causal_mask(sequences: Sequences, q_begin: int, q_end: int, kv_len: int) -> Tensor:
    """Bool `(batch, 1, q_end - q_begin, kv_len)`, True if a query may attend; padding attends to everything.

    `q_begin` and `q_end` are indices in the call; `sequences` has one sequence per row.
    """
    real, slot = _slots(sequences, q_begin, q_end)
    key = torch.arange(kv_len, device=slot.device)
    start, end = (sequences.table[:, column, None, None] for column in (3, 4))
    mask = (key >= start) & (key < end) & (key <= slot[:, :, None])
    return (mask | ~real[:, :, None])[:, None]


def _slots(sequences: Sequences, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Which of queries `[begin, end)` are real tokens, and their slots, both `(batch, queries)`."""
    _, q_begin, q_end, _, k_end = sequences.table[:, :, None].unbind(1)
    query = torch.arange(begin, end, device=sequences.table.device)
    return (query >= q_begin) & (query < q_end), query + k_end - q_end


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sequences: Sequences | None = None,
    backend: str = "auto",
    *,
    whole: bool = False,
) -> Tensor:
    """Causal attention `(batch, q_len, num_heads, v_dim)`; the last query is at the position of the last key.

    Args:
        q: `(batch, num_heads, q_len, head_dim)`, any strides.
        k: `(batch, num_kv_heads, kv_len, head_dim)`, any strides.
        v: `(batch, num_kv_heads, kv_len, v_dim)`, any strides.
        scale: factor of the scores in the softmax.
        sequences: one per row; None: all tokens are real. The output of padding is zero.
        backend: "auto" or a name in `moba_hf.op.backend_table.BACKENDS`; its kernel is used for a few
            queries, if it has one.
        whole: all tokens are real, even if `sequences` is not None.
    """
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    kernel = _decode_kernel(q, k, v, backend)
    if kernel is not None:
        table = batched_table(batch, q_len, kv_len, q.device) if sequences is None else sequences.table
        return _few_at_a_time(q, k, v, table, scale, kernel)
    whole = whole or sequences is None
    if whole and q_len == kv_len:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=bool(num_heads != num_kv_heads)
        )
        return out.transpose(1, 2)
    group_size = num_heads // num_kv_heads
    if sequences is None and q_len > 1:
        sequences = Sequences(batched_table(1, q_len, kv_len, q.device), q_len, kv_len)
    step = max(1, _MASK_BUDGET // (batch * group_size * kv_len))
    chunks = []
    for start in range(0, q_len, step):
        end = min(q_len, start + step)
        rows = q[:, :, start:end].reshape(batch, num_kv_heads, group_size * (end - start), head_dim)
        mask = None
        if sequences is not None and not (whole and q_len == 1):
            mask = causal_mask(sequences, start, end, kv_len)
        if mask is not None and group_size > 1:
            mask = mask.repeat(1, 1, group_size, 1)
        part = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
        part = part.reshape(batch, num_heads, end - start, v.shape[3]).transpose(1, 2)
        if sequences is not None and not whole:
            real, _ = _slots(sequences, start, end)
            part = part.masked_fill(~real[:, :, None, None], 0.0)
        chunks.append(part)
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)


def dense_tail_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of the last queries of each row, without a mask in memory on a GPU; differentiable.

    Shapes are those of `dense_attention`, without padding. Torch takes no grouped heads here, so keys
    and values are repeated. A compiled graph cannot contain torch's bias, so masks are built there, for some
    queries at a time; training keeps them for the backward pass, a byte for each query and key.
    """
    if torch.compiler.is_compiling():
        return dense_attention(q, k, v, scale)
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    bias = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scale).transpose(1, 2)


def _few_at_a_time(q: Tensor, k: Tensor, v: Tensor, table: Tensor, scale: float, kernel: str) -> Tensor:
    """Runs the split-key kernel on as many queries at a time as it supports."""
    kernels = load_backend(kernel).cache
    assert kernels is not None
    step, q_len = kernels.max_dense_queries, q.shape[2]
    if q_len <= step:
        return dense_decode_op(q, k, v, table, scale, kernel)[0]
    parts = []
    for start in range(0, q_len, step):
        end = min(q_len, start + step)
        part = _queries_of(table, start, end)
        parts.append(dense_decode_op(q[:, :, start:end], k, v, part, scale, kernel)[0])
    return torch.cat(parts, dim=1)


def _queries_of(table: Tensor, start: int, end: int) -> Tensor:
    """The sequence table of queries `[start, end)`, numbered from `start`."""
    row, q_begin, q_end, k_begin, k_end = table.unbind(1)
    first, last = ((bound - start).clamp(0, end - start) for bound in (q_begin, q_end))
    later = (q_end - start - last).clamp(min=0)  # the sequence's queries after `end`, and as many keys
    return torch.stack([row, first, last, k_begin, k_end - later], dim=1)


def _decode_kernel(q: Tensor, k: Tensor, v: Tensor, backend: str) -> str | None:
    """The backend whose split-key kernel runs this decode step; None: torch's attention runs it.

    Torch's kernels do not split the keys of a masked call, and a static cache needs a mask.
    """
    if q.shape[2] == k.shape[2]:
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return None
    if has_tangent(q, k, v):  # the kernel would drop it
        return None
    name = choose_backend(backend, q, k, v, None)
    kernels = load_backend(name).cache
    few = kernels is not None and q.shape[2] <= _MOST_STEPS * kernels.max_dense_queries
    return name if few else None


def dense_packed_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, spans: Sequence[Sequence[int]]
) -> Tensor:
    """Causal attention inside each span `(batch row, begin, end)` of packed sequences; 0 elsewhere.

    Shapes are those of `dense_attention`, with equally many queries and keys. Spans must be in order. Each
    row is split and put together at once, since the backward of a slice passes over all tokens.
    """
    outs = []
    for row, tensors in enumerate(zip(*(x.split(1) for x in (q, k, v)), strict=True)):
        pieces = _pieces([(begin, end) for at, begin, end in spans if at == row], q.shape[2])
        sizes = [size for size, _ in pieces]
        queries, keys, values = (x.split(sizes, dim=2) for x in tensors)
        for at, (size, real) in enumerate(pieces):
            if real:
                outs.append(dense_attention(queries[at], keys[at], values[at], scale))
            else:
                outs.append(q.new_zeros(1, size, q.shape[1], v.shape[3]))
    return torch.cat([x.flatten(0, 1) for x in outs]).unflatten(0, (q.shape[0], q.shape[2]))


def _pieces(spans: Iterable[tuple[int, int]], length: int) -> list[tuple[int, bool]]:
    """Cuts a row at the ends of its spans: the size of each piece, and whether it is a span."""
    pieces, done = [], 0
    for begin, end in spans:
        if begin > done:
            pieces.append((begin - done, False))
        if end > begin:
            pieces.append((end - begin, True))
        done = max(done, end)
    return [*pieces, (length - done, False)] if done < length else pieces
