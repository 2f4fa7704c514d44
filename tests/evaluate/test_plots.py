"""Figures show the numbers they were given, and the commands draw them from JSON."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_ids, tiny_model

from moba_hf import MobaConfig, select_blocks
from moba_hf.config import LayerConfig
from moba_hf.evaluate import perplexity, recall
from moba_hf.evaluate.tasks import TaskScore
from moba_hf.op.shared_reference import select_shared_ref
from moba_hf.op.shared_rule import SharedRule

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


def test_routing_of_a_shared_choice_is_that_of_its_tiles() -> None:
    torch.manual_seed(0)
    q, k = 3 * torch.randn(4, 96, 16), torch.randn(2, 96, 16)
    rule = SharedRule(8, 16, threshold=0.5)
    picture = torch.tensor(plots.plot_routing(q, k, rule, head=3).axes[0].images[0].get_array().data)
    chosen = select_shared_ref(q.transpose(0, 1), k.transpose(0, 1), rule)[3]
    for t in (0, 9, 40, 95):
        causal = chosen[t // 16] & (torch.arange(12) <= t // 8)
        assert torch.equal(picture[t] > 0, causal)
        assert picture[t, t // 8] == 3
    assert picture[70, 0] == picture[70, 7] == 2
    assert picture[95, 10] == picture[95, 11] == 3


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


def test_a_figure_names_the_setting_it_is_of(tmp_path: Path) -> None:
    """The last setting measured, or the requested one."""
    model, ids, file = tiny_model(), tiny_ids(64), tmp_path / "eval.json"
    found = {n: recall(model, ids, MobaConfig(8, n), samples=8).to_dict() for n in (2, 4)}
    scores = [
        {"setting": name, **TaskScore("needle", 100, 1, mark, 0, 1, ((0.1, mark),)).to_dict()}
        for name, mark in (("dense", 1.0), ("moba", 0.0))
    ]
    values = {"recall": {"text": {"two": found[2], "four": found[4]}}, "tasks": scores}
    file.write_text(json.dumps(values))
    for setting, name, topk in ((None, "four", 4), ("two", "two", 2)):
        figure = plots.from_json("recall", str(file), setting=setting)
        assert figure.get_suptitle() == name
        shown = torch.tensor(figure.axes[0].images[0].get_array().data)
        assert torch.allclose(shown, torch.tensor(found[topk]["mass"]))
    for setting, name, mark in ((None, "moba", 0.0), ("dense", "dense", 1.0)):
        ax = plots.from_json("needles", str(file), setting=setting).axes[0]
        assert ax.get_title() == f"needle: {name}"
        assert ax.images[0].get_array()[0, 0] == mark
    with pytest.raises(ValueError, match="unknown setting 'x'; known are two, four"):
        plots.from_json("recall", str(file), setting="x")


def test_a_calibration_is_drawn_by_what_it_counts_and_by_kind(tmp_path: Path) -> None:
    def point(keys: float, cost: float, rise: list[float] | None, layers: dict[str, dict[str, float]]):
        return {"keys": keys, "cost": cost, "rise": rise, "config": {"threshold": 0.1, "layers": layers}}

    own = {"1": {"threshold": 0.2}}
    curve = [point(0.1, 3.0, None, {}), point(0.2, 2.0, [0.1, 0.3], {}), point(0.2, 1.0, [0.2, 0.05], own)]
    file = tmp_path / "curve.json"
    file.write_text(json.dumps({"counts": "causal pairs", "curve": curve}))
    ax = plots.from_json("budget", str(file)).axes[0]
    assert ax.get_xlabel() == "causal pairs (%)"
    lines = {line.get_label().split(" (")[0]: line.get_xydata().tolist() for line in ax.lines}
    assert lines == {
        "local cost": [[10.0, 3.0], [20.0, 2.0]],
        "local cost, a threshold for each layer": [[20.0, 1.0]],
        "measured, worst text": [[20.0, 0.3]],
        "measured, worst text, a threshold for each layer": [[20.0, 0.2]],
    }


@pytest.mark.parametrize("kind", ["recall", "needles", "budget", "positions"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "other.json"
    for text in ("[1, 2]", "3", "null", "{}", '{"recall": 1, "tasks": [2], "curve": [3], "perplexity": [4]}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"contains no results for '{kind}'"):
            plots.from_json(kind, str(file))


def test_the_routing_picture_of_few_blocks_has_whole_numbers_and_what_is_there() -> None:
    torch.manual_seed(0)
    figure = plots.plot_routing(torch.randn(2, 40, 8), torch.randn(1, 40, 8), LayerConfig(16, 2), 0)
    ax = figure.axes[0]
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["chosen by score", "own"]


def test_a_routing_picture_of_everything_says_why() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 40, 8), torch.randn(1, 40, 8)
    titles = [plots.plot_routing(q, k, LayerConfig(8, n), 0).axes[0].get_title() for n in (4, 5)]
    assert titles[0] == "Blocks attended by head 0"
    assert titles[1] == titles[0] + "\n(all: 5 blocks of 8 cover these 40 tokens)"


def test_a_large_local_cost_has_ticks_beside_it() -> None:
    ticks = plots.plot_budget({"cost": [(0.05, 112.0), (1.0, 0.0)]}).axes[0].get_yticks()
    assert [float(t) for t in ticks if t >= 1] == [1, 3, 10, 30, 100]
