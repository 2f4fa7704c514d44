"""The commands for quality: eval, calibrate, plot, lm-eval."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from moba_hf_cli.options import (
    AsJson,
    Gate,
    Settings,
    TrustRemoteCode,
    load_package,
    quiet,
    shown,
    takes_settings,
)
from moba_hf_cli.preset_files import check_preset

_Texts = Annotated[list[str] | None, typer.Option("--text", help="A text file; repeatable.")]
_Length = Annotated[int, typer.Option(min=1, help="Number of tokens to read of each text.")]


@takes_settings("preset", "full_attention_layers")
def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder.")],
    text: _Texts = None,
    length: _Length = 8192,
    preset: Annotated[list[str] | None, typer.Option(help="A preset to measure; repeatable.")] = None,
    *,
    given: Settings,
    measure: Annotated[
        list[str] | None, typer.Option(help="perplexity, positions, agreement, recall; repeatable.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="needle, multi-needle, key-value, variables (RULER-like), code-lookup."),
    ] = None,
    sources: Annotated[
        list[str] | None,
        typer.Option(help="code-lookup: a folder with a repository of Python code; repeatable."),
    ] = None,
    task_length: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a task's context; repeatable.")
    ] = None,
    contexts: Annotated[int, typer.Option(help="Number of contexts per task and length.")] = 4,
    depth: Annotated[
        list[float] | None,
        typer.Option(help="Position of answers, 0 to 1; repeatable (default: spread evenly)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of tasks and samples.")] = 0,
    out: Annotated[str | None, typer.Option(help="JSON file for the results.")] = None,
    store: Annotated[str | None, typer.Option(help="JSON file for resuming an interrupted run.")] = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure the quality of MoBA compared with dense attention, on your texts and on generated tasks."""
    for name in preset or ():
        check_preset(name)
    _check_folder(out, store, read=text or ())
    setting = given.config()
    quiet()
    from moba_hf.evaluate import run
    from moba_hf.evaluate.repositories import read_repository

    run.check_ranks(measure or (), store)
    named = run.presets_of(preset or [], setting)
    loaded, tokenizer = run.load(model, trust_remote_code=trust_remote_code, spread=True)
    wanted = run.settings_of(loaded, named)
    texts = {name: run.read_ids(tokenizer, name, length) for name in text or ()}
    repositories = [read_repository(folder, tokenizer) for folder in sources or ()]
    result = run.evaluate(
        loaded,
        tokenizer,
        texts,
        wanted,
        measures=measure or ["perplexity"],
        tasks=run.Tasks(task or [], task_length or [length], contexts, depth or None, repositories),
        seed=seed,
        store=store,
        source=model,
    )
    _write_json(out, result)
    print(json.dumps(result, indent=1) if as_json else shown(run.tables(result)))


