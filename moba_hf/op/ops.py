"""The operator: `moba_attention` and `select_blocks` on packed tensors, and `attention` under them.

Everything is checked here, at the edge: shapes, dtypes and devices always; tensor values (offsets, a given
choice of blocks) on CPU tensors, and on others only with `MOBA_HF_CHECK=1`, so that the hot path never waits
for a device.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from moba_hf.config import LayerConfig, Rule, make_rule
from moba_hf.op.backends import Backend, choose_backend, load_backend
from moba_hf.op.block_means import block_means_of
from moba_hf.op.gates import GATES, Kept
from moba_hf.op.numerics import check_int, default_scale, has_tangent, plain_int
from moba_hf.op.operators import attend_op, decode_op, flat_rule, flat_sequences, select_op
from moba_hf.op.sequences import Sequences, batched_table, packed_table
from moba_hf.op.shared import mask_words, num_tiles, sequence_tiles, unpack_blocks
from moba_hf.op.shared_ops import select_shared, shared_attention, shared_steps
from moba_hf.op.shared_rule import SharedRule

# Bytes above which a choice with more slots than blocks is refused.
_MOST_CHOICE = 1 << 32

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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

    Each query attends its own block of `block_size` keys, causally, the forced blocks, and the earlier
    blocks whose mean key scores best, `topk` blocks in all. Differentiable in q, k, v with the choice fixed.
    With `tile` > 1 neighbouring queries share a choice: another rule, not MoBA, see `moba_hf.op.shared`.

    Args:
        q: `(total_q, num_heads, head_dim)`; fp64, fp32, bf16 or fp16.
        k: `(total_k, num_kv_heads, head_dim)`; `num_heads` is a multiple of `num_kv_heads`.
        v: `(total_k, num_kv_heads, v_dim)`.
        block_size: tokens in a block.
        topk: blocks a query attends, its own and the forced ones included; with `tile` > 1 the most that a
            tile attends, None: no limit.
        sink_blocks: first blocks of each sequence that are always attended.
        local_blocks: blocks just before the own one that are always attended.
        gate: "mean", the paper's score, or "mass" (`moba_hf.op.gates`), which is not the paper's MoBA; with
            `tile` > 1 "mass".
        tile: queries that share a choice, a multiple or a divisor of `block_size`.
        threshold: with `tile` > 1, blocks of at least so many times the largest mass are attended.
        sample: with `tile` > 1, one query in so many, the last of each group, speaks for the tile.
        dense_below: with `tile` > 1, queries before this position attend every key; a multiple of `tile`.
        cu_seqlens_q, cu_seqlens_k: int32 `(num_seqs + 1,)` running totals of lengths; None: one sequence
            (keys take those of the queries when only these are given). A sequence with fewer queries than
            keys is aligned at its end. Sequences may be empty.
        max_seqlen_q, max_seqlen_k: lengths of the longest sequences, or bounds on them; None: the totals.
        softmax_scale: factor of the scores in the softmax; None: `head_dim ** -0.5`.
        block_indices: int32 `(total_q, num_heads, topk)`, a choice made before (`select_blocks`), relative
            to each sequence, -1 last; it holds the own block and no duplicate or later block. With
            `tile` > 1: a block mask, int32 `(num_heads, num_tiles, words)`.
        backend: "auto" or a name of `moba_hf.op.backend_table.BACKENDS`.
        return_lse: also return `lse (num_heads, total_q)` fp32, the natural logarithm of the denominators.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit; the message says which.
        TypeError: `block_size`, `topk`, `sink_blocks`, `local_blocks` or a `max_seqlen` not an integer; a
            list or array where a tensor belongs.
        NotImplementedError: a derivative in forward mode, which the reference alone has.
    """
    _check_packed(q, k, v)
    rule = make_rule(block_size, topk, sink_blocks, local_blocks, gate, tile, threshold, dense_below, sample)
    table = _packed_table(q, k, cu_seqlens_q, cu_seqlens_k)
    sequences = Sequences(table, *_longest(q, k, table, max_seqlen_q, max_seqlen_k), by_row=False)
    if block_indices is not None:
        _require_tensor("block_indices", block_indices)
        if block_indices.ndim != 3:
            expected = "(total_q, num_heads, topk)" if tile == 1 else "(num_heads, num_tiles, words)"
            raise ValueError(f"block_indices must be {expected}, got {tuple(block_indices.shape)}")
        block_indices = block_indices[None] if tile == 1 else block_indices
    out, lse = attention(
        _as_batch(q),
        _as_batch(k),
        _as_batch(v),
        sequences,
        rule,
        softmax_scale=default_scale(q) if softmax_scale is None else float(softmax_scale),
        block_indices=block_indices,
        backend=backend,
    )
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
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The blocks each query attends, int32 `(total_q, num_heads, topk)`, relative to its sequence.

    Slot 0 is the own block, the order of the others is not specified, and -1 fills up where fewer exist. A
    `topk` above the number of blocks is filled up too, unless that would take more than 4 GiB: ValueError.
    With `tile` > 1 a block mask, int32 `(num_heads, num_tiles, words)`, see `moba_hf.op.shared`.
    Arguments and errors are those of `moba_attention`. The choice carries no gradient.
    """
    _check_packed(q, k, k)
    rule = make_rule(block_size, topk, sink_blocks, local_blocks, gate, tile, threshold, dense_below, sample)
    table = _packed_table(q, k, cu_seqlens_q, cu_seqlens_k)
    lengths = _longest(q, k, table, max_seqlen_q, max_seqlen_k)
    q4, k4 = _as_batch(q.detach()), _as_batch(k.detach())
    scale = default_scale(q) if softmax_scale is None else float(softmax_scale)
    if isinstance(rule, SharedRule):
        return select_shared(q4, k4, Sequences(table, *lengths), rule, softmax_scale=scale, backend=backend)
    _check_head_dim(rule, q)
    short = rule if torch.compiler.is_compiling() else _shortened(rule, int(lengths[1]))
    if short.topk < rule.topk:
        _check_size(q, rule.topk, short.topk)
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
    block_indices: Tensor | None = None,
    steps: bool = False,
) -> tuple[Tensor, Tensor]:
    """MoBA over strided `(batch, heads, length, dim)` views; nothing is unpadded, repeated or copied.

    A few queries per row without gradients (a decode step) read only the keys they attend.

    Args:
        q: `(batch, num_heads, q_len, head_dim)`. k, v: `(batch, num_kv_heads, kv_len, ...)`; checked by
            `check_tensors`.
        sequences: where the sequences lie; queries outside them are padding, their output is zero.
        rule: how blocks are chosen.
        softmax_scale: factor of the scores in the softmax.
        backend: "auto" or a name of `moba_hf.op.backend_table.BACKENDS`.
        block_means: `(batch, num_kv_heads, blocks, width)` from a cache: what `kept_of(rule)` says of each
            row's complete blocks, counted from `kv_start`, then anything; None: taken here, which reads all
            keys.
        block_indices: int32 `(batch, q_len, num_heads, topk)`, a choice made before, or the block mask of a
            shared one; None: made here.
        steps: queries are decode steps: under a shared choice every one is a tile of its own.

    Returns:
        `out (batch, q_len, num_heads, v_dim)` and `lse (batch, num_heads, q_len)` fp32 (fp64).
    """
    if backend != "reference":
        _refuse_tangents(q, k, v)
    if isinstance(rule, SharedRule):
        if block_indices is not None:
            _check_mask(block_indices, q, sequences, rule)
        settings: Any = {"softmax_scale": softmax_scale, "backend": backend}
        if steps:
            return shared_steps(q, k, v, sequences, rule, **settings, kept=block_means)
        return shared_attention(q, k, v, sequences, rule, **settings, block_mask=block_indices)
    _check_head_dim(rule, q)
    if block_indices is None and not torch.compiler.is_compiling():
        rule = _shortened(rule, int(sequences.max_seqlen_k))
    name = choose_backend(backend, q, k, v, rule)
    runs = load_backend(name)
    if block_indices is not None:
        _check_choice(block_indices, q, rule.topk)
        if check_values(q):
            _check_choice_values(block_indices, sequences.table, rule.block_size)
    elif _is_decode(q, k, v, sequences, rule, runs):
        if block_means is None:
            block_means = block_means_of(k, sequences.kv_start, rule.block_size, name, kept_of(rule))
        return decode_op(q, k, v, block_means, sequences.table, *flat_rule(rule), softmax_scale, name)
    else:
        flat = (*flat_sequences(sequences), *flat_rule(rule))
        block_indices = select_op(q.detach(), k.detach(), *flat, softmax_scale, name, block_means)
    if runs.differentiable:  # plain torch: no operator between it and autograd
        return runs.forward(q, k, v, block_indices, sequences, rule.block_size, softmax_scale)
    flat_where = flat_sequences(sequences)
    return attend_op(q, k, v, block_indices, *flat_where, rule.block_size, softmax_scale, name)


def kept_of(rule: Rule) -> Kept:
    """What a cache keeps of a block for the decode steps of a rule."""
    return GATES[rule.gate].kept(rule.rotary_pairs)


def _check_head_dim(rule: LayerConfig, q: Tensor) -> None:
    """Raises ValueError where `q (..., head_dim)` has a coordinate without a partner."""
    if rule.gate == "mass" and q.shape[-1] % 2:
        raise ValueError(f"gate='mass' needs an even head_dim, got {q.shape[-1]}")


def _shortened(rule: LayerConfig, longest: int) -> LayerConfig:
    """What `rule` chooses in sequences of at most `longest` keys, with no more blocks than they have."""
    blocks = max(1, -(-longest // rule.block_size))
    if rule.topk <= blocks:
        return rule
    sinks = min(rule.sink_blocks, blocks - 1)
    local = min(rule.local_blocks, blocks - 1 - sinks)
    return replace(rule, topk=blocks, sink_blocks=sinks, local_blocks=local)


def _check_size(q: Tensor, topk: int, blocks: int) -> None:
    """Raises ValueError where a choice with more slots than there are blocks would be huge."""
    size = 4 * q.shape[0] * q.shape[1] * topk
    if size > _MOST_CHOICE:
        raise ValueError(
            f"topk={topk} makes a choice of {size / 2**30:,.0f} GiB for {q.shape[0]} queries and "
            f"{q.shape[1]} heads, but the longest sequence has {blocks} blocks: lower topk to that"
        )


def _refuse_tangents(*tensors: Tensor) -> None:
    """Raises NotImplementedError where forward-mode AD asks for a derivative, which would be lost."""
    if has_tangent(*tensors):
        raise NotImplementedError(
            "MoBA has no forward-mode derivative (torch.autograd.forward_ad, torch.func.jvp): use reverse "
            'mode (backward, torch.func.vjp), or backend="reference" for short sequences'
        )


def _is_decode(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, rule: LayerConfig, runs: Backend
) -> bool:
    """Whether `Backend.decode` computes this call."""
    few = sequences.by_row and q.shape[2] <= runs.max_decode_queries and rule.gate in runs.decode_gates
    return few and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))


def check_values(x: Tensor) -> bool:
    """Whether values of tensors beside `x` may be read: on the CPU, or when `MOBA_HF_CHECK=1`."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return False
    return x.device.type == "cpu" or os.environ.get("MOBA_HF_CHECK") == "1"


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless `(batch, heads, length, dim)` tensors fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} must be fp64, fp32, bf16 or fp16, got {x.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"k and v must agree in length and heads, and with q in batch: q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, v {tuple(v.shape)} as (batch, heads, length, dim)"
        )
    if q.shape[3] == 0 or v.shape[3] == 0:
        raise ValueError(f"head_dim and v_dim must be at least 1, got {q.shape[3]} and {v.shape[3]}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one head_dim, got {q.shape[3]} and {k.shape[3]}")
    if q.shape[1] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"num_heads={q.shape[1]} must be a multiple of num_kv_heads={k.shape[1]}")


