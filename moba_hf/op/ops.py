"""The operator: `moba_attention` and `select_blocks` on packed tensors, and `attention` behind them.

All inputs are checked here (with `inputs`), not further down.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moba_hf.op.backends import Backend, choose_backend, load_backend
from moba_hf.op.block_means import block_means_of
from moba_hf.op.gates import GATES, Kept
from moba_hf.op.inputs import (
    as_batch,
    check_choice,
    check_choice_values,
    check_head_dim,
    check_mask,
    check_packed,
    check_size,
    check_values,
    longest,
    packed_table_of,
    refuse_tangents,
    require_tensor,
)
from moba_hf.op.layer_rule import LayerConfig, Rule, make_rule
from moba_hf.op.numerics import default_scale
from moba_hf.op.operators import attend_op, decode_op, flat_rule, flat_sequences, select_op
from moba_hf.op.sequences import Sequences
from moba_hf.op.shared_ops import select_shared, shared_attention, shared_steps
from moba_hf.op.shared_rule import SharedRule


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    topk: int | None = None,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    gate: str = "mean",
    tile: int = 1,
    threshold: float | None = None,
    sample: int = 1,
    dense_below: int = 0,
    rotary_pairs: str = "halves",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    block_indices: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """MoBA output `(total_q, num_heads, v_dim)` in q's dtype; arXiv 2502.13189, equations 1-6.

    Each query attends causally to its own block of `block_size` keys, to the sink and local blocks, and to
    the earlier blocks with the highest scores, `topk` blocks in total. Differentiable in q, k, v for a fixed
    choice. With `tile` > 1, neighbouring queries share a choice. That is a different rule, not MoBA; see
    `moba_hf.op.shared`.

    Args:
        q: `(total_q, num_heads, head_dim)`; fp64, fp32, bf16 or fp16.
        k: `(total_k, num_kv_heads, head_dim)`; `num_heads` is a multiple of `num_kv_heads`.
        v: `(total_k, num_kv_heads, v_dim)`.
        block_size: tokens per block.
        topk: number of blocks that a query attends to, including its own, sink and local blocks. With
            `tile` > 1 it is the maximum per tile; None: no limit.
        sink_blocks: number of first blocks of each sequence that are always attended.
        local_blocks: number of blocks just before the own block that are always attended.
        gate: "mean", the paper's score, or "mass" (`moba_hf.op.gates`), which is not the paper's MoBA. With
            `tile` > 1 it must be "mass".
        tile: number of queries that share a choice, a multiple or a divisor of `block_size`.
        threshold: with `tile` > 1, a block is attended if its mass is at least `threshold` times the largest.
        sample: with `tile` > 1, only the last of every `sample` queries is used to choose for the tile.
        dense_below: with `tile` > 1, queries before this position attend to every key; a multiple of `tile`.
        rotary_pairs: which coordinates the rotary embedding of q and k rotates together: "halves" (d and
            d + D/2, as in Llama) or "neighbours" (2d and 2d + 1, interleaved). Only gate "mass" uses it.
        cu_seqlens_q: int32 `(num_seqs + 1,)`, cumulative numbers of queries, from 0; None: one sequence.
            Sequences may be empty. A sequence with fewer queries than keys is aligned at its end.
        cu_seqlens_k: the same for keys; None: `cu_seqlens_q`, or one sequence.
        max_seqlen_q: number of queries of the longest sequence, or a bound on it; None: `total_q`.
        max_seqlen_k: number of keys of the longest sequence, or a bound on it; None: `total_k`.
        softmax_scale: factor of the scores in the softmax; None: `head_dim ** -0.5`.
        block_indices: a given choice, int32 `(total_q, num_heads, topk)` as from `select_blocks`: relative to
            each sequence, -1 last, with the own block and without duplicates or later blocks. With
            `tile` > 1: a block mask, int32 `(num_heads, num_tiles, words)`.
        backend: "auto" or a name in `moba_hf.op.backend_table.BACKENDS`.
        return_lse: also return `lse (num_heads, total_q)` in fp32, the natural logarithm of the softmax
            denominators.

    Raises:
        ValueError: shapes, dtypes, devices or values do not fit; the message says which.
        TypeError: `block_size`, `topk`, `sink_blocks`, `local_blocks` or a `max_seqlen` is not an integer, or
            a tensor argument is a list or an array.
        NotImplementedError: a forward-mode derivative, which only backend "reference" supports.
    """
    check_packed(q, k, v)
    shared: Any = {"threshold": threshold, "dense_below": dense_below, "sample": sample}
    rule = make_rule(
        block_size, topk, sink_blocks, local_blocks, gate, tile, **shared, rotary_pairs=rotary_pairs
    )
    table = packed_table_of(q, k, cu_seqlens_q, cu_seqlens_k)
    sequences = Sequences(table, *longest(q, k, table, max_seqlen_q, max_seqlen_k), by_row=False)
    if block_indices is not None:
        require_tensor("block_indices", block_indices)
        if block_indices.ndim != 3:
            expected = "(total_q, num_heads, topk)" if tile == 1 else "(num_heads, num_tiles, words)"
            raise ValueError(f"block_indices must be {expected}, got {tuple(block_indices.shape)}")
        block_indices = block_indices[None] if tile == 1 else block_indices
    qkv = (as_batch(q), as_batch(k), as_batch(v))
    scale = _scale(q, softmax_scale)
    given: Any = {"softmax_scale": scale, "backend": backend}
    if block_indices is None:
        out, lse = attention(*qkv, sequences, rule, **given)
    else:
        out, lse = attention_over(*qkv, block_indices, sequences, rule, **given)
    return (out[0], lse[0].float()) if return_lse else out[0]


def select_blocks(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    topk: int | None = None,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    gate: str = "mean",
    tile: int = 1,
    threshold: float | None = None,
    sample: int = 1,
    dense_below: int = 0,
    rotary_pairs: str = "halves",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The blocks that each query attends to, int32 `(total_q, num_heads, topk)`, relative to its sequence.

    Slot 0 is the own block, the order of the others is unspecified, and unused slots at the end are -1. If
    `topk` exceeds the number of blocks and the result would be larger than 4 GiB, ValueError is raised. With
    `tile` > 1 the result is a block mask, int32 `(num_heads, num_tiles, words)`, see `moba_hf.op.shared`.
    Arguments and errors are those of `moba_attention`. The choice has no gradient.
    """
    check_packed(q, k, k)
    shared: Any = {"threshold": threshold, "dense_below": dense_below, "sample": sample}
    rule = make_rule(
        block_size, topk, sink_blocks, local_blocks, gate, tile, **shared, rotary_pairs=rotary_pairs
    )
    table = packed_table_of(q, k, cu_seqlens_q, cu_seqlens_k)
    lengths = longest(q, k, table, max_seqlen_q, max_seqlen_k)
    return _select(q, k, rule, Sequences(table, *lengths), softmax_scale, backend)


