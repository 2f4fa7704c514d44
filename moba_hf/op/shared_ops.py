"""The torch operators of the shared choice of blocks, and the attention function that calls them.

Like those of `moba_hf.op.operators`, they have fake kernels and an explicit backward. So `torch.compile` sees
each as one opaque node, and autograd saves only inputs, output and lse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moba_hf.op.backends import choose_backend, load_backend
from moba_hf.op.block_means import block_means_of
from moba_hf.op.declare import fake, gradient, no_second_derivative, operator
from moba_hf.op.gates import KeptMass
from moba_hf.op.operators import empty_results, flat_sequences
from moba_hf.op.sequences import Attended, Sequences, each_query
from moba_hf.op.shared import SharedRule, mask_words, num_tiles
from moba_hf.op.shared_backends import SharedKernels

# Most bytes for the masses of one tile in fp32. A larger tile would run out of memory, not just be slow.
_MOST_MASSES = 1 << 32

# Builds the rule from its flattened form; cached, so that it is validated once.
_rule = lru_cache(maxsize=None)(SharedRule)

# Functions that are called with `(block_mask, q, sequences, rule)` of every choice, to count keys. A prompt
# may take two calls, one for the rows before `dense_below`. Empty unless an evaluation is running.
CHOICE_WATCHERS: list[Callable[[Tensor, Tensor, Sequences, SharedRule], None]] = []


def flat_shared_rule(rule: SharedRule) -> tuple[Any, ...]:
    """The rule as arguments of the operators: the fields of `SharedRule` in order."""
    shape = (rule.block_size, rule.tile, rule.threshold, rule.share, rule.topk)
    rest = (rule.sink_blocks, rule.local_blocks, rule.sample, rule.dense_below, rule.rotary_pairs)
    return shape + rest


def _kernels(backend: str) -> SharedKernels:
    shared = load_backend(backend).shared
    assert shared is not None
    return shared


@operator("select_shared")
def select_shared_op(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    tile: int,
    threshold: float | None,
    share: float | None,
    topk: int | None,
    sink_blocks: int,
    local_blocks: int,
    sample: int,
    dense_below: int,
    rotary_pairs: str,
    softmax_scale: float,
    backend: str,
) -> Tensor:
    """`SharedKernels.select` as one operator."""
    shape = (block_size, tile, threshold, share, topk)
    rule = _rule(*shape, sink_blocks, local_blocks, sample, dense_below, rotary_pairs)
    sequences = Sequences(table, max_seqlen_q, max_seqlen_k)
    return _kernels(backend).select(q, k, sequences, rule, softmax_scale)


@fake(select_shared_op)
def _(q, k, table, max_seqlen_q, max_seqlen_k, block_size, tile, *_rest):  # type: ignore[no-untyped-def]
    sequences = Sequences(table, max_seqlen_q, max_seqlen_k)
    shape = (q.shape[1], num_tiles(sequences, q, tile), mask_words(max_seqlen_k, block_size))
    return q.new_empty(shape, dtype=torch.int32)


@operator("attend_shared")
def attend_shared_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    table: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    tile: int,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`SharedKernels.attend` as one operator, differentiable in q, k, v for a fixed choice."""
    sequences = Sequences(table, max_seqlen_q, max_seqlen_k)
    return _kernels(backend).attend(q, k, v, block_mask, sequences, block_size, tile, softmax_scale)


@fake(attend_shared_op)
def _(q, k, v, *_rest):  # type: ignore[no-untyped-def]
    return empty_results(q, v)


