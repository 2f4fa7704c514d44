"""Progress bars for long steps."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from tqdm.auto import tqdm

from moba_hf.hf.parallel import is_first_rank

T = TypeVar("T")


def progress_bar(what: str, total: int, unit: str, *, begin: int = 0, shown: bool | None = None) -> Any:
    """A tqdm bar on stderr, shown only on the first rank; close it or use it in a `with` statement.

    Args:
        what: label of the bar.
        total: number of units of the whole step.
        unit: name of the unit; "B" is shown as kB, MB and GB.
        begin: number of units that are already done.
        shown: True: always show the bar, and keep it when it is complete. False: never. None: show it while
            it runs, if stderr is a terminal.
    """
    hidden = None if shown is None else not shown
    return tqdm(
        total=total,
        initial=begin,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        disable=hidden if is_first_rank() else True,
        leave=bool(shown),
        file=sys.stderr,
        dynamic_ncols=True,
    )


def progress(items: Sequence[T], what: str, unit: str) -> Iterator[T]:
    """Iterates over `items` with a `progress_bar`."""
    with progress_bar(what, len(items), unit) as bar:
        for item in items:
            yield item
            bar.update(1)


@contextmanager
def advanced_by(bar: Any, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, each forward call of any of `modules` advances `bar` by one."""

    def advance(_module: nn.Module, _args: Any, _output: Any) -> None:
        bar.update(1)

    hooks = [] if bar.disable else [module.register_forward_hook(advance) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def print_beside(bar: Any, line: str) -> None:
    """Prints a line to stdout without garbling `bar`, which may be in the same terminal."""
    bar.write(line, file=sys.stdout)
    sys.stdout.flush()
