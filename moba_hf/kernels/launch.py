"""Shared by all kernel files: the interpreter switch, dot products, rounding, and the device of a launch.

If `TRITON_INTERPRET=1` is set before Triton is imported, kernels run in numpy on CPU tensors.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels.layout import Constant

INTERPRETED = bool(triton.knobs.runtime.interpret)
_UPCAST = Constant(INTERPRETED)
_NO_CHANGE = nullcontext()


def _let_interpreted_scalars_index() -> None:
    """Makes `range(n)` work for a run-time `n` under the interpreter with numpy 2.4 and later.

    Interpreted scalars are arrays with one element, for which numpy 2.4 made `int()` an error.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: object, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    _let_interpreted_scalars_index()


@triton.jit
def dot(a, b):
    """`a @ b` of the stored dtypes, accumulated in fp32, never TF32. The interpreter has no bf16 matmul."""
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def add_dot(total, a, b):
    """`total + a @ b`, computed like `dot`."""
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def narrow(x, like):
    """fp32 `x` rounded to nearest in the dtype of the pointer `like`; the interpreter would truncate bf16."""
    if _UPCAST:
        if like.dtype.element_ty == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(like.dtype.element_ty)


def head_dims(head_dim: int, v_dim: int) -> dict[str, int]:
    """The constants that a kernel takes for the head dims of keys and values, by name."""
    return {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded(head_dim),
        "V_DIM": v_dim,
        "PADDED_V": padded(v_dim),
    }


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Context that makes `x`'s GPU the current one, as kernel launches require; no effect for CPU tensors."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NO_CHANGE
    return torch.cuda.device(x.device)


def num_processors(x: Tensor) -> int:
    """Number of streaming multiprocessors of `x`'s GPU; 2 under the interpreter."""
    return _processors(x.device) if x.is_cuda else 2


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up. For the host: `triton.cdiv` can also run in kernels, which makes it slow."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two of at least `n`, for the host like `cdiv`."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


@cache
def padded(dim: int) -> int:
    """`dim` rounded up to a power of two, at least 16, the minimum of the matrix units."""
    return max(16, next_power_of_2(dim))


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
