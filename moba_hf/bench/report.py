"""Results as CSV, Markdown and pictures."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moba_hf.bench.rows import Figure
from moba_hf.bench.stages import STAGES
from moba_hf.evaluate.results import format_table

Result = dict[str, Any]
DENSE_NAMES = {
    "fa2": "FA2 (torch)",
    "cudnn": "cuDNN (torch)",
    "flash_attn": "flash-attn 2",
    "fa4": "flash-attn 4",
}


def brief(result: Result) -> str:
    """One line that sums up a result."""
    parts = [f"{result['row']:>16}", f"MoBA {number(result['ms'])} ms"]
    dense = [name for name in DENSE_NAMES if result.get(f"{name}_ms")]
    parts += [f"{name} {number(result[f'{name}_ms'])} ms" for name in dense]
    if result.get("speedup"):
        parts.append(f"{result['speedup']:.1f} x the best dense")
    return "  ".join(parts)


def number(value: Any) -> str:
    """`value` to three significant digits; "-" for None."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_rows(results: Sequence[Result], header: str, folder: Path, *, green: bool) -> None:
    """Writes `bench_kernels.csv`, `.md` and `.png` to `folder`; no picture if the gate was red."""
    write_csv(results, folder / "bench_kernels.csv")
    text = "\n\n".join([header, rows_table(results), *([stages_table(results)] if _staged(results) else [])])
    _write_text(text, folder / "bench_kernels.md")
    if green:
        _save("plot_bench_rows", folder / "bench_kernels.png", results)


def write_figure(
    name: str, figures: Sequence[Figure], lines: Sequence[Result], header: str, folder: Path, green: bool
) -> None:
    """Writes `bench_NAME.csv`, `.md` and `.png` to `folder`; no picture if the gate was red."""
    write_csv(lines, folder / f"bench_{name}.csv")
    parts = [header]
    for figure in figures:
        own = [line for line in lines if line["figure"] == figure.name]
        parts += [f"{figure.title}; the paper reports {figure.claim}.", figure_table(own)]
    _write_text("\n\n".join(parts), folder / f"bench_{name}.md")
    if green:
        panels = [(f.title, [x for x in lines if x["figure"] == f.name]) for f in figures]
        _save("plot_bench_figures", folder / f"bench_{name}.png", panels)


def rows_table(results: Sequence[Result]) -> str:
    """A table of the operator next to dense attention."""
    dense = [name for name in DENSE_NAMES if any(f"{name}_ms" in result for result in results)]
    flash = any("flash_backend_ms" in result for result in results)
    head = ["tokens", "heads", "block/topk", "MoBA ms"]
    head += ["backend flash_attn ms"] * flash + [f"{DENSE_NAMES[name]} ms" for name in dense]
    head += ["over the best dense", "TFLOP/s", "GiB"]
    lines = []
    for result in results:
        line = [f"{result['tokens']:,}", result["heads"], result["rule"], number(result["ms"])]
        line += [number(result.get("flash_backend_ms"))] * flash
        line += [number(result.get(f"{name}_ms")) for name in dense]
        speedup = result.get("speedup")
        line += ["-" if speedup is None else f"{speedup:.1f} x", number(result["tflops"])]
        lines.append([*line, number(result.get("peak_gib"))])
    return format_table([head, *lines])


def stages_table(results: Sequence[Result]) -> str:
    """A table of each stage's milliseconds and its share of this machine's ceilings."""
    rates = ("means", "gate", "own", "routed", "merge")
    head = ["row", *(f"{name} ms" for name in STAGES), *(f"{name} of ceiling" for name in rates)]
    lines = [
        [
            result["row"],
            *(number(result[f"{name}_ms"]) for name in STAGES),
            *(_share(result.get(f"{name}_of_ceiling")) for name in rates),
        ]
        for result in results
        if "gate_ms" in result
    ]
    return format_table([head, *lines])


def figure_table(lines: Sequence[Result]) -> str:
    """A table of one figure's points."""
    head = [
        "tokens",
        "block/topk",
        "MoBA ms",
        "FA2 ms",
        "cuDNN ms",
        "over FA2",
        "over cuDNN",
        "dense measured on",
    ]
    rows = []
    for line in lines:
        over = [line.get(f"over_{name}") for name in ("fa2", "cudnn")]
        row = [
            f"{line['tokens']:,}",
            line["rule"],
            *(number(line.get(x)) for x in ("ms", "fa2_ms", "cudnn_ms")),
        ]
        note = line.get("dense", "-")
        scaled = [line.get(f"{name}_scaled_ms") for name in ("fa2", "cudnn")]
        if any(scaled):
            note += f" (its last queries, scaled, give {' and '.join(number(x) for x in scaled)} ms)"
        rows.append([*row, *("-" if x is None else f"{x:.2f} x" for x in over), note])
    return format_table([head, *rows])


def _staged(results: Sequence[Result]) -> bool:
    return any("gate_ms" in result for result in results)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Writes all columns of all results. Called after each row, so that an interrupted run leaves results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for result in results for name in result))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(results)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text + "\n", encoding="utf-8")
    print(text)


def _save(name: str, path: Path, *args: Any) -> None:
    """Draws with `moba_hf.plot_bench` if matplotlib is installed."""
    from moba_hf import plot_bench

    try:
        getattr(plot_bench, name)(*args).savefig(path, dpi=160)
    except ImportError as error:
        print(f"no picture: {error}")