def _check_packed(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _require_tensor(name, x)
        if x.ndim != 3:
            raise ValueError(f"{name} must be (tokens, heads, dim), got {tuple(x.shape)}")
    check_tensors(_as_batch(q), _as_batch(k), _as_batch(v))


def _require_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a torch tensor, got {type(x).__name__}: pass torch.as_tensor({name})"
        )


def _as_batch(x: Tensor) -> Tensor:
    """Packed `(tokens, heads, dim)` as a `(1, heads, tokens, dim)` view."""
    return x.transpose(0, 1)[None]


def _packed_table(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> Tensor:
    """The sequence table of packed tensors, checked."""
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k is given without cu_seqlens_q")
        if q.shape[0] > k.shape[0]:
            raise ValueError(f"more queries ({q.shape[0]}) than keys ({k.shape[0]})")
        return batched_table(1, q.shape[0], k.shape[0], q.device)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _require_tensor(name, cu)
        if cu.ndim != 1 or cu.shape[0] < 1 or cu.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 (num_seqs + 1,), got {cu.dtype} {tuple(cu.shape)}")
        if cu.device != q.device:
            raise ValueError(f"{name} is on {cu.device}, q on {q.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k name {cu_seqlens_q.shape[0] - 1} and "
            f"{cu_seqlens_k.shape[0] - 1} sequences"
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
        raise ValueError(
            f"sequence {i} has more queries ({int(lengths_q[i])}) than keys ({int(lengths_k[i])})"
        )


def _longest(
    q: Tensor, k: Tensor, table: Tensor, max_seqlen_q: int | None, max_seqlen_k: int | None
) -> tuple[int, int]:
    """The bounds on sequence lengths, else the totals; kernels leave out what lies beyond them."""
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


def _check_choice(block_indices: Tensor, q: Tensor, topk: int) -> None:
    expected = (q.shape[0], q.shape[2], q.shape[1], topk)
    if tuple(block_indices.shape) != expected or block_indices.dtype != torch.int32:
        raise ValueError(
            f"block_indices must be int32 (total_q, num_heads, topk) = {expected[1:]}, got "
            f"{block_indices.dtype} {tuple(block_indices.shape[1:])}"
        )
    if block_indices.device != q.device:
        raise ValueError(f"block_indices is on {block_indices.device}, q on {q.device}")


def _check_choice_values(block_indices: Tensor, table: Tensor, block_size: int) -> None:
    """Each choice holds the own block, no duplicate, no later block, and -1 only at its end."""
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
                raise ValueError(f"block_indices holds {problem} for a query at row {q_begin} or after")


def _check_mask(block_mask: Tensor, q: Tensor, sequences: Sequences, rule: SharedRule) -> None:
    """Raises ValueError unless a block mask fits the call and holds a tile's own blocks and no later ones."""
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
                raise ValueError(f"block_indices holds a later block for the tile at row {q_begin}")
            if not chosen[:, at, own:end].all():
                raise ValueError(f"block_indices lacks a block that the tile at row {q_begin} overlaps")
