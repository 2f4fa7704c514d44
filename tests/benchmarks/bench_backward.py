"""Times the Triton backward, by kernel and as a whole, next to dense attention, after a correctness check.

    python tests/benchmarks/bench_backward.py                        # five rows, on one GPU
    python tests/benchmarks/bench_backward.py --rows 131K-128/8 --variants
    python tests/benchmarks/bench_backward.py --dense                # with FlashAttention-2 and cuDNN
    TRITON_INTERPRET=1 python tests/benchmarks/bench_backward.py --tiny     # the gate alone, on a CPU

Steps: compile the kernels of all rows, one process each; run the correctness gate (at a small length by the
tests' own rule, at full length on sampled queries and blocks, and two runs bit for bit); then measure, per
row, forward, backward, both together, time by kernel, and memory. Times are medians of CUDA-event times;
times by kernel come from the profiler, for one backward. Forward and backward run through autograd from q, k,
v. `held_tflops` counts the matrix products of the routed dk and dv kernel. Speedups are printed only if the
gate is green. Results go to CSV and Markdown files in `--out`.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moba_hf.bench.measure import inputs
from moba_hf.bench.rows import HEAD_DIM, K, Row
from moba_hf.bench.timing import GIB, median_ms
from moba_hf.config import LayerConfig
from moba_hf.kernels import attend, attend_backward, select_blocks, tuning_backward
from moba_hf.kernels.tuning import Tile
from moba_hf.kernels.tuning_backward import BackwardTiles
from moba_hf.op.checks import Case, assert_gradients
from moba_hf.op.ops import moba_attention
from moba_hf.op.sequences import Attended, Sequences, batched_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = (
    Row("32K-128/8", 32 * K, 32, 8, 128, 8),
    Row("131K-128/8", 128 * K, 32, 8, 128, 8),
    Row("131K-512/3", 128 * K, 32, 8, 512, 3),
    Row("131K-512/8", 128 * K, 32, 8, 512, 8),
    Row("131K-4096/12", 128 * K, 32, 8, 4096, 12),
)
# Milliseconds of forward plus backward: the goal to reach, and the goal to aim for.
GOALS = {
    "32K-128/8": (14, 9),
    "131K-128/8": (50, 34),
    "131K-512/3": (44, 30),
    "131K-512/8": (120, 85),
    "131K-4096/12": (850, 620),
}
TINY = Row("tiny", 96, 4, 2, 16, 3)


def variants(row: Row) -> dict[str, BackwardTiles]:
    """Tiles to compare; a variant changes several kernels at once, since each kernel is timed separately."""
    base = tuning_backward.backward_tiles((HEAD_DIM, HEAD_DIM), 2, row.block_size, (9, 0))
    if row.block_size <= 128:
        return {
            "tuned": base,
            "own 32": replace(base, own=Tile(32, 128, 8, 3)),
            "held s5, own s2": replace(base, held=Tile(64, 128, 8, 5), own=Tile(64, 128, 8, 2)),
        }
    return {
        "tuned": base,
        "held 128, own 64": replace(base, held=Tile(64, 128, 8, 3), own=Tile(64, 64, 4, 3)),
        "held s5, dq 128": replace(base, held=Tile(64, 64, 4, 5), dq=Tile(128, 64, 8, 3)),
    }


def problem_of(row: Row) -> tuple[tuple[Tensor, ...], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """The inputs of a row's backward, made by its forward, and the backward call."""
    q, k, v = (x.transpose(0, 1)[None] for x in inputs(row))
    sequences = Sequences(batched_table(1, row.length, row.length, q.device), row.length, row.length)
    choice = select_blocks(q, k, sequences, LayerConfig(row.block_size, row.topk))
    out, lse = attend(q, k, v, choice, sequences, row.block_size, HEAD_DIM**-0.5)
    grad_out, grad_lse = torch.randn_like(out), torch.zeros_like(lse)

    def call(**kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        saved = Attended(q, k, v, out, lse, choice)
        return attend_backward(grad_out, grad_lse, saved, sequences, row.block_size, HEAD_DIM**-0.5, **kwargs)

    return (grad_out, q, k, v, out, lse, choice), call


def prove(row: Row) -> str | None:
    """None if the row's gradients pass the tests' tolerance rule at a small length, else what failed."""
    tiny = row is TINY
    length = row.length if tiny else min(row.length, max(4096, 3 * row.topk * row.block_size // 2))
    case = Case(
        [(length if tiny else 512, length), (100, 333)],
        num_heads=4 if tiny or row.block_size > 1024 else 16,
        num_kv_heads=2 if tiny or row.block_size > 1024 else 4,
        head_dim=16 if tiny else HEAD_DIM,
        block_size=row.block_size,
        topk=row.topk,
        dtype=torch.bfloat16,
        device=DEVICE,
    )
    try:
        assert_gradients(case, case.select())
    except AssertionError as error:
        return f"{row.name} at {length}: {error}"
    return None


def prove_whole(row: Row) -> str | None:
    """None if sampled gradients at the row's length are right and two runs agree, else what failed."""
    (grad_out, q, k, v, out, lse, choice), call = problem_of(row)
    grads = call()
    if not all(torch.equal(a, b) for a, b in zip(grads, call(), strict=True)):
        return f"{row.name}: two runs differ"
    group, scale, size = row.num_heads // row.num_kv_heads, HEAD_DIM**-0.5, row.block_size
    for head in (0, row.num_heads - 1):
        kv = head // group
        for at in (0, size + 1, row.length // 3, row.length - 1):
            query = q[0, head, at].float()
            blocks = torch.tensor([b for b in choice[0, at, head].tolist() if b >= 0])
            keys = (blocks[:, None] * size + torch.arange(size)).flatten()
            keys = keys[keys <= at].to(q.device)
            delta = (grad_out[0, at, head].float() * out[0, at, head].float()).sum()
            p = (k[0, kv, keys].float() @ query * scale - lse[0, head, at]).exp()
            ds = p * (v[0, kv, keys].float() @ grad_out[0, at, head].float() - delta)
            truth = ds @ k[0, kv, keys].float() * scale
            error = (grads[0][0, head, at].float() - truth).abs().max()
            if not error <= 0.02 * truth.abs().max() + 1e-3:
                return f"{row.name}: dq of query {at}, head {head}: {float(error):.3g}"
    for kv in (0, row.num_kv_heads - 1):
        for block in (0, row.length // size // 2, row.length // size - 1):
            part = slice(block * size, (block + 1) * size)
            dk, dv = torch.zeros(2, size, HEAD_DIM, device=q.device).unbind(0)
            for head in range(kv * group, (kv + 1) * group):
                chosen = (choice[0, :, head] == block).any(1).nonzero()[:, 0]
                for rows in chosen.split(16 * K):
                    query, grad = q[0, head, rows].float(), grad_out[0, rows, head].float()
                    delta = (grad * out[0, rows, head].float()).sum(1, keepdim=True)
                    p = (query @ k[0, kv, part].float().T * scale - lse[0, head, rows, None]).exp()
                    p *= rows[:, None] >= torch.arange(part.start, part.stop, device=q.device)
                    dv += p.T @ grad
                    dk += (p * (grad @ v[0, kv, part].float().T - delta)).T @ query * scale
            for name, ours, truth in (("dk", grads[1], dk), ("dv", grads[2], dv)):
                error = (ours[0, kv, part].float() - truth).abs().max()
                if not error <= 0.02 * truth.abs().max() + 1e-3:
                    return f"{row.name}: {name} of block {block}, kv head {kv}: {float(error):.3g}"
    return None


def by_kernel(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each kernel in one `call`; kernels of others count as "torch"."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profile.key_averages():
        name = event.key.strip("_").removesuffix("_kernel") if event.key.startswith("_") else "torch"
        times[name] = times.get(name, 0.0) + event.self_device_time_total / 1e3
    return times


def whole(row: Row, repeats: int) -> dict[str, Any]:
    """Times of forward, backward and both through autograd, and the backward's extra memory."""
    q, k, v = (x.requires_grad_() for x in inputs(row))
    rule = {"block_size": row.block_size, "topk": row.topk}
    out = moba_attention(q, k, v, **rule)
    grad = torch.randn_like(out)

    def backward() -> None:
        torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    def both() -> None:
        torch.autograd.grad(moba_attention(q, k, v, **rule), (q, k, v), grad)

    result = {
        "backward": median_ms(backward, repeats, budget=2.0),
        "both": median_ms(both, repeats, budget=2.0),
    }
    with torch.no_grad():
        result["forward"] = median_ms(lambda: moba_attention(q, k, v, **rule), repeats, budget=2.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward()
    gradients = sum(x.numel() * x.element_size() for x in (q, k, v))
    return result | {"extra_gib": (torch.cuda.max_memory_allocated() - before - gradients) / GIB}


def measure(row: Row, args: argparse.Namespace, green: bool) -> dict[str, Any]:
    """One line of results: total times, times by kernel, memory, dense baselines."""
    reach, aim = GOALS.get(row.name, (0, 0))
    result = {"row": row.name, "reach": reach, "aim": aim, **whole(row, args.repeats)}
    (*_, choice), call = problem_of(row)
    result |= by_kernel(call)
    pairs = int((choice[..., 1:] >= 0).sum()) * row.block_size
    products = 5 if row.block_size <= 128 else 4
    result["held_tflops"] = 2 * HEAD_DIM * products * pairs / result["pair_gradients"] / 1e9
    if args.dense:
        result |= dense(row, max(2, args.repeats // 4))
        known = [result[x] for x in ("fa2", "cudnn") if result[x]]
        if green and known:
            result["speedup"] = min(known) / result["both"]
    return result


def dense(row: Row, repeats: int) -> dict[str, float | None]:
    """Milliseconds of forward and backward of torch's causal FlashAttention-2 and cuDNN attention."""
    q, k, v = (x.transpose(0, 1)[None] for x in inputs(row))
    k, v = (x.repeat_interleave(row.num_heads // row.num_kv_heads, 1) for x in (k, v))
    q, k, v = (x.contiguous().requires_grad_() for x in (q, k, v))
    grad = torch.randn_like(q)
    times: dict[str, float | None] = {}
    for name, backend in (("fa2", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):

        def call(backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(out, (q, k, v), grad)

        try:
            times[name] = median_ms(call, repeats, budget=6.0)
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}")
            times[name] = None
    return times


def compile_all(names: list[str]) -> None:
    """Compiles the kernels of rows and variants, one process each, as many at a time as memory allows."""
    most = int(torch.cuda.get_device_properties(0).total_memory // (12 * GIB))
    waiting, running = list(names), []
    while waiting or running:
        while waiting and len(running) < most:
            command = [sys.executable, __file__, "--compile", waiting.pop(0)]
            running.append(subprocess.Popen(command))
        running = [x for x in running if x.poll() is None]
        time.sleep(0.1)


def compile_one(name: str) -> None:
    """Compiles forward and backward of row `name`, or of its variant `name|variant`, without launching."""
    name, _, variant = name.partition("|")
    row = next(x for x in ROWS if x.name == name)
    run = triton.JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    with mock.patch.object(triton.JITFunction, "run", warm):
        _, call = problem_of(row)
        call(tiles=variants(row)[variant] if variant else None)
        if not variant:
            prove(row)  # compares values that were never computed


def table(results: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for result in results for name in result))

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(cell(result.get(name)) for name in names) + " |" for result in results]
    return "\n".join(lines)


def write(results: list[dict[str, Any]], header: str, folder: Path, name: str) -> None:
    """Prints the table, and writes it to `name.csv` and `name.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(x for result in results for x in result))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(results)
    text = f"{header}\n\n{table(results)}\n"
    (folder / f"{name}.md").write_text(text)
    print(text, flush=True)


def compare(row: Row) -> list[dict[str, Any]]:
    """Times by kernel of every variant of a row; "gate": its gradients equal those of the checked tiles."""
    _, call = problem_of(row)
    proven = call()
    lines = []
    for name, tiles in variants(row).items():
        line: dict[str, Any] = {"row": row.name, "variant": name}
        try:
            close = [
                (a - b).abs().max() <= 2**-6 * b.abs().max()
                for a, b in zip(call(tiles=tiles), proven, strict=True)
            ]
            line["gate"] = "green" if all(close) else "RED"
            line |= by_kernel(lambda tiles=tiles: call(tiles=tiles))  # type: ignore[misc]
        except Exception as error:  # a variant that does not fit the GPU must not end the run
            line["gate"] = str(error).splitlines()[0][:60]
        lines.append(line)
        print(line, flush=True)
    return lines


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", nargs="*", help=f"among {', '.join(row.name for row in ROWS)}; default: all"
    )
    parser.add_argument("--repeats", type=int, default=10, help="maximum runs per median")
    parser.add_argument("--dense", action="store_true", help="also time dense attention")
    parser.add_argument("--variants", action="store_true", help="also time all tiles of `variants`")
    parser.add_argument("--tiny", action="store_true", help="run only the correctness gate, on a tiny case")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("bench_results"), help="folder for the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.tiny:
        problem = prove(TINY)
        print("gate: green" if problem is None else f"gate: RED: {problem}")
        return 0 if problem is None else 1
    if DEVICE == "cpu":
        print("no CUDA device: only --tiny runs here, with TRITON_INTERPRET=1")
        return 2
    if args.compile:
        compile_one(args.compile)
        return 0
    start = time.monotonic()
    rows = [row for row in ROWS if not args.rows or row.name in args.rows]
    names = [row.name for row in rows]
    if args.variants:
        names += [f"{row.name}|{name}" for row in rows for name in list(variants(row))[1:]]
    compile_all(names)
    print(f"compiled: {time.monotonic() - start:.0f} s", flush=True)
    problems = [x for row in rows for x in (prove(row), prove_whole(row)) if x is not None]
    for problem in problems:
        print(f"gate: RED: {problem}", flush=True)
    header = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, head_dim {HEAD_DIM}, ms; "
        f"correctness gate {'RED' if problems else 'green'}"
    )
    print(f"{header} ({time.monotonic() - start:.0f} s)", flush=True)
    results = []
    for row in rows:
        results.append(measure(row, args, not problems))
        print(results[-1], flush=True)
        torch.cuda.empty_cache()
    write(results, header, args.out, "bench_backward")
    if args.variants:
        lines = [line for row in rows for line in compare(row)]
        write(lines, header, args.out, "bench_backward_variants")
    print(f"took {time.monotonic() - start:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
