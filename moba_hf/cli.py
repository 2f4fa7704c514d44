"""The command `moba-hf`: parses and prints, decides nothing.

Every error is one plain line on stderr and exit code 2. What a command needs is imported inside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from moba_hf.config import MobaConfig

# typer carries its own copy of click in newer versions; this is its base class of usage errors in all.
_UsageError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="moba-hf",
    help="MoBA (Mixture of Block Attention) for Hugging Face Transformers checkpoints.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class LoadDtype(str, Enum):
    """What a model may be loaded as; "auto" is the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Dtype(str, Enum):
    """What a GGUF file may be saved as."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Preset = Annotated[str | None, typer.Option(help="Name of a preset; 'moba-hf presets' lists them.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens in a block.")]
Topk = Annotated[int | None, typer.Option(help="Blocks a query attends, its own included.")]
SinkBlocks = Annotated[
    int | None, typer.Option(help="First blocks that are always attended; they count in topk.")
]
LocalBlocks = Annotated[
    int | None, typer.Option(help="Blocks just before one's own, always attended; they count in topk.")
]
FullLayers = Annotated[
    str | None,
    typer.Option(help="Layers that stay dense, e.g. '0,-1'; negative ones count from the last."),
]


@app.command()
def convert(
    src: Annotated[str, typer.Argument(help="Folder with config.json and safetensors, or a .gguf file.")],
    dst: Annotated[str, typer.Argument(help="Folder to make.")],
    preset: Preset = None,
    block_size: BlockSize = None,
    topk: Topk = None,
    sink_blocks: SinkBlocks = None,
    local_blocks: LocalBlocks = None,
    full_attention_layers: FullLayers = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DST if it is a checkpoint.")
    ] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Hard-link the weight files instead of copying.")
    ] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="GGUF only: what to save as. float32 (default) is exact; the others take half the size."
        ),
    ] = None,
) -> None:
    """Copy a checkpoint and turn MoBA on in its config; the weights stay byte for byte as they are."""
    from moba_hf.convert import convert_checkpoint

    config = _settings(preset, block_size, topk, sink_blocks, local_blocks, full_attention_layers)
    if config is None:
        raise typer.BadParameter("give --preset NAME, or both --block-size and --topk")
    _quiet()
    chosen = None if dtype is None else dtype.value
    made = convert_checkpoint(src, dst, config, overwrite=overwrite, link=link, dtype=chosen)
    print(f"{made}: converted; block_size {config.block_size}, topk {config.topk}")
    print(f"Load it with 'import moba_hf' and AutoModelForCausalLM.from_pretrained({str(made)!r})")


@app.command()
def presets() -> None:
    """List the presets."""
    from moba_hf.config import MobaConfig, preset_names, read_preset

    rows = [("PRESET", "BLOCK_SIZE", "TOPK", "SINK", "LOCAL", "FULL LAYERS", "DESCRIPTION")]
    for name in preset_names():
        moba = MobaConfig.from_preset(name)
        full = ",".join(map(str, moba.full_attention_layers)) or "-"
        numbers = (moba.block_size, moba.topk, moba.sink_blocks, moba.local_blocks)
        rows.append((name, *map(str, numbers), full, read_preset(name)["description"]))
    _print_table(rows)


@app.command()
def verify(
    dst: Annotated[str, typer.Argument(help="Folder that 'convert' made.")],
    source: Annotated[str, typer.Option(help="What it was made from: the folder or the .gguf file.")],
) -> None:
    """Check a converted checkpoint against its source: weights, settings, loading, logits."""
    from moba_hf.verify import verify_checkpoint

    _quiet()
    report = verify_checkpoint(dst, source)
    for check in report.checks:
        if check.passed:
            print(f"ok      {check.name:<8} {check.detail}")
    if not report.passed:
        failed = report.checks[-1]
        raise ValueError(f"verify failed at {failed.name}: {failed.detail}")


@app.command("inspect")
def inspect_model(
    src: Annotated[str, typer.Argument(help="Folder with config.json, or that file; no weights are read.")],
    preset: Preset = None,
    block_size: BlockSize = None,
    topk: Topk = None,
    sink_blocks: SinkBlocks = None,
    local_blocks: LocalBlocks = None,
    full_attention_layers: FullLayers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what each layer would do and cost; settings from the config unless options give others."""
    from moba_hf.inspection import describe, inspect_checkpoint

    _quiet()
    config = _settings(preset, block_size, topk, sink_blocks, local_blocks, full_attention_layers)
    result = inspect_checkpoint(src, config)
    print(json.dumps(result.to_dict(), indent=2) if as_json else describe(result))


