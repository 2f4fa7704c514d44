"""Combines the commands of `moba-hf`, and turns errors into messages and exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn, TextIO

import typer

from moba_hf_cli import checkpoints, quality, speed
from moba_hf_cli.options import shown
from moba_hf_cli.signals import Ended, raising

# The base class of usage errors in every version of typer; newer ones have their own copy of click.
_UsageError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="moba-hf",
    help="MoBA (Mixture of Block Attention) for Hugging Face Transformers checkpoints.",
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
    """Runs the command line `args` (default: `sys.argv`) and exits."""
    warnings.showwarning = _warn
    try:
        with raising(), _first_rank_alone():
            code = app(args=None if args is None else list(args), prog_name="moba-hf", standalone_mode=False)
    except _UsageError as error:
        _fail(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", code=130)
    except Ended as error:
        _fail("interrupted", code=128 + error.number)
    except Exception as error:  # files can be wrong in many ways
        if os.environ.get("MOBA_HF_TRACEBACK"):
            raise
        known = isinstance(error, (ValueError, OSError, ImportError, RuntimeError)) and str(error)
        _fail(str(error) if known else f"{type(error).__name__}: {error}".removesuffix(": "))
    if code == 130:  # typer returns this for KeyboardInterrupt
        _fail("interrupted", code=130)
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _first_rank_alone() -> Iterator[None]:
    """Under `torchrun`, only the first rank prints inside the block; errors are printed after it."""
    try:
        if os.environ.get("RANK", "0") == "0":
            yield
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
    finally:
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Prints our own warnings as one line; warnings of libraries would not help users of the command."""
    if "moba_hf" in Path(filename).parts:
        print(f"moba-hf: {shown(' '.join(str(message).split()))}", file=sys.stderr)


def _fail(message: str, code: int = 2) -> NoReturn:
    """Prints one line and exits."""
    print(f"moba-hf: {shown(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)
