"""Kernel tests: under the interpreter in a process of their own, on a GPU, and compiled ahead of time.

`TRITON_INTERPRET=1` counts only when it is set before Triton is imported, and then holds for the whole
process, so `interpreted/` is collected only in a process started that way; `test_interpreted.py` starts one.
`TRITON_INTERPRET=1 pytest tests/kernels/interpreted` shows the tests one by one.
"""

from __future__ import annotations

import os

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