@app.command()
def generate(
    dst: Annotated[str, typer.Argument(help="Folder that 'convert' made.")],
    prompt_file: Annotated[str | None, typer.Option(help="Text file to read.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to read, after that of --prompt-file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many new tokens.")] = 128,
    compare: Annotated[bool, typer.Option("--compare", help="Run dense attention as well.")] = False,
    dtype: Annotated[LoadDtype, typer.Option(help="What to load the weights as.")] = LoadDtype.auto,
    chunk: Annotated[int, typer.Option(help="Tokens of the prompt to read at a time.")] = 2048,
) -> None:
    """Continue a long prompt greedily: tokens on stdout as they come, progress on stderr."""
    from moba_hf import generation

    text = generation.read_prompt(prompt_file, prompt)
    _quiet()
    model, tokenizer = generation.load(dst, dtype.value)
    ids = generation.encode(model, tokenizer, text)
    runs = {"MoBA": generation.generate, **({"dense": generation.generate_dense} if compare else {})}
    results = []
    for name, function in runs.items():
        if compare:
            print(f"--- {name} ---", flush=True)
        with _progress(ids.shape[1] - 1) as advance:
            streamer = generation.text_streamer(tokenizer)
            result = function(model, ids, max_new_tokens, chunk=chunk, streamer=streamer, on_prefill=advance)
        results.append(result)
    if compare:
        print("\n" + generation.compare_table(results[0], results[1], ids.shape[1]))
    else:
        print(generation.summary(results[0], ids.shape[1]), file=sys.stderr)


_Texts = Annotated[list[str] | None, typer.Option("--text", help="A text file; may be given again.")]
_Length = Annotated[int, typer.Option(help="Tokens of each text that are read.")]
_Gate = Annotated[
    str | None, typer.Option(help="How blocks are scored: mean (MoBA) or mass (better untrained, no kernel).")
]


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder.")],
    text: _Texts = None,
    length: _Length = 8192,
    preset: Annotated[list[str] | None, typer.Option(help="A preset to measure; may be given again.")] = None,
    block_size: BlockSize = None,
    topk: Topk = None,
    sink_blocks: SinkBlocks = None,
    local_blocks: LocalBlocks = None,
    gate: _Gate = None,
    measure: Annotated[
        list[str] | None, typer.Option(help="perplexity, agreement, recall; may be given again.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="needle, multi-needle, key-value, variables (RULER-like).")
    ] = None,
    task_length: Annotated[list[int] | None, typer.Option(help="Tokens of a task's context.")] = None,
    contexts: Annotated[int, typer.Option(help="Contexts of each task and length.")] = 4,
    seed: Annotated[int, typer.Option(help="Of tasks and samples.")] = 0,
    out: Annotated[str | None, typer.Option(help="JSON file for the results.")] = None,
    store: Annotated[str | None, typer.Option(help="JSON file that lets a stopped run go on.")] = None,
) -> None:
    """Measure what MoBA costs a model, beside dense: on your texts, and on tasks made on the spot."""
    from moba_hf.evaluate import run

    _quiet()
    numbers = {
        "block_size": block_size,
        "topk": topk,
        "sink_blocks": sink_blocks,
        "local_blocks": local_blocks,
        "gate": gate,
    }
    loaded, tokenizer = run.load(model)
    settings = run.settings_of(loaded, preset or [], numbers)
    texts = {name: run.read_ids(tokenizer, name, length) for name in text or ()}
    result = run.evaluate(
        loaded,
        tokenizer,
        texts,
        settings,
        measures=measure or ["perplexity"],
        tasks=task or [],
        task_lengths=task_length or [length],
        contexts=contexts,
        seed=seed,
        store=store,
    )
    _write_json(out, result)
    print(run.tables(result))


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder.")],
    text: _Texts = None,
    length: _Length = 8192,
    max_loss: Annotated[
        float | None, typer.Option(help="Allowed rise of the loss of the last 2,048 tokens, in nats.")
    ] = None,
    keys: Annotated[float | None, typer.Option(help="Allowed key budget, e.g. 0.25.")] = None,
    block_size: Annotated[list[int] | None, typer.Option(help="Block sizes to try (32).")] = None,
    gate: _Gate = None,
    write: Annotated[bool, typer.Option("--write", help="Store the result in the checkpoint.")] = False,
    out: Annotated[str | None, typer.Option(help="JSON file for the curve.")] = None,
    store: Annotated[str | None, typer.Option(help="JSON file that lets a stopped run go on.")] = None,
) -> None:
    """Find, for each layer, full attention or how many blocks: the cheapest setting you allow."""
    from moba_hf.calibrate import calibrate as search
    from moba_hf.calibrate import write_settings
    from moba_hf.evaluate import run

    if not text:
        raise ValueError("give --text FILE, texts like those the model will read")
    _quiet()
    loaded, tokenizer = run.load(model)
    texts = [run.read_ids(tokenizer, name, length) for name in text]
    found = search(
        loaded,
        texts,
        max_loss=max_loss,
        keys=keys,
        block_sizes=block_size or (32,),
        gate=gate or "mean",
        store=store,
    )
    _write_json(out, found.to_dict())
    print(found.report())
    if write:
        write_settings(model, found.config)
        print(f"{model}: settings stored in config.json")


