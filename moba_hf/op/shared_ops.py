"""The torch operators of the shared choice of blocks, and the backends that run them.

`select_shared_op` and `attend_shared_op` are `torch.library` operators with fake kernels and an explicit
backward, as those of `moba_hf.op.backends`: `torch.compile` sees one opaque node each, and autograd keeps
inputs, output and lse. What a choice looks like is in `moba_hf.op.shared`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moba_hf.op.reference import accumulate_dtype, full_precision
from moba_hf.op.shared import SharedRule, mask_words, pack_blocks, tile_bound, tile_table, unpack_blocks


@dataclass(frozen=True)
class Tiles:
    """The tiles of one call.

    Attributes:
        table: the tile table, int32 `(num_tiles, 6)`.
        tile: queries in a tile.
        max_seqlen_k: a bound on the keys of one sequence.
    """

    table: Tensor
    tile: int
    max_seqlen_k: int

    @classmethod
    def of(cls, table: Tensor, q: Tensor, tile: int, max_seqlen_q: int, max_seqlen_k: int) -> Tiles:
        """The tiles of `q (batch, H, q_len, D)` under a sequence table, int32 `(num_seqs, 5)`."""
        bound = tile_bound(table.shape[0], max_seqlen_q, q.shape[0] * q.shape[2], tile)
        return cls(tile_table(table, tile, bound), tile, max_seqlen_k)


@dataclass(frozen=True)
class SharedBackend:
    """One way to compute the shared choice.

    Attributes:
        select: `(q, k, tiles, max_seqlen_k, rule, softmax_scale)` -> `block_mask`.
        attend: `(q, k, v, block_mask, tiles, block_size, tile, softmax_scale)` ->
            `out (batch, q_len, H, Dv)`, `lse (batch, H, q_len)` fp32 (fp64).
        backward: `(grad_out, grad_lse, q, k, v, out, lse, *the rest as attend)` -> gradients of q, k, v.
        unsupported: `(q, k, v, rule)` -> why these inputs cannot be taken, or None.
    """

    select: Callable[..., Tensor]
    attend: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    unsupported: Callable[[Tensor, Tensor, Tensor, SharedRule], str | None]


def _load_portable() -> SharedBackend:
    from moba_hf.op import shared_portable

    def attend(*args: Any) -> tuple[Tensor, Tensor]:
        *tensors, block_size, tile, scale = args
        return shared_portable.attend(*tensors, block_size=block_size, tile=tile, softmax_scale=scale)

    def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, block_size, tile, scale = args
        return shared_portable.attend_backward(
            *tensors, block_size=block_size, tile=tile, softmax_scale=scale
        )

    return SharedBackend(shared_portable.select, attend, backward, lambda *_: None)


def _load_reference() -> SharedBackend:
    from moba_hf.op import shared_reference as reference
    from moba_hf.op.shared_portable import _sequences as sequences

    def parts_of(rows: list[list[int]], q: Tensor, *kv: Tensor) -> tuple[int, slice, list[Tensor]]:
        """Batch row, query slice, and the sequence's tensors `(length, heads, dim)`."""
        batch, queries, keys = rows[0][0], slice(rows[0][1], rows[-1][2]), slice(rows[0][4], rows[0][5])
        parts = [q[batch, :, queries], *(x[batch, :, keys] for x in kv)]
        return batch, queries, [x.transpose(0, 1) for x in parts]

    def select(
        q: Tensor, k: Tensor, tiles: Tensor, max_seqlen_k: int, rule: SharedRule, scale: float
    ) -> Tensor:
        words = mask_words(max_seqlen_k, rule.block_size)
        result = torch.zeros(q.shape[1], tiles.shape[0], words, dtype=torch.int32, device=q.device)
        with full_precision(q.device):
            for numbers, rows in sequences(tiles):
                _, _, parts = parts_of(rows, q, k)
                chosen = reference.select_shared_ref(*parts, rule, scale)
                result[:, numbers] = pack_blocks(chosen, words)
        return result

    def attend(q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor, tiles: Tensor, *rest: Any) -> Any:
        block_size, tile, scale = rest
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        lse = torch.full(q.shape[:3], -torch.inf, dtype=accumulate_dtype(q.dtype), device=q.device)
        with full_precision(q.device):
            for numbers, rows in sequences(tiles):
                batch, queries, parts = parts_of(rows, q, k, v)
                chosen = unpack_blocks(block_mask[:, numbers], -(-len(parts[1]) // block_size))
                settings = {"block_size": block_size, "tile": tile, "softmax_scale": scale}
                out[batch, queries], lse[batch, :, queries] = reference.attend_shared_ref(
                    *parts, chosen, **settings
                )
        return out, lse

    def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError("the reference is differentiated by autograd")

    return SharedBackend(select, attend, backward, lambda *_: None)


SHARED_BACKENDS: dict[str, Callable[[], SharedBackend]] = {
    "reference": _load_reference,
    "portable": _load_portable,
}
# What "auto" tries before "portable", by device type.
_AUTO: dict[str, tuple[str, ...]] = {}


class _Loaded:
    """Backends as attributes: unlike those of a dict, a graph that is being traced sees new ones."""


_loaded: Any = _Loaded()


def load_shared_backend(name: str) -> SharedBackend:
    """The backend `name`. Raises ValueError for an unknown one, ImportError when its package is missing."""
    _ensure_loaded(name)
    backend: SharedBackend = getattr(_loaded, name)
    return backend


@torch._dynamo.assume_constant_result
def _ensure_loaded(name: str) -> bool:
    """Loads `name`, outside what is traced."""
    if name not in SHARED_BACKENDS:
        known = ", ".join(SHARED_BACKENDS)
        raise ValueError(
            f"backend {name!r} cannot share a choice between queries (tile > 1); known are auto, {known}"
        )
    if not hasattr(_loaded, name):
        setattr(_loaded, name, SHARED_BACKENDS[name]())
    return True


def choose_shared_backend(name: str, q: Tensor, k: Tensor, v: Tensor, rule: SharedRule) -> str:
    """The backend that will run: `name` itself, checked, or for "auto" the fastest that takes the inputs."""
    if name == "auto":
        for each in _AUTO.get(q.device.type, ()):
            if _why_not(each, q, k, v, rule) is None:
                return each
        return "portable"
    reason = _why_not(name, q, k, v, rule)
    if reason is not None:
        raise ValueError(f'backend "{name}" cannot run this: {reason}; backend="auto" picks one that can')
    return name


def _why_not(name: str, q: Tensor, k: Tensor, v: Tensor, rule: SharedRule) -> str | None:
    """Why the backend `name` cannot take the inputs, a missing package included, or None."""
    try:
        backend = load_shared_backend(name)
    except ImportError as error:
        return f"{error.name or error} is not installed"
    return backend.unsupported(q, k, v, rule)


@torch.library.custom_op("moba_hf::select_shared", mutates_args=())
def _select(
    q: Tensor,
    k: Tensor,
    tiles: Tensor,
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
    """`SharedBackend.select` as one operator; the numbers of the rule one by one, as operators take them."""
    rule = SharedRule(
        block_size, tile, threshold, share, topk, sink_blocks, local_blocks, sample, dense_below, rotary_pairs
    )
    return load_shared_backend(backend).select(q, k, tiles, max_seqlen_k, rule, softmax_scale)


@_select.register_fake
def _(q, k, tiles, max_seqlen_k, block_size, *_rest):  # type: ignore[no-untyped-def]
    words = mask_words(max_seqlen_k, block_size)
    return q.new_empty((q.shape[1], tiles.shape[0], words), dtype=torch.int32)


def select_shared_op(
    q: Tensor, k: Tensor, tiles: Tiles, rule: SharedRule, softmax_scale: float, backend: str
) -> Tensor:
    """`SharedBackend.select`: the `block_mask` of a call."""
    numbers = (
        rule.block_size,
        rule.tile,
        rule.threshold,
        rule.share,
        rule.topk,
        rule.sink_blocks,
        rule.local_blocks,
        rule.sample,
        rule.dense_below,
        rule.rotary_pairs,
    )
    return _select(q.detach(), k.detach(), tiles.table, tiles.max_seqlen_k, *numbers, softmax_scale, backend)


@torch.library.custom_op("moba_hf::attend_shared", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    tiles: Tensor,
    block_size: int,
    tile: int,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`SharedBackend.attend` as one operator."""
    return load_shared_backend(backend).attend(q, k, v, block_mask, tiles, block_size, tile, softmax_scale)


@_attend.register_fake
def _(q, k, v, block_mask, tiles, block_size, tile, softmax_scale, backend):  # type: ignore[no-untyped-def]
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op("moba_hf::attend_shared_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_mask: Tensor,
    tiles: Tensor,
    block_size: int,
    tile: int,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`SharedBackend.backward` as one operator; gradients are contiguous."""
    args = (block_mask, tiles, block_size, tile, softmax_scale)
    return load_shared_backend(backend).backward(grad_out, grad_lse, q, k, v, out, lse, *args)


@_attend_backward.register_fake
def _(grad_out, grad_lse, q, k, v, *_rest):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, block_mask, tiles, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, block_mask, tiles)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attend_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest)
    return *grads, *[None] * 6


_attend.register_autograd(_backward, setup_context=_save_for_backward)


def attend_shared_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    tiles: Tiles,
    block_size: int,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`SharedBackend.attend`, differentiable in q, k, v with the choice held."""
    args = (q, k, v, block_mask, tiles.table, block_size, tiles.tile, softmax_scale)
    if backend == "reference":  # plain differentiable torch: nothing between it and autograd
        return load_shared_backend(backend).attend(*args)
    return _attend(*args, backend)


def shared_attention_over(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    rule: SharedRule,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    backend: str = "auto",
    block_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Select, then attend, over checked `(batch, heads, length, dim)` tensors; returns `(out, lse)`."""
    name = choose_shared_backend(backend, q, k, v, rule)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else float(softmax_scale)
    tiles = Tiles.of(table, q, rule.tile, max_seqlen_q, max_seqlen_k)
    if block_mask is None:
        block_mask = select_shared_op(q, k, tiles, rule, scale, name)
    return attend_shared_op(q, k, v, block_mask, tiles, rule.block_size, scale, name)
