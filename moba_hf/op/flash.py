"""Attention over chosen blocks with flash-attn's public varlen function: the paper's Algorithm 1.

1. Own blocks: one causal varlen call with a segment per (sequence, block).
2. Chosen blocks: (query, head, slot) triples are regrouped by block. There is one varlen call for each kv
   head and chunk of queries, with a segment per block. Keys and values are read in place.
3. The two results are merged by their log-sum-exps.

flash-attn 2 (`flash_attn.flash_attn_varlen_func`) is used if it is installed, else flash-attn 4
(`flash_attn.cute`). These functions need segment lengths on the host, so calls wait for the device and cannot
be captured in a CUDA graph; backend "triton" never waits and is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_hf.op.backends import PortableBackend, choose_backend, load_backend
from moba_hf.op.layer_rule import LayerConfig
from moba_hf.op.numerics import with_positive_scale
from moba_hf.op.sequences import Sequences, rows_of

# `(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)` -> out, lse.
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, bool], tuple[Tensor, Tensor]]

# Device types that flash-attn runs on.
DEVICES = ("cuda",)
MAX_HEAD_DIM = 256
# Head dims are padded to a multiple of this, because flash-attn reads 16 bytes at a time.
_DIM_STEP = 8
# Bytes for the gathered queries and partial outputs of one chunk of queries.
_WORKSPACE = 2 << 30


def load_varlen() -> Varlen:
    """flash-attn's varlen function, with the same signature for both versions.

    Raises:
        ImportError: neither flash-attn 2 nor flash-attn 4 is installed.
    """
    try:
        from flash_attn import flash_attn_varlen_func

        with_lse = {"return_attn_probs": True}
    except ImportError:
        try:
            from flash_attn.cute import flash_attn_varlen_func
        except ImportError as error:
            raise ImportError(
                f'backend="flash_attn" needs flash-attn (pip install "moba-hf[flash]"): {error}',
                name='flash-attn (pip install "moba-hf[flash]")',
            ) from error
        with_lse = {"return_lse": True}

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        mq: int,
        mk: int,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=mq,
            max_seqlen_k=mk,
            softmax_scale=scale,
            causal=causal,
            **with_lse,
        )
        return out, lse

    return varlen


class FlashBackend(PortableBackend):
    """flash-attn's varlen functions; the backend of "auto" chooses blocks, "portable" computes gradients."""

    shared = None

    def __init__(self) -> None:
        super().__init__()
        self.max_decode_queries, self.decode_gates = 0, ()  # decode steps use select and forward
        self._varlen = load_varlen()

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, rule: LayerConfig | None) -> str | None:
        return unsupported(q, k, v)

    def select(
        self,
        q: Tensor,
        k: Tensor,
        sequences: Sequences,
        rule: LayerConfig,
        softmax_scale: float,
        block_means: Tensor | None,
    ) -> Tensor:
        gate = load_backend(choose_backend("auto", q, k, k, rule))
        return gate.select(q, k, sequences, rule, softmax_scale, block_means)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_indices: Tensor,
        sequences: Sequences,
        block_size: int,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor]:
        return attend(self._varlen, q, k, v, block_indices, sequences.table, block_size, softmax_scale)


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these `(batch, heads, length, dim)` tensors are not supported, or None."""
    if q.device.type not in DEVICES:
        return f"flash-attn needs a CUDA device; q is on {q.device}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "flash-attn needs compute capability 8.0 or later"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn supports bf16 and fp16, not {q.dtype}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head dims must be at most {MAX_HEAD_DIM}, got {q.shape[3]} and {v.shape[3]}"
    return None


@dataclass(frozen=True)
class _Sequence:
    """A sequence that has queries, as rows of the flattened `(batch * length)` tensors.

    Attributes:
        q_begin: its first query row.
        q_end: end of its query rows.
        k_begin: its first key row.
        k_end: end of its key rows.
        first_bin: index of its first block among the blocks of all sequences.
    """

    q_begin: int
    q_end: int
    k_begin: int
    k_end: int
    first_bin: int

    @property
    def first_position(self) -> int:
        """Position of the first query."""
        return (self.k_end - self.k_begin) - (self.q_end - self.q_begin)


def attend(
    varlen: Varlen,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    table: Tensor,
    block_size: int,
    softmax_scale: float,
    *,
    workspace: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over chosen blocks.

    Args:
        varlen: the result of `load_varlen`.
        q: `(batch, num_heads, q_len, head_dim)`.
        k: `(batch, num_kv_heads, kv_len, head_dim)`.
        v: `(batch, num_kv_heads, kv_len, v_dim)`.
        block_indices: int32 `(batch, q_len, num_heads, topk)`, own block in any slot, -1 for none.
        table: see `moba_hf.op.sequences`; rows in order.
        block_size: tokens per block.
        softmax_scale: factor of the scores in the softmax.
        workspace: bytes for gathered queries and partial outputs; None: 2 GiB.

    Returns:
        `out (batch, q_len, num_heads, v_dim)` in q's dtype, and `lse (batch, num_heads, q_len)` in fp32, a
        natural logarithm.
    """
    batch, num_heads, q_len, _ = q.shape
    v_dim = v.shape[3]
    q, softmax_scale = with_positive_scale(q, softmax_scale)
    q, k, v = _padded(q, k, v)
    rows = tuple(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (batch * length, heads, dim)
    sequences = _sequences(table, q_len, k.shape[2], block_size)
    out = q.new_zeros(batch * q_len, num_heads, v.shape[3])
    lse = torch.full((num_heads, batch * q_len), -torch.inf, dtype=torch.float32, device=q.device)
    if sequences:
        _own_blocks(varlen, rows, sequences, out, lse, block_size, softmax_scale)
        choice = block_indices.flatten(0, 1)
        _chosen_blocks(
            varlen, rows, sequences, choice, out, lse, block_size, softmax_scale, workspace or _WORKSPACE
        )
    out = out.view(batch, q_len, num_heads, v.shape[3])[..., :v_dim].contiguous()
    return out, lse.view(num_heads, batch, q_len).transpose(0, 1).contiguous()


def _padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pads q, k, v with zeros to the same head dim, one that flash-attn supports."""
    dim = max(q.shape[3], v.shape[3])
    dim = -(-dim // _DIM_STEP) * _DIM_STEP
    q, k, v = (x if x.shape[3] == dim else F.pad(x, (0, dim - x.shape[3])) for x in (q, k, v))
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    return q, k, v


def _sequences(table: Tensor, q_len: int, kv_len: int, block_size: int) -> list[_Sequence]:
    """The sequences that have queries; waits for the device."""
    found: list[_Sequence] = []
    number = 0
    for row, q_begin, q_end, k_begin, k_end in rows_of(table):
        if q_end > q_begin:
            q_at, k_at = row * q_len, row * kv_len
            found.append(_Sequence(q_at + q_begin, q_at + q_end, k_at + k_begin, k_at + k_end, number))
            number += _num_bins(k_end - k_begin, block_size)
    return found


def _num_bins(length: int, block_size: int) -> int:
    """Number of blocks that a later query may choose, plus one for the remaining keys."""
    return (length - 1) // block_size + 1


def _own_blocks(
    varlen: Varlen,
    rows: tuple[Tensor, ...],
    sequences: list[_Sequence],
    out: Tensor,
    lse: Tensor,
    block_size: int,
    softmax_scale: float,
) -> None:
    """Writes the causal attention of every query over its own block."""
    q, k, v = rows
    q_lengths, k_lengths = [], []
    q_spans, k_spans = [], []
    for seq in sequences:
        length, first = seq.k_end - seq.k_begin, seq.first_position
        edges = torch.arange(first // block_size, (length - 1) // block_size + 2) * block_size
        edges = edges.clamp(max=length)
        k_lengths.append(edges.diff())
        q_lengths.append(edges.clamp(min=first).diff())
        q_spans.append((seq.q_begin, seq.q_end))
        k_spans.append((seq.k_begin + int(edges[0]), seq.k_end))
    all_q, all_k = torch.cat(q_lengths), torch.cat(k_lengths)
    part, part_lse = varlen(
        _take(q, q_spans),
        _take(k, k_spans),
        _take(v, k_spans),
        _offsets(all_q, q.device),
        _offsets(all_k, q.device),
        int(all_q.max()),
        int(all_k.max()),
        softmax_scale,
        True,
    )
    at = 0
    for begin, end in q_spans:
        out[begin:end] = part[at : at + end - begin]
        lse[:, begin:end] = part_lse[:, at : at + end - begin]
        at += end - begin


def _take(x: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Concatenates the rows of the spans; a view if the spans are adjacent."""
    if all(a[1] == b[0] for a, b in pairwise(spans)):
        return x[spans[0][0] : spans[-1][1]]
    return torch.cat([x[begin:end] for begin, end in spans])


def _offsets(lengths: Tensor, device: torch.device) -> Tensor:
    """int32 cumulative sums of `lengths`, from 0."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)


def _chosen_blocks(
    varlen: Varlen,
    rows: tuple[Tensor, ...],
    sequences: list[_Sequence],
    choice: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    softmax_scale: float,
    workspace: int,
) -> None:
    """Merges the attention over the chosen earlier blocks into `out` and `lse`, which contain the own blocks.

    Args:
        choice: int32 `(rows, num_heads, topk)`, block indices relative to each sequence.
    """
    q, k, v = rows
    num_heads, dim = q.shape[1:]
    topk, num_kv_heads = choice.shape[2], k.shape[1]
    group = num_heads // num_kv_heads
    bins, num_bins = _bins(choice, sequences, block_size)
    k_edges = _key_edges(sequences, block_size)
    k_rows = slice(int(k_edges[0]), int(k_edges[-1]))
    cu_k, longest = (k_edges - k_edges[0]).to(q.device, torch.int32), int(k_edges.diff().max())
    step = max(1, workspace // (2 * group * topk * dim * q.element_size()))
    for kv_head in range(num_kv_heads):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        keys, values = (x[k_rows, kv_head : kv_head + 1] for x in (k, v))
        for begin in range(0, q.shape[0], step):
            part = slice(begin, min(q.shape[0], begin + step))
            pairs = bins[part, heads].flatten()
            order = pairs.sort(stable=True).indices
            counts = torch.bincount(pairs, minlength=num_bins + 1)[:num_bins]
            total, most = torch.stack([counts.sum(), counts.max()]).tolist()
            if total == 0:
                continue
            query = order[:total] // topk
            gathered = q[begin + query // group, heads.start + query % group][:, None]
            cu_q = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
            partial, partial_lse = varlen(
                gathered, keys, values, cu_q, cu_k, most, longest, softmax_scale, False
            )
            _merge(out, lse, part, heads, partial[:, 0], partial_lse[0], order, topk)


def _bins(choice: Tensor, sequences: list[_Sequence], block_size: int) -> tuple[Tensor, int]:
    """Index of each chosen block among the blocks of all sequences, int64 `choice.shape`; and their number.

    Own blocks and -1 get the index `num_bins`, so they sort last.
    """
    last = sequences[-1]
    num_bins = last.first_bin + _num_bins(last.k_end - last.k_begin, block_size)
    bins = torch.full(choice.shape, num_bins, dtype=torch.int64, device=choice.device)
    for seq in sequences:
        part = choice[seq.q_begin : seq.q_end]
        position = torch.arange(part.shape[0], device=choice.device) + seq.first_position
        earlier = (part >= 0) & (part != (position // block_size)[:, None, None])
        bins[seq.q_begin : seq.q_end] = torch.where(earlier, part + seq.first_bin, num_bins)
    return bins, num_bins


def _key_edges(sequences: list[_Sequence], block_size: int) -> Tensor:
    """First key row of each bin and the end of the last, int64 `(num_bins + 1,)`.

    The last bin of a sequence extends to the next sequence.
    """
    starts = [
        seq.k_begin + torch.arange(_num_bins(seq.k_end - seq.k_begin, block_size)) * block_size
        for seq in sequences
    ]
    return torch.cat([*starts, torch.tensor([sequences[-1].k_end])])


def _merge(
    out: Tensor,
    lse: Tensor,
    rows: slice,
    heads: slice,
    partial: Tensor,
    partial_lse: Tensor,
    order: Tensor,
    topk: int,
) -> None:
    """Merges `partial (pairs, dim)` into `out` with softmax weights, slot by slot in fp32.

    Args:
        order: the flattened index `(row, head, slot)` of each partial output; entries after the first
            `pairs` have no output.
    """
    count = partial.shape[0]
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    there = (place < count).view(-1, topk)
    place = place.clamp(max=count - 1).view(-1, topk)
    own, own_lse = out[rows, heads], lse[heads, rows].T
    shape = own.shape
    own_lse = own_lse.reshape(-1)
    masses = torch.where(there, partial_lse[place], -torch.inf)
    total = torch.logaddexp(own_lse, masses.logsumexp(1))
    safe = torch.where(total > -torch.inf, total, 0.0)
    result = own.reshape(-1, shape[-1]).float() * (own_lse - safe).exp()[:, None]
    for slot in range(topk):
        result.addcmul_(partial[place[:, slot]].float(), (masses[:, slot] - safe).exp()[:, None])
    out[rows, heads] = result.view(shape).to(out.dtype)
    lse[heads, rows] = total.view(shape[:2]).T
