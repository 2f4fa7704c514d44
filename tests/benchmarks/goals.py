"""Compares a run of `moba-hf bench` on one H200 with the goals for the kernels.

moba-hf bench --out results && python tests/benchmarks/goals.py results/bench_kernels.csv
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

# Milliseconds of the whole operator by row: the goal to reach, and the goal to aim for.
GOALS = {
    "32K-128/8": (5.0, 3.3),
    "131K-128/8": (16.0, 11.5),
    "131K-512/3": (10.0, 7.3),
    "131K-512/8": (26.0, 20.0),
    "131K-4096/12": (150.0, 130.0),
    "131K-64/16": (38.0, 28.0),
    "1M-128/8": (56.0, 40.0),
    "1M-512/3": (25.0, 18.0),
    "1M-4096/12": (360.0, 315.0),
}


def verdict(row: str, ms: float) -> str:
    """ "aim", "reached" or "missed" for a row of the benchmark."""
    reach, aim = GOALS[row]
    return "aim" if ms <= aim else "reached" if ms <= reach else "missed"


def table(results: Iterable[Mapping[str, str]]) -> str:
    """A Markdown table of the results, lines of `bench_kernels.csv`."""
    lines = ["| row | ms | to reach | to aim for | |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        row, ms = result["row"], float(result["ms"])
        reach, aim = GOALS[row]
        lines.append(f"| {row} | {ms:.3g} | {reach:g} | {aim:g} | {verdict(row, ms)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with Path(sys.argv[1]).open(newline="", encoding="utf-8") as file:
        print(table(csv.DictReader(file)))
