"""The evaluation commands on a vision-language checkpoint use its text model."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path += [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "patches")]
from checkpoints import save_tokenizer
from families import tiny_config

from moba_hf import MobaConfig, convert_checkpoint
from moba_hf.testing import build_model
from moba_hf_cli import main

RULE = ("--block-size", 8, "--topk", 2)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vl")
    build_model(tiny_config(request.param)).save_pretrained(folder / "src")
    save_tokenizer(folder / "src")
    (folder / "text.txt").write_text("abcdefghij" * 40)
    return convert_checkpoint(folder / "src", folder / "dst", MobaConfig(8, 2))


def run(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    return captured.out


def test_eval_calibrate_and_plot(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ("--text", checkpoint.parent / "text.txt", "--length", 100)
    measures = [a for m in ("perplexity", "agreement", "recall") for a in ("--measure", m)]
    run(capsys, "eval", checkpoint, *text, *RULE, *measures, "--out", tmp_path / "eval.json")
    found = json.loads((tmp_path / "eval.json").read_text())["perplexity"][str(text[1])]
    assert found["given"]["loss"] != found["dense"]["loss"]
    run(capsys, "plot", "routing", checkpoint, *text, "--out", tmp_path / "routing.png")
    run(capsys, "calibrate", checkpoint, *text, "--keys", 0.5, "--block-size", 8, "--write")
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["attn_implementation"] == {"text_config": "moba"}
    assert config["text_config"]["moba"] != MobaConfig(8, 2).to_dict()
    generated = run(capsys, "generate", checkpoint, "--prompt", "abc", "--max-new-tokens", 2)
    assert generated.strip()
