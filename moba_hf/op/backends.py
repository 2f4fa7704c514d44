"""The table of backends, and the torch operators through which they run.

A backend is three functions over strided `(batch, heads, length, dim)` tensors and a sequence table (see
`moba_hf.op.sequences`), one that says what it cannot take, and perhaps one for decode steps. To add one,
write a loader that returns a `Backend` and put it in `BACKENDS`; loaders import lazily, so a missing package
never breaks the import.

`select_op`, `attend_op` and `decode_op` are `torch.library` operators with fake kernels and an explicit
backward, so `torch.compile` and `torch.export` see one opaque node each and autograd keeps only inputs,
output and lse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moba_hf.op.reference import accumulate_dtype


@dataclass(frozen=True)
class Backend:
    """One way to compute MoBA.

    Attributes:
        select: `(q, k, table, max_seqlen_q, max_seqlen_k, block_size, topk, sink_blocks, local_blocks,
            block_means, gate, softmax_scale)` -> int32 `(batch, q_len, num_heads, topk)`, own block first, -1
            last. `block_means` is None or what a cache keeps, `(batch, num_kv_heads, blocks, head_dim)`: the
            means of each row's complete blocks (of slots `[k_begin, k_end)`), then anything; one sequence per
            row, in order. `gate`: one of `moba_hf.config.GATES`; only "mass" reads `softmax_scale`.
        forward: `(q, k, v, block_indices, table, max_seqlen_q, max_seqlen_k, block_size, softmax_scale)` ->
            `out (batch, q_len, num_heads, v_dim)`, `lse (batch, num_heads, q_len)` fp32 (fp64).
        backward: `(grad_out, grad_lse, q, k, v, out, lse, *the rest as forward)` -> gradients of q, k, v.
        unsupported: `(q, k, v, block_size)` -> why these inputs cannot be taken, or None.
        decode: `(q, k, v, block_means, table, block_size, topk, sink_blocks, local_blocks, softmax_scale)` ->
            `out`, `lse` as forward, for the few queries of a decode step (at most `max_decode_queries`, one
            sequence per row, in order); it never waits for the device. None: select, then forward.
        max_decode_queries: the most queries per row that `decode` takes.
    """

    select: Callable[..., Tensor]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    unsupported: Callable[[Tensor, Tensor, Tensor, int], str | None]
    decode: Callable[..., tuple[Tensor, Tensor]] | None = None
    max_decode_queries: int = 0


def _load_portable() -> Backend:
    from moba_hf.op import portable
    from moba_hf.op import portable_decode as decode

    def select(q: Tensor, k: Tensor, table: Tensor, _mq: int, _mk: int, *rest: Any) -> Tensor:
        block_size, topk, sink, local, means, gate, scale = rest
        return portable.select(
            q,
            k,
            table,
            block_size=block_size,
            topk=topk,
            sink_blocks=sink,
            local_blocks=local,
            block_means=means,
            mass_scale=scale if gate == "mass" else None,
        )

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        *tensors, _mq, _mk, block_size, scale = args
        return portable.attend(*tensors, block_size=block_size, softmax_scale=scale)

    def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, _mq, _mk, block_size, scale = args
        return portable.attend_backward(*tensors, block_size=block_size, softmax_scale=scale)

    def decode_step(*args: Any) -> tuple[Tensor, Tensor]:
        *tensors, block_size, topk, sink, local, scale = args
        return decode.decode(
            *tensors,
            block_size=block_size,
            topk=topk,
            sink_blocks=sink,
            local_blocks=local,
            softmax_scale=scale,
        )

    return Backend(select, forward, backward, _takes_all, decode_step, decode.MAX_QUERIES)


def _load_reference() -> Backend:
    from moba_hf.op import reference

    def select(q: Tensor, k: Tensor, table: Tensor, _mq: int, _mk: int, *rest: Any) -> Tensor:
        block_size, topk, sink, local, _means, gate, scale = rest  # the truth takes its own means
        rule = {"block_size": block_size, "topk": topk, "sink_blocks": sink, "local_blocks": local}
        rule |= {"gate": gate, "softmax_scale": scale}
        result = torch.full(
            (q.shape[0], q.shape[2], q.shape[1], topk), -1, dtype=torch.int32, device=q.device
        )
        with reference.full_precision(q.device):
            for at, (queries, keys) in _each_sequence(table, q, k):
                result[at] = reference.select_blocks_ref(queries, keys, **rule)
        return result

    def forward(
        q: Tensor, k: Tensor, v: Tensor, choice: Tensor, table: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        _mq, _mk, block_size, scale = rest
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        lse = torch.full(q.shape[:3], -torch.inf, dtype=accumulate_dtype(q.dtype), device=q.device)
        with reference.full_precision(q.device):
            for (row, part), (queries, keys, values) in _each_sequence(table, q, k, v):
                out[row, part], lse[row, :, part] = reference.attend_ref(
                    queries, keys, values, choice[row, part], block_size=block_size, softmax_scale=scale
                )
        return out, lse

    def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError("the reference is differentiated by autograd")

    return Backend(select, forward, backward, _takes_all)


def _each_sequence(table: Tensor, q: Tensor, *kv: Tensor) -> Iterator[tuple[tuple[int, slice], list[Tensor]]]:
    """Per sequence: (batch row, query slice), and q, k, v of it as `(length, heads, dim)`."""
    for row, q_begin, q_end, k_begin, k_end in table.tolist():
        parts = [q[row, :, q_begin:q_end], *(x[row, :, k_begin:k_end] for x in kv)]
        yield (row, slice(q_begin, q_end)), [x.transpose(0, 1) for x in parts]


def _takes_all(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> None:
    return None


def _load_triton() -> Backend:
    """Triton kernels."""
    from moba_hf import kernels

    def select(*args: Any) -> Tensor:
        *rest, _means, gate, scale = args  # taken again by a kernel, in the layout that the gate reads
        by_gate: Callable[..., Tensor] = kernels.select_blocks
        if gate == "mass":
            by_gate = partial(kernels.select_blocks_by_mass, softmax_scale=scale)
        return by_gate(*rest)

    def decode_step(*args: Any) -> tuple[Tensor, Tensor]:
        q, k, v, means, table, block_size, topk, sink, local, scale = args
        choice = kernels.choose_blocks(q, means, table, k.shape[2], block_size, topk, sink, local)
        lengths = (q.shape[2], k.shape[2])
        return kernels.attend(q, k, v, choice, table, *lengths, block_size, scale, by_row=True)

    return Backend(
        select,
        kernels.attend,
        kernels.attend_backward,
        kernels.unsupported,
        decode_step,
        kernels.MAX_DECODE_QUERIES,
    )


def _load_flash_attn() -> Backend:
    """flash-attn's varlen functions; blocks are chosen by Triton where it runs, gradients are portable."""
    from moba_hf.op import flash

    varlen, portable = flash.load_varlen(), _load_portable()

    def select(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        gate = portable if _why_not("triton", q, k, k, rest[3]) else load_backend("triton")
        return gate.select(q, k, *rest)

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return flash.attend(varlen, *args, **kwargs)

    return Backend(select, forward, portable.backward, flash.unsupported)


BACKENDS: dict[str, Callable[[], Backend]] = {
    "reference": _load_reference,
    "portable": _load_portable,
    "triton": _load_triton,
    "flash_attn": _load_flash_attn,
}


# What "auto" tries before "portable", by device type. Triton's interpreter runs on CPU tensors by name only.
_AUTO: dict[str, tuple[str, ...]] = {"cuda": ("triton",)}


class _Loaded:
    """Backends as attributes: unlike those of a dict, a graph that is being traced sees new ones."""


_loaded: Any = _Loaded()


def check_backend(name: str) -> None:
    """Raises ValueError unless `name` is one of `BACKENDS`."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known are auto, {', '.join(BACKENDS)}")


def load_backend(name: str) -> Backend:
    """The backend `name`. Raises ValueError for an unknown one, ImportError when its package is missing."""
    _ensure_loaded(name)
    backend: Backend = getattr(_loaded, name)
    return backend


@torch._dynamo.assume_constant_result
def _ensure_loaded(name: str) -> bool:
    """Loads `name`, outside what is traced."""
    check_backend(name)
    if not hasattr(_loaded, name):
        setattr(_loaded, name, BACKENDS[name]())
    return True


def choose_backend(name: str, q: Tensor, k: Tensor, v: Tensor, block_size: int) -> str:
    """The backend that will run: `name` itself, checked, or for "auto" the fastest that takes the inputs."""
    if name == "auto":
        for each in _AUTO.get(q.device.type, ()):
            if _why_not(each, q, k, v, block_size) is None:
                return each
        return "portable"
    reason = _why_not(name, q, k, v, block_size)
    if reason is not None:
        raise ValueError(f'backend "{name}" cannot run this: {reason}; backend="auto" picks one that can')
    return name


def _why_not(name: str, q: Tensor, k: Tensor, v: Tensor, block_size: int) -> str | None:
    """Why the backend `name` cannot take the inputs, a missing package included, or None."""
    try:
        backend = load_backend(name)
    except ImportError as error:
        return f"{error.name or error} is not installed"
    return backend.unsupported(q, k, v, block_size)


@torch.library.custom_op("moba_hf::select_blocks", mutates_args=())
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
    backend: str,
    block_means: Tensor | None = None,
    gate: str = "mean",
    softmax_scale: float = 1.0,
) -> Tensor:
    """`Backend.select` as one operator."""
    rule = (block_size, topk, sink_blocks, local_blocks)
    rest = (block_means, gate, softmax_scale)
    return load_backend(backend).select(q, k, table, max_seqlen_q, max_seqlen_k, *rule, *rest)


@select_op.register_fake
def _(q, k, table, mq, mk, block_size, topk, *_rest):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], topk), dtype=torch.int32)


@torch.library.custom_op("moba_hf::decode", mutates_args=())
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
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`Backend.decode` as one operator, without gradients."""
    decode = load_backend(backend).decode
    assert decode is not None
    out, lse = decode(q, k, v, block_means, table, block_size, topk, sink_blocks, local_blocks, softmax_scale)
    return out.contiguous(), lse.contiguous()


@decode_op.register_fake
def _(q, k, v, *_rest):  # type: ignore[no-untyped-def]
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op("moba_hf::attend", mutates_args=())
def _attend(
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
    """`Backend.forward` as one operator."""
    return load_backend(backend).forward(
        q, k, v, block_indices, table, max_seqlen_q, max_seqlen_k, block_size, softmax_scale
    )


@_attend.register_fake
def _(q, k, v, block_indices, table, max_seqlen_q, max_seqlen_k, block_size, softmax_scale, backend):  # type: ignore[no-untyped-def]
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op("moba_hf::attend_backward", mutates_args=())
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
    args = (block_indices, table, max_seqlen_q, max_seqlen_k, block_size, softmax_scale)
    return load_backend(backend).backward(grad_out, grad_lse, q, k, v, out, lse, *args)


@_attend_backward.register_fake
def _(grad_out, grad_lse, q, k, v, *_rest):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, block_indices, table, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, block_indices, table)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attend_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest)
    return *grads, *[None] * 7


_attend.register_autograd(_backward, setup_context=_save_for_backward)


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
    """`Backend.forward`, differentiable."""
    args = (q, k, v, block_indices, table, max_seqlen_q, max_seqlen_k, block_size, softmax_scale)
    if backend == "reference":  # plain differentiable torch: nothing between it and autograd
        return load_backend(backend).forward(*args)
    return _attend(*args, backend)
