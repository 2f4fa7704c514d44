"""The recipes of the README run as they are written, on a tiny model.

`make test-wheel` runs this file with the built wheel, where the repository cannot be imported.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points, metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_tiny, save_tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import moba_hf
import moba_hf_cli as cli
from moba_hf.config import MobaConfig, preset_names

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    """The code blocks of the README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with all that the recipes name: two checkpoints, a text and a book."""
    place = tmp_path_factory.mktemp("recipes")
    for name in ("SRC", "MODEL"):
        save_tokenizer(save_tiny(place / name, layers=4))
        model = AutoModelForCausalLM.from_pretrained(place / name)
        for layer in model.model.layers:  # else a query attends all keys alike, and no block can be left out
            layer.self_attn.q_proj.weight.data *= 60
            layer.self_attn.k_proj.weight.data *= 60
        model.save_pretrained(place / name)
    text = "".join(random.Random(0).choices([chr(33 + i) for i in range(90)], k=9000))
    (place / "my.txt").write_text(text)
    (place / "book.txt").write_text(text[:700])
    return place


@pytest.fixture
def names(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """What the Python of the README takes for granted, and the diff at its top."""
    model = AutoModelForCausalLM.from_pretrained(folder / "SRC", attn_implementation="moba")
    row = torch.randint(0, 90, (600,))
    return {
        "moba_hf": moba_hf,
        "model": model,
        "input_ids": row[None],
        "Trainer": Trainer,
        "arguments": TrainingArguments(str(tmp_path / "out"), max_steps=2, report_to=[], use_cpu=True),
        "rows": [{"input_ids": row[:64], "labels": row[:64]}] * 2,
        "q": torch.randn(600, 4, 16),
        "k": torch.randn(600, 2, 16),
        "v": torch.randn(600, 2, 16),
    }


def test_the_diff_at_the_top(folder: Path) -> None:
    """Its lines without those that it takes away."""
    (diff,) = fenced("diff")
    lines = [line[1:] for line in diff.splitlines() if not line.startswith("-")]
    space: dict[str, Any] = {"path": folder / "SRC"}
    exec("\n".join(lines), space)
    assert space["model"].config._attn_implementation == "moba"


def test_python(names: dict[str, Any]) -> None:
    """The blocks share one namespace, as in a notebook that opens with the diff."""
    blocks = fenced("python")
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    names["trainer"].train()
    assert names["output"].shape[1] > 600
    expected = moba_hf.moba_attention(
        names["q"], names["k"], names["v"], block_size=128, topk=8, block_indices=names["blocks"]
    )
    torch.testing.assert_close(names["out"], expected)
    assert names["lse"].shape == (4, 600)


def test_shell(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every `moba-hf` line, in order, where the files that they name are."""
    monkeypatch.chdir(folder)
    blocks = [block for block in fenced("bash") if block.startswith("moba-hf ")]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [words[1:] for line in lines if (words := shlex.split(line, comments=True))]
    printed = {}
    for command in commands:
        with pytest.raises(SystemExit) as caught:
            cli.main(command)
        printed[command[0]], errors = capsys.readouterr()
        assert caught.value.code == 0, (command, errors)
    assert list(printed) == ["inspect", "convert", "verify", "generate", "calibrate", "eval"]
    assert "blocks of 4096" in printed["inspect"]
    assert printed["verify"].count("ok ") == 5
    assert "the continuations" in printed["generate"]
    converted = json.loads((folder / "DST" / "config.json").read_text())
    assert MobaConfig.from_dict(converted["moba"]) == MobaConfig.from_preset("default")
    assert "moba" in json.loads((folder / "MODEL" / "config.json").read_text())  # --write
    assert "| default |" in printed["eval"]


def test_what_is_installed() -> None:
    """Files that a wheel must contain in addition to its modules."""
    assert files("moba_hf").joinpath("py.typed").is_file()
    assert {path.name for path in files("moba_hf.patches").iterdir()} >= {"llama.py", "README.md"}
    found = {path.name for path in files("moba_hf.configs").iterdir() if path.name.endswith(".json")}
    assert found == {f"{name}.json" for name in preset_names()}
    about = metadata("moba-hf")
    assert about["License-Expression"] == "Apache-2.0"
    assert about["License-File"] == "LICENSE"
    assert "Typing :: Typed" in about.get_all("Classifier", [])
    (script,) = entry_points(group="console_scripts", name="moba-hf")
    assert script.load() is cli.main


def test_the_script() -> None:
    script = Path(sys.executable).with_name("moba-hf")
    done = subprocess.run([script, "presets"], capture_output=True, text=True, check=True, cwd=os.sep)
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == preset_names()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    """What `moba-hf --show-completion` prints, for shells that need not be installed here."""
    script = Path(sys.executable).with_name("moba-hf")
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [script, "--show-completion", shell]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    marks = {
        "bash": "complete -o default -F",
        "zsh": "#compdef moba-hf",
        "fish": "complete --command moba-hf",
    }
    assert marks[shell] in done.stdout
    assert "_MOBA_HF_COMPLETE" in done.stdout
