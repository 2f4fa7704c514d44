"""The notebooks run from top to bottom, and the examples of patches/README.md work."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save_tiny, save_tokenizer

ROOT = Path(__file__).parents[1]
FOREIGN = ROOT / "tests" / "patches" / "foreign"
FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def printed(cell: dict[str, Any]) -> str:
    """What a cell printed."""
    outputs = cell.get("outputs", [])
    return "".join(output.get("text", "") for output in outputs if output.get("name") != "stderr")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_how_notebooks_are_kept(path: Path) -> None:
    """Run from top to bottom, without what belongs to one machine; the first cell says what they give."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = "".join(cells[0]["source"])
    assert re.match(r"# .+\nAt the end you have ", first)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert not re.search(r"/(?:work|home|root|tmp|Users)/", json.dumps(outputs))


def ask_codebase(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The cells of the notebook after a run on `checkpoint`."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("MOBA_NOTEBOOK_CHECKPOINT", str(checkpoint))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(FOLDER / "ask_codebase.ipynb", as_version=4)
    where = {"metadata": {"path": str(FOLDER)}}
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where)
    return client.execute().cells


def test_ask_codebase_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """25 seconds on a busy core."""
    checkpoint = save_tokenizer(save_tiny(tmp_path / "model"))
    text = "\n".join(map(printed, ask_codebase(checkpoint, monkeypatch)))
    tokens = re.findall(r"^project: 4 files, ([\d,]+) tokens, ([\d,]+) of them", text, re.MULTILINE)
    (all_tokens, none), (_, every), (_, some) = tokens
    assert (none, every) == ("0", all_tokens)
    assert some not in ("0", all_tokens)


@pytest.mark.slow
def test_ask_codebase_on_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = ROOT / "out" / "smollm2-moba"
    if not checkpoint.exists():
        pytest.skip("make demo makes the checkpoint")
    text = "\n".join(map(printed, ask_codebase(checkpoint, monkeypatch)))
    assert text.count("settings.py:3]") == 3


@pytest.mark.slow
def test_new_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "examples" / "notebooks" / "new_architecture.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    text = "\n".join(map(printed, notebook.cells))
    assert "no MoBA adapter for model_type 'phi3'" in text
    assert "facts: eligible layers [0, 1] are not among attention_layers(model)" in text
    assert "facts: layer 0 has a sliding window of 16" in text
    assert "['lookup', 'facts', 'projection', 'covering'" in text
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
