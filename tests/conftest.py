"""Fixtures and options of the whole suite."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch

# Deprecation warnings of transformers about our code fail the tests, so that its next release does not
# surprise us. A warning may be attributed to its own module or, by stacklevel, to ours or to the caller's.
_DEPRECATIONS = [
    f"error::{category}:{module}"
    for category in ("FutureWarning", "DeprecationWarning")
    for module in (r"transformers(\..*)?", r"moba_hf(\..*)?", r"torch\.nn\.modules\.module")
]


# Files whose tests take a minute each.
_LONG = ("test_interpreted.py", "test_distributed.py")
# Marks of tests that are left out if they cannot run or were not requested, and how to run them.
_LEFT_OUT = {
    "gpu": "that need a CUDA device; run them on a machine with one by `make test-gpu`",
    "slow": "that take minutes; run them by `python -m pytest --slow`",
}
_COUNTS = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    for line in _DEPRECATIONS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = set()
    if not config.getoption("--slow"):
        skipped.add("slow")
    if not torch.cuda.is_available():
        skipped.add("gpu")
    left_out = {
        item: next(x for x in _LEFT_OUT if x in skipped and x in item.keywords)
        for item in items
        if skipped & set(item.keywords)
    }
    config.hook.pytest_deselected(items=list(left_out))
    kept = [item for item in items if item not in left_out]
    # tests of a minute come first: as the last ones they would keep one process busy while the others wait
    items[:] = sorted(kept, key=lambda item: item.path.name not in _LONG)
    config.stash[_COUNTS] = Counter(left_out.values())


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist: the main process prints
        session.config.workeroutput["left_out"] = dict(session.config.stash.get(_COUNTS, Counter()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes the counts of left-out tests from a pytest-xdist worker; all workers collect the same tests."""
    node.config.stash[_COUNTS] = Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line for all tests that need a GPU and one for all slow tests, instead of a skip for each."""
    for mark, count in sorted(config.stash.get(_COUNTS, Counter()).items()):
        terminalreporter.write_line(f"not run: {count} tests {_LEFT_OUT[mark]}")


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, regardless of the order of the tests."""
    torch.manual_seed(0)


def _poisoned(make):
    def filled(*args, **kwargs):
        result = make(*args, **kwargs)
        if result.is_floating_point():
            return result.fill_(float("nan"))
        return result.fill_(torch.iinfo(result.dtype).max) if result.dtype != torch.bool else result

    return filled


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills uninitialised memory with NaN (integers: the largest value), so that reading it is noticed."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills uninitialised memory with NaN (integers: the largest value), on any device, also inside torch."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
