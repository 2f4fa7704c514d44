"""Runs a job of `jobs.py` in several processes of one machine, as `torchrun` does, over gloo or NCCL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_ranks(*steps: str, ranks: int = 2, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs `jobs.py STEPS...` on `ranks` processes to the end, without checking the exit status."""
    return launch(str(HERE / "jobs.py"), *steps, ranks=ranks, timeout=timeout)


def launch(*program: str, ranks: int = 2, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs a program with its arguments under `torchrun` to the end."""
    paths = (HERE.parents[1], HERE.parent, os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*command, *program],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )


def assert_ranks(*steps: str, ranks: int = 2) -> None:
    """Runs steps that must succeed on every rank."""
    result = run_ranks(*steps, ranks=ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_done(result, *steps, ranks=ranks)


def assert_done(result: subprocess.CompletedProcess[str], *steps: str, ranks: int = 2) -> None:
    """Each step has ended on every rank."""
    output = result.stdout + result.stderr
    for step in steps:
        name = step.split("=")[0]
        for rank in range(ranks):
            assert f"done: {name} on rank {rank}" in result.stdout, output
