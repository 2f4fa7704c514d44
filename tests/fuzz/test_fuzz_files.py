"""Damaged files, kills, races: every run succeeds or prints one line with code 2; nothing is left half done.

Takes seconds by default; --slow runs enough cases to be worth reporting (pytest -s prints the counts).
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))
from checkpoints import save_tiny, save_tokenizer, write_tiny_gguf
from fuzz.kills import kill_everywhere
from fuzz.mutations import end_of, fuzz, mutate_bytes, mutate_text_json
from fuzz.races import race_threads

MOBA = ["--block-size", "8", "--topk", "2"]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded llama with a tokenizer, and a text file."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "text.txt").write_text("abcdefghij" * 40)
    return save_tokenizer(save_tiny(folder / "src", max_shard_size="20KB"))


def run(name: str, count: int, damage: object) -> None:
    ends, longest = fuzz(count, damage)  # type: ignore[arg-type]
    print(f"\n{name}: {dict(ends)}, the longest {longest:.1f} s")
    assert set(ends) <= {"done", "told", "told (by a foreign error)"}, ends
    assert longest < 10


def commands(src: Path, out: Path) -> list[list[str]]:
    shutil.rmtree(out, ignore_errors=True)
    return [
        ["inspect", str(src)],
        ["convert", str(src), str(out), *MOBA],
        ["generate", str(src), "--prompt", "abc", "--max-new-tokens", "2"],
    ]


@pytest.mark.parametrize(
    ("what", "count"),
    [
        ("config", 25),
        ("header", 15),
        ("index", 15),
        pytest.param("config", 1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
        pytest.param("header", 500, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
        pytest.param("index", 300, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_damaged_checkpoints(what: str, count: int, tiny: Path, tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "dst"

    def damage(rng: random.Random) -> list[list[str]]:
        shutil.rmtree(src, ignore_errors=True)
        shutil.copytree(tiny, src)
        if what == "config":
            mutate_text_json(src / "config.json", rng)
        elif what == "index":
            mutate_text_json(src / INDEX, rng)
        else:
            shard = rng.choice(sorted(src.glob("*.safetensors")))
            data = shard.read_bytes()
            length = 8 + int.from_bytes(data[:8], "little")
            shard.write_bytes(mutate_bytes(data, rng, 0, length))
        return commands(src, out)[0 if what == "config" else 1 :]

    run(what, count, damage)


@pytest.mark.parametrize(
    "count", [15, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_damaged_gguf(count: int, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_tiny_gguf(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    header = data.index(b"token_embd.weight") + 1500

    def damage(rng: random.Random) -> list[list[str]]:
        shutil.rmtree(tmp_path / "dst", ignore_errors=True)
        (tmp_path / "m.gguf").write_bytes(mutate_bytes(data, rng, 0, header))
        return [["convert", str(tmp_path / "m.gguf"), str(tmp_path / "dst"), *MOBA]]

    run("gguf", count, damage)


@pytest.mark.parametrize(
    "count", [10, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_damaged_stores(count: int, tiny: Path, tmp_path: Path) -> None:
    store, whole = tmp_path / "store.json", tmp_path / "whole.json"
    text = ["--text", str(tiny.parent / "text.txt"), "--length", "100"]
    rule = ["--preset", "default-per-query", "--block-size", "8"]
    arguments = ["calibrate", str(tiny), *text, "--keys", "0.7", *rule]
    assert end_of([*arguments, "--store", str(whole)], 60) == "done"

    def damage(rng: random.Random) -> list[list[str]]:
        shutil.copy(whole, store)
        mutate_text_json(store, rng)
        return [[*arguments, "--store", str(store)]]

    run("store", count, damage)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("step", [9, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_kills(overwrite: bool, exchange: bool, step: int, tiny: Path, tmp_path: Path) -> None:
    counts = kill_everywhere(tiny, tmp_path, overwrite=overwrite, exchange=exchange, step=step)
    print(f"\nkills, overwrite {overwrite}, exchange {exchange}: {counts}")
    assert counts.pop("kills") > 30 / step
    assert not any(counts.values())


@pytest.mark.slow
def test_races(tiny: Path, tmp_path: Path) -> None:
    counts = race_threads(tiny, tmp_path, 50)
    print(f"\nraces: {counts}")
    assert counts == {"pairs": 50, "incomplete": 0, "leftovers": 0}
