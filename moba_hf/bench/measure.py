"""The benchmark: the correctness gate, then this machine's ceilings, then every row.

Times are medians of CUDA-event times; dense calls longer than a second are timed once. TFLOP/s count
4 * head_dim operations per attended (query, key) pair and head; masked work does not count. Speedups are
printed only if the gate is green.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moba_hf.bench import peers, report
from moba_hf.bench.rows import FIGURES, HEAD_DIM, ROWS, TINY, Figure, M, Row
from moba_hf.bench.stages import stage_times
from moba_hf.bench.timing import GIB, ceilings, median_ms
from moba_hf.op.checks import Case, assert_attention, assert_choice
from moba_hf.op.ops import moba_attention
from moba_hf.progress import print_beside, progress, progress_bar

# Where dense attention is too long to be timed whole, only the last 1 / PARTS of the queries are timed.
PARTS = 32
_ATTENTION = {"triton": "ms", "flash_attn": "flash_backend_ms"}


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        rows: names from `ROWS`, or from the figure's rows; empty: all of them.
        figure: a name from `FIGURES`, to draw instead of measuring `ROWS`; None: no figure.
        repeats: maximum number of runs that a median is taken over.
        stages: also time each stage.
        dense: also time the dense baselines.
        dense_limit: the longest dense baseline, in tokens.
        flash: also check and time the backend "flash_attn".
        workspace: size of the forward's workspace in GiB; None: `budgets.WORKSPACE`.
        tiny: run only the correctness gate, on a tiny case; works on a CPU too, with TRITON_INTERPRET=1.
        out: folder for the results.
    """

    rows: Sequence[str] = ()
    figure: str | None = None
    repeats: int = 20
    stages: bool = True
    dense: bool = True
    dense_limit: int = M
    flash: bool = False
    workspace: float | None = None
    tiny: bool = False
    out: Path = Path("bench_results")

    def __post_init__(self) -> None:
        if self.figure is not None and self.figure not in FIGURES:
            raise ValueError(f"unknown figure {self.figure!r}; known are {', '.join(FIGURES)}")
        figures = FIGURES[self.figure] if self.figure else ()
        known = [row.name for rows in ([x.rows for x in figures] or [ROWS]) for row in rows]
        for name in self.rows:
            if name not in known:
                raise ValueError(f"unknown row {name!r}; known are {', '.join(known)}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Attributes:
        problems: what the correctness gate found wrong; none: it was green.
        machine: device, versions and ceilings in one line; "" for the tiny case.
        results: a line per row, the columns of the CSV file.
    """

    problems: tuple[str, ...]
    machine: str = ""
    results: tuple[dict[str, Any], ...] = ()

    @property
    def green(self) -> bool:
        """Whether the correctness gate was."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"green": self.green, **asdict(self)}


def run(options: Options) -> Outcome:
    """Runs the benchmark, and prints and writes its results.

    Raises:
        ValueError: no GPU, unless `options.tiny` is set and Triton interprets its kernels.
    """
    from moba_hf.kernels import budgets
    from moba_hf.kernels.launch import INTERPRETED

    on_gpu = torch.cuda.is_available() and not INTERPRETED
    if not on_gpu and not (options.tiny and INTERPRETED):
        raise ValueError("no CUDA device: only --tiny runs here, with TRITON_INTERPRET=1")
    if options.tiny:
        problem = prove(TINY, device="cpu" if INTERPRETED else "cuda", head_dim=16)
        print("gate: green" if problem is None else f"gate: RED: {problem}")
        return Outcome(() if problem is None else (problem,))
    before = budgets.WORKSPACE
    if options.workspace is not None:
        budgets.WORKSPACE = int(options.workspace * GIB)
    try:
        return _run_figure(options) if options.figure is not None else _run_rows(options)
    finally:
        budgets.WORKSPACE = before


def prove(row: Row, backend: str = "triton", *, device: str = "cuda", head_dim: int = HEAD_DIM) -> str | None:
    """None if choice and attention under the row's rule are right at a small length, else what failed."""
    length = min(row.length, max(4096, 3 * row.topk * row.block_size // 2))
    case = Case(
        [(min(length, 1024), length), (100, 333)],
        num_heads=row.num_heads,
        num_kv_heads=row.num_kv_heads,
        head_dim=head_dim,
        block_size=row.block_size,
        topk=row.topk,
        dtype=torch.bfloat16,
        device=device,
        backend=backend,
    )
    try:
        choice = case.select()
        assert_choice(case, choice)
        out, _ = assert_attention(case, choice)
        if not torch.equal(case.attend(case.select())[0], out):
            raise AssertionError("two runs differ")
    except Exception as error:  # any exception counts as a failed check
        return f"{row.name}, {backend}: {' '.join(str(error).split())[:300]}"
    return None


def inputs(row: Row, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """Packed bf16 q, k, v, random normal."""
    torch.manual_seed(0)
    shapes = [(row.length, heads, HEAD_DIM) for heads in (row.num_heads, row.num_kv_heads, row.num_kv_heads)]
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
    return q, k, v


def attended_pairs(row: Row) -> tuple[int, int]:
    """(query, key) pairs attended in the own blocks and in the chosen blocks, summed over all heads."""
    full, rest = divmod(row.length, row.block_size)
    own = full * row.block_size * (row.block_size + 1) // 2 + rest * (rest + 1) // 2
    chosen = sum(min(i, row.topk - 1) * row.block_size for i in range(full))
    chosen += min(full, row.topk - 1) * rest
    return own * row.num_heads, chosen * row.block_size * row.num_heads


def _run_rows(options: Options) -> Outcome:
    rows = [row for row in ROWS if not options.rows or row.name in options.rows]
    backends = ("triton", "flash_attn") if options.flash else ("triton",)
    problems = _gate(rows, backends)
    limits = ceilings(options.repeats)
    known: dict[tuple[int, int, int], dict[str, float | None]] = {}
    results: list[dict[str, Any]] = []
    with progress_bar("rows", len(rows), " rows") as bar:
        for row in rows:
            bar.set_description(row.name)
            result = _measure(row, options, limits, backends, known)
            if not problems:
                result |= _speedup(result)
            results.append(result)
            report.write_csv(results, options.out / "bench_kernels.csv")
            print_beside(bar, report.brief(result))
            bar.update(1)
            torch.cuda.empty_cache()
    machine = _header(limits, problems)
    report.write_rows(results, machine, options.out, green=not problems)
    return Outcome(tuple(problems), machine, tuple(results))


def _gate(rows: Sequence[Row], backends: Sequence[str]) -> list[str]:
    """Runs the correctness gate, prints each failure and returns them."""
    cases = [(row, name) for row in rows for name in backends]
    proved = [prove(row, name) for row, name in progress(cases, "correctness", " rows")]
    found = [problem for problem in proved if problem is not None]
    for problem in found:
        print(f"gate: RED: {problem}")
    torch.cuda.empty_cache()
    return found


def _header(limits: dict[str, float], problems: Sequence[str]) -> str:
    return (
        f"{torch.cuda.get_device_name()}, {', '.join(peers.versions())}; bf16, head_dim {HEAD_DIM}, batch 1; "
        f"ceilings {limits['matmul_tflops']:.0f} TFLOP/s, {limits['copy_tbps']:.2f} TB/s; "
        f"correctness gate {'RED' if problems else 'green'}"
    )


def _measure(
    row: Row,
    options: Options,
    limits: dict[str, float],
    backends: Sequence[str],
    known: dict[tuple[int, int, int], dict[str, float | None]],
) -> dict[str, Any]:
    """One line of the results; `known` caches dense times by shape."""
    q, k, v = inputs(row)
    result: dict[str, Any] = {"row": row.name, "tokens": row.length}
    result |= {"heads": f"{row.num_heads}/{row.num_kv_heads}", "rule": f"{row.block_size}/{row.topk}"}
    for backend in backends:
        result |= _operator(row, backend, q, k, v, options.repeats)
    own, chosen = attended_pairs(row)
    result["tflops"] = 4 * HEAD_DIM * (own + chosen) / result["ms"] / 1e9
    if options.stages:
        result |= _stage_columns(row, q, k, v, result["ms"], limits)
    if options.dense and row.length <= options.dense_limit:
        shape = (row.length, row.num_heads, row.num_kv_heads)
        if shape not in known:
            repeats = max(2, options.repeats // 4)
            known[shape] = peers.times(q, k, v, peers.implementations(), repeats)
        result |= {f"{name}_ms": value for name, value in known[shape].items()}
    return result


def _operator(row: Row, backend: str, q: Tensor, k: Tensor, v: Tensor, repeats: int) -> dict[str, Any]:
    """Milliseconds of the whole operator, and for Triton its peak memory in addition to q, k, v and out."""
    rule: dict[str, Any] = {"block_size": row.block_size, "topk": row.topk, "backend": backend}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        ms = median_ms(lambda: moba_attention(q, k, v, **rule), repeats)
    except Exception as error:  # other packages may raise anything
        if backend == "triton":
            raise
        print(f"  backend {backend} does not run: {(str(error) or type(error).__name__).splitlines()[0]}")
        return {_ATTENTION[backend]: None}
    extra = torch.cuda.max_memory_allocated() - before - q.numel() * q.element_size()
    return {_ATTENTION[backend]: ms} | ({"peak_gib": extra / GIB} if backend == "triton" else {})


def _stage_columns(
    row: Row, q: Tensor, k: Tensor, v: Tensor, ms: float, limits: dict[str, float]
) -> dict[str, float]:
    """Milliseconds of each stage, and the share of this machine's ceilings that the larger ones reach."""
    rule: dict[str, Any] = {"block_size": row.block_size, "topk": row.topk, "backend": "triton"}
    times = stage_times(lambda: moba_attention(q, k, v, **rule), 1 if ms > 100 else 4)
    result = {f"{name}_ms": value for name, value in times.items()}
    own, chosen = attended_pairs(row)
    scores = row.num_heads * row.length**2 / 2 / row.block_size
    work = {
        "gate": 2 * HEAD_DIM * scores,
        "own": 4 * HEAD_DIM * own,
        "routed": 4 * HEAD_DIM * chosen,
    }
    for name, flops in work.items():
        if not times[name]:
            continue
        result[f"{name}_tflops"] = flops / times[name] / 1e9
        result[f"{name}_of_ceiling"] = result[f"{name}_tflops"] / limits["matmul_tflops"]
    moved = {
        "means": k.numel() * 2,
        "merge": row.length * row.num_heads * ((row.topk + 1) * HEAD_DIM * 2 + row.topk * 6),
    }
    for name, count in moved.items():
        if not times[name]:
            continue
        result[f"{name}_gbps"] = count / times[name] / 1e6
        result[f"{name}_of_ceiling"] = result[f"{name}_gbps"] / 1e3 / limits["copy_tbps"]
    return result


def _speedup(result: dict[str, Any]) -> dict[str, Any]:
    """The best dense time divided by the operator's; empty without a dense time."""
    names = [name for name in ("fa2", "cudnn", "flash_attn", "fa4") if result.get(f"{name}_ms")]
    if not names:
        return {}
    best = min(names, key=lambda name: float(result[f"{name}_ms"]))
    return {"best_dense": best, "speedup": result[f"{best}_ms"] / result["ms"]}


def _run_figure(options: Options) -> Outcome:
    assert options.figure is not None
    figures = FIGURES[options.figure]
    if options.rows:
        figures = tuple(replace(x, rows=tuple(y for y in x.rows if y.name in options.rows)) for x in figures)
        figures = tuple(x for x in figures if x.rows)
    problems = _gate([row for figure in figures for row in (figure.rows[0], figure.rows[-1])], ("triton",))
    limits = ceilings(options.repeats)
    lines: list[dict[str, Any]] = []
    points = [(figure, row) for figure in figures for row in figure.rows]
    with progress_bar("points", len(points), " points") as bar:
        for figure, row in points:
            bar.set_description(f"{figure.name}, {row.name}")
            line = _figure_line(figure, row, options)
            if not problems:
                line |= {
                    f"over_{name}": line[f"{name}_ms"] / line["ms"]
                    for name in ("fa2", "cudnn")
                    if line.get(f"{name}_ms")
                }
            lines.append(line)
            report.write_csv(lines, options.out / f"bench_{options.figure}.csv")
            print_beside(bar, report.brief(line))
            bar.update(1)
            torch.cuda.empty_cache()
    machine = _header(limits, problems)
    report.write_figure(options.figure, figures, lines, machine, options.out, not problems)
    return Outcome(tuple(problems), machine, tuple(lines))


def _figure_line(figure: Figure, row: Row, options: Options) -> dict[str, Any]:
    """One point of a figure: the operator, and dense attention over all queries or over the last ones."""
    q, k, v = inputs(row)
    line: dict[str, Any] = {"figure": figure.name, "row": row.name, "tokens": row.length}
    line |= {"heads": f"{row.num_heads}/{row.num_kv_heads}", "rule": f"{row.block_size}/{row.topk}"}
    rule: dict[str, Any] = {"block_size": row.block_size, "topk": row.topk, "backend": "triton"}
    line["ms"] = median_ms(lambda: moba_attention(q, k, v, **rule), options.repeats, budget=1.0)
    own, chosen = attended_pairs(row)
    line["tflops"] = 4 * HEAD_DIM * (own + chosen) / line["ms"] / 1e9
    if not options.dense:
        return line
    found = peers.implementations(packages=False)
    repeats = max(2, options.repeats // 4)
    if row.length < figure.slice_from:
        line["dense"] = "whole"
        line |= {f"{name}_ms": ms for name, ms in peers.times(q, k, v, found, repeats).items()}
    if row.length >= figure.slice_from or (row.length * 2 >= figure.slice_from and row.num_heads == 1):
        sliced = peers.sliced_times(q, k, v, found, 1, PARTS)
        if row.length >= figure.slice_from:
            line["dense"] = f"last 1/{PARTS} of the queries, scaled by pairs"
            line |= {f"{name}_ms": ms for name, ms in sliced.items()}
        else:  # shows how well scaling does where the full time is known
            line |= {f"{name}_scaled_ms": ms for name, ms in sliced.items()}
    return line
