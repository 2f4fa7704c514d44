"""The commands of `moba-hf` put together, and how it ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer

from moba_hf.cli import checkpoints, quality, speed

# typer carries its own copy of click in newer versions; this is its base class of usage errors in all.
_UsageError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="moba-hf",
    help="MoBA (Mixture of Block Attention) for Hugging Face Transformers checkpoints.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# in the order of `moba-hf --help`
app.command()(checkpoints.convert)
app.command()(checkpoints.presets)
app.command()(checkpoints.verify)
app.command("inspect")(checkpoints.inspect_model)
app.command()(checkpoints.generate)
app.command("eval")(quality.evaluate)
app.command()(quality.calibrate)
app.command()(quality.plot)
app.command()(speed.bench)
app.command("lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    quality.lm_eval
)


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
