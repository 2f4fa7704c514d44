"""Every long step of the command line shows one progress bar, which ends complete."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_tiny, save_tokenizer
from torch import nn
from tqdm import tqdm

import moba_hf_cli as cli
from moba_hf import prefill, progress
from moba_hf.progress import advanced_by, print_beside, progress_bar

RULE = ("--block-size", "8", "--topk", "3")


class Screen(io.StringIO):
    """A terminal that keeps what is written."""

    def isatty(self) -> bool:
        return True


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar that records its texts, its progress, and how many bars are open."""

    seen: list[tuple[list[str], int, int]]
    shown: int
    screen: io.StringIO

    def __init__(self, **kwargs: Any) -> None:
        assert kwargs["file"] is sys.stderr
        super().__init__(**{**kwargs, "file": self.screen})
        if not self.disable:
            type(self).shown += 1
            assert self.shown == 1, f"{self.desc} stands beside another bar"
            self.texts = [kwargs["desc"]]

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        if not self.disable:
            self.texts.append(str(desc))
        super().set_description(desc, refresh)

    def close(self) -> None:
        if not self.disable:
            type(self).shown -= 1
            self.seen.append((self.texts, int(self.n), int(self.total)))
        super().close()


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int, int]]:
    """The texts, progress and totals of all bars in the test, on a terminal."""
    Bar.seen, Bar.shown, Bar.screen = [], 0, Screen()
    monkeypatch.setattr(progress, "tqdm", Bar)
    return Bar.seen


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save_tiny(tmp_path_factory.mktemp("bars") / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(33 + i * i % 90) for i in range(300)))
    return file


def run(*args: str | Path) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(arg) for arg in args])
    assert caught.value.code == 0


@pytest.mark.parametrize("flag", [(), ("--link",)])
def test_convert_and_verify(bars: Any, model: Path, tmp_path: Path, flag: tuple[str, ...]) -> None:
    run("convert", model, tmp_path / "dst", *RULE, *flag)
    copied = sum(path.stat().st_size for path in model.iterdir() if path.name != "config.json")
    assert bars == [(["copying"], copied, copied)]
    bars.clear()
    run("verify", tmp_path / "dst", "--source", model)
    (names, compared, size), logits = bars
    assert (names, compared) == (["comparing weights"], size)
    assert 0 < size < (model / "model.safetensors").stat().st_size
    assert logits == (["comparing logits"], 9, 9)  # three passes through three layers


def test_eval(bars: Any, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ("--store", tmp_path / "store.json")
    measures = ("--measure", "perplexity", "--measure", "agreement", "--measure", "recall")
    command = ("eval", model, "--text", text, "--length", "256", *RULE, *measures, *store)
    run(*command)
    texts = ["perplexity of text.txt, dense"]
    texts += [f"{measure} of text.txt, given" for measure in ("perplexity", "agreement", "recall")]
    assert bars == [(["passes", *texts], 15, 15)]  # agreement takes two passes
    bars.clear()
    run(*command, "--json")
    assert bars == [(["passes", *texts], 0, 0)]  # the store knows all
    capsys.readouterr()
    bars.clear()
    run("eval", model, "--task", "needle", "--task-length", "200", "--contexts", "2", *RULE, "--json")
    assert [text for texts, *_ in bars for text in texts] == [
        "passes",
        "needle, 200 tokens, dense (1 of 2)",
        "needle, 200 tokens, given (2 of 2)",
    ]
    assert [(done, total) for _, done, total in bars[1:]] == [(2, 2)] * 2
    assert len(json.loads(capsys.readouterr().out)["tasks"]) == 2


def test_calibrate(bars: Any, model: Path, text: Path) -> None:
    rule = ("--preset", "default-per-query", "--block-size", "8")
    run("calibrate", model, "--text", text, "--length", "256", "--keys", "0.4", *rule)
    first, second, dense, chosen, *more = bars
    assert (first, second) == ((["sensitivity"], 3, 3), (["local costs"], 3, 3))
    assert (dense[0][0].split(", ")[1], *dense[1:]) == ("dense", 3, 3)
    assert (chosen[0][0].split("%")[1], *chosen[1:]) == (" of the keys", 3, 3)
    assert all(done == total for _, done, total in more)


def test_plot(bars: Any, model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run("convert", model, tmp_path / "dst", *RULE)
    bars.clear()
    run("plot", "routing", tmp_path / "dst", "--text", text, "--length", "64", "--out", tmp_path / "a.png")
    assert bars == [(["reading the text"], 3, 3)]


def test_generate(bars: Any, model: Path, text: Path) -> None:
    run(
        "generate", model, "--prompt-file", text, "--max-new-tokens", "2", *RULE, "--compare", "--chunk", "99"
    )
    assert bars == [(["prefill"], 300, 300)] * 2


def test_where_none_is_shown(bars: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    progress_bar("a", 1, " b").close()
    assert len(bars) == 1
    monkeypatch.setenv("RANK", "1")
    progress_bar("a", 1, " b").close()
    progress_bar("a", 1, " b", shown=True).close()
    monkeypatch.delenv("RANK")
    Bar.screen = io.StringIO()  # no terminal
    progress_bar("a", 1, " b").close()
    assert len(bars) == 1
    progress_bar("a", 1, " b", shown=True).close()
    assert len(bars) == 2
    assert "a:   0%" in Bar.screen.getvalue()


def test_prefill_shows_one_unless_told_not_to(bars: Any, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.randint(90, (1, 40))
    cache = prefill(loaded, ids[:, :20], progress=False)
    assert bars == []
    prefill(loaded, ids, cache=cache)
    assert bars == [(["prefill"], 39, 39)]


def test_modules_advance_a_bar_and_keep_their_outputs(bars: Any) -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    expected = layer(x)
    with progress_bar("layers", 2, " layers") as bar, advanced_by(bar, [layer]):
        assert torch.equal(layer(x), expected)
        layer(x)
    assert torch.equal(layer(x), expected)
    assert bars == [(["layers"], 2, 2)]


def test_a_line_beside_a_bar(bars: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("rows", 1, " rows") as bar:
        print_beside(bar, "a line")
    assert capsys.readouterr().out == "a line\n"
