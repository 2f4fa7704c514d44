"""The command about speed: bench."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from moba_hf_cli.options import AsJson, load_package


def bench(
    rows: Annotated[
        list[str] | None, typer.Option(help="A row of the table, e.g. 131K-128/8; may be given again.")
    ] = None,
    figure: Annotated[
        str | None, typer.Option(help="Draw a figure instead: 'paper', the two of the MoBA paper.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Most runs of a median.")] = 20,
    no_stages: Annotated[bool, typer.Option("--no-stages", help="Time the whole operator only.")] = False,
    no_dense: Annotated[bool, typer.Option("--no-dense", help="Leave out dense attention.")] = False,
    dense_limit: Annotated[int, typer.Option(help="Longest dense baseline, tokens.")] = 1 << 20,
    flash: Annotated[
        bool, typer.Option("--flash", help="Also prove and time the backend flash_attn.")
    ] = False,
    workspace: Annotated[float | None, typer.Option(help="GiB of the forward's workspace.")] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Only the correctness gate on a tiny case, on a CPU.")
    ] = False,
    out: Annotated[str, typer.Option(help="Folder for CSV, Markdown and PNG.")] = "bench_results",
    as_json: AsJson = False,
) -> None:
    """Time the operator beside dense attention on this GPU, after proving it right."""
    load_package()
    from moba_hf.bench import Options, run

    options = Options(
        rows=rows or (),
        figure=figure,
        repeats=repeats,
        stages=not no_stages,
        dense=not no_dense,
        dense_limit=dense_limit,
        flash=flash,
        workspace=workspace,
        tiny=tiny,
        out=Path(out),
    )
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # tables and lines under way
        outcome = run(options)
    if as_json:
        print(json.dumps(outcome.to_dict(), indent=1))
    if not outcome.green:
        raise typer.Exit(1)
