"""Attention over lists of blocks by torch's fused kernel for CPUs, which keeps scores in registers and cache.

Every (head, tile) is one dense problem. Those with equally many blocks run in one call, their keys and values
gathered before it; a mask hides keys after a row. The operator behind `scaled_dot_product_attention` is
called itself, since only that returns `lse`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_hf.op.shared_problems import Problems, SequenceBlocks


def fused(q: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes `q (..., D)` and `v (..., Dv)`."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def attend_batch(seq: SequenceBlocks, problems: Problems) -> tuple[Tensor, Tensor]:
    """Outputs `(P, T, Dv)` and log denominators `(P, T)` of problems with equally many blocks."""
    assert not problems.padded
    index = problems.kv_head[:, None] * seq.count + problems.blocks
    keys, values = seq.take("keys", seq.keys, index), seq.take("values", seq.values, index)
    queries = seq.gather(seq.q, problems.row)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries[None], keys[None], values[None], 0.0, False, attn_mask=_mask(seq, problems), scale=1.0
    )
    return out[0], lse[0]


def _mask(seq: SequenceBlocks, problems: Problems) -> Tensor:
    """0 where a row attends a key of its tile's list and -inf after the row, `(1, P or 1, T, n B)`."""
    blocks, position = problems.blocks[:, -seq.own :], problems.position
    whole = (position[:, 0] % seq.tile == 0) & (position[:, -1] - position[:, 0] == seq.tile - 1)
    if seq.tile >= seq.block_size and bool(whole.all()):  # alike
        blocks, position = blocks[:1], position[:1]
    inside = torch.arange(seq.block_size, device=blocks.device)
    keys_at = (blocks[:, :, None] * seq.block_size + inside).flatten(1)
    later = keys_at[:, None, :] > position[:, :, None]
    keys = problems.blocks.shape[1] * seq.block_size
    mask = seq.q.new_zeros(len(later), later.shape[1], keys)
    mask[:, :, -later.shape[2] :].masked_fill_(later, -torch.inf)
    return mask[None]
