"""What a signal does to a running command: one quiet line, and no unfinished folder left behind."""

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
    """A signal asked the program to end; raised so that unfinished folders are removed."""

    def __init__(self, number: int) -> None:
        self.number = number


def ignore() -> None:
    """Ignores these signals from now on."""
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def raising() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise, and whatever signal came first, later ones are ignored."""

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        ignore()  # what is still done is short
        raise KeyboardInterrupt if number == signal.SIGINT else Ended(number)

    with _handled_by(end):
        yield


@contextmanager
def exiting() -> Iterator[None]:
    """Inside the block a signal ends the process at once.

    For imports of large packages: nothing is open yet, and an exception would pass through half-made modules.
    """

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        os.write(2, b"moba-hf: interrupted\n")
        os._exit(128 + number)

    with _handled_by(end):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Inside the block `handler` takes the signals that are not ignored, as they are under nohup."""
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