@app.command()
def plot(
    kind: Annotated[str, typer.Argument(help="routing, recall, needles, budget or positions.")],
    source: Annotated[str, typer.Argument(help="JSON of 'eval' or 'calibrate'; for routing a checkpoint.")],
    out: Annotated[str, typer.Option(help="PNG, SVG or PDF file.")],
    text: Annotated[str | None, typer.Option(help="routing: the text file that is read.")] = None,
    length: Annotated[int, typer.Option(help="routing: tokens of it.")] = 2048,
    layer: Annotated[int, typer.Option(help="routing: layer.")] = 0,
    head: Annotated[int, typer.Option(help="routing: query head.")] = 0,
) -> None:
    """Draw results (needs matplotlib: extra 'plot')."""
    from moba_hf import plots

    _quiet()
    if kind == "routing":
        if text is None:
            raise ValueError("routing needs --text FILE")
        plots.routing_of(source, text, length, layer, head).savefig(out, dpi=160)
    else:
        plots.from_json(kind, source).savefig(out, dpi=160)
    print(out)


@app.command()
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
) -> None:
    """Time the operator beside dense attention on this GPU, after proving it right."""
    from pathlib import Path

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
    if not run(options):
        raise typer.Exit(1)


@app.command("lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with "moba" registered; all arguments go to it (extra 'eval')."""
    from moba_hf.evaluate.harness import run_lm_eval

    run_lm_eval(context.args)


def _write_json(path: str | None, values: Any) -> None:
    if path is not None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=1)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line `args` (default: the program's own) and exits."""
    try:
        code = app(args=None if args is None else list(args), prog_name="moba-hf", standalone_mode=False)
    except _UsageError as error:
        _fail(error.format_message())
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        _fail(str(error) or type(error).__name__)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", code=130)
    if code == 130:  # what typer makes of KeyboardInterrupt
        _fail("interrupted", code=130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> NoReturn:
    """Prints one line and exits."""
    print(f"moba-hf: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _quiet() -> None:
    """Keeps transformers from adding its own lines; progress bars only on a terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _settings(
    preset: str | None,
    block_size: int | None,
    topk: int | None,
    sink_blocks: int | None,
    local_blocks: int | None,
    full_attention_layers: str | None,
) -> MobaConfig | None:
    """The settings that options give; None: no option is given."""
    from moba_hf.config import MobaConfig

    numbers: dict[str, object] = {
        "block_size": block_size,
        "topk": topk,
        "sink_blocks": sink_blocks,
        "local_blocks": local_blocks,
        "full_attention_layers": _layer_list(full_attention_layers),
    }
    given = {name: value for name, value in numbers.items() if value is not None}
    if preset is not None and given:
        raise typer.BadParameter(f"--preset excludes --{next(iter(given)).replace('_', '-')}")
    if preset is not None:
        return MobaConfig.from_preset(preset)
    if given and (block_size is None or topk is None):
        raise typer.BadParameter("give --preset NAME, or both --block-size and --topk")
    return MobaConfig.from_dict(given) if given else None


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of a prefill on stderr, where that is a terminal; gives the function to advance it."""
    from tqdm import tqdm

    with tqdm(total=total, desc="prefill", unit=" tokens", disable=None, file=sys.stderr, leave=False) as bar:

        def advance(tokens: int) -> None:
            bar.update(tokens)
            if bar.n >= total:
                bar.close()  # before the first token is printed

        yield advance


def _layer_list(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(
            f"--full-attention-layers takes comma-separated layer numbers, got {text!r}"
        ) from None


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows in columns; the last column runs free."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        print("  ".join([*cells, row[-1]]))


if __name__ == "__main__":
    main()
