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


def run(path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, length: int) -> Any:
    monkeypatch.setenv("MOBA_NOTEBOOK_CHECKPOINT", str(folder))
    monkeypatch.setenv("MOBA_NOTEBOOK_LENGTH", str(length))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(FOLDER)}}
    return nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run_on_a_tiny_model(
    path: Path,
    checkpoint: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = run(path, monkeypatch, checkpoint, 256)
    outputs = [out for cell in done.cells for out in cell.get("outputs", ())]
    assert not any(out.output_type == "error" for out in outputs)
    assert any("image/png" in out.get("data", {}) for out in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run_on_smollm2(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[2] / "out" / "smollm2-moba"
    if not folder.exists():
        pytest.skip("make demo makes the checkpoint")
    run(path, monkeypatch, folder, 1024)
