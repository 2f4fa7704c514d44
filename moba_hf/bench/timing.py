"""GPU timing, and the highest rates that the GPU reaches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

GIB = 1 << 30
# Number of matrix products, about 0.2 s in all, that keep the GPU busy while the host prepares a call.
_HEAD_START = 150


def median_ms(
    call: Callable[[], Any], repeats: int, *, budget: float = 20.0, once_above: float | None = None
) -> float:
    """Median milliseconds of `call` by CUDA events, from at most `repeats` runs and about `budget` seconds.

    The first run is a warm-up, unless it takes longer than `once_above` milliseconds: then it is the result.
    Without a GPU, nothing is measured: the call runs once and 1.0 is returned.
    """
    if not torch.cuda.is_available():
        call()
        return 1.0
    first = elapsed_ms(call, head_start=once_above is not None)
    if once_above is not None and first > once_above:
        return first
    times: list[float] = []
    start = time.monotonic()
    while len(times) < repeats and (len(times) < 1 or time.monotonic() - start < budget):
        times.append(elapsed_ms(call))
    return statistics.median(times)


def elapsed_ms(call: Callable[[], Any], *, head_start: bool = False) -> float:
    """GPU milliseconds of one run of `call`.

    Args:
        head_start: keep the GPU busy first, so that the host's launch overhead is not counted.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if head_start:
        a, b = (torch.ones(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for _ in range(_HEAD_START):
            torch.matmul(a, a, out=b)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def ceilings(repeats: int) -> dict[str, float]:
    """bf16 matmul TFLOP/s and copy TB/s (read plus write) that this GPU reaches now."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / median_ms(lambda: a @ b, repeats) / 1e9
    source = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / median_ms(lambda: target.copy_(source), repeats) / 1e9
    return {"matmul_tflops": matmul, "copy_tbps": copy}
