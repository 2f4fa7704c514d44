"""Dense causal attention to compare with: torch's own, and that of other packages if installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moba_hf.bench.timing import median_ms

# `(q, k, v, causal)` over `(1, heads, length, dim)`; if causal, there are as many queries as keys.
Dense = Callable[[Tensor, Tensor, Tensor, bool], Any]
# Calls that take longer than this, in milliseconds, are timed once.
ONCE_ABOVE = 1000.0


def _torch(backend: SDPBackend) -> Dense:
    def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )

    return dense


def _package(function: Callable[..., Any]) -> Dense:
    return lambda q, k, v, causal: function(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal
    )


def implementations(packages: bool = True) -> dict[str, Dense]:
    """Dense attention by short name; "fa2" and "cudnn" are torch's.

    Args:
        packages: also return "flash_attn" (flash-attn 2) and "fa4" (flash-attn 4), if installed.
    """
    found = {"fa2": _torch(SDPBackend.FLASH_ATTENTION), "cudnn": _torch(SDPBackend.CUDNN_ATTENTION)}
    for name, module in (("flash_attn", "flash_attn"), ("fa4", "flash_attn.cute")) if packages else ():
        with suppress(ImportError, AttributeError):
            found[name] = _package(import_module(module).flash_attn_func)
    return found


def versions() -> Iterator[str]:
    """Names and versions of the libraries compared with."""
    yield f"torch {torch.__version__}"
    yield f"cuDNN {torch.backends.cudnn.version()}"
    for package in ("triton", "flash-attn", "flash-attn-4"):
        with suppress(PackageNotFoundError):
            yield f"{package} {version(package)}"


def times(q: Tensor, k: Tensor, v: Tensor, found: dict[str, Dense], repeats: int) -> dict[str, float | None]:
    """Milliseconds of each implementation on packed `(length, heads, dim)` tensors; None if it fails."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return {name: _ms(name, partial(dense, q, k, v, True), repeats) for name, dense in found.items()}


def sliced_times(
    q: Tensor, k: Tensor, v: Tensor, found: dict[str, Dense], repeats: int, parts: int
) -> dict[str, float | None]:
    """Like `times`, but measured on the last `1 / parts` of the queries and scaled by (query, key) pairs.

    Takes two calls: the slice against all earlier keys, without a causal mask, and the slice against itself,
    with one. Merging the two results is not timed. Both simplifications favour dense attention.
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    length = q.shape[2]
    rows = length // parts
    early = length - rows
    tail = q[:, :, early:]
    scale = length * (length + 1) / (2 * rows * early + rows * (rows + 1))
    results: dict[str, float | None] = {}
    for name, dense in found.items():
        before = _ms(name, partial(dense, tail, k[:, :, :early], v[:, :, :early], False), repeats)
        end = _ms(name, partial(dense, tail, k[:, :, early:], v[:, :, early:], True), repeats)
        results[name] = None if before is None or end is None else (before + end) * scale
    return results


def _ms(name: str, call: Callable[[], Any], repeats: int) -> float | None:
    try:
        return median_ms(call, repeats, budget=5.0, once_above=ONCE_ABOVE)
    except Exception as error:  # other packages may raise anything
        print(f"  {name} does not run: {(str(error) or type(error).__name__).splitlines()[0]}", flush=True)
        return None
