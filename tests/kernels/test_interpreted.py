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
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


# A process for each of these lists, since half of a file's time went into imports.
FILES = sorted(str(x) for x in (TESTS / "kernels" / "interpreted").glob("test_*.py"))
LISTS = [FILES[i::3] for i in range(3)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("files", LISTS, ids=["+".join(Path(x).stem[17:] for x in files) for files in LISTS])
def test_kernels(files: list[str]) -> None:
    options = ("-n", "0") if importlib.util.find_spec("xdist") else ()
    said = run_interpreted("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, *files)
    assert " passed" in said


def test_benchmark_runs() -> None:
    program = "import sys, faster_interpreter, moba_hf_cli as cli; cli.main(sys.argv[1:])"
    assert "gate: green" in run_interpreted("-c", program, "bench", "--tiny")