def select_by_rule(q: Tensor, k: Tensor, rule: Rule, *, softmax_scale: float | None = None) -> Tensor:
    """`select_blocks` for one sequence and a rule, which also knows the model's rotary embedding."""
    check_packed(q, k, k)
    table = packed_table_of(q, k, None, None)
    sequences = Sequences(table, *longest(q, k, table, None, None))
    return _select(q, k, rule, sequences, softmax_scale, "auto")


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    """The factor of the scores. Raises ValueError if it is not finite, as it would make every output NaN."""
    scale = default_scale(q) if softmax_scale is None else float(softmax_scale)
    if not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise ValueError(f"softmax_scale must be finite, got {scale}")
    return scale


def _select(
    q: Tensor, k: Tensor, rule: Rule, sequences: Sequences, softmax_scale: float | None, backend: str
) -> Tensor:
    """The result of `select_blocks`, for checked tensors."""
    table, lengths = sequences.table, (sequences.max_seqlen_q, sequences.max_seqlen_k)
    q4, k4 = as_batch(q.detach()), as_batch(k.detach())
    scale = _scale(q, softmax_scale)
    if isinstance(rule, SharedRule):
        return select_shared(q4, k4, sequences, rule, softmax_scale=scale, backend=backend)
    check_head_dim(rule, q)
    short = rule if torch.compiler.is_compiling() else _shortened(rule, int(lengths[1]))
    if short.topk < rule.topk:
        check_size(q, rule.topk, short.topk)
    name = choose_backend(backend, q4, k4, k4, short)
    choice = select_op(q4, k4, table, *lengths, *flat_rule(short), scale, name)[0]
    missing = rule.topk - short.topk
    return torch.nn.functional.pad(choice, (0, missing), value=-1) if missing else choice


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    rule: Rule,
    *,
    softmax_scale: float,
    backend: str = "auto",
    block_means: Tensor | None = None,
    steps: bool = False,
    heard: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """MoBA over strided `(batch, heads, length, dim)` views, without unpadding, repeating or copying them.

    A few queries per row without gradients (a decode step) read only the keys that they attend to.

    Args:
        q: `(batch, num_heads, q_len, head_dim)`; q, k and v must have passed `check_tensors`.
        k: `(batch, num_kv_heads, kv_len, head_dim)`.
        v: `(batch, num_kv_heads, kv_len, v_dim)`.
        sequences: the sequences in the tensors; queries outside of them are padding with zero output.
        rule: how blocks are chosen.
        softmax_scale: factor of the scores in the softmax.
        backend: "auto" or a name in `moba_hf.op.backend_table.BACKENDS`.
        block_means: `(batch, num_kv_heads, blocks, width)`, the summaries `kept_of(rule)` from a cache of
            each row's complete blocks, counted from `kv_start`, followed by arbitrary values. None: computed
            here, which reads all keys.
        steps: the queries are decode steps: with a shared choice, each chooses for itself (step 8 of
            `moba_hf.op.shared`).
        heard: `(batch, num_heads, rows, head_dim)`, with `steps` and a shared choice, the queries just
            before `q`, with which the steps choose too; None: each step chooses by its own query alone.

    Returns:
        `out (batch, q_len, num_heads, v_dim)` and `lse (batch, num_heads, q_len)` fp32 (fp64).
    """
    if backend != "reference":
        refuse_tangents(q, k, v)
    if isinstance(rule, SharedRule):
        settings: Any = {"softmax_scale": softmax_scale, "backend": backend}
        if steps:
            return shared_steps(q, k, v, sequences, rule, **settings, kept=block_means, heard=heard)
        return shared_attention(q, k, v, sequences, rule, **settings)
    check_head_dim(rule, q)
    if not torch.compiler.is_compiling():
        rule = _shortened(rule, int(sequences.max_seqlen_k))
    name = choose_backend(backend, q, k, v, rule)
    runs = load_backend(name)
    if _is_decode(q, k, v, sequences, rule, runs):
        if block_means is None:
            block_means = block_means_of(k, sequences.kv_start, rule.block_size, name, kept_of(rule))
        return decode_op(q, k, v, block_means, sequences.table, *flat_rule(rule), softmax_scale, name)
    flat = flat_sequences(sequences)
    choice = select_op(q.detach(), k.detach(), *flat, *flat_rule(rule), softmax_scale, name, block_means)
    if runs.differentiable:  # plain torch, so autograd needs no operator
        return runs.forward(q, k, v, choice, sequences, rule.block_size, softmax_scale)
    return attend_op(q, k, v, choice, *flat, rule.block_size, softmax_scale, name)


