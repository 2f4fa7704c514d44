"""Dtypes, precision and checks of numbers that the reference and the torch paths share."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Runs the body without autocast and without TF32 or bf16 matmuls, because scores determine the choice.

    Only the state of this thread changes. If a setting of torch lowers the precision of fp32 matmuls on
    `device`, the matmuls of the body run in fp64 and are rounded to fp32.
    """
    exact = _Fp64Matmuls() if _lowers_matmuls(device) else nullcontext()
    with torch.autocast(device.type, enabled=False), exact:
        yield


def _lowers_matmuls(device: torch.device) -> bool:
    """Whether fp32 matmuls on `device` are computed in TF32 or bf16, by torch's settings."""
    backend = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device.type)
    if backend is None:
        return False
    switch = getattr(backend, "matmul", None)
    if switch is None or not hasattr(switch, "fp32_precision"):  # torch before 2.9
        return torch.get_float32_matmul_precision() != "highest"
    return switch.fp32_precision not in ("none", "ieee")


class _Fp64Matmuls(TorchDispatchMode):
    """Computes fp32 matrix products in fp64, only in the current thread."""

    # below autograd, as inside our operators, a mode sees matmul and einsum before they are decomposed
    _NAMES = ("matmul", "einsum", "linear", "mm", "bmm", "addmm", "baddbmm", "mv", "dot")
    _PRODUCTS = frozenset(getattr(torch.ops.aten, name) for name in _NAMES)
    # the same that write their result to the first argument
    _IN_PLACE: ClassVar[dict[Any, Any]] = {
        getattr(torch.ops.aten, f"{name}_"): getattr(torch.ops.aten, name) for name in ("addmm", "baddbmm")
    }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product_of = func.overloadpacket
        if product_of in self._IN_PLACE:
            product_of, result = self._IN_PLACE[product_of], args[0]
        elif product_of in self._PRODUCTS:
            result = kwargs.pop("out", None)
        else:
            return func(*args, **kwargs)
        product = product_of(*_widened(args), **kwargs)
        narrow = product.to(next(_tensors(args)).dtype)
        return narrow if result is None else result.copy_(narrow)


def _tensors(args: Any) -> Iterator[Tensor]:
    """Yields the tensors among arguments, including those in lists."""
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _widened(x: Any) -> Any:
    """Converts every fp32 tensor among arguments to fp64."""
    if isinstance(x, (list, tuple)):
        return [_widened(each) for each in x]
    return x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x


def masked_product(weights: Tensor, x: Tensor, hidden: Tensor | None) -> Tensor:
    """`weights (t, A, B) @ x (t, B, D)` without the terms in `hidden`, even if `x` is not finite there.

    Args:
        weights: `(t, A, B)`.
        x: `(t, B, D)`.
        hidden: bool `(t, A, B)`; None: no terms are hidden, or `x` is finite and hidden weights are 0.
    """
    if hidden is None:
        return torch.bmm(weights, x)
    result = torch.bmm(weights.masked_fill(hidden, 0.0), x.nan_to_num(0.0, 0.0, 0.0))
    seen = (~hidden).to(x.dtype)
    for odd, where in ((torch.nan, x.isnan()), (torch.inf, x == torch.inf), (-torch.inf, x == -torch.inf)):
        result += torch.where(torch.bmm(seen, where.to(x.dtype)) > 0, odd, 0.0)
    return result


def all_finite(*tensors: Tensor) -> bool:
    """Whether the sums of all tensors are finite, which implies that all elements are."""
    sums = [x.detach().sum(dtype=accumulate_dtype(x.dtype)) for x in tensors]
    return bool(torch.stack(sums).isfinite().all())


def has_tangent(*tensors: Tensor) -> bool:
    """Whether any of the tensors has a forward-mode AD tangent."""
    if torch.compiler.is_compiling():
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def plain_int(value: Any) -> Any:
    """`value` as an int if it is an integer of another type, such as numpy's; otherwise unchanged."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return operator.index(value)
    return value


def check_int(name: str, value: object, *, minimum: int) -> None:
    """Raises TypeError if `value` is not an int, ValueError if it is below `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def part_size(block_size: int) -> int:
    """Number of keys in a part of a block for the mass gate: 16 if that divides the block, else the block."""
    return 16 if block_size % 16 == 0 else block_size


def spread_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of variances of keys and squares of queries; bf16 for fp16, whose range they exceed."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def with_positive_scale(q: Tensor, softmax_scale: float) -> tuple[Tensor, float]:
    """Queries and a positive scale with the same scores, for kernels that take the maximum before scaling."""
    if softmax_scale > 0:
        return q, softmax_scale
    return (q * -1, -softmax_scale) if softmax_scale < 0 else (torch.zeros_like(q), 1.0)


def default_scale(q: Tensor) -> float:
    """The usual factor of scores in the softmax, `head_dim ** -0.5`; the last dim of `q` is `head_dim`."""
    return float(q.shape[-1] ** -0.5)
