"""Runs `interpreted/` in a process in which Triton was imported with its interpreter on."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


TESTS = Path(__file__).parents[1]


def run_interpreted(*arguments: str) -> str:
    """What a Python process with Triton's interpreter on prints."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.timeout(1800)  # 409 seconds were seen for all files on a busy machine
@pytest.mark.parametrize(
    "file", sorted(x.name for x in (TESTS / "kernels" / "interpreted").glob("test_*.py"))
)
def test_kernels(file: str) -> None:
    path = str(TESTS / "kernels" / "interpreted" / file)
    options = ("-n", "0") if importlib.util.find_spec("xdist") else ()
    assert " passed" in run_interpreted("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, path)


def test_benchmark_runs() -> None:
    assert "gate: green" in run_interpreted("-m", "moba_hf_cli", "bench", "--tiny")
