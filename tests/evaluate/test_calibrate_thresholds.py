"""Calibration of a shared choice: counted shares meet the goal; layers get their own if it helps."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from test_commands import checkpoint, run  # noqa: F401  the fixture
from tiny import tiny_ids, tiny_model, tiny_windowed
from transformers import AutoModelForCausalLM

from moba_hf import MobaConfig, use_moba
from moba_hf.calibrate import Options, calibrate, passes, starting_setting, thresholds, write_settings
from moba_hf.checkpoints.inspection import inspect_config
from moba_hf.evaluate import token_losses
from moba_hf.evaluate.attended import count_pairs
from moba_hf.evaluate.local_shared import threshold_errors
from moba_hf.op.shared_reference import attend_shared_ref, select_shared_ref
from moba_hf.op.shared_rule import SharedRule

SETTING = MobaConfig(8, tile=16, threshold=0.01, sample=2, sink_blocks=1, local_blocks=1, gate="mass")
LAYERS = 3


class Constructed:
    """A model whose loss and pairs are functions of the thresholds, so that the best setting is known.

    At threshold t, layer i attends to a share of `.1 + .9 (1 - t)` of the pairs and costs `weights[i] * t`
    nats. The local estimates are off by the factors `share_off` and `cost_off`.
    """

    def __init__(self, weights: tuple[float, ...], share_off: float = 1.0, cost_off: float = 1.0):
        self.weights, self.share_off, self.cost_off = weights, share_off, cost_off
        self.passes: list[dict[str, Any] | None] = []

    def truth(self, config: MobaConfig | None) -> tuple[float, float]:
        """Mean share of pairs, and loss."""
        rules = [None if config is None else config.for_layer(i, LAYERS) for i in range(LAYERS)]
        found = [0.0 if rule is None else rule.threshold for rule in rules]
        pairs = [1.0 if rule is None else self.pairs(t) for rule, t in zip(rules, found, strict=True)]
        return sum(pairs) / LAYERS, sum(w * t for w, t in zip(self.weights, found, strict=True))

    @staticmethod
    def pairs(threshold: float) -> float:
        return 0.1 + 0.9 * (1 - threshold)

    def one_pass(self, _model: Any, ids: Any, config: MobaConfig | None, _trailing: int) -> dict[str, Any]:
        self.passes.append(None if config is None else config.to_dict())
        pairs, loss = self.truth(config)
        loss = loss * (1 + int(ids[0, 0]) / 1000) + 2  # texts differ a little
        return {"loss": loss, "stretches": [loss, loss + 0.1], "pairs": pairs}

    def costs(self, _model: Any, _texts: Any, rules: Any, values: Any, *_: Any, **__: Any) -> Any:
        return {
            i: {t: (self.share_off * self.pairs(t), self.cost_off * self.weights[i] * t) for t in values}
            for i in rules
        }


def construct(monkeypatch: pytest.MonkeyPatch, *args: Any, **more: Any) -> Constructed:
    made = Constructed(*args, **more)
    monkeypatch.setattr(passes, "one_pass", made.one_pass)
    monkeypatch.setattr(thresholds, "threshold_costs", made.costs)
    monkeypatch.setattr(thresholds, "sensitivities", lambda *_, **__: {})
    return made


@pytest.mark.parametrize("off", [0.9, 1.0, 1.1])
def test_an_allowed_share_is_kept_and_used(monkeypatch: pytest.MonkeyPatch, off: float) -> None:
    """The estimate of the pairs may be far off, because they are counted."""
    made = construct(monkeypatch, (1.0, 1.0, 1.0), share_off=off)
    found = calibrate(tiny_model(), [tiny_ids(64)], Options(keys=0.8, setting=SETTING))
    assert 0.95 * 0.8 < found.chosen.keys <= 0.8
    assert found.chosen.keys == found.chosen.pairs == made.truth(found.config)[0]
    assert found.config.layers == ()  # equal layers need only one threshold
    assert found.comparison is None or not found.comparison.pays


def test_an_allowed_loss_is_kept_with_few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = construct(monkeypatch, (1.0, 1.0, 1.0))
    texts = [tiny_ids(64, seed) for seed in (1, 2)]
    found = calibrate(tiny_model(), texts, Options(max_loss=0.6, setting=SETTING, confirmations=7))
    factor = 1 + max(int(ids[0, 0]) for ids in texts) / 1000
    assert found.chosen.worst is not None
    assert found.chosen.worst == pytest.approx(factor * made.truth(found.config)[1])
    assert found.chosen.worst <= 0.6
    best = made.pairs(0.2 / factor)  # the largest threshold within the allowed loss
    assert best - 1e-9 <= found.chosen.keys < 1.02 * best


@pytest.mark.parametrize("goal", [{"keys": 0.8}, {"max_loss": 0.6}])
def test_layers_get_their_own_threshold_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, goal: dict[str, float]
) -> None:
    made = construct(monkeypatch, (0.01, 3.0, 0.02))
    options = Options(setting=SETTING, confirmations=6, **goal)
    found = calibrate(tiny_model(), [tiny_ids(64)], options)
    assert found.comparison is not None
    assert found.comparison.pays
    assert found.comparison.by_layer <= found.comparison.one
    own = [found.config.for_layer(i, LAYERS).threshold for i in range(LAYERS)]  # type: ignore[union-attr]
    assert own[1] < min(own[0], own[2])
    even = [p for p in found.curve if p.rise is not None and len(p.thresholds) == 1]
    if "keys" in goal:
        assert found.chosen.keys <= 0.8
        assert made.truth(found.config)[1] < 0.5 * min(p.rise[0] for p in even if p.keys <= 0.8)  # type: ignore[index]
    else:
        assert found.chosen.worst is not None
        assert found.chosen.worst <= 0.6
        assert found.chosen.keys < 0.9 * min(p.keys for p in even if p.rise[0] <= 0.6)  # type: ignore[index]


def test_the_thresholds_of_layers_are_the_best_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    made = construct(monkeypatch, (0.3, 3.0, 1.0))
    model = tiny_model()
    by_layer = thresholds.threshold_ladders(
        passes.Passes(model, [tiny_ids(64)], 32, passes.Store(None, {})), SETTING, Options(keys=0.5)
    )[1]
    for share in (0.6, 0.75, 0.9):
        point = by_layer.at(share)
        assert point.keys <= share + 1e-9
        grid = product(thresholds.THRESHOLDS, repeat=LAYERS)
        configs = (thresholds.with_thresholds(SETTING, dict(enumerate(t)), LAYERS) for t in grid)
        best = min(loss for pairs, loss in map(made.truth, configs) if pairs <= share)
        assert point.cost <= best + 1e-9  # the point may be between those of the grid


def test_impossible_goals_are_refused_or_left_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    construct(monkeypatch, (1e4, 1e4, 1e4))
    with pytest.raises(ValueError, match=r"keys=0.3 was not reached: the smallest share found is 55.0%"):
        calibrate(tiny_model(), [tiny_ids(64)], Options(keys=0.3, setting=SETTING))
    found = calibrate(tiny_model(), [tiny_ids(64)], Options(max_loss=0.1, setting=SETTING))
    assert found.chosen.dense
    assert found.comparison is None
    assert all(found.config.for_layer(i, LAYERS) is None for i in range(LAYERS))
    assert "every layer keeps full attention" in found.report()
    everything = calibrate(tiny_model(), [tiny_ids(64)], Options(keys=1.0, setting=SETTING))
    assert everything.chosen.dense


@pytest.mark.parametrize("dense_below", [0, 32])
def test_local_errors_and_pairs_are_those_of_the_reference(dense_below: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 90, 16) * 2, torch.randn(2, 90, 16) * 2, torch.randn(2, 90, 12)
    project = torch.nn.Linear(48, 20, bias=False)
    positions, values = torch.tensor([5, 40, 64, 89]), [0.5, 0.2, 0.01]
    rule = SharedRule(8, 16, threshold=0.9, sample=2, dense_below=dense_below)
    packed = [x.transpose(0, 1) for x in (q, k, v)]
    full = attend_shared_ref(
        *packed, torch.ones(4, 6, 12, dtype=torch.bool), block_size=8, tile=16, softmax_scale=0.25
    )[0]
    expected = []
    with torch.no_grad():
        found = threshold_errors(q, k, v, positions, rule, values, 0.25, project)
        for threshold in values:
            chosen = select_shared_ref(*packed[:2], replace(rule, threshold=threshold), 0.25)
            out = attend_shared_ref(*packed, chosen, block_size=8, tile=16, softmax_scale=0.25)[0]
            error = project((out - full)[positions].flatten(1)).square().sum(1).mean()
            pairs = chosen[:, torch.arange(90) // 16][:, :, torch.arange(90) // 8].tril()
            expected.append((float(pairs.sum()) / (4 * 90 * 91 / 2), float(error)))
    assert [share for share, _ in found] == pytest.approx([share for share, _ in expected])
    assert [error for _, error in found] == pytest.approx([error for _, error in expected], rel=1e-3)
    assert expected[0][0] < expected[1][0] < expected[2][0]


def test_a_real_calibration_reports_what_a_pass_finds() -> None:
    model, texts, apart = tiny_model(), [tiny_ids(256, 1), tiny_ids(256, 2)], [tiny_ids(256, 3)]
    options = Options(keys=0.6, setting=SETTING, trailing=128, samples=8)
    found = calibrate(model, texts, options, held_out=apart)
    assert found.counts == "causal pairs"
    assert found.held_out is not None
    for point, read in ((found.chosen, texts), (found.held_out, apart)):
        shares, rises = [], []
        for ids in read:
            with count_pairs(model, found.config, 256) as counted:
                losses = token_losses(model, ids, found.config)
            shares.append(counted.share())
            rises.append(float((losses - token_losses(model, ids))[-128:].double().mean()))
        assert point.pairs == pytest.approx(sum(shares) / len(shares))
        assert point.rise == pytest.approx(rises, abs=1e-6)
        assert point.error is not None
        assert all(error is not None and error > 0 for error in point.error)
    assert found.chosen.keys <= 0.6
    # held-out text is not used for tuning
    assert replace(found, held_out=None) == calibrate(model, texts, options)


def test_the_interval_is_that_of_paired_stretches() -> None:
    torch.manual_seed(0)
    values = torch.randn(32).double()
    assert passes.half_interval(values) == pytest.approx(1.96 * float(values.std()) / 32**0.5)
    assert passes.half_interval(values[:1]) is None
    found = passes.one_pass(tiny_model(), tiny_ids(1200), None, 1100)
    losses = token_losses(tiny_model(), tiny_ids(1200))[-1100:].double()
    assert found["loss"] == pytest.approx(float(losses.mean()))
    assert len(found["stretches"]) == 1100 // 64
    assert found["stretches"][-1] == pytest.approx(float(losses[-64:].mean()))


def test_the_rest_of_a_setting_stays_and_old_thresholds_go(monkeypatch: pytest.MonkeyPatch) -> None:
    construct(monkeypatch, (1.0, 1.0, 1.0))
    setting = replace(
        SETTING,
        full_attention_layers=(-1,),
        decode="sparse",
        topk=6,
        layers={0: {"threshold": 0.2, "topk": 8}, 1: {"threshold": 0.3}},  # type: ignore[arg-type]
    )
    found = calibrate(tiny_model(), [tiny_ids(64)], Options(keys=0.85, setting=setting)).config
    assert (found.full_attention_layers, found.decode, found.topk) == ((-1,), "sparse", 6)
    assert found.layers == ((0, (("topk", 8),)),)
    assert found.threshold not in (0.01, 0.2, 0.3)
    assert found.for_layer(2, 3) is None


def test_layers_without_a_shared_choice_are_counted_as_they_are() -> None:
    model = tiny_windowed()
    for layer in model.model.layers:  # far from uniform attention
        layer.self_attn.q_norm.weight.data *= 8
    setting = replace(SETTING, full_attention_layers=(3,))
    options = Options(keys=0.52, setting=setting, trailing=64, samples=8)
    found = calibrate(model, [tiny_ids(128)], options)
    with count_pairs(model, found.config, 128) as counted:
        token_losses(model, tiny_ids(128), found.config)
    assert found.chosen.keys == pytest.approx(counted.share())
    assert found.chosen.keys <= 0.52
    estimated = [p for p in found.curve if p.rise is None]
    windows = sum(row.pairs(128) for row in counted.layers if row.kind == "stock") / counted.dense
    assert all(
        (windows + 1) / 4 < p.keys <= (windows + 2) / 4 for p in estimated
    )  # one layer full, one sought
    assert max(p.keys for p in estimated) == pytest.approx((windows + 2) / 4)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"block_sizes": (8,)}, "block sizes are tried only if every query chooses.*tile=16"),
        ({}, {"confirmations": 0}, "only be counted in whole passes"),
        ({"layers": {1: {"tile": 1, "topk": 4}}}, {}, "layer 1 has tile=1"),
        ({"full_attention_layers": (0, 1, 2)}, {}, "no layer of this llama model"),
        ({"full_attention_layers": (7,)}, {}, "layer 7"),
        ({"dense_below": 128}, {}, "gives full attention up to 128 tokens"),
    ],
)
def test_senseless_combinations_are_refused_before_any_pass(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(passes, "one_pass", lambda *_: pytest.fail("a pass was made"))
    setting = replace(SETTING, **changes)
    with pytest.raises(ValueError, match=message):
        calibrate(tiny_model(), [tiny_ids(128)], Options(keys=0.5, setting=setting, **options))


def test_more_keys_than_a_hybrid_attends_are_refused_before_any_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passes, "one_pass", lambda *_: pytest.fail("a pass was made"))
    monkeypatch.setattr(thresholds, "threshold_costs", lambda *_, **__: pytest.fail("a pass was made"))
    model = tiny_windowed()
    dense = inspect_config(model.config, replace(SETTING, full_attention_layers=(0, 1, 2, 3)), (128,))
    share = dense.lengths[0].pair_share
    assert 0.5 < share < 0.7
    message = rf"keys=0\.7 limits nothing: .* attends to {share:.1%} of the keys"
    with pytest.raises(ValueError, match=message):
        calibrate(model, [tiny_ids(128)], Options(keys=0.7, setting=SETTING))


def test_a_stopped_run_makes_no_pass_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store, made = tiny_model(), tmp_path / "store.json", list[Any]()
    options = Options(keys=0.6, setting=SETTING, trailing=64, samples=8, store=store)
    real = passes.one_pass

    def counted(*args: Any) -> dict[str, Any]:
        made.append(args[2])
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(passes, "one_pass", counted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, [tiny_ids(256)], options)
    monkeypatch.setattr(thresholds, "threshold_costs", lambda *_, **__: pytest.fail("looked at twice"))
    again = calibrate(model, [tiny_ids(256)], options)
    assert len({str(config) for config in made}) == len(made) - 1  # only the interrupted pass ran twice
    # another goal reuses the same passes
    calibrate(model, [tiny_ids(256)], replace(options, keys=None, max_loss=1e3))
    monkeypatch.undo()
    assert again == calibrate(model, [tiny_ids(256)], replace(options, store=None))
    with pytest.raises(ValueError, match="other settings"):
        calibrate(model, [tiny_ids(256)], replace(options, setting=replace(SETTING, sample=1)))
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]


def test_where_a_calibration_starts() -> None:
    model = tiny_model()
    assert starting_setting(model) == MobaConfig.from_preset("default")
    with use_moba(model, SETTING):
        assert starting_setting(model) == SETTING
        assert starting_setting(model, "fine") == MobaConfig.from_preset("fine")
    assert starting_setting(model, "default-per-query", "mass").gate == "mass"
    with pytest.raises(ValueError, match="needs gate='mass'"):
        starting_setting(model, gate="mean")


@pytest.fixture
def shared(checkpoint: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A checkpoint with a shared choice of small tiles, and a text with twice the tokens that are read."""
    folder = tmp_path / "shared"
    rule = ("--tile", 16, "--block-size", 8, "--threshold", 0.01, "--sink-blocks", 1, "--local-blocks", 1)
    from moba_hf_cli import main

    with pytest.raises(SystemExit):
        main([str(x) for x in ("convert", checkpoint, folder, *rule)])
    (folder / "text.txt").write_text(
        "".join(f"The grass is {n % 7} green and the sky blue. " for n in range(40))
    )
    return folder


