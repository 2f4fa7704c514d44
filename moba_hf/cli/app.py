"""The commands of `moba-hf` put together, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import typer

from moba_hf.cli import checkpoints, quality, speed
from moba_hf.cli.options import shown

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
    warnings.showwarning = _warn
    try:
        with _signals(), _first_rank_alone():
            code = app(args=None if args is None else list(args), prog_name="moba-hf", standalone_mode=False)
    except _UsageError as error:
        _fail(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", code=130)
    except _Ended as error:
        _fail("interrupted", code=128 + error.number)
    except Exception as error:  # files can be wrong in ways that nobody has listed
        if os.environ.get("MOBA_HF_TRACEBACK"):
            raise
        known = isinstance(error, (ValueError, OSError, ImportError, RuntimeError)) and str(error)
        _fail(str(error) if known else f"{type(error).__name__}: {error}".removesuffix(": "))
    if code == 130:  # what typer makes of KeyboardInterrupt
        _fail("interrupted", code=130)
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _first_rank_alone() -> Iterator[None]:
    """Under `torchrun`, ranks but the first print nothing inside the block; errors are told behind it."""
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


class _Ended(BaseException):
    """A signal asked the program to end; raised so that unfinished folders are removed."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _signals() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise, and whatever signal came first, later ones are ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # what is still done is short
        raise KeyboardInterrupt if number == signal.SIGINT else _Ended(number)

    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # ignored ones stay so, as under nohup
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Shows our own warnings as one line; those of the libraries say nothing to who types a command."""
    if "moba_hf" in Path(filename).parts:
        print(f"moba-hf: {shown(' '.join(str(message).split()))}", file=sys.stderr)


def _fail(message: str, code: int = 2) -> NoReturn:
    """Prints one line and exits."""
    print(f"moba-hf: {shown(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)
