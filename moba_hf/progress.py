"""Progress bars: what a long step does, and how long is left."""

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
    """A bar of tqdm on stderr, to be closed or used in `with`; of several ranks only the first shows it.

    Args:
        what: what is being done.
        total: how many of `unit` the whole takes; "B" is counted in kilo, mega and gigabytes.
        begin: how many are done already.
        shown: True: always, and it stays when it is complete. False: never. None: while it runs, where
            stderr is a terminal.
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
    """`items`, counted by a `progress_bar`."""
    with progress_bar(what, len(items), unit) as bar:
        for item in items:
            yield item
            bar.update(1)


@contextmanager
def advanced_by(bar: Any, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block every forward call of one of `modules` advances `bar` by one."""

    def advance(_module: nn.Module, _args: Any, _output: Any) -> None:
        bar.update(1)

    hooks = [] if bar.disable else [module.register_forward_hook(advance) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def print_beside(bar: Any, line: str) -> None:
    """Prints a line on stdout without breaking `bar`, which may stand in the same terminal."""
    bar.write(line, file=sys.stdout)
    sys.stdout.flush()
