"""examples/adapt.py on a tiny model: the control, two settings, the table, the saved checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import save_tokenizer
from example_scripts import load_example
from tiny_models import tiny, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def adapt() -> Any:
    return load_example("adapt")


def learnable(rows: int, length: int, seed: int) -> np.ndarray[Any, Any]:
    """Rows whose second half repeats the first, so that distant keys matter."""
    first = tokens(rows, length // 2, seed=seed)
    return torch.cat([first, first], dim=1).flatten().numpy().astype(np.uint16)


def test_adapt(adapt: Any, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    np.save(tmp_path / "train.npy", learnable(32, 64, 1))
    np.save(tmp_path / "held.npy", learnable(3, 64, 2))
    sizes = ["--length", "64", "--steps", "4", "--warmup", "1", "--trailing", "16", "--curve-every", "2"]
    results = adapt.main(
        [
            str(tmp_path / "model"),
            *("--text", str(tmp_path / "train.npy"), "--held-out", str(tmp_path / "held.npy")),
            *("--setting", "plain=8/2", "--setting", "forced=8/3/1/1", "--recipe", "hybrid-time"),
            *("--out", str(tmp_path / "out"), "--save", "--lr", "1e-2", "--log-every", "1", *sizes),
        ]
    )
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    dense, plain, forced = results["runs"]
    assert [run["name"] for run in results["runs"]] == ["dense", "plain", "forced"]
    assert dense["before"] == results["dense_before"] != plain["before"]
    assert dense["after"] == dense["after_dense"]
    assert plain["after"] != plain["after_dense"]
    assert plain["gap_after"] == plain["after"] - dense["after"]
    assert forced["moba"]["sink_blocks"] == 1
    assert [point["step"] for point in plain["curve"]] == [0, 2, 4]
    assert plain["curve"][0]["held_out_trailing"] == plain["before"]
    assert plain["curve"][-1]["held_out_trailing"] == plain["after"]
    assert [line["moba_full"] for line in plain["log"]] == [0, 0, 0, 1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "plain").eval()
    held = torch.from_numpy(np.load(tmp_path / "held.npy").astype(np.int64)).view(3, 64)
    assert adapt.trailing(loaded, held, adapt.parse_setting("p=8/2").moba, 16) == plain["after"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "plain")("a1").input_ids[0] == 0


def test_text_is_read_and_too_little_is_refused(adapt: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("x = 1\n")
    (tmp_path / "a" / "y.txt").write_text("no\n")
    assert adapt.read_text([tmp_path / "a"], ".py") == "# a/x.py\nx = 1\n\n"
    with pytest.raises(SystemExit, match="a folder without files that end in"):
        adapt.read_text([tmp_path / "a"], ".md")
    with pytest.raises(SystemExit, match="do not fill one row of 8"):
        adapt.TokenBlocks(np.arange(7), 8)
    with pytest.raises(SystemExit):
        adapt.parse(["m", "--text", "t", "--held-out", "h", "--setting", "a=3/2/1"])


def test_the_notebook_runs_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    path = ROOT / "examples" / "notebooks" / "adapt.ipynb"
    notebook = nbformat.read(path, as_version=4)
    shown = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    for run in json.loads((path.parent / "adapt_smollm2.json").read_text())["runs"]:  # the published run
        assert f"{run['before']:.3f} -> {run['after']:.3f}, run dense {run['after_dense']:.3f}" in shown
    monkeypatch.setenv("MOBA_NOTEBOOK_RESULTS", str(tmp_path / "results.json"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    outputs = [out for cell in client.execute().cells for out in cell.get("outputs", ())]
    assert not any(out.output_type == "error" for out in outputs)
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 2
    dense, plain, _ = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert dense["after"] < dense["before"] - 0.5
    assert plain["after"] < plain["before"] - 0.5
