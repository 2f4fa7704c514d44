"""The portable path against torch's dense attention, on the CPU.

    python tests/benchmarks/bench_portable.py [--tokens 32768]

Correctness is checked first: if it fails, no speed is printed and the exit status is 1. Then the median time
of both is measured in one run and, in a new process, the memory at twice the length: how far the peak
resident set rises while attention runs (Linux). 9 query and 3 kv heads, head_dim 64, blocks of 128, topk 8,
fp32.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from moba_hf import moba_attention, select_blocks
from moba_hf.op.reference import attend_ref, select_blocks_ref

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64
RULE = {"block_size": 128, "topk": 8}
TARGET_SPEEDUP = 4.0
TARGET_BYTES = 1.5e9


def inputs(tokens: int) -> list[torch.Tensor]:
    """Packed q, k, v in fp32."""
    torch.manual_seed(0)
    return [torch.randn(tokens, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]


def gate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: int = 24) -> list[str]:
    """What is wrong with the last `queries` queries; empty if all is right."""
    last = q[-queries:]
    got = select_blocks(last, k, **RULE, backend="portable").sort(2).values
    want = select_blocks_ref(last, k, **RULE)
    problems = []
    same = (got == want.sort(2).values).all(2).float().mean().item()
    if same < 0.99:  # scores may tie up to rounding
        problems.append(f"only {same:.1%} of the choices equal the reference's")
    out = moba_attention(last, k, v, **RULE, block_indices=want, backend="portable")
    exact, _ = attend_ref(last.double(), k.double(), v.double(), want, block_size=RULE["block_size"])
    error = (out - exact).abs().max().item()
    if not error < 1e-5:
        problems.append(f"the output is off by {error:.2g}")
    whole = moba_attention(q, k, v, **RULE, backend="portable")[-queries:]
    if not (whole - moba_attention(last, k, v, **RULE, backend="portable")).abs().max().item() < 1e-5:
        problems.append("the last queries give another result alone than among all")
    return problems


def seconds(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median wall time of each run; the runs alternate, so that other load affects all of them."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def resident_bytes(name: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, from Linux.

    The peak reported by `getrusage` includes that of the parent, which would hide what a new process adds.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def extra_memory(tokens: int) -> int:
    """Bytes by which the peak resident set rises above inputs and libraries, including the output."""
    q, k, v = inputs(tokens)
    warm = 4 * RULE["block_size"]
    moba_attention(q[:warm], k[:warm], v[:warm], **RULE, backend="portable")
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    moba_attention(q, k, v, **RULE, backend="portable")
    return resident_bytes("VmHWM") - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=32768, help="length of the timed sequence")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the median is reported")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(extra_memory(args.memory_of))
        return 0

    q, k, v = inputs(args.tokens)
    problems = gate(q, k, v)
    if problems:
        print("\n".join(f"WRONG: {problem}" for problem in problems), file=sys.stderr)
        return 1
    print("correct: choice, output and chunking agree with the reference")

    batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
    runs = [
        lambda: F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True),
        lambda: moba_attention(q, k, v, **RULE, backend="portable"),
    ]
    with torch.inference_mode():
        dense, sparse = seconds(runs, args.repeats)
    threads = torch.get_num_threads()
    print(f"{args.tokens} tokens, {threads} threads: dense {dense:.2f} s, portable {sparse:.2f} s")
    print(f"speedup {dense / sparse:.2f} (target {TARGET_SPEEDUP:g})")

    command = [sys.executable, __file__, "--memory-of", str(2 * args.tokens)]
    extra = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"{2 * args.tokens} tokens: {extra / 1e9:.2f} GB above inputs (target {TARGET_BYTES / 1e9:g})")
    return 0 if dense / sparse >= TARGET_SPEEDUP and extra <= TARGET_BYTES else 2


if __name__ == "__main__":
    sys.exit(main())
