"""Times the Triton forward, stage by stage and whole, beside dense attention, after proving it right.

    python tests/benchmarks/bench_kernels.py                       # every row of ROWS, on one GPU
    python tests/benchmarks/bench_kernels.py --rows 131K-128/8 --no-dense
    TRITON_INTERPRET=1 python tests/benchmarks/bench_kernels.py --tiny    # the gate alone, on a CPU

Order: correctness gate (the tests' own rules, on each row's heads, block size and topk), ceilings of this
machine in this run (bf16 matmul, copy), then per row the whole operator from q, k, v to out, its stages, and
torch's FlashAttention-2 and cuDNN on the same tensors. Medians of CUDA-event times. TFLOP/s count
4 * head_dim per attended (query, key) pair and head, masked work not included. Without a green gate no
speedup is printed. Results go to a CSV and a Markdown file.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from kernel_checks import Case, assert_attention, assert_choice

from moba_hf.kernels import tuning
from moba_hf.kernels.block_mean import block_mean
from moba_hf.kernels.gate import gate, head_split
from moba_hf.kernels.launch import INTERPRETED, padded
from moba_hf.kernels.merge import merge
from moba_hf.kernels.own import own_attention
from moba_hf.kernels.plan import make_plan
from moba_hf.kernels.routed import routed_attention
from moba_hf.kernels.routing import key_format, pair_keys, route
from moba_hf.ops import moba_attention
from moba_hf.sequences import batched_table

HEAD_DIM = 128
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
GIB = 1 << 30


@dataclass(frozen=True)
class Row:
    """One line of the table: tokens, heads, rule, and the milliseconds to reach and to aim for."""

    name: str
    length: int
    num_heads: int
    num_kv_heads: int
    block_size: int
    topk: int
    reach: float = 0.0
    aim: float = 0.0


K = 1 << 10
ROWS = (
    Row("32K-128/8", 32 * K, 32, 8, 128, 8, 5, 3.3),
    Row("131K-128/8", 128 * K, 32, 8, 128, 8, 16, 11.5),
    Row("131K-512/3", 128 * K, 32, 8, 512, 3, 10, 7.3),
    Row("131K-512/8", 128 * K, 32, 8, 512, 8, 26, 20),
    Row("131K-4096/12", 128 * K, 32, 8, 4096, 12, 150, 130),
    Row("131K-64/16", 128 * K, 32, 8, 64, 16, 38, 28),
    Row("1M-128/8", 1024 * K, 8, 2, 128, 8, 56, 40),
    Row("1M-512/3", 1024 * K, 8, 2, 512, 3, 25, 18),
    Row("1M-4096/12", 1024 * K, 8, 2, 4096, 12, 360, 315),
)
TINY = Row("tiny", 96, 4, 2, 16, 3)


def prove(row: Row, tiny: bool = False) -> str | None:
    """None if the row's gate and attention hold the tests' rules at a small length, else what failed."""
    length = row.length if tiny else min(row.length, max(4096, 3 * row.topk * row.block_size // 2))
    case = Case(
        [(min(length, 1024), length), (100, 333)],
        num_heads=row.num_heads,
        num_kv_heads=row.num_kv_heads,
        head_dim=16 if tiny else HEAD_DIM,
        block_size=row.block_size,
        topk=row.topk,
        dtype=torch.bfloat16,
        device=DEVICE,
    )
    try:
        choice = case.select()
        assert_choice(case, choice)
        out, _ = assert_attention(case, choice)
        assert torch.equal(case.attend(case.select())[0], out), "two runs differ"
    except AssertionError as error:
        return f"{row.name}: {error}"
    return None


def median_ms(call: Callable[[], Any], repeats: int, budget: float = 20.0) -> float:
    """Median milliseconds of `call` by CUDA events, at most `repeats` runs and about `budget` seconds."""
    if DEVICE == "cpu":  # --tiny: the code runs, nothing is measured
        call()
        return 1.0
    call()
    torch.cuda.synchronize()
    times: list[float] = []
    start = time.monotonic()
    while len(times) < repeats and (len(times) < 2 or time.monotonic() - start < budget):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def ceilings(repeats: int) -> dict[str, float]:
    """bf16 matmul TFLOP/s and copy TB/s (read plus written) of this GPU, now."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / median_ms(lambda: a @ b, repeats) / 1e9
    source = torch.empty(2 * GIB, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / median_ms(lambda: target.copy_(source), repeats) / 1e9
    return {"matmul_tflops": matmul, "copy_tbps": copy}


def inputs(row: Row) -> tuple[Tensor, Tensor, Tensor]:
    """Packed bf16 q, k, v, random normal."""
    torch.manual_seed(0)
    shapes = [(row.length, heads, HEAD_DIM) for heads in (row.num_heads, row.num_kv_heads, row.num_kv_heads)]
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes)
    return q, k, v


