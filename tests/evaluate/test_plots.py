"""Figures hold the numbers they were given, and the commands draw them from JSON."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_ids, tiny_model

from moba_hf import MobaConfig, select_blocks
from moba_hf.config import LayerConfig
from moba_hf.evaluate import perplexity, recall
from moba_hf.evaluate.tasks import TaskScore

plots = pytest.importorskip("moba_hf.plots")
pytest.importorskip("matplotlib")


def test_the_routing_picture_is_the_choice() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(4, 96, 16), torch.randn(2, 96, 16)
    figure = plots.plot_routing(q, k, LayerConfig(8, 4, 1, 1), head=3)
    picture = torch.tensor(figure.axes[0].images[0].get_array().data)
    choice = select_blocks(
        q.transpose(0, 1), k.transpose(0, 1), block_size=8, topk=4, sink_blocks=1, local_blocks=1
    )
    for t in (0, 9, 40, 95):
        assert set(picture[t].nonzero()[:, 0].tolist()) == {b for b in choice[t, 3].tolist() if b >= 0}
        assert picture[t, t // 8] == 3
    assert picture[40, 0] == picture[40, 4] == 2


def test_the_other_pictures_hold_their_numbers(tmp_path: Path) -> None:
    model, ids = tiny_model(), tiny_ids(128)
    found = recall(model, ids, MobaConfig(8, 4), samples=8)
    left, right = plots.plot_recall(found).axes[:2]
    mass = torch.tensor(left.images[0].get_array().data)
    assert torch.allclose(mass, torch.tensor(found.mass))
    assert torch.allclose(
        torch.tensor(right.images[0].get_array().data), torch.tensor(found.oracle) - mass, atol=1e-6
    )
    scores = [TaskScore("needle", n, 2, 0.5, 0, 1, ((0.1, 1.0), (0.9, 0.0))) for n in (100, 200)]
    cells = plots.plot_needles(scores, bins=2).axes[0].images[0].get_array()
    assert cells.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    line = plots.plot_budget({"a": [(0.5, 0.1), (0.05, 0.4)]}, targets=[0.03]).axes[0].lines[0]
    assert line.get_xydata().tolist() == [[5.0, 0.4], [50.0, 0.1]]
    result = perplexity(model, ids, buckets=4)
    y = plots.plot_positions({"dense": result}).axes[0].lines[0].get_ydata()
    assert list(y) == [mean for *_, mean in result.buckets]
    file = tmp_path / "eval.json"
    file.write_text(json.dumps({"perplexity": {"text": {"dense": result.to_dict()}}}))
    assert list(plots.from_json("positions", str(file)).axes[0].lines[0].get_ydata()) == list(y)
    with pytest.raises(ValueError, match="no results for 'recall'"):
        plots.from_json("recall", str(file))
    with pytest.raises(ValueError, match="unknown kind"):
        plots.from_json("poem", str(file))
