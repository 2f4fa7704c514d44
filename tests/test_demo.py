"""examples/demo.py on a tiny model: its table, and the commands that it prints."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json, save_tiny, save_tokenizer
from example_scripts import load_example
from transformers import AutoModelForCausalLM

import moba_hf_cli as cli

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo() -> Any:
    pytest.importorskip("matplotlib")
    return load_example("demo")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tokenizer(save_tiny(tmp_path_factory.mktemp("demo") / "tiny", layers=4))
    edit_json(folder / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
    return folder


def test_the_table(demo: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PRESETS", ("default", "fine"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.randint(90, (1, 1200))
    results = demo.read_with_all(model, ids, 3)
    head, dense, default, fine = demo.table(results)
    assert dense[0] == "dense"
    assert dense[1] == dense[5] == "100.0%"
    assert dense[6] == "3 of 3"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(ids).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    assert float(dense[3]) == pytest.approx(float(loss.mean().exp()), abs=0.006)
    assert float(dense[4]) == pytest.approx(float(loss[-299:].mean().exp()), abs=0.006)
    assert results["dense"]["continuation"][0] == int(logits[-1].argmax())
    moba = results["fine"]
    same = (moba["first"] == logits[:-1].argmax(-1))[-299:].float().mean()
    assert fine[5] == f"{same:.1%}"
    assert 0 < moba["share"] < 1
    assert len(head) == len(default) == len(fine)


def test_the_next_commands_work_as_printed(
    demo: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them after the conversion that the demo makes, in a folder with the files of the repository."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with pytest.raises(SystemExit):
        cli.main(["convert", str(checkpoint), str(demo.CHECKPOINT), "--preset", "default"])
    commands = demo.next_commands()
    assert len(commands) == 3
    for words in commands:
        begin = 3 if words[0] == sys.executable else 1
        with pytest.raises(SystemExit) as caught:
            cli.main(words[begin:])
        assert caught.value.code == 0, words
    assert (tmp_path / "out" / "routing.png").stat().st_size > 1000
    assert "moba" in json.loads((demo.CHECKPOINT / "config.json").read_text())
