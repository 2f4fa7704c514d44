"""Dtypes and precision that the reference and the torch paths share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are held in: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Runs the body without autocast and without TF32 or bf16 matmuls: scores decide a choice of blocks.

    The per-backend switches are used where torch has them (2.9): it refuses to read the older global one
    after they were set one by one.
    """
    switches: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    newer = all(hasattr(switch, "fp32_precision") for switch in switches)
    previous = [switch.fp32_precision for switch in switches] if newer else []
    older = "" if newer else torch.get_float32_matmul_precision()
    try:
        if newer:
            for switch in switches:
                switch.fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, value in zip(switches, previous, strict=False):
            switch.fp32_precision = value
        if not newer:
            torch.set_float32_matmul_precision(older)


def check_int(name: str, value: object, *, minimum: int) -> None:
    """Raises TypeError unless `value` is an int, ValueError where it is below `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def part_size(block_size: int) -> int:
    """Keys in one part of a block under the mass gate: 16 where that divides the block, else all of it."""
    return 16 if block_size % 16 == 0 else block_size


def spread_dtype(dtype: torch.dtype) -> torch.dtype:
    """What variances of keys and squares of queries are rounded to; bf16 for fp16, whose range they leave."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def default_scale(q: Tensor) -> float:
    """The usual factor of scores in the softmax, `head_dim ** -0.5`; the last dim of `q` is `head_dim`."""
    return float(q.shape[-1] ** -0.5)