def attended_pairs(choice: Tensor, block_size: int) -> int:
    """(query, key) pairs that the choice `(1, q_len, H, K)`, own block first, attends, all heads together."""
    position = torch.arange(choice.shape[1], device=choice.device)
    own = int(((position % block_size) + 1).sum()) * choice.shape[2]
    return own + int((choice[..., 1:] >= 0).sum()) * block_size


def stages(row: Row, q: Tensor, k: Tensor, v: Tensor, repeats: int) -> dict[str, float]:
    """Milliseconds of each stage; stages that run per chunk are timed on the last, fullest, and scaled up."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    table = batched_table(1, row.length, row.length, q.device)
    scale, group = HEAD_DIM**-0.5, row.num_heads // row.num_kv_heads
    dims = (padded(HEAD_DIM), padded(HEAD_DIM))
    own_tile = tuning.own_tile(dims, 2, tuning.capability(q.device))
    tile, resident = tuning.routed_tile(dims, 2, row.block_size, tuning.capability(q.device))
    chunk_rows = tuning.chunk_rows(row.length, row.num_heads, row.topk - 1, HEAD_DIM, 2, tuning.WORKSPACE)
    _, tokens = head_split(group, own_tile.m)
    rule = {"block_size": row.block_size, "tile": tokens}
    plan = make_plan(q, k, table, row.length, row.length, **rule)
    chunked = make_plan(q, k, table, row.length, row.length, **rule, chunk_rows=chunk_rows)
    last = chunked.num_chunks - 1
    means = block_mean(k, plan)
    choice = torch.full((1, row.length, row.num_heads, row.topk), -1, dtype=torch.int32, device=q.device)
    gate(q, means, plan, choice, 0, 0)
    keys = pair_keys(choice, chunked, last, row.num_kv_heads)
    num_bins = row.num_kv_heads * chunked.num_blocks
    rows = tile.m * (tuning.RESIDENT_TILES if resident else 1)
    routes = route(keys, num_bins, rows)
    first = last * chunked.chunk_rows
    partial = torch.empty(*keys.shape, HEAD_DIM, dtype=q.dtype, device=q.device)
    partial_lse = torch.empty(keys.shape, device=q.device)
    out = torch.empty(1, row.length, row.num_heads, HEAD_DIM, dtype=q.dtype, device=q.device)
    lse = torch.empty(1, row.num_heads, row.length, device=q.device)
    no_bin = num_bins + key_format(num_bins)[1]

    def routed() -> None:
        routed_attention(q, k, v, chunked, routes, partial, partial_lse, first, scale, tile, resident)

    once = {
        "plan": lambda: make_plan(q, k, table, row.length, row.length, **rule),
        "means": lambda: block_mean(k, plan),
        "gate": lambda: gate(q, means, plan, choice, 0, 0),
    }
    per_chunk = {
        "own": lambda: own_attention(q, k, v, out, lse, chunked, last, scale, own_tile, False),
        "keys": lambda: pair_keys(choice, chunked, last, row.num_kv_heads),
        "route": lambda: route(keys, num_bins, rows),
        "routed": routed,
        "merge": lambda: merge(out, lse, partial, partial_lse, keys, no_bin, first),
    }
    share = row.length / keys.shape[0]
    times = {name: median_ms(call, repeats) for name, call in once.items()}
    times |= {name: median_ms(call, repeats) * share for name, call in per_chunk.items()}
    times["pairs"] = float(attended_pairs(choice, row.block_size))
    return times


def dense(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> dict[str, float | None]:
    """Milliseconds of torch's causal FlashAttention-2 and cuDNN attention; None where one does not run."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    results: dict[str, float | None] = {}
    for name, backend in (("fa2", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                results[name] = median_ms(
                    lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), repeats
                )
        except RuntimeError as error:  # noqa: PERF203
            print(f"  {name} does not run: {str(error).splitlines()[0]}")
            results[name] = None
    return results


def measure(row: Row, args: argparse.Namespace, green: bool) -> dict[str, Any]:
    """One line of the results."""
    q, k, v = inputs(row)
    result: dict[str, Any] = {"row": row.name, "reach_ms": row.reach, "aim_ms": row.aim}
    rule = {"block_size": row.block_size, "topk": row.topk, "backend": "triton"}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result["ms"] = median_ms(lambda: moba_attention(q, k, v, **rule), args.repeats)
    extra = torch.cuda.max_memory_allocated() - before - q.numel() * q.element_size()
    result["peak_gib"] = extra / GIB  # beyond q, k, v and out
    if not args.no_stages:
        times = stages(row, q, k, v, args.repeats)
        pairs = times.pop("pairs")
        result |= {f"{name}_ms": value for name, value in times.items()}
        result["tflops"] = 4 * HEAD_DIM * pairs / result["ms"] / 1e9
        scores = row.num_heads * row.length**2 / 2 / row.block_size
        result["gate_tflops"] = 2 * HEAD_DIM * scores / times["gate"] / 1e9
        result["means_gbps"] = k.numel() * 2 / times["means"] / 1e6
        merged = row.length * row.num_heads * ((row.topk + 1) * HEAD_DIM * 2 + row.topk * 6)
        result["merge_gbps"] = merged / times["merge"] / 1e6
    if not args.no_dense and row.length <= args.dense_limit:
        result |= {f"{name}_ms": value for name, value in dense(q, k, v, max(2, args.repeats // 4)).items()}
        known = [x for x in (result["fa2_ms"], result["cudnn_ms"]) if x]
        if green and known:
            result["speedup"] = min(known) / result["ms"]
    return result


def write(results: list[dict[str, Any]], header: str, folder: Path) -> None:
    """`bench_kernels.csv` and `.md` in `folder`."""
    names = list(dict.fromkeys(name for result in results for name in result))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "bench_kernels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(results)

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [header, "", "| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(cell(result.get(name)) for name in names) + " |" for result in results]
    text = "\n".join(lines)
    (folder / "bench_kernels.md").write_text(text + "\n")
    print(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", help=f"of {', '.join(row.name for row in ROWS)}; default: all")
    parser.add_argument("--repeats", type=int, default=20, help="most runs of a median")
    parser.add_argument("--no-stages", action="store_true", help="time the whole operator only")
    parser.add_argument("--no-dense", action="store_true", help="leave out the dense baselines")
    parser.add_argument("--dense-limit", type=int, default=256 * K, help="longest dense baseline, tokens")
    parser.add_argument("--workspace", type=float, help="GiB of the forward's workspace; default: tuning's")
    parser.add_argument("--tiny", action="store_true", help="only the correctness gate, on a tiny case")
    parser.add_argument("--out", type=Path, default=Path("bench_results"), help="folder of the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.tiny:
        problem = prove(TINY, tiny=True)
        stages(TINY, *inputs(TINY), repeats=1)
        print("gate: green" if problem is None else f"gate: RED: {problem}")
        return 0 if problem is None else 1
    if DEVICE == "cpu":
        print("no CUDA device: only --tiny runs here, with TRITON_INTERPRET=1")
        return 2
    if args.workspace is not None:
        tuning.WORKSPACE = int(args.workspace * GIB)
    rows = [row for row in ROWS if not args.rows or row.name in args.rows]
    problems = [problem for row in rows if (problem := prove(row)) is not None]
    for problem in problems:
        print(f"gate: RED: {problem}")
    limits = ceilings(args.repeats)
    header = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, head_dim {HEAD_DIM}; "
        f"ceilings {limits['matmul_tflops']:.0f} TFLOP/s, {limits['copy_tbps']:.2f} TB/s; "
        f"correctness gate {'RED' if problems else 'green'}"
    )
    results = []
    for row in rows:
        results.append(measure(row, args, not problems))
        print(results[-1], flush=True)
        torch.cuda.empty_cache()
    write(results, header, args.out)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
