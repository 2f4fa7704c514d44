"""The commands for checkpoints: convert, presets, verify, inspect, generate."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from moba_hf_cli.options import (
    AsJson,
    Settings,
    TrustRemoteCode,
    load_package,
    load_package_alone,
    quiet,
    shown,
    takes_settings,
)
from moba_hf_cli.preset_files import preset_rows, presets_as_json, table_lines


class LoadDtype(str, Enum):
    """The dtypes to load a model in; "auto" is that of the checkpoint."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Dtype(str, Enum):
    """The dtypes in which a GGUF file can be saved."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@takes_settings()
def convert(
    called: typer.Context,
    src: Annotated[str, typer.Argument(help="Folder with config.json and safetensors, or a .gguf file.")],
    dst: Annotated[str, typer.Argument(help="Folder to create.")],
    *,
    given: Settings,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DST if it is a checkpoint.")
    ] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Hard-link the weight files instead of copying.")
    ] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="GGUF only: dtype to save in. float32 (default) is exact; the others take half the space."
        ),
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Extend the context in the config to this many tokens.")
    ] = None,
    rope: Annotated[
        str, typer.Option(help="How rotary positions are extended: theta, linear or yarn.")
    ] = "theta",
    rope_theta: Annotated[
        float | None, typer.Option(help="theta only: the new base (default: computed from the length).")
    ] = None,
    rescale: Annotated[
        bool,
        typer.Option("--rescale", help="Extend a source even if its rotary embedding is already scaled."),
    ] = False,
    remote_code: Annotated[
        bool,
        typer.Option(
            "--remote-code",
            help="Write the module that lets trust_remote_code=True load DST without 'import moba_hf'.",
        ),
    ] = False,
    eval_results: Annotated[
        str | None,
        typer.Option(
            help="JSON of 'eval' of SRC with these settings, to show what they cost in the model card."
        ),
    ] = None,
) -> None:
    """Copy a checkpoint and turn MoBA on in its config; the weights are not changed.

    The model card, README.md of DST, says how the checkpoint was made and how to load it.
    """
    if context_length is None and (rope != "theta" or rope_theta is not None or rescale):
        raise typer.BadParameter("--rope, --rope-theta and --rescale need --context-length")
    config = given.config()
    quiet()
    from moba_hf.checkpoints.context_length import ContextLength
    from moba_hf.checkpoints.convert import convert_checkpoint
    from moba_hf.config import DEFAULT_PRESET, MobaConfig

    added: list[str] = []
    if config is None:
        print(f"moba-hf: no settings given, so preset {DEFAULT_PRESET!r} is used", file=sys.stderr)
        config, added = MobaConfig.from_preset(DEFAULT_PRESET), ["--preset", DEFAULT_PRESET]
    chosen = None if dtype is None else dtype.value
    context = None if context_length is None else ContextLength(context_length, rope, rope_theta, rescale)
    made = convert_checkpoint(
        src,
        dst,
        config,
        overwrite=overwrite,
        link=link,
        dtype=chosen,
        context=context,
        remote_code=remote_code,
        eval_results=eval_results,
        command=_command_line(called, *added),
    )
    print(f"{shown(made)}: converted; {config.in_words()}")
    if context is not None:
        print(
            f"Context extended to {context.length:,} tokens ({context.rope}) without training, so measure it "
            "with 'moba-hf eval'"
        )
    print(f"Load it with 'import moba_hf' and AutoModelForCausalLM.from_pretrained({str(made)!a})")
    if remote_code:
        print("or, if moba-hf is installed, with trust_remote_code=True and without that import")


def _command_line(called: typer.Context, *more: str) -> str:
    """The command line of `convert` for the model card, with `more` options.

    Paths are reduced to the names of files and folders, because a public card should not show local paths.
    """
    words = ["moba-hf", "convert"]
    for option in called.command.params:
        place, value = called.get_parameter_source(str(option.name)), called.params.get(str(option.name))
        if place is None or place.name != "COMMANDLINE" or value is None:
            continue
        if option.name == "dst" or (option.name in ("src", "eval_results") and Path(value).exists()):
            value = Path(value).resolve().name if Path(value).is_dir() else Path(value).absolute().name
        words += option.opts[:1] if option.param_type_name == "option" else []
        words += [] if value is True else [str(getattr(value, "value", value))]
    return shlex.join([*words, *more])


def presets(as_json: AsJson = False) -> None:
    """List the presets."""
    if as_json:
        print(json.dumps(presets_as_json(), indent=2))
    else:
        print("\n".join(table_lines(preset_rows())))


def verify(
    dst: Annotated[str, typer.Argument(help="Folder created by 'convert'.")],
    source: Annotated[str, typer.Option(help="The source of the conversion: the folder or the .gguf file.")],
    as_json: AsJson = False,
) -> None:
    """Check a converted checkpoint against its source: weights, settings, loading, logits."""
    load_package()
    quiet()
    from moba_hf.checkpoints.verify import verify_checkpoint

    report = verify_checkpoint(dst, source)
    if as_json:
        print(json.dumps({"passed": report.passed, **asdict(report)}, indent=1))
    for check in report.checks:
        if check.passed and not as_json:
            print(f"ok      {check.name:<8} {shown(check.detail)}")
    if not report.passed:
        failed = report.checks[-1]
        raise ValueError(f"verify failed at {failed.name}: {failed.detail}")


@takes_settings()
def inspect_model(
    src: Annotated[str, typer.Argument(help="Folder with config.json, or config.json; no weights are read.")],
    *,
    given: Settings,
    as_json: AsJson = False,
) -> None:
    """Show what each layer would do and cost, with the settings of the config or of the options."""
    config = given.config(load_package_alone)
    quiet()
    from moba_hf.checkpoints.inspection import describe, inspect_checkpoint

    result = inspect_checkpoint(src, config)
    print(json.dumps(result.to_dict(), indent=2) if as_json else shown(describe(result)))


@takes_settings()
def generate(
    dst: Annotated[str, typer.Argument(help="Folder created by 'convert', or any checkpoint.")],
    prompt_file: Annotated[str | None, typer.Option(help="Text file with the prompt.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text of the prompt, after that of --prompt-file.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.")] = 128,
    *,
    given: Settings,
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the model's chat template to the prompt.")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also run dense attention and compare.")] = False,
    dtype: Annotated[LoadDtype, typer.Option(help="Dtype to load the weights in.")] = LoadDtype.auto,
    chunk: Annotated[int, typer.Option(help="Number of prompt tokens to read at a time.")] = 2048,
    dense_tail: Annotated[
        int, typer.Option(min=0, help="Tokens at the end of the prompt that attend to every key.")
    ] = 128,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a long prompt greedily; tokens go to stdout as they are generated, progress to stderr."""
    load_package()
    from moba_hf.hf import generation

    text = generation.read_prompt(prompt_file, prompt)
    config = given.config()
    quiet()
    model, tokenizer = generation.load(dst, dtype.value, config, trust_remote_code=trust_remote_code)
    ids = generation.encode(model, tokenizer, text, chat=chat)
    if not chat and getattr(tokenizer, "chat_template", None):
        print("moba-hf: the model has a chat template; pass --chat to apply it", file=sys.stderr)
    runs = {"MoBA": generation.generate, **({"dense": generation.generate_dense} if compare else {})}
    results = []
    for name, function in runs.items():
        if compare and not as_json:
            print(f"--- {name} ---", flush=True)
        with _progress(ids.shape[1] - 1) as advance:
            streamer = None if as_json else generation.text_streamer(tokenizer)
            more: Any = {"dense_tail": dense_tail, "streamer": streamer, "on_prefill": advance}
            result = function(model, ids, max_new_tokens, chunk=chunk, **more)
        results.append(result)
    if as_json:
        found = {name.lower(): run.to_dict(tokenizer) for name, run in zip(runs, results, strict=True)}
        print(json.dumps({"prompt_tokens": ids.shape[1], **found}, indent=1))
    elif compare:
        print("\n" + generation.compare_table(results[0], results[1], ids.shape[1]))
    else:
        print(generation.summary(results[0], ids.shape[1]), file=sys.stderr)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar of a prefill if stderr is a terminal; yields the function that advances it."""
    from moba_hf.progress import progress_bar

    with progress_bar("prefill", total, " tokens") as bar:

        def advance(tokens: int) -> None:
            bar.update(tokens)
            if bar.n >= total:
                bar.close()  # before the first token is printed

        yield advance
