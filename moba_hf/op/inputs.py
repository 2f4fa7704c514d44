"""Checks of the operator's inputs: tensors, offsets, and a given choice of blocks.

Shapes, dtypes and devices are always checked. Tensor values are checked on a CPU, and on other devices only
with `MOBA_HF_CHECK=1`, so that the hot path never waits for a device.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from moba_hf.op.layer_rule import LayerConfig
from moba_hf.op.numerics import check_int, has_tangent, plain_int
from moba_hf.op.sequences import Sequences, batched_table, more_queries, packed_table
from moba_hf.op.shared import mask_words, num_tiles, sequence_tiles, unpack_blocks
from moba_hf.op.shared_rule import SharedRule

# A choice with more slots than blocks is refused if it would be larger than this, in bytes.
_MOST_CHOICE = 1 << 32

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_values(x: Tensor) -> bool:
    """Whether values of tensors on the device of `x` may be read: on a CPU, or with `MOBA_HF_CHECK=1`."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return False
    return x.device.type == "cpu" or os.environ.get("MOBA_HF_CHECK") == "1"


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError if the `(batch, heads, length, dim)` tensors do not fit together."""
    dtypes = q.dtype, k.dtype, v.dtype
    for name, dtype in zip("qkv", dtypes, strict=True):
        if dtype not in _DTYPES:
            raise ValueError(f"{name} must be fp64, fp32, bf16 or fp16, got {dtype}")
    if not dtypes[0] == dtypes[1] == dtypes[2]:
        raise ValueError(f"q, k, v must have the same dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must be on the same device, got {q.device}, {k.device}, {v.device}")
    (batch, num_heads, _, head_dim), keys, values = q.shape, k.shape, v.shape
    if keys[:3] != values[:3] or batch != keys[0]:
        raise ValueError(
            "q, k, v must have the same batch size, and k and v the same length and heads: "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} as (batch, heads, length, dim)"
        )
    if head_dim == 0 or values[3] == 0:
        raise ValueError(f"head_dim and v_dim must be at least 1, got {head_dim} and {values[3]}")
    if head_dim != keys[3]:
        raise ValueError(f"q and k must have the same head_dim, got {head_dim} and {keys[3]}")
    if num_heads == 0 or keys[1] == 0 or num_heads % keys[1]:
        raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={keys[1]}")


def check_packed(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x)
        if x.ndim != 3:
            raise ValueError(f"{name} must be (tokens, heads, dim), got {tuple(x.shape)}")
    check_tensors(as_batch(q), as_batch(k), as_batch(v))


def require_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a torch tensor, got {type(x).__name__}: pass torch.as_tensor({name})"
        )


def as_batch(x: Tensor) -> Tensor:
    """Packed `(tokens, heads, dim)` as a `(1, heads, tokens, dim)` view."""
    return x.transpose(0, 1)[None]


def packed_table_of(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> Tensor:
    """Checks the offsets of packed tensors and returns the sequence table."""
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k needs cu_seqlens_q")
        if q.shape[0] > k.shape[0]:
            raise ValueError(f"more queries ({q.shape[0]}) than keys ({k.shape[0]})")
        return batched_table(1, q.shape[0], k.shape[0], q.device)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        require_tensor(name, cu)
        if cu.ndim != 1 or cu.shape[0] < 1 or cu.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 (num_seqs + 1,), got {cu.dtype} {tuple(cu.shape)}")
        if cu.device != q.device:
            raise ValueError(f"{name} is on {cu.device}, q on {q.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must have equally many sequences, got "
            f"{cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}"
        )
    if check_values(q):
        _check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
    return packed_table(cu_seqlens_q, cu_seqlens_k)


def _check_cu_seqlens(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int) -> None:
    for name, cu, total in (("cu_seqlens_q", cu_seqlens_q, total_q), ("cu_seqlens_k", cu_seqlens_k, total_k)):
        if int(cu[0]) != 0 or int(cu[-1]) != total or bool((cu[1:] < cu[:-1]).any()):
            raise ValueError(f"{name} must rise from 0 to the number of tokens {total}, got {cu.tolist()}")
    lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    wrong = (lengths_q > lengths_k).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise more_queries(i, int(lengths_q[i]), int(lengths_k[i]))


def longest(
    q: Tensor, k: Tensor, table: Tensor, max_seqlen_q: int | None, max_seqlen_k: int | None
) -> tuple[int, int]:
    """The given bounds on sequence lengths, else the totals; kernels ignore tokens beyond them."""
    if check_values(q):
        for name, bound, begin in (("max_seqlen_q", max_seqlen_q, 1), ("max_seqlen_k", max_seqlen_k, 3)):
            if bound is None:
                continue
            check_int(name, plain_int(bound), minimum=-sys.maxsize)
            lengths = (table[:, begin + 1] - table[:, begin]).tolist()
            if bound < max(lengths, default=0):
                raise ValueError(f"{name}={bound} is below the longest sequence, {max(lengths)} tokens")
    return (
        q.shape[0] if max_seqlen_q is None else plain_int(max_seqlen_q),
        k.shape[0] if max_seqlen_k is None else plain_int(max_seqlen_k),
    )


def check_choice(block_indices: Tensor, q: Tensor, topk: int) -> None:
    expected = (q.shape[0], q.shape[2], q.shape[1], topk)
    if tuple(block_indices.shape) != expected or block_indices.dtype != torch.int32:
        raise ValueError(
            f"block_indices must be int32 (total_q, num_heads, topk) = {expected[1:]}, got "
            f"{block_indices.dtype} {tuple(block_indices.shape[1:])}"
        )
    if block_indices.device != q.device:
        raise ValueError(f"block_indices is on {block_indices.device}, q on {q.device}")


def check_choice_values(block_indices: Tensor, table: Tensor, block_size: int) -> None:
    """Checks that each choice has the own block, no duplicate, no later block, and -1 only at its end."""
    for row, q_begin, q_end, k_begin, k_end in table.tolist():
        choice = block_indices[row, q_begin:q_end]
        position = torch.arange(q_end - q_begin, device=choice.device) + (k_end - k_begin) - (q_end - q_begin)
        own = (position // block_size)[:, None, None]
        ordered = choice.sort(dim=2).values
        problems = {
            "a later block": (choice > own).any(),
            "an index below -1": (choice < -1).any(),
            "no own block": (~(choice == own).any(dim=2)).any(),
            "a block twice": ((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).any(),
            "-1 before a block": ((choice[:, :, 1:] >= 0) & (choice[:, :, :-1] < 0)).any(),
        }
        for problem, found in problems.items():
            if bool(found):
                raise ValueError(f"block_indices has {problem} for a query at row {q_begin} or after")


def check_mask(block_mask: Tensor, q: Tensor, sequences: Sequences, rule: SharedRule) -> None:
    """Raises ValueError if a block mask does not fit the call, lacks own blocks, or has later blocks."""
    words = mask_words(sequences.max_seqlen_k, rule.block_size)
    expected = (q.shape[1], num_tiles(sequences, q, rule.tile), words)
    if tuple(block_mask.shape) != expected or block_mask.dtype != torch.int32:
        raise ValueError(
            f"block_indices must be int32 (num_heads, num_tiles, words) = {expected} for tile={rule.tile}, "
            f"got {block_mask.dtype} {tuple(block_mask.shape)}"
        )
    if block_mask.device != q.device:
        raise ValueError(f"block_indices is on {block_mask.device}, q on {q.device}")
    if not check_values(q):
        return
    for numbers, rows in sequence_tiles(sequences, q, rule.tile):
        chosen = unpack_blocks(block_mask[:, numbers], words * 32)
        for at, (_, q_begin, q_end, position, _, _) in enumerate(rows):
            own = position // rule.tile * rule.tile // rule.block_size
            end = (position + q_end - q_begin - 1) // rule.block_size + 1
            if chosen[:, at, end:].any():
                raise ValueError(f"block_indices has a later block for the tile at row {q_begin}")
            if not chosen[:, at, own:end].all():
                raise ValueError(f"block_indices lacks a block that the tile at row {q_begin} overlaps")


def check_head_dim(rule: LayerConfig, q: Tensor) -> None:
    """Raises ValueError if the gate pairs coordinates and the head dim of `q (..., head_dim)` is odd."""
    if rule.gate == "mass" and q.shape[-1] % 2:
        raise ValueError(f"gate='mass' needs an even head_dim, got {q.shape[-1]}")


def check_size(q: Tensor, topk: int, blocks: int) -> None:
    """Raises ValueError if a choice with more slots than blocks would be huge."""
    size = 4 * q.shape[0] * q.shape[1] * topk
    if size > _MOST_CHOICE:
        raise ValueError(
            f"with topk={topk} the choice takes {size / 2**30:,.0f} GiB for {q.shape[0]} queries and "
            f"{q.shape[1]} heads, but the longest sequence has {blocks} blocks: lower topk to that"
        )


def refuse_tangents(*tensors: Tensor) -> None:
    """Raises NotImplementedError if forward-mode AD needs a derivative, which would be lost."""
    if has_tangent(*tensors):
        raise NotImplementedError(
            "MoBA has no forward-mode derivative (torch.autograd.forward_ad, torch.func.jvp): use reverse "
            'mode (backward, torch.func.vjp), or backend="reference" for short sequences'
        )
