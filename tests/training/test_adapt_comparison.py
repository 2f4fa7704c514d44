"""examples/adapt.py compares only what is comparable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_adapt import adapt, learnable  # noqa: F401  the fixture
from tiny_models import tiny


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Arguments for a short run: a tiny checkpoint and token files."""
    tiny().save_pretrained(tmp_path / "model")
    np.save(tmp_path / "train.npy", learnable(32, 64, 1))
    np.save(tmp_path / "held.npy", learnable(2, 64, 2))
    files = ["--text", str(tmp_path / "train.npy"), "--held-out", str(tmp_path / "held.npy")]
    sizes = ["--length", "64", "--steps", "8", "--warmup", "1", "--trailing", "16", "--log-every", "1"]
    return [str(tmp_path / "model"), *files, *sizes, "--out", str(tmp_path / "out")]


@pytest.mark.parametrize("slow", ["dense", "moba"])
def test_runs_cut_short_by_the_clock_are_compared_at_equal_steps_only(
    adapt: Any,  # noqa: F811
    inputs: list[str],
    monkeypatch: pytest.MonkeyPatch,
    slow: str,
) -> None:
    """With a fake clock, the slow run has time for three steps, the other one for all."""

    def seconds(self: Any) -> float:
        self.asked = getattr(self, "asked", -1) + 1
        return self.asked * (1.0 if (self.run.moba is None) == (slow == "dense") else 0.01)

    monkeypatch.setattr(adapt.HeldOut, "seconds", seconds)
    results = adapt.main([*inputs, "--max-seconds", "3", "--curve-every", "100"])
    dense, moba = results["runs"]
    if slow == "dense":
        assert dense["steps"] == moba["steps"] < 8
        assert "gap_after" in moba
        assert moba["curve"][-1]["step"] == moba["steps"]
    else:  # it had fewer steps than the control, so there is no comparison
        assert moba["steps"] < dense["steps"] == 8
        assert "gap_after" not in moba
        assert "closed" not in moba
    assert f"| {moba['steps']} |" in adapt.table(results)


def test_a_share_of_no_gap_is_not_printed(adapt: Any, inputs: list[str]) -> None:  # noqa: F811
    """With blocks as long as the row, MoBA is dense attention, and there is no gap to close."""
    results = adapt.main([*inputs, "--setting", "whole=64/1", "--steps", "2"])
    whole = results["runs"][1]
    assert whole["gap_before"] == 0
    assert "closed" not in whole
    assert "whole" in adapt.table(results)


def test_invalid_arguments_are_refused(
    adapt: Any,  # noqa: F811
    inputs: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for given, message in (
        (["--setting", "a=8/2", "--setting", "a=8/3"], "names two runs 'a'"),
        (["--setting", "dense=8/2"], "names two runs 'dense'"),
        (["--steps", "0"], "at least 1"),
        (["--held-out-rows", "0"], "at least 1"),
        (["--max-seconds", "-1"], "at least 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            adapt.main([*inputs, *given])
        assert message in f"{stop.value} {capsys.readouterr().err}"