def test_the_command_writes_thresholds_that_reload_to_the_same_logits(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, ids = tmp_path / "curve.json", tiny_ids(300)
    capsys.readouterr()
    args = ("--text", shared / "text.txt", "--length", 512, "--keys", 0.5, "--out", out, "--write")
    printed = run(capsys, "calibrate", shared, *args, "--json")
    values = json.loads(out.read_text())
    assert json.loads(printed) == values
    assert values["counts"] == "causal pairs"
    assert values["chosen"]["pairs"] <= 0.5
    assert values["held_out"]["rise"] is not None
    config = MobaConfig.from_dict(values["config"])
    assert config == MobaConfig.from_dict(json.loads((shared / "config.json").read_text())["moba"])
    loaded = AutoModelForCausalLM.from_pretrained(shared, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(shared, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad(), use_moba(dense, config):
        expected = dense(ids).logits
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
        assert not torch.equal(dense(ids).logits, expected)
    run(capsys, "plot", "budget", out, "--out", tmp_path / "x.png")


def test_thresholds_of_layers_reload_to_the_same_logits(shared: Path) -> None:
    config = thresholds.with_thresholds(SETTING, {0: 0.3, 1: 0.02, 2: 0.3}, LAYERS)
    assert config.threshold == 0.3
    write_settings(shared, config)
    loaded = AutoModelForCausalLM.from_pretrained(shared, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(shared, dtype=torch.float32, attn_implementation="sdpa")
    ids, logits = tiny_ids(300), []
    for setting in (config, replace(config, layers=())):
        with torch.no_grad(), use_moba(dense, setting):
            logits.append(dense(ids).logits)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, logits[0])
    assert not torch.equal(*logits)


def test_the_command_refuses_what_does_not_fit(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moba_hf_cli import main

    text = ("--text", shared / "text.txt", "--length", 128, "--keys", 0.5)
    for args, message in (
        (("--block-size", 8), "block sizes are tried only if every query chooses"),
        (("--gate", "mean"), "needs gate='mass'"),
        (("--preset", "poem"), "poem"),
        (("--max-loss", 0.1), "one of max_loss and keys"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(x) for x in ("calibrate", shared, *text, *args)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