@operator("attend_shared_backward")
def _attend_shared_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_mask: Tensor,
    table: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    tile: int,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`SharedKernels.backward` as one operator; gradients are contiguous."""
    saved = Attended(q, k, v, out, lse, block_mask)
    sequences = Sequences(table, max_seqlen_q, max_seqlen_k)
    return _kernels(backend).backward(grad_out, grad_lse, saved, sequences, block_size, tile, softmax_scale)


@fake(_attend_shared_backward)
def _(grad_out, grad_lse, q, k, v, *_rest):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


gradient(_attend_shared_backward, no_second_derivative)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, block_mask, table, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, block_mask, table)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attend_shared_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest)
    return *grads, *[None] * 8


gradient(attend_shared_op, _backward, _save_for_backward)


@operator("decode_shared")
def decode_shared_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    table: Tensor,
    block_size: int,
    tile: int,
    threshold: float | None,
    share: float | None,
    topk: int | None,
    sink_blocks: int,
    local_blocks: int,
    sample: int,
    dense_below: int,
    rotary_pairs: str,
    softmax_scale: float,
    backend: str,
    heard: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`SharedKernels.decode` as one operator, without gradients."""
    shape = (block_size, tile, threshold, share, topk)
    rule = _rule(*shape, sink_blocks, local_blocks, sample, dense_below, rotary_pairs)
    sequences = Sequences(table, q.shape[2], k.shape[2])
    return _kernels(backend).decode(q, k, v, kept, sequences, rule, softmax_scale, heard)


@fake(decode_shared_op)
def _(q, k, v, *_rest):  # type: ignore[no-untyped-def]
    return empty_results(q, v)


def select_shared(
    q: Tensor,
    k: Tensor,
    sequences: Sequences,
    rule: SharedRule,
    *,
    softmax_scale: float,
    backend: str = "auto",
) -> Tensor:
    """The choice of blocks, `block_mask` int32 `(num_heads, num_tiles, words)`, without gradient.

    Arguments as for `shared_attention`.

    Raises:
        ValueError: the head dim is odd, or the tile is huge.
    """
    if q.shape[3] % 2:
        raise ValueError(f"a shared choice (tile > 1) needs an even head_dim, got {q.shape[3]}")
    name = choose_backend(backend, q, k, k, rule)
    _check_masses(q.shape[1], sequences.max_seqlen_k, rule, name)
    flat = (*flat_sequences(sequences), *flat_shared_rule(rule))
    mask: Tensor = select_shared_op(q.detach(), k.detach(), *flat, softmax_scale, name)
    return mask


