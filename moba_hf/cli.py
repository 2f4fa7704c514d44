"""The command `moba-hf`: parses and prints, decides nothing.

Every error is one plain line on stderr and exit code 2. What a command needs is imported inside it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from typing import Annotated, Any, NoReturn

import typer

# typer carries its own copy of click in newer versions; this is its base class of usage errors in all.
_UsageError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="moba-hf",
    help="MoBA (Mixture of Block Attention) for Hugging Face Transformers checkpoints.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Dtype(str, Enum):
    """What a GGUF file may be saved as."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def convert(
    src: Annotated[str, typer.Argument(help="Folder with config.json and safetensors, or a .gguf file.")],
    dst: Annotated[str, typer.Argument(help="Folder to make.")],
    preset: Annotated[
        str | None, typer.Option(help="Name of a preset; 'moba-hf presets' lists them.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens in a block.")] = None,
    topk: Annotated[int | None, typer.Option(help="Blocks a query attends, its own included.")] = None,
    sink_blocks: Annotated[
        int | None, typer.Option(help="First blocks that are always attended; they count in topk.")
    ] = None,
    local_blocks: Annotated[
        int | None, typer.Option(help="Blocks just before one's own, always attended; they count in topk.")
    ] = None,
    full_attention_layers: Annotated[
        str | None,
        typer.Option(help="Layers that stay dense, e.g. '0,-1'; negative ones count from the last."),
    ] = None,
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
    from moba_hf.config import MobaConfig
    from moba_hf.convert import convert_checkpoint

    numbers: dict[str, object] = {
        "block_size": block_size,
        "topk": topk,
        "sink_blocks": sink_blocks,
        "local_blocks": local_blocks,
        "full_attention_layers": _layer_list(full_attention_layers),
    }
    given = {name: value for name, value in numbers.items() if value is not None}
    if preset is not None and given:
        raise ValueError(f"--preset excludes --{next(iter(given)).replace('_', '-')}")
    if preset is None and (block_size is None or topk is None):
        raise ValueError("give --preset NAME, or both --block-size and --topk")
    config = MobaConfig.from_dict(given) if preset is None else MobaConfig.from_preset(preset)
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
