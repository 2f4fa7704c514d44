"""Gradients of attention with a shared choice of blocks, in pure torch; see `shared_problems`."""

from __future__ import annotations

import torch
from torch import Tensor

from moba_hf.op.numerics import accumulate_dtype, all_finite, full_precision, masked_product
from moba_hf.op.sequences import Attended, Sequences
from moba_hf.op.shared_problems import each_sequence


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    saved: Attended,
    sequences: Sequences,
    *,
    block_size: int,
    tile: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v for a fixed choice, from `lse`; shapes as in `attend`."""
    q, k, v, out, lse, block_mask = saved
    dtype, finite = accumulate_dtype(q.dtype), all_finite(q, k, v, grad_out, grad_lse, out)
    grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (k, v))
    with full_precision(q.device):
        delta = (grad_out.to(dtype) * out.to(dtype)).sum(3).transpose(1, 2) - grad_lse.to(dtype)
        for seq in each_sequence(q, k, v, block_mask, sequences, block_size, tile, softmax_scale):
            d_out = seq.sorted(grad_out[seq.batch, seq.queries].transpose(0, 1))
            d_row = seq.sorted(delta[seq.batch, :, seq.queries, None])
            lse_row = seq.sorted(lse[seq.batch, :, seq.queries, None], fill=torch.inf)
            d_q, d_values = torch.zeros_like(seq.q), torch.zeros_like(seq.values)
            d_keys = d_values.new_zeros(len(d_values), seq.block_size * k.shape[3])
            for problems in seq.batches():
                d_tile, d_sum, log, queries = (x[problems.place] for x in (d_out, d_row, lse_row, seq.q))
                part = d_q[problems.place]
                for piece in seq.pieces(problems):
                    weights = piece.weights(log)
                    d_scores = torch.bmm(d_tile, piece.values.transpose(1, 2)).sub_(d_sum).mul_(weights)
                    hidden = None if finite else piece.hidden()
                    turned = None if hidden is None else hidden.transpose(1, 2)
                    part += masked_product(d_scores, piece.keys, hidden)
                    grads = (
                        masked_product(d_scores.transpose(1, 2), queries, turned),
                        masked_product(weights.transpose(1, 2), d_tile, turned),
                    )
                    for total, grad in zip((d_keys, d_values), grads, strict=True):
                        _add_blocks(total, piece.index, grad)
            grad_q[seq.batch, :, seq.queries] = seq.unsorted(d_q.mul_(softmax_scale)).to(q.dtype)
            for total, grad in ((grad_k, d_keys), (grad_v, d_values)):
                blocks = grad.view(seq.num_kv_heads, seq.count * seq.block_size, -1)
                total[seq.batch, :, seq.slots] += blocks[:, : seq.length]
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _add_blocks(total: Tensor, index: Tensor, grad: Tensor) -> None:
    """Adds `grad (P, n B, D)` to rows `index (P, n)` of `total (HK * NB, B * D)`, in a fixed order."""
    rows = grad.reshape(index.numel(), -1)
    if total.device.type == "cpu":
        total.index_add_(0, index.flatten(), rows)
    else:  # index_add_ is not deterministic on GPUs
        total.index_put_((index.flatten(),), rows, accumulate=True)
