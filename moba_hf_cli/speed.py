"""The command `bench`."""

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
        list[str] | None, typer.Option(help="A row of the table, e.g. 131K-128/8; repeatable.")
    ] = None,
    figure: Annotated[
        str | None, typer.Option(help="Draw figures instead: 'paper', the two of the MoBA paper.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Maximum number of runs per median.")] = 20,
    no_stages: Annotated[bool, typer.Option("--no-stages", help="Time the whole operator only.")] = False,
    no_dense: Annotated[bool, typer.Option("--no-dense", help="Do not time dense attention.")] = False,
    dense_limit: Annotated[int, typer.Option(help="Longest dense baseline, in tokens.")] = 1 << 20,
    flash: Annotated[
        bool, typer.Option("--flash", help="Also check and time the backend flash_attn.")
    ] = False,
    workspace: Annotated[float | None, typer.Option(help="Workspace of the forward in GiB.")] = None,
    tiny: Annotated[
        bool,
        typer.Option("--tiny", help="Only check a tiny case; on a CPU this needs TRITON_INTERPRET=1."),
    ] = False,
    out: Annotated[str, typer.Option(help="Folder for CSV, Markdown and PNG.")] = "bench_results",
    as_json: AsJson = False,
) -> None:
    """Check the operator on this GPU, then time it against dense attention."""
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
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # keep tables out of the JSON
        outcome = run(options)
    if as_json:
        print(json.dumps(outcome.to_dict(), indent=1))
    if not outcome.green:
        raise typer.Exit(1)
