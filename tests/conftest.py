"""Fixtures and options of the whole suite."""

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch

# A deprecation that transformers reports about our use is a failure now, not a surprise at its next release.
# The warning may be attributed to its module or, by stacklevel, to ours.
_DEPRECATIONS = [
    f"error::{category}:{module}"
    for category in ("FutureWarning", "DeprecationWarning")
    for module in (r"transformers(\..*)?", r"moba_hf(\..*)?")
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    for line in _DEPRECATIONS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for every test, whatever ran before it."""
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
    """Uninitialised memory holds NaN (integers: their largest value), so that reading it shows."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills uninitialised memory with NaN (the largest integer), on any device and inside torch as well."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
