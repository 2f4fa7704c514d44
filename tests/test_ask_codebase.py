"""examples/ask_codebase.py on a tiny model gives the same answers with and without the cache on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import save_tiny, save_tokenizer
from example_scripts import load_example

from moba_hf.evaluate.repositories import Repository

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example() -> Any:
    return load_example("ask_codebase")


def test_answers_do_not_depend_on_the_cache(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "model")
    save_tokenizer(model, 64)
    folder = tmp_path / "project"
    folder.mkdir()
    for i in range(3):
        (folder / f"f{i}.py").write_text(f"A{i}=B{i}+{i}\n" * 9)
    command = [str(model), str(folder), "--max-new-tokens", "4", "--chunk-size", "128", "--preset", "default"]
    command += ["--question", "A1=", "--question", "B2"]
    plain = example.main(command)
    assert len(plain) == 2
    cached = [*command, "--cache", str(tmp_path / "cache.safetensors")]
    assert example.main(cached) == plain
    capsys.readouterr()
    assert example.main(cached) == plain
    first = capsys.readouterr().out.splitlines()[0]
    tokens = first.split(" tokens")[0].split()[-1]
    assert f"{tokens} of them from the cache" in first
    (folder / "f2.py").write_text("A2=0\n")
    assert example.main(cached) == example.main(command)


def test_the_place_of_an_answer(example: Any) -> None:
    sources = torch.tensor([5, 1, 2, 3, 9, 1, 2, 3, 4, 7])
    assert example.find_place(torch.tensor([8, 1, 2, 3, 4]), sources) == (5, 4)
    assert example.find_place(torch.tensor([8, 8]), sources) == (0, 0)

    class Letters:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode()

    text = b"# p/a.py\nx = 1\n# p/b.py\ny = 2\nz = 3\n"
    repository = Repository("p", np.frombuffer(text, np.uint8).astype(np.int32), np.array([0, 15]))
    assert example.line_of(text.index(b"x ="), repository, Letters()) == "p/a.py:1"
    assert example.line_of(text.index(b"z ="), repository, Letters()) == "p/b.py:2"
