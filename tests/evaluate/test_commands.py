"""The commands eval, calibrate and plot, end to end on a tiny checkpoint."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AttentionInterface, PreTrainedTokenizerFast

from moba_hf import MobaConfig
from moba_hf.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are bytes, and a text beside it."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    tiny_model(vocab_size=256).save_pretrained(folder)
    (folder / "text.txt").write_text("The grass is green and the sky is blue. " * 40)
    return folder


def run(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    return captured.out


def test_eval_prints_what_it_writes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = checkpoint / "text.txt", tmp_path / "eval.json"
    rule = ("--block-size", 16, "--topk", 4, "--sink-blocks", 1, "--local-blocks", 1)
    measures = [a for m in ("perplexity", "agreement", "recall") for a in ("--measure", m)]
    task = ("--task", "needle", "--task-length", 500, "--contexts", 1)
    printed = run(
        capsys, "eval", checkpoint, "--text", text, "--length", 512, *rule, *measures, *task, "--out", out
    )
    values = json.loads(out.read_text())
    losses = values["perplexity"][str(text)]
    rise = losses["given"]["trailing"] - losses["dense"]["trailing"]
    assert f"{rise:+.4f}" in printed
    assert values["keys"][str(text)]["given"][0] == 4 * 16 / 512
    assert {t["setting"] for t in values["tasks"]} == {"dense", "given"}
    for kind in ("positions", "recall", "needles"):
        picture = tmp_path / f"{kind}.png"
        run(capsys, "plot", kind, out, "--out", picture)
        assert picture.read_bytes()[:4] == b"\x89PNG"


def test_calibrate_writes_the_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = checkpoint / "text.txt", tmp_path / "curve.json"
    args = ("--text", text, "--length", 512, "--keys", 0.4, "--block-size", 16, "--gate", "mass")
    printed = run(capsys, "calibrate", checkpoint, *args, "--out", out, "--write")
    config = MobaConfig.from_dict(json.loads((checkpoint / "config.json").read_text())["moba"])
    assert config == MobaConfig.from_dict(json.loads(out.read_text())["config"])
    assert config.gate == "mass"
    assert config.key_budget(512, 3) <= 0.4
    assert "measured rise" in printed
    for kind, source, more in (
        ("budget", out, ()),
        ("routing", checkpoint, ("--text", text, "--length", 256, "--layer", 1)),
    ):
        run(capsys, "plot", kind, source, "--out", tmp_path / "x.png", *more)


def test_lm_eval_gets_its_arguments_and_finds_moba(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for the harness: what reaches its command line, and what is registered by then."""
    harness, seen = types.ModuleType("lm_eval.__main__"), []

    def cli_evaluate() -> None:
        seen.append((sys.argv, "moba" in AttentionInterface()))

    harness.cli_evaluate = cli_evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", harness)
    before = sys.argv
    run(capsys, "lm-eval", "--model", "hf", "--tasks", "mine", "--limit", 2)
    assert seen == [(["lm-eval", "--model", "hf", "--tasks", "mine", "--limit", "2"], True)]
    assert sys.argv == before


def test_errors_are_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = checkpoint / "text.txt"
    for args in (
        ("calibrate", checkpoint, "--keys", 0.5),
        ("calibrate", checkpoint, "--text", text, "--length", 64),
        ("eval", checkpoint, "--text", text, "--length", 100000),
        ("plot", "poem", text, "--out", "x.png"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