def _check_masses(num_heads: int, longest: int, rule: SharedRule, backend: str) -> None:
    """Raises ValueError if the masses of a single tile, of which all backends hold at least one, are huge.

    The kernels hold a whole tile, the others only the rows that exist.
    """
    tile = rule.tile if backend == "triton" else min(rule.tile, longest)
    rows, blocks = max(1, tile // rule.sample), -(-longest // rule.block_size)
    size = 4 * num_heads * rows * blocks
    if size > _MOST_MASSES:
        raise ValueError(
            f"tile={rule.tile} with sample={rule.sample} takes {size / 2**30:,.1f} GiB for the masses of one "
            f"tile: {num_heads} heads x {rows} rows x {blocks} blocks; at most {_MOST_MASSES >> 30} GiB are "
            "allowed, so lower tile, or raise sample or block_size"
        )


def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    rule: SharedRule,
    *,
    softmax_scale: float,
    backend: str = "auto",
    block_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with a shared choice of blocks. The tensors may be strided views, already checked.

    Args:
        q: `(batch, num_heads, q_len, head_dim)`.
        k: `(batch, num_kv_heads, kv_len, head_dim)`.
        v: `(batch, num_kv_heads, kv_len, v_dim)`.
        sequences: the sequences in the tensors; queries outside of them are padding with zero output.
        rule: how blocks are chosen.
        softmax_scale: factor of the scores in the softmax.
        backend: "auto" or a name in `moba_hf.op.backend_table.BACKENDS`.
        block_mask: a given choice, see `moba_hf.op.shared`; None: blocks are chosen here.

    Returns:
        `out (batch, q_len, num_heads, v_dim)` and `lse (batch, num_heads, q_len)` fp32 (fp64).
    """
    name = choose_backend(backend, q, k, v, rule)
    if block_mask is None:
        block_mask = select_shared(q, k, sequences, rule, softmax_scale=softmax_scale, backend=name)
    for watch in CHOICE_WATCHERS:
        watch(block_mask, q, sequences, rule)
    where = flat_sequences(sequences)
    runs = _kernels(name)
    if runs.differentiable:  # plain torch, so autograd needs no operator
        return runs.attend(q, k, v, block_mask, sequences, rule.block_size, rule.tile, softmax_scale)
    return attend_shared_op(q, k, v, block_mask, *where, rule.block_size, rule.tile, softmax_scale, name)


def shared_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    rule: SharedRule,
    *,
    softmax_scale: float,
    backend: str = "auto",
    kept: Tensor | None = None,
    heard: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`shared_attention` for decode steps: every query chooses for itself, see `moba_hf.op.shared`.

    Every batch row is one sequence. Arguments and results are those of `shared_attention`, except:

    Args:
        kept: summaries from the cache, see `SharedKernels.decode`; None: computed here, which reads all keys.
        heard: `(batch, num_heads, rows, head_dim)`, the queries just before `q`, with which the steps
            choose too (step 8 of `moba_hf.op.shared`); None: each step chooses by its own query alone.
    """
    assert sequences.by_row
    name = choose_backend(backend, q, k, v, rule)
    settings: Any = {"softmax_scale": softmax_scale, "backend": name}
    many = q.shape[2] > 1
    if heard is not None:
        heard = heard[:, :, max(0, heard.shape[2] - rule.tile + 1) :]
    if _kernels(name).differentiable or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        if heard is not None:
            return _one_by_one(q, k, v, sequences, rule, heard, settings)
        where = each_query(sequences, q.shape[2]) if many else sequences
        return shared_attention(q, k, v, where, rule, **settings)
    if not _kernels(name).decodes:
        if not many:
            return _one_step(q, k, v, sequences, rule, heard, settings)
        name = "portable"  # recomputing the summaries of all keys for every query would be slower
    elif kept is None and not many:
        return _one_step(q, k, v, sequences, rule, heard, settings)
    if kept is None:
        what = KeptMass(rule.rotary_pairs)
        kept = block_means_of(k, sequences.kv_start, rule.block_size, name, what)
    flat = (sequences.table, *flat_shared_rule(rule))
    return decode_shared_op(q, k, v, kept, *flat, softmax_scale, name, heard)


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    rule: SharedRule,
    heard: Tensor,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """`_one_step` for each query of a call; arguments as for `shared_steps`."""
    batch, length = q.shape[0], q.shape[2]
    tables = each_query(sequences, length).table.view(batch, length, -1)
    outs, lses = [], []
    for m in range(length):
        table = tables[:, m] - torch.tensor([0, m, m, 0, 0], dtype=torch.int32, device=q.device)
        where = Sequences(table, 1, sequences.max_seqlen_k, True, sequences.kv_start)
        known = torch.cat([heard, q[:, :, :m]], 2)
        known = known[:, :, max(0, known.shape[2] - rule.tile + 1) :]
        out, lse = _one_step(q[:, :, m : m + 1], k, v, where, rule, known, settings)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 2)


def _one_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    rule: SharedRule,
    heard: Tensor | None,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """One decode step as the last row of its tile, whose earlier rows only help to choose.

    It summarises all keys. Shapes do not depend on values, so nothing waits for the device.
    """
    if heard is None or heard.shape[2] == 0:
        return shared_attention(q, k, v, sequences, rule, **settings)
    row, q_begin, q_end, k_begin, k_end = sequences.table.unbind(1)
    rows, real = heard.shape[2], q_end - q_begin
    earlier = ((k_end - k_begin - 1) % rule.tile).clamp(max=rows) * real
    columns = [row, rows - earlier, rows + real, k_begin, k_end]
    tiles = Sequences(torch.stack(columns, 1), min(rows + 1, rule.tile), sequences.max_seqlen_k)
    queries = torch.cat([heard, q.detach()], 2)
    mask = select_shared(queries, k, tiles, rule, **settings)[:, : num_tiles(sequences, q, rule.tile)]
    return shared_attention(q, k, v, sequences, rule, **settings, block_mask=mask)
