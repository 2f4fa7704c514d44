"""Times the Triton forward, stage by stage and whole, beside dense attention, after proving it right.

    python tests/benchmarks/bench_kernels.py                       # every row, on one GPU
    python tests/benchmarks/bench_kernels.py --rows 131K-128/8 --no-dense
    python tests/benchmarks/bench_kernels.py --figure paper        # the two figures of the MoBA paper
    TRITON_INTERPRET=1 python tests/benchmarks/bench_kernels.py --tiny    # the gate alone, on a CPU

The same as `moba-hf bench`; see `moba_hf.bench`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from moba_hf.bench import Options, run
from moba_hf.bench.rows import FIGURES, ROWS, M


def parse(argv: list[str] | None = None) -> Options:
    """The options on a command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(row.name for row in ROWS)
    parser.add_argument("--rows", nargs="*", default=[], help=f"of {names}; default: all")
    parser.add_argument("--figure", help=f"draw a figure instead: {', '.join(FIGURES)}")
    parser.add_argument("--repeats", type=int, default=20, help="most runs of a median")
    parser.add_argument("--no-stages", action="store_true", help="time the whole operator only")
    parser.add_argument("--no-dense", action="store_true", help="leave out the dense baselines")
    parser.add_argument("--dense-limit", type=int, default=M, help="longest dense baseline, tokens")
    parser.add_argument("--flash", action="store_true", help="also prove and time the backend flash_attn")
    parser.add_argument("--workspace", type=float, help="GiB of the forward's workspace; default: tuning's")
    parser.add_argument("--tiny", action="store_true", help="only the correctness gate, on a tiny case")
    parser.add_argument("--out", type=Path, default=Path("bench_results"), help="folder of the results")
    args = parser.parse_args(argv)
    return Options(
        rows=args.rows,
        figure=args.figure,
        repeats=args.repeats,
        stages=not args.no_stages,
        dense=not args.no_dense,
        dense_limit=args.dense_limit,
        flash=args.flash,
        workspace=args.workspace,
        tiny=args.tiny,
        out=args.out,
    )


if __name__ == "__main__":
    raise SystemExit(0 if run(parse()) else 1)
