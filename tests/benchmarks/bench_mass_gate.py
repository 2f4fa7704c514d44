"""Times the mass gate next to the mean gate, and the operator with both, after checking the choice.

    python tests/benchmarks/bench_mass_gate.py --out DIR      # about 60 s on a GPU, most of it compiling
    TRITON_INTERPRET=1 python tests/benchmarks/bench_mass_gate.py --tiny     # the code runs, on a CPU

Rows: 131,072 tokens of a model with 32 query and 8 kv heads of 128 dims, 8,192 of one with 9 and 3 of 64
(SmolLM2), bf16, random normal, a sink and a local block. Gates are timed with and without the block means or
summaries that they need (`means`). The tiles of the mass gate are tried one by one, each compiled in a
separate process before anything is timed; a tile that does not fit shared memory is named and left out. Then
one layer's attention is timed with both gates and dense (`scaled_dot_product_attention`). If a choice is
wrong, its time is not printed. The results are a table on stdout, and mass_gate.csv and mass_gate.md in
--out.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from moba_hf.evaluate.results import format_table
from moba_hf.kernels import tuning, tuning_gate
from moba_hf.kernels.block_mean import block_mean
from moba_hf.kernels.gate import gate, summarize_mass, summarize_means
from moba_hf.kernels.launch import INTERPRETED
from moba_hf.kernels.mass_summary import mass_summary
from moba_hf.kernels.tiling import head_split, make_tiling
from moba_hf.kernels.tuning import Tile
from moba_hf.op.checks import Case, assert_choice
from moba_hf.op.numerics import part_size
from moba_hf.op.ops import moba_attention
from moba_hf.op.sequences import batched_table

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
SINK, LOCAL = 1, 1
TILES = {
    "64x32 4w 2s": Tile(64, 32, 4, 2),
    "64x32 4w 1s": Tile(64, 32, 4, 1),
    "64x32 8w 2s": Tile(64, 32, 8, 2),
    "64x64 8w 2s": Tile(64, 64, 8, 2),
    "64x64 8w 1s": Tile(64, 64, 8, 1),
    "32x32 4w 2s": Tile(32, 32, 4, 2),
}


@dataclass(frozen=True)
class Row:
    """Tokens, rule, heads (query, kv) and head dim of one line."""

    name: str
    length: int
    block_size: int
    topk: int
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128


ROWS = (
    Row("131K 32/64", 1 << 17, 32, 64),
    Row("131K 64/16", 1 << 17, 64, 16),
    Row("8K 32/64", 1 << 13, 32, 64, (9, 3), 64),
    Row("8K 16/128", 1 << 13, 16, 128, (9, 3), 64),
)
TINY = Row("tiny", 300, 32, 4, (4, 2), 16)


def too_large(row: Row, tile: Tile) -> str | None:
    """None if `tile` fits this GPU's shared memory, else what it needs."""
    parts = row.block_size // part_size(row.block_size)
    memory = tuning_gate.mass_gate_memory(tile, row.head_dim, 2, parts)
    if tuning.fits(memory, tuning.capability(torch.device(DEVICE))):
        return None
    return f"needs {memory} bytes of shared memory, more than this GPU has"


def using(tile: Tile) -> Any:
    """A context in which the mass gate uses `tile`."""
    return mock.patch.object(tuning_gate, "gate_tile", return_value=tile)


def prove(row: Row, tile: Tile) -> str | None:
    """None if the mass gate of `row` passes the tests' check at a small length, else what failed."""
    length = min(row.length, 3 * row.topk * row.block_size)
    case = Case(
        [(min(length, 200), length), (40, 333)],
        num_heads=row.heads[0],
        num_kv_heads=row.heads[1],
        head_dim=row.head_dim,
        block_size=row.block_size,
        topk=row.topk,
        sink=SINK,
        local=LOCAL,
        dtype=torch.bfloat16,
        device=DEVICE,
        gate="mass",
    )
    try:
        with using(tile):
            assert_choice(case, case.select())
    except AssertionError as error:
        return f"{row.name}: {error}"
    return None


def median_ms(call: Callable[[], Any], repeats: int, budget: float = 3.0) -> float:
    """Median milliseconds of `call` by CUDA events, in about `budget` seconds."""
    call()
    if DEVICE == "cpu":
        return 1.0
    torch.cuda.synchronize()
    times: list[float] = []
    start = time.monotonic()
    while len(times) < repeats and (len(times) < 3 or time.monotonic() - start < budget):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


