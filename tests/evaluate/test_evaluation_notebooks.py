"""The notebooks run from top to bottom, on a tiny checkpoint and, with --slow, on SmolLM2."""

from pathlib import Path
from typing import Any

import pytest
from test_commands import checkpoint  # noqa: F401  the fixture

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("matplotlib")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = [FOLDER / f"{name}.ipynb" for name in ("calibrate", "quickstart", "routing")]


def run(cells: list[Any], monkeypatch: pytest.MonkeyPatch, folder: Path, length: int) -> list[Any]:
    monkeypatch.setenv("MOBA_NOTEBOOK_CHECKPOINT", str(folder))
    monkeypatch.setenv("MOBA_NOTEBOOK_LENGTH", str(length))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    notebook = nbformat.v4.new_notebook(cells=cells)
    where = {"metadata": {"path": str(FOLDER)}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where)
    return client.execute().cells


def cells_of(path: Path) -> list[Any]:
    return nbformat.read(path, as_version=4).cells


def test_notebooks_run_on_a_tiny_model(
    checkpoint: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one process, since most of the time goes into its imports; each begins without any names."""
    parts = [[*cells_of(path), nbformat.v4.new_code_cell("%reset -f")] for path in NOTEBOOKS]
    done = run([cell for part in parts for cell in part], monkeypatch, checkpoint, 256)
    for part in parts:
        ran, done = done[: len(part)], done[len(part) :]
        outputs = [out for cell in ran for out in cell.get("outputs", ())]
        assert not any(out.output_type == "error" for out in outputs)
        assert any("image/png" in out.get("data", {}) for out in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run_on_smollm2(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[2] / "out" / "smollm2-moba"
    if not folder.exists():
        pytest.skip("make demo makes the checkpoint")
    run(cells_of(path), monkeypatch, folder, 1024)
