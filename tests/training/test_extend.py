"""examples/extend.py: two tiny stages, stopped and resumed, give the weights of an uninterrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import save_tokenizer
from example_scripts import load_example
from tiny_models import tiny, tokens
from transformers import AutoTokenizer

from moba_hf import MobaConfig
from moba_hf.evaluate.repositories import save_repositories
from moba_hf.training import Repository, Schedule, Stage

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def extend() -> Any:
    return load_example("extend")


def test_the_example_schedule_is_the_measured_one(
    extend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/training.md carries on these two stages in its results."""
    path = tmp_path / "schedule.json"
    assert extend.main(["--write-schedule", str(path)]) == []
    first, second = Schedule.load(path).stages
    rule = MobaConfig(64, sink_blocks=1, local_blocks=1, gate="mass", tile=64, threshold=0.01)
    assert first == Stage(32768, rule, 7_438_336, 6e-4, 20, theta=1e6, dense_tail=2048)
    assert second == Stage(131072, rule, 5_373_952, 3e-4, 5, theta=8e6, dense_tail=4096)
    assert (first.steps, second.steps) == (227, 41)
    with pytest.raises(SystemExit):
        extend.parse(["--schedule", str(path)])
    assert "MODEL is missing" in capsys.readouterr().err


def test_resumed_stages_are_bit_identical(extend: Any, tmp_path: Path) -> None:
    tiny(rule=None, attention="sdpa").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    ids = tokens(3000).numpy().astype(np.uint16)
    save_repositories(tmp_path / "text.npz", [Repository("r", ids, np.arange(0, 3000, 150))])
    schedule = Schedule(
        (
            Stage(576, MobaConfig(8, 4), 2304, learning_rate=1e-2, warmup_steps=1, theta=2e4, dense_tail=64),
            Stage(640, MobaConfig(16, 4), 1920, learning_rate=1e-2, warmup_steps=1, rope="yarn"),
        )
    )
    schedule.save(tmp_path / "schedule.json")
    files = ("--schedule", str(tmp_path / "schedule.json"), "--tokens", str(tmp_path / "text.npz"))
    command = [str(tmp_path / "model"), *files, "--log-every", "1", "--recompute-from", "600"]
    whole = extend.main([*command, "--out", str(tmp_path / "whole"), "--dense-steps", "1"])
    assert [one["steps_of_this_run"] for one in whole] == [4, 3]
    assert all(one["dense_seconds_per_step"] > 0 for one in whole)
    parts = [*command, "--out", str(tmp_path / "parts")]
    assert extend.main([*parts, "--stop-after", "2"]) == []  # within the first stage
    assert (tmp_path / "parts" / "stage0-running").is_dir()
    assert len(extend.main([*parts, "--stages", "1"])) == 1
    assert len(extend.main([*parts, "--stop-after", "1"])) == 1  # within the second
    resumed = extend.main(parts)
    assert [one["steps_of_this_run"] for one in resumed] == [2, 2]
    for i in range(2):
        one, other = (tmp_path / x / f"stage{i}" / "model.safetensors" for x in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes()
    assert one.read_bytes() != (tmp_path / "whole" / "stage0" / "model.safetensors").read_bytes()
    assert not (tmp_path / "parts" / "stage1-running").exists()
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / x) for x in ("model", "parts/stage1")]
    assert tokenizers[0]("a1").input_ids == tokenizers[1]("a1").input_ids  # `moba-hf eval` needs one


def test_a_stage_that_takes_too_long_counts_as_done(extend: Any, tmp_path: Path) -> None:
    tiny(rule=None, attention="sdpa").save_pretrained(tmp_path / "model")
    ids = tokens(900).numpy().astype(np.uint16)
    save_repositories(tmp_path / "text.npz", [Repository("r", ids, np.arange(0, 900, 150))])
    Schedule((Stage(576, MobaConfig(8, 4), tokens=57600),)).save(tmp_path / "schedule.json")
    files = ("--schedule", str(tmp_path / "schedule.json"), "--tokens", str(tmp_path / "text.npz"))
    out = ("--out", str(tmp_path / "out"), "--stage-seconds", "0")
    (one,) = extend.main([str(tmp_path / "model"), *files, *out])
    assert (one["steps"], one["steps_of_this_run"], one["tokens"]) == (100, 1, 576)
    assert extend.main([str(tmp_path / "model"), *files, *out]) == [one]
