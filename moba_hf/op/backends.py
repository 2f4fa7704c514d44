"""The backend protocol, the two backends in plain torch, and the choice of a backend.

A backend is an object that implements the protocol `Backend`. To add one, write a class whose constructor
takes no arguments (it may raise ImportError), and add it to `moba_hf.op.backend_table`. Backends are called
through the torch operators in `moba_hf.op.operators`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from moba_hf.op.backend_table import BACKENDS, check_backend
from moba_hf.op.gates import Kept
from moba_hf.op.layer_rule import LayerConfig
from moba_hf.op.numerics import accumulate_dtype, full_precision
from moba_hf.op.registry import Registry
from moba_hf.op.sequences import Attended, Sequences, rows_of
from moba_hf.op.shared import SharedRule
from moba_hf.op.shared_backends import SharedKernels, SharedPortable, SharedReference


class CacheKernels(Protocol):
    """A backend's kernels for caches and for full attention of a few queries; none waits for the device.

    Attributes:
        max_append_rows: most rows (batch * heads * new tokens) that `append` supports.
        max_dense_queries: most queries per row that `dense_decode` supports.
    """

    max_append_rows: int
    max_dense_queries: int

    def append(
        self, keys: Tensor, values: Tensor, length: Tensor, key_states: Tensor, value_states: Tensor
    ) -> None:
        """Writes states `(batch, HK, new, dim)` after the first `length` (0-d) slots and updates `length`."""

    def update_means(
        self,
        means: Tensor,
        keys: Tensor,
        kv_start: Tensor | None,
        length: int | Tensor,
        behind: int,
        block_size: int,
    ) -> None:
        """Writes the means of the blocks that the last `behind` of `length` slots completed.

        Args:
            means: `(batch, HK, blocks + 1, D)`.
            keys: `(batch, HK, >= length, D)`.
        """

    def update_mass(
        self,
        kept: Tensor,
        keys: Tensor,
        kv_start: Tensor | None,
        length: int | Tensor,
        behind: int,
        block_size: int,
        rotary_pairs: str,
    ) -> None:
        """Like `update_means`, for the summaries `gates.KeptMass(rotary_pairs)`."""

    def summarizes(self, kept: Kept, head_dim: int, block_size: int) -> bool:
        """Whether there is a kernel for the summaries `kept`."""
        ...

    def takes(self, device: torch.device) -> bool:
        """Whether these kernels can run on `device`."""
        ...

    def row_bounds(self, given: Tensor, q_offset: int, q_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """Finds the sequences of a padded batch.

        Args:
            given: bool `(batch, >= q_offset + q_len)`, False for padding.
            q_offset: slot of the first query.
            q_len: queries per row.

        Returns:
            The sequence table, int32 `(batch, 5)`; the first real slots, int64 `(batch,)`; and whether a row
            has no hole, bool `(batch,)`.
        """
        ...

    def dense_decode(
        self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Full causal attention, one sequence per row; returns `out` and `lse` as `Backend.forward`."""
        ...