def attention_over(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    sequences: Sequences,
    rule: Rule,
    *,
    softmax_scale: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`attention` with a given choice of blocks.

    Args:
        block_indices: int32 `(batch, q_len, num_heads, topk)`, or the block mask of a shared choice.
    """
    if backend != "reference":
        refuse_tangents(q, k, v)
    if isinstance(rule, SharedRule):
        check_mask(block_indices, q, sequences, rule)
        settings: Any = {"softmax_scale": softmax_scale, "backend": backend}
        return shared_attention(q, k, v, sequences, rule, **settings, block_mask=block_indices)
    check_head_dim(rule, q)
    name = choose_backend(backend, q, k, v, rule)
    check_choice(block_indices, q, rule.topk)
    if check_values(q):
        check_choice_values(block_indices, sequences.table, rule.block_size)
    runs = load_backend(name)
    if runs.differentiable:
        return runs.forward(q, k, v, block_indices, sequences, rule.block_size, softmax_scale)
    flat = flat_sequences(sequences)
    return attend_op(q, k, v, block_indices, *flat, rule.block_size, softmax_scale, name)


def kept_of(rule: Rule) -> Kept:
    """The kind of summary that a cache keeps for the decode steps of a rule."""
    return GATES[rule.gate].kept(rule.rotary_pairs)


def _shortened(rule: LayerConfig, keys: int) -> LayerConfig:
    """`rule` for sequences of at most `keys` keys, with block counts reduced to the number of blocks."""
    blocks = max(1, -(-keys // rule.block_size))
    if rule.topk <= blocks:
        return rule
    sinks = min(rule.sink_blocks, blocks - 1)
    local = min(rule.local_blocks, blocks - 1 - sinks)
    return replace(rule, topk=blocks, sink_blocks=sinks, local_blocks=local)


def _is_decode(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, rule: LayerConfig, runs: Backend
) -> bool:
    """Whether `Backend.decode` computes this call."""
    few = sequences.by_row and q.shape[2] <= runs.max_decode_queries and rule.gate in runs.decode_gates
    return few and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
