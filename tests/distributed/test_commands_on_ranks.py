"""`moba-hf generate` and `moba-hf eval` under torchrun print once what a single process prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import save_tiny, save_tokenizer, write_tiny_gguf
from ranks import launch

import moba_hf_cli as cli

CLI = ("-m", "moba_hf_cli")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    folder = save_tokenizer(save_tiny(place / "model"))
    values = json.loads((folder / "config.json").read_text())
    values["moba"] = {"block_size": 16, "topk": 3}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("%&'()*+,-." * 14)
    return file


def alone(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a single process, this one, prints."""
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    captured = capsys.readouterr()
    assert caught.value.code == 0, captured.err
    return captured.out


def test_generate(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(model), "--prompt-file", str(text), "--max-new-tokens", "8", "--chunk", "32"]
    two = launch(*CLI, *arguments)
    assert two.returncode == 0, two.stderr
    assert two.stdout == alone(capsys, *arguments)
    assert two.stderr.count("tokens read in") == 1


def test_eval(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(model), "--text", str(text), "--length", "120"]
    arguments += ["--measure", "perplexity", "--measure", "agreement"]
    out = [tmp_path / f"{name}.json" for name in ("one", "two")]
    two = launch(*CLI, *arguments, "--out", str(out[1]))
    assert two.returncode == 0, two.stderr
    assert two.stdout == alone(capsys, *arguments, "--out", str(out[0]))
    results = [json.loads(file.read_text()) for file in out]
    assert results[0].keys() == results[1].keys()
    _assert_close(*results)


def _assert_close(one: object, two: object) -> None:
    if isinstance(one, dict) and isinstance(two, dict):
        assert one.keys() == two.keys()
        for key in one:
            _assert_close(one[key], two[key])
    elif isinstance(one, list) and isinstance(two, list):
        for a, b in zip(one, two, strict=True):
            _assert_close(a, b)
    elif one is None or isinstance(one, str):  # in the settings
        assert two == one
    else:
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "MODEL", "--text", "TEXT", "--measure", "recall"], "recall needs all heads"),
        (["eval", "MODEL", "--text", "TEXT", "--store", "STORE"], "omit --store"),
        (["generate", "GGUF", "--prompt", "%%"], "cannot be sharded over 2 ranks"),
    ],
)
def test_what_ranks_cannot_do_is_refused(
    model: Path,
    text: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    gguf = tmp_path / "tiny.gguf"
    write_tiny_gguf(gguf)
    names = {"MODEL": model, "TEXT": text, "GGUF": gguf, "STORE": tmp_path / "store.json"}
    with pytest.raises(SystemExit) as caught:
        cli.main([str(names.get(x, x)) for x in arguments])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err  # whichever rank fails says why
    assert captured.out == ""