class Backend(Protocol):
    """One way to compute MoBA over strided `(batch, heads, length, dim)` tensors.

    Attributes:
        max_decode_queries: most queries per row that `decode` supports; 0: no `decode`.
        decode_gates: the gates that `decode` supports.
        differentiable: autograd can differentiate `forward`, so `backward` is not needed.
        cache: kernels for caches; None: torch operators are used.
        shared: implementation of the shared choice of blocks; None: not supported.
    """

    max_decode_queries: int
    decode_gates: tuple[str, ...]
    differentiable: bool
    cache: CacheKernels | None
    shared: SharedKernels | None

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, rule: LayerConfig | None) -> str | None:
        """Why these inputs are not supported, or None if they are; `rule` is None for full attention."""

    def select(
        self,
        q: Tensor,
        k: Tensor,
        sequences: Sequences,
        rule: LayerConfig,
        softmax_scale: float,
        block_means: Tensor | None,
    ) -> Tensor:
        """The choice, int32 `(batch, q_len, num_heads, topk)`, own block first, -1 last.

        Args:
            softmax_scale: for gates that use it.
            block_means: summaries from the cache for the rule's gate (`gates.Kept`), `(batch, num_kv_heads,
                blocks, width)`: usually means of each row's complete blocks (slots `[k_begin, k_end)`),
                followed by arbitrary values; one sequence per row, in order. None: there are none.
        """
        ...

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
        """`out (batch, q_len, num_heads, v_dim)`, `lse (batch, num_heads, q_len)` fp32 (fp64)."""
        ...

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor,
        saved: Attended,
        sequences: Sequences,
        block_size: int,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Contiguous gradients of q, k, v for a fixed choice."""
        ...

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_means: Tensor,
        sequences: Sequences,
        rule: LayerConfig,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor]:
        """`out` and `lse` as `forward`, for the few queries of a decode step, one sequence per row.

        Blocks are scored with `block_means`, as in `select`. Does not wait for the device.
        """
        ...


class ReferenceBackend:
    """`moba_hf.op.reference`, sequence by sequence."""

    max_decode_queries = 0
    decode_gates = ()
    differentiable = True
    cache = None
    shared = SharedReference()

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, rule: LayerConfig | None) -> str | None:
        return None

    def select(
        self,
        q: Tensor,
        k: Tensor,
        sequences: Sequences,
        rule: LayerConfig,
        softmax_scale: float,
        block_means: Tensor | None,
    ) -> Tensor:
        from moba_hf.op.reference import select_blocks_ref

        shape = (q.shape[0], q.shape[2], q.shape[1], rule.topk)
        result = torch.full(shape, -1, dtype=torch.int32, device=q.device)
        with full_precision(q.device):
            for at, (queries, keys) in _each_sequence(sequences.table, q, k):
                result[at] = select_blocks_ref(
                    queries,
                    keys,
                    **rule.to_dict(),
                    softmax_scale=softmax_scale,
                )  # the reference computes its own means
        return result

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
        from moba_hf.op.reference import attend_ref

        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        lse = torch.full(q.shape[:3], -torch.inf, dtype=accumulate_dtype(q.dtype), device=q.device)
        settings: dict[str, Any] = {"block_size": block_size, "softmax_scale": softmax_scale}
        with full_precision(q.device):
            for (row, part), (queries, keys, values) in _each_sequence(sequences.table, q, k, v):
                choice = block_indices[row, part]
                out[row, part], lse[row, :, part] = attend_ref(queries, keys, values, choice, **settings)
        return out, lse

    def backward(self, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError("the reference is differentiated by autograd")

    def decode(self, *_: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("the reference has no decode")


def _each_sequence(table: Tensor, q: Tensor, *kv: Tensor) -> Iterator[tuple[tuple[int, slice], list[Tensor]]]:
    """Yields for each sequence its `(batch row, query slice)` and its q, k, v as `(length, heads, dim)`."""
    for row, q_begin, q_end, k_begin, k_end in rows_of(table):
        parts = [q[row, :, q_begin:q_end], *(x[row, :, k_begin:k_end] for x in kv)]
        yield (row, slice(q_begin, q_end)), [x.transpose(0, 1) for x in parts]


class PortableBackend:
    """`moba_hf.op.portable` and `portable_decode`: pure torch on any device."""

    decode_gates: tuple[str, ...] = ("mean", "mass")
    differentiable = False
    cache = None
    shared: SharedKernels | None = SharedPortable()

    def __init__(self) -> None:
        from moba_hf.op import portable, portable_decode, portable_select

        self.max_decode_queries = portable_decode.MAX_QUERIES
        self._portable, self._decode, self._select = portable, portable_decode, portable_select

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, rule: LayerConfig | None) -> str | None:
        return None

    def select(
        self,
        q: Tensor,
        k: Tensor,
        sequences: Sequences,
        rule: LayerConfig,
        softmax_scale: float,
        block_means: Tensor | None,
    ) -> Tensor:
        return self._select.select(q, k, sequences.table, rule, softmax_scale, block_means)

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
        args = (q, k, v, block_indices, sequences.table)
        return self._portable.attend(*args, block_size=block_size, softmax_scale=softmax_scale)

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor,
        saved: Attended,
        sequences: Sequences,
        block_size: int,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        args = (grad_out, grad_lse, saved, sequences.table)
        return self._portable.attend_backward(*args, block_size=block_size, softmax_scale=softmax_scale)

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_means: Tensor,
        sequences: Sequences,
        rule: LayerConfig,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor]:
        return self._decode.decode(q, k, v, block_means, sequences.table, rule, softmax_scale)


# What "auto" tries before "portable", by device type. It never uses Triton's interpreter on CPU tensors.
_AUTO: dict[str, tuple[str, ...]] = {"cuda": ("triton",)}

_loaded = Registry()


def load_backend(name: str) -> Backend:
    """The backend `name`. Raises ValueError if it is unknown, ImportError if its package is missing."""
    backend: Backend = getattr(_loaded, _keep_backend(name))
    return backend


@torch.compiler.assume_constant_result
def _keep_backend(name: str) -> str:
    """Loads the backend `name`, outside the traced code."""
    check_backend(name)

    def load() -> Any:
        module, attribute = BACKENDS[name].split(":")
        return getattr(importlib.import_module(module), attribute)()

    return _loaded.keep(name, load)


def choose_backend(name: str, q: Tensor, k: Tensor, v: Tensor, rule: LayerConfig | SharedRule | None) -> str:
    """The backend that will run: for "auto" the fastest one that supports the inputs, else `name`.

    Args:
        rule: how blocks are chosen; None: full attention, for which torch ("portable") replaces a backend
            that does not support the inputs.

    Raises:
        ValueError: the backend `name` does not support the inputs, and there is a rule.
    """
    if name == "auto":
        for each in _AUTO.get(q.device.type, ()):
            if _why_not(each, q, k, v, rule) is None:
                return each
        return "portable"
    reason = _why_not(name, q, k, v, rule)
    if reason is None:
        return name
    if rule is None:
        return "portable"
    raise ValueError(f'backend "{name}" cannot run this: {reason}; backend="auto" picks one that can')


def cache_kernels(name: str, device: torch.device) -> CacheKernels | None:
    """The cache kernels of the backend `name` on `device`; None: use torch operators."""
    for each in _AUTO.get(device.type, ()) if name == "auto" else (name,):
        try:
            kernels = load_backend(each).cache
        except ImportError:
            continue
        if kernels is not None and kernels.takes(device):
            return kernels
    return None


def reads_chosen_only(name: str, rule: LayerConfig | SharedRule) -> bool:
    """Whether a decode step of the backend `name` reads only the keys of the blocks that it chose.

    That requires the summaries of a cache; without them a step reads all cached keys to score blocks.
    """
    backend = load_backend(name)
    if isinstance(rule, SharedRule):
        return backend.shared is not None and backend.shared.decodes
    return backend.max_decode_queries > 0 and rule.gate in backend.decode_gates


def _why_not(name: str, q: Tensor, k: Tensor, v: Tensor, rule: LayerConfig | SharedRule | None) -> str | None:
    """Why the backend `name` cannot run the inputs (also if its package is missing), or None."""
    try:
        backend = load_backend(name)
    except ImportError as error:
        return f"{error.name or error} is not installed"
    if isinstance(rule, SharedRule):
        if backend.shared is None:
            return "it cannot share a choice of blocks between queries (tile > 1)"
        return backend.shared.unsupported(q, k, v, rule)
    return backend.unsupported(q, k, v, rule)
