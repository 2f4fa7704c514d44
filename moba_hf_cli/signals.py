"""Signal handling: a signal ends a command with one line and leaves no unfinished folder."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Ended(BaseException):
    """Raised when a signal asks the program to end, so that unfinished folders are removed."""

    def __init__(self, number: int) -> None:
        self.number = number


def ignore() -> None:
    """Ignores these signals from now on."""
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def raising() -> Iterator[None]:
    """Inside the block, the first signal raises an exception, and later ones are ignored."""

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        ignore()  # the cleanup is short
        raise KeyboardInterrupt if number == signal.SIGINT else Ended(number)

    with _handled_by(end):
        yield


@contextmanager
def exiting() -> Iterator[None]:
    """Inside the block, a signal ends the process immediately.

    This is for imports of large packages: nothing needs cleanup yet, and an exception would interrupt
    half-imported modules.
    """

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        os.write(2, b"moba-hf: interrupted\n")
        os._exit(128 + number)

    with _handled_by(end):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Inside the block, `handler` handles the signals, except those that are ignored (as under nohup)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    for number, was in before.items():
        if was != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)
