"""Choices forced on the kernels, so that small inputs reach rare paths."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

import triton

from moba_hf.kernels import tuning


def fewer_levels(levels: int) -> AbstractContextManager[object]:
    """The gates keep so many entries per class, so that more rows need the second kernel."""

    def gate_levels(count: int, max_blocks: int, width: int) -> tuple[int, bool]:
        return levels, levels >= min(count, triton.cdiv(max_blocks, width))

    return mock.patch.object(tuning, "gate_levels", gate_levels)
