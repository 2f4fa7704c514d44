"""Runs `interpreted/` in a process that imports Triton with its interpreter on."""

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
    """The output of a Python process with Triton's interpreter on."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.timeout(1800)  # all files took 409 s on a busy machine
@pytest.mark.parametrize(
    "file", sorted(x.name for x in (TESTS / "kernels" / "interpreted").glob("test_*.py"))
)
def test_kernels(file: str) -> None:
    path = str(TESTS / "kernels" / "interpreted" / file)
    options = ("-n", "0") if importlib.util.find_spec("xdist") else ()
    assert " passed" in run_interpreted("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, path)


def test_benchmark_runs() -> None:
    assert "gate: green" in run_interpreted("-m", "moba_hf_cli", "bench", "--tiny")