class Inputs:
    """Random q, k, v of a row, and the calls to time."""

    def __init__(self, row: Row):
        torch.manual_seed(0)
        self.row = row
        shapes = [(row.length, h, row.head_dim) for h in (row.heads[0], row.heads[1], row.heads[1])]
        self.q, self.k, self.v = (torch.randn(s, device=DEVICE, dtype=torch.bfloat16) for s in shapes)
        self.batched = [x.transpose(0, 1)[None] for x in (self.q, self.k)]
        shape = (1, row.length, row.heads[0], row.topk)
        self.choice = torch.full(shape, -1, dtype=torch.int32, device=DEVICE)

    def tiling(self, rows: int) -> Any:
        q, k = self.batched
        _, tokens = head_split(q.shape[1] // k.shape[1], rows)
        table = batched_table(1, self.row.length, self.row.length, q.device)
        sizes = {"block_size": self.row.block_size, "tile": tokens}
        return make_tiling(q, k, table, self.row.length, self.row.length, **sizes)

    def mean_gate(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """A call that computes the means, and a call of the gate alone."""
        (q, k), tiling = self.batched, self.tiling(tuning.choices_for(self.q).mean_gate.m)
        means = summarize_means(k, tiling)
        return lambda: block_mean(k, tiling), lambda: gate(q, means, tiling, self.choice, SINK, LOCAL)

    def mass_gate(self, tile: Tile) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """A call that computes the summaries, and a call of the gate alone."""
        (q, k), tiling, scale = self.batched, self.tiling(tile.m), self.q.shape[2] ** -0.5
        summary = summarize_mass(k, tiling, scale)

        def choose() -> None:
            with using(tile):
                gate(q, summary, tiling, self.choice, SINK, LOCAL)

        return lambda: mass_summary(k, tiling), choose

    def operator(self, name: str) -> Tensor:
        row = self.row
        rule = {"block_size": row.block_size, "topk": row.topk, "sink_blocks": SINK, "local_blocks": LOCAL}
        out = moba_attention(self.q, self.k, self.v, **rule, gate=name, backend="triton")
        assert isinstance(out, Tensor)
        return out

    def dense(self) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def compile_all(rows: Sequence[Row], tiles: Sequence[str]) -> None:
    """Fills Triton's cache by running every kernel once, in parallel processes."""
    fitting = [(row.name, name) for row in rows for name in tiles if not too_large(row, TILES[name])]
    jobs = [*((row.name, "mean") for row in rows), *fitting]
    running = [
        subprocess.Popen([sys.executable, __file__, "--compile", *job], stdout=subprocess.DEVNULL)
        for job in jobs
    ]
    for process in running:
        process.wait()


def measure(row: Row, repeats: int, tiles: Sequence[str]) -> list[dict[str, Any]]:
    """Results of one row: both gates, the mass gate's tiles, the whole operator with both gates, dense."""
    inputs, lines = Inputs(row), []

    def line(what: str, means: float | None, ms: float) -> None:
        lines.append({"row": row.name, "what": what, "means_ms": means, "ms": ms})
        print(lines[-1], flush=True)

    means, choose = inputs.mean_gate()
    line("mean gate", median_ms(means, repeats), median_ms(choose, repeats))
    for name in tiles:
        wrong = too_large(row, TILES[name])
        if wrong is not None:
            print(f"{row.name}: {name} left out: {wrong}", flush=True)
            continue
        wrong = prove(row, TILES[name])
        if wrong is not None:
            print(f"gate: RED: {name}: {wrong}", flush=True)
            continue
        means, choose = inputs.mass_gate(TILES[name])
        line(f"mass gate {name}", median_ms(means, repeats), median_ms(choose, repeats))
    for name in ("mean", "mass"):
        line(f"operator, {name}", None, median_ms(lambda name=name: inputs.operator(name), repeats))
    line("dense", None, median_ms(inputs.dense, repeats))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="maximum runs per median")
    parser.add_argument("--out", type=Path, default=Path("out/mass_gate"), help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="run everything once on a small case")
    parser.add_argument("--rows", nargs="*", choices=[r.name for r in ROWS], help="default: all")
    parser.add_argument("--tiles", nargs="*", choices=list(TILES), default=list(TILES), help="tiles to try")
    parser.add_argument("--compile-only", action="store_true", help="only fill Triton's cache")
    parser.add_argument("--compiled", action="store_true", help="Triton's cache is filled: time at once")
    parser.add_argument("--compile", nargs=2, metavar=("ROW", "TILE"), help="only compile this")
    args = parser.parse_args()
    if args.compile is not None:
        row = next(row for row in ROWS if row.name == args.compile[0])
        if args.compile[1] == "mean":
            Inputs(row).operator("mean")
        else:
            prove(row, TILES[args.compile[1]])
            Inputs(row).mass_gate(TILES[args.compile[1]])[1]()
        return 0
    rows = (TINY,) if args.tiny else tuple(r for r in ROWS if r.name in (args.rows or [r.name]))
    if DEVICE == "cpu" and not args.tiny:
        print("no CUDA device: only --tiny runs here, with TRITON_INTERPRET=1")
        return 2
    if DEVICE == "cuda" and not args.compiled:
        compile_all(rows, args.tiles)
    if args.compile_only:
        return 0
    lines = [line for row in rows for line in measure(row, args.repeats, args.tiles)]
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "mass_gate.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["row", "what", "means_ms", "ms"])
        writer.writeheader()
        writer.writerows(lines)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "interpreter"
    head = ["row", "what", "means ms", "ms"]
    cells = [[x["row"], x["what"], x["means_ms"] or "-", x["ms"]] for x in lines]
    text = f"{name}, torch {torch.__version__}\n\n{format_table([head, *cells])}"
    (args.out / "mass_gate.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
