"""The torch operators through which backends run; their arguments are the flattened rule and sequences.

`select_op`, `attend_op`, `decode_op`, `update_means_op` and `dense_decode_op` are `torch.library` operators
with fake kernels, and `attend_op` has an explicit backward. So `torch.compile` and `torch.export` see each as
one opaque node, and autograd saves only inputs, output and lse. The other operators are not differentiable:
callers pass tensors that need no gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moba_hf.op.backends import CacheKernels, load_backend
from moba_hf.op.declare import fake, gradient, no_second_derivative, operator
from moba_hf.op.layer_rule import LayerConfig
from moba_hf.op.numerics import accumulate_dtype
from moba_hf.op.sequences import Attended, Sequences

# Builds the rule from its flattened form; cached, so that it is validated once.
_rule = lru_cache(maxsize=None)(LayerConfig)


def flat_rule(rule: LayerConfig) -> tuple[int, int, int, int, str, str]:
    """The rule as arguments of the operators: the fields of `LayerConfig` in order."""
    return rule.block_size, rule.topk, rule.sink_blocks, rule.local_blocks, rule.gate, rule.rotary_pairs


def flat_sequences(sequences: Sequences) -> tuple[Tensor, int, int]:
    """The sequences as arguments of the operators."""
    return sequences.table, sequences.max_seqlen_q, sequences.max_seqlen_k


def _cache_kernels(backend: str) -> CacheKernels:
    kernels = load_backend(backend).cache
    assert kernels is not None
    return kernels


@operator("select_blocks")
def select_op(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    topk: int,
    sink_blocks: int,
    local_blocks: int,
    gate: str,
    rotary_pairs: str,
    softmax_scale: float,
    backend: str,
    block_means: Tensor | None = None,
) -> Tensor:
    """`Backend.select` as one operator."""
    sequences = Sequences(table, max_seqlen_q, max_seqlen_k)
    rule = _rule(block_size, topk, sink_blocks, local_blocks, gate, rotary_pairs)
    return load_backend(backend).select(q, k, sequences, rule, softmax_scale, block_means)


@fake(select_op)
def _(q, k, table, mq, mk, block_size, topk, *_rest):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], topk), dtype=torch.int32)


@operator("decode")
def decode_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_means: Tensor,
    table: Tensor,
    block_size: int,
    topk: int,
    sink_blocks: int,
    local_blocks: int,
    gate: str,
    rotary_pairs: str,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`Backend.decode` as one operator, without gradients."""
    sequences = Sequences(table, q.shape[2], k.shape[2])
    rule = _rule(block_size, topk, sink_blocks, local_blocks, gate, rotary_pairs)
    out, lse = load_backend(backend).decode(q, k, v, block_means, sequences, rule, softmax_scale)
    return out.contiguous(), lse.contiguous()


@fake(decode_op)
def _(q, k, v, *_rest):  # type: ignore[no-untyped-def]
    return empty_results(q, v)


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised `out` and `lse`."""
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


@operator("attend")
def attend_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    table: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`Backend.forward` as one operator, differentiable."""
    sequences = Sequences(table, max_seqlen_q, max_seqlen_k)
    return load_backend(backend).forward(q, k, v, block_indices, sequences, block_size, softmax_scale)


@fake(attend_op)
def _(q, k, v, *_rest):  # type: ignore[no-untyped-def]
    return empty_results(q, v)


@operator("attend_backward")
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    table: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`Backend.backward` as one operator; gradients are contiguous."""
    saved = Attended(q, k, v, out, lse, block_indices)
    sequences = Sequences(table, max_seqlen_q, max_seqlen_k)
    return load_backend(backend).backward(grad_out, grad_lse, saved, sequences, block_size, softmax_scale)


@fake(_attend_backward)
def _(grad_out, grad_lse, q, k, v, *_rest):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


gradient(_attend_backward, no_second_derivative)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, block_indices, table, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, block_indices, table)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attend_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest)
    return *grads, *[None] * 7


gradient(attend_op, _backward, _save_for_backward)


@operator("dense_decode")
def dense_decode_op(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, softmax_scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """`CacheKernels.dense_decode` as one operator, without gradients."""
    return _cache_kernels(backend).dense_decode(q, k, v, table, softmax_scale)


@fake(dense_decode_op)
def _(q, k, v, *_rest):  # type: ignore[no-untyped-def]
    return empty_results(q, v)


@operator("update_block_means", mutates=("means",))
def update_means_op(
    means: Tensor,
    keys: Tensor,
    kv_start: Tensor | None,
    length: Tensor | None,
    slots: int,
    behind: int,
    block_size: int,
    backend: str,
    rotary_pairs: str | None = None,
) -> None:
    """`CacheKernels.update_means` as one operator; `slots` is used if `length` is None.

    With `rotary_pairs` it is `CacheKernels.update_mass`.
    """
    torch.autograd.graph.increment_version(means)
    kernels, written = _cache_kernels(backend), slots if length is None else length
    if rotary_pairs is None:
        kernels.update_means(means, keys, kv_start, written, behind, block_size)
    else:
        kernels.update_mass(means, keys, kv_start, written, behind, block_size, rotary_pairs)


@fake(update_means_op)
def _(means, keys, *_rest):  # type: ignore[no-untyped-def]
    return None
