"""The notebooks run from top to bottom, and the examples of patches/README.md work."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOREIGN = ROOT / "tests" / "patches" / "foreign"


@pytest.mark.slow
def test_new_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "examples" / "notebooks" / "new_architecture.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = ["".join(out.get("text", "") for out in cell.get("outputs", [])) for cell in notebook.cells]
    text = "\n".join(shown)
    assert "no MoBA adapter for model_type 'phi3'" in text
    assert "facts: eligible layers [0, 1] are not among attention_layers(model)" in text
    assert "facts: layer 0 has a sliding window of 16" in text
    assert "['lookup', 'facts', 'covering'" in text
    assert "torch.Size([1, 100, 96])" in text


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "patches" / "README.md").read_text(), re.S)


def test_the_readme_example_runs() -> None:
    space: dict[str, object] = {}
    for block in readme_blocks("python"):
        exec(block, space)
    assert space["report"].packing == "separate"  # type: ignore[attr-defined]


def test_the_readme_example_is_the_foreign_package() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    (shown,) = map(tomllib.loads, readme_blocks("toml"))
    tested = tomllib.loads((FOREIGN / "pyproject.toml").read_text())
    tested["project"].pop("description")
    assert shown == tested
    code = readme_blocks("python")[0].strip()
    assert (FOREIGN / "moba_olmo2.py").read_text().strip().endswith(code.split("\n\n\n")[1])
