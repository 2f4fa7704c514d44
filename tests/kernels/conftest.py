"""Kernel tests: under the interpreter in a separate process, on a GPU, and compiled ahead of time.

`TRITON_INTERPRET=1` must be set before Triton is imported and then applies to the whole process. So
`interpreted/` is collected only in a process that was started with it; `test_interpreted.py` starts one.
`TRITON_INTERPRET=1 pytest tests/kernels/interpreted` shows these tests one by one.
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