def calibrate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder.")],
    text: _Texts = None,
    length: _Length = 8192,
    max_loss: Annotated[
        float | None, typer.Option(help="Allowed increase of the loss of the last 2,048 tokens, in nats.")
    ] = None,
    keys: Annotated[
        float | None,
        typer.Option(help="Allowed share of the causal pairs, e.g. 0.25; with a topk, the key budget."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Setting to start from (default: the checkpoint's own, else 'default')."),
    ] = None,
    block_size: Annotated[
        list[int] | None,
        typer.Option(help="Block size to try if every query chooses for itself; repeatable."),
    ] = None,
    gate: Gate = None,
    write: Annotated[bool, typer.Option("--write", help="Store the result in the checkpoint.")] = False,
    out: Annotated[str | None, typer.Option(help="JSON file for the curve.")] = None,
    store: Annotated[str | None, typer.Option(help="JSON file for resuming an interrupted run.")] = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find the sparsest setting within --max-loss, or the one with the least loss within --keys.

    If a tile of queries shares a choice, attended pairs are counted, and each layer gets its own threshold if
    that significantly lowers the loss. If every query chooses for itself (--preset default-per-query), each
    layer gets a topk or full attention. If a text has twice --length tokens, the second half is used to check
    the result.

    It runs a dense pass and a short backward pass, then one pass over each text for every setting that it
    tries. This takes minutes for a model of 135M parameters on two cores, and an estimated few minutes for an
    8B model at 32K tokens on an 80 GB GPU.
    """
    if not text:
        raise ValueError("pass --text FILE, with texts like those that the model will read")
    if write and not Path(model).is_dir():
        raise ValueError(f"{model}: is not a checkpoint folder, so --write cannot store anything in it")
    if preset is not None:
        check_preset(preset)
    _check_folder(out, store, read=text)
    load_package()
    quiet()
    from moba_hf.calibrate import Options, starting_setting, write_settings
    from moba_hf.calibrate import calibrate as search
    from moba_hf.evaluate import run

    options = Options(max_loss, keys, block_sizes=tuple(block_size or ()), store=store)
    loaded, tokenizer = run.load(model, trust_remote_code=trust_remote_code)
    options = replace(options, setting=starting_setting(loaded, preset, gate))
    read = [run.read_ids(tokenizer, name, length, most=2 * length) for name in text]
    held_out = [ids[:, length:] for ids in read if ids.shape[1] == 2 * length]
    found = search(loaded, [ids[:, :length] for ids in read], options, held_out=held_out)
    _write_json(out, found.to_dict())
    print(json.dumps(found.to_dict(), indent=1) if as_json else found.report())
    if write:
        write_settings(model, found.config)
        print(f"{shown(model)}: settings stored in config.json", file=sys.stderr if as_json else sys.stdout)


def plot(
    kind: Annotated[str, typer.Argument(help="routing, recall, needles, budget or positions.")],
    source: Annotated[str, typer.Argument(help="JSON of 'eval' or 'calibrate'; for routing, a checkpoint.")],
    out: Annotated[str, typer.Option(help="PNG, SVG or PDF file to write.")],
    text: Annotated[str | None, typer.Option(help="routing: the text file to read.")] = None,
    length: Annotated[int, typer.Option(min=1, help="routing: number of tokens to read.")] = 8192,
    layer: Annotated[int, typer.Option(min=0, help="routing: layer.")] = 0,
    head: Annotated[int, typer.Option(min=0, help="routing: query head.")] = 0,
    setting: Annotated[
        str | None, typer.Option(help="recall, needles: name of a setting in the file (default: the last).")
    ] = None,
) -> None:
    """Draw results (needs matplotlib: extra 'plot')."""
    _check_folder(out, read=(source, text))
    load_package()
    quiet()
    from moba_hf import plots

    if kind == "routing":
        if text is None:
            raise ValueError("routing needs --text FILE")
        plots.routing_of(source, text, length, layer, head).savefig(out, dpi=160)
    else:
        plots.from_json(kind, source, setting=setting).savefig(out, dpi=160)
    print(shown(out))


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with "moba" registered; all arguments are passed to it (extra 'eval')."""
    load_package()
    from moba_hf.evaluate.harness import run_lm_eval

    run_lm_eval(context.args)


def _check_folder(*paths: str | None, read: Iterable[str | None] = ()) -> None:
    """Raises ValueError if a file cannot be written or would replace another one, before the work is done.

    Args:
        paths: the files to write.
        read: files that the command reads.
    """
    taken = {Path(path).resolve() for path in read if path is not None}
    for path in paths:
        if path is None:
            continue
        if Path(path).resolve() in taken:
            raise ValueError(f"{path}: is named twice and would be replaced; name another file to write")
        taken.add(Path(path).resolve())
        folder = Path(path).absolute().parent
        if not folder.is_dir():
            raise ValueError(f"{path}: the folder {folder} does not exist; create it first")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
            if Path(path).exists():
                with open(path, "ab"):
                    pass
        except OSError as error:
            raise ValueError(f"{path}: cannot be written: {error.strerror}") from error


def _write_json(path: str | None, values: Any) -> None:
    """Writes `values` to a file; if that fails, prints them, so that no work is lost."""
    if path is None or os.environ.get("RANK", "0") != "0":
        return
    text = json.dumps(values, indent=1)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError:
        print(text)
        raise
