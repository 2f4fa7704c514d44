"""Kernel tests: under the interpreter in a process of their own, on a GPU, and compiled ahead of time.

`TRITON_INTERPRET=1` counts only when it is set before Triton is imported, and then holds for the whole
process, so `interpreted/` is collected only in a process started that way; `test_interpreted.py` starts one.
`TRITON_INTERPRET=1 pytest tests/kernels/interpreted` shows the tests one by one.
"""

from __future__ import annotations

import os

import pytest
import torch

collect_ignore: list[str] = []
if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore += [
        "test_interpreted.py",
        "test_kernels_aot.py",
        "test_kernels_gpu.py",
        "test_decode_gpu.py",
    ]
else:
    collect_ignore += ["interpreted"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = config.getoption("--slow", default=False)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and not slow:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
