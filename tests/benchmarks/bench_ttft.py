"""Time to first token for a model of Llama-3.1-8B's shape: MoBA, dense attention, and no attention.

    python tests/benchmarks/bench_ttft.py                          # about two minutes on an H200
    python tests/benchmarks/bench_ttft.py --sdpa-limit 131072      # 40 seconds less
    python tests/benchmarks/bench_ttft.py --shared                 # under the shared choice, see ttft_shared
    python tests/benchmarks/bench_ttft.py --tiny                   # toy size, on a CPU

One prompt of random ids in one call, bf16, random weights drawn on the GPU, logits of the last position only;
the time ends when its argmax is on the host. MoBA is 128/8 in every layer; dense attention is torch's cuDNN;
"none" returns the queries as the output. The cache is kept if it fits. No time is printed before the operator
has passed the correctness gate. `attention` is the time inside the attention functions, by CUDA events.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers.utils import logging
from ttft_model import CUDA, attention_alone, build, cache_fits, first_token, register, reserve
from ttft_shared import DEFAULT_SHARES, shared_rows

from moba_hf.bench.measure import prove
from moba_hf.bench.rows import ROWS
from moba_hf.bench.timing import GIB

WARM_UP = 4096


@torch.no_grad()
def warm_up(model: Any, args: argparse.Namespace) -> None:
    """Runs a short forward of each kind, then attention alone at each length, which selects its kernels."""
    short = torch.randint(model.config.vocab_size, (1, min(WARM_UP, max(args.lengths))), device=model.device)
    for name in ("none", "moba", "sdpa"):
        first_token(model, short, name, True)
    for length in args.lengths:
        attention_alone(model, length, "moba")
        if length <= args.sdpa_limit:
            attention_alone(model, length, "sdpa")


def measure(model: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One line per length."""
    lines = []
    limits = {"none": args.none_limit, "moba": max(args.lengths), "sdpa": args.sdpa_limit}
    for length in args.lengths:
        torch.manual_seed(length)
        ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)
        line: dict[str, Any] = {"tokens": length, "cache": cache_fits(model, length)}
        for name, limit in limits.items():
            if length > limit:
                continue
            runs = args.runs if name == "moba" and length <= args.repeat_limit else 1
            tries = [first_token(model, ids, name, line["cache"]) for _ in range(runs)]
            line[name], line[f"{name}_attention"], _ = min(tries)
            line[f"{name}_all"] = " ".join(f"{one.seconds:.3f}" for one in tries)
        if CUDA:
            line["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()
        if "sdpa" in line:
            line["speedup"] = line["sdpa"] / line["moba"]
        print({key: round(x, 3) if isinstance(x, float) else x for key, x in line.items()}, flush=True)
        lines.append(line)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown of the results."""
    head = ["tokens", "cache kept", "dense (cuDNN)", "MoBA 128/8", "no attention", "dense / MoBA"]
    head += ["in MoBA's attention", "in dense attention"]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        seconds = [
            f"{line[name]:.2f} s" if name in line else "-"
            for name in ("sdpa", "moba", "none", "moba_attention", "sdpa_attention")
        ]
        speedup = f"{line['speedup']:.2f} x" if "speedup" in line else "-"
        kept = "yes" if line["cache"] else "no"
        rows.append([f"{line['tokens']:,}", kept, *seconds[:3], speedup, *seconds[3:]])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(lines: list[dict[str, Any]], text: str, folder: Path, name: str) -> int:
    """Writes and prints `NAME.csv` and `NAME.md`; returns the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(column for line in lines for column in line))
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="tokens of the prompts")
    parser.add_argument("--sdpa-limit", type=int, default=262_144, help="longest dense prompt")
    parser.add_argument("--none-limit", type=int, default=131_072, help="longest prompt without attention")
    parser.add_argument(
        "--runs",
        type=int,
        default=None,
        help="runs of MoBA, the best one counts: 2; with --shared, of each: 7 to 2",
    )
    parser.add_argument(
        "--repeat-limit", type=int, default=131_072, help="longest prompt with this many runs"
    )
    shared = parser.add_argument_group("the shared choice")
    shared.add_argument(
        "--shared",
        nargs="*",
        metavar="TOKENS=SHARE",
        help="time shared choices at these shares of the pairs; between them, shares are interpolated; "
        "default: " + " ".join(f"{length}={share}" for length, share in DEFAULT_SHARES.items()),
    )
    shared.add_argument(
        "--candidates",
        nargs="+",
        default=["default"],
        metavar="TILE/BLOCK/SAMPLE[/DENSE_BELOW]",
        help="the rules to time; default: the preset",
    )
    shared.add_argument("--none", action="store_true", help="also time the model without attention")
    parser.add_argument("--tiny", action="store_true", help="toy sizes; the code runs, nothing is measured")
    parser.add_argument("--out", type=Path, default=Path("bench_results"), help="folder for the results")
    return parser.parse_args()


def main() -> int:
    args = parse()
    logging.set_verbosity_error()
    if not args.tiny and not CUDA:
        print("no CUDA device: only --tiny runs here")
        return 2
    if args.shared is not None:
        lines, text = shared_rows(args)
        return write(lines, text, args.out, "bench_ttft_shared") if lines else 1
    args.lengths = args.lengths or [32_768, 131_072, 262_144, 524_288]
    args.runs = args.runs or 2
    if args.tiny:
        args.lengths = [1500, 3000]
    if CUDA:
        row = next(row for row in ROWS if row.name == "131K-128/8")
        problem = prove(row)
        if problem is not None:
            print(f"gate: RED: {problem}")
            return 1
    register()
    start = time.perf_counter()
    model = build(args.tiny)
    reserve()
    warm_up(model, args)
    print(f"built and warm after {time.perf_counter() - start:.1f} s", flush=True)
    lines = measure(model, args)
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    header = f"{name}, torch {torch.__version__}, Llama-3.1-8B's shape, random weights, bf16, one prompt"
    return write(lines, f"{header}\n\n{table(lines)}", args.out, "bench_ttft")


if __name__ == "__main__":
    raise SystemExit(main())
