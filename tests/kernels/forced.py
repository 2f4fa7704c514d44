"""Forces launch parameters, so that small inputs reach rare paths of the kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import triton

from moba_hf.kernels import tuning, tuning_gate


def fewer_levels(levels: int) -> AbstractContextManager[object]:
    """Makes the gates keep `levels` entries per class, so that more rows need the second kernel."""

    def gate_levels(count: int, max_blocks: int, width: int) -> tuple[int, bool]:
        return levels, levels >= min(count, triton.cdiv(max_blocks, width))

    return mock.patch.object(tuning_gate, "gate_levels", gate_levels)


def with_choices(**changes: Any) -> AbstractContextManager[object]:
    """Changes fields of `tuning.Choices` for every GPU."""
    original = tuning.choices
    return mock.patch.object(tuning, "choices", lambda one: replace(original(one), **changes))
