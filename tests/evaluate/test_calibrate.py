"""Calibration finds planted answers, keeps its budget, and resumes after an interruption."""

import errno
import json
import math
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model, tiny_windowed
from transformers import AutoModelForImageTextToText

sys.path += [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "patches")]
from checkpoints import snapshot
from families import tiny_config

from moba_hf import MobaConfig, use_moba
from moba_hf.calibrate import Options, allocate, calibrate, config_of, passes, per_query, write_settings
from moba_hf.checkpoints.convert import convert_checkpoint
from moba_hf.checkpoints.inspection import inspect_config
from moba_hf.checkpoints.verify import verify_checkpoint
from moba_hf.config import LayerConfig
from moba_hf.evaluate import local_shared
from moba_hf.evaluate.local import LocalCosts, output_errors, sensitivities
from moba_hf.op.reference import attend_ref, select_blocks_ref
from moba_hf.op.shared_rule import SharedRule
from moba_hf.testing import build_model
from moba_hf_cli.signals import Ended

PER_QUERY = MobaConfig.from_preset("default-per-query")


def planted_model() -> Any:
    """Layers 0 and 2 hardly write to the residual stream, so only layer 1 needs keys."""
    model = tiny_model()
    for layer in (0, 2):
        model.model.layers[layer].self_attn.o_proj.weight.data *= 1e-3
    return model


def test_calibration_gives_the_keys_to_the_layer_that_matters() -> None:
    model, texts = planted_model(), [tiny_ids(256, seed) for seed in (1, 2)]
    options = Options(keys=0.4, setting=PER_QUERY, block_sizes=(8, 16), trailing=128, samples=16)
    found = calibrate(model, texts, options)
    share = {
        i: 1.0 if rule is None else rule.max_keys / 256
        for i, rule in enumerate(found.config.for_layer(i, 3) for i in range(3))
    }
    assert share[1] > 2 * max(share[0], share[2])
    assert found.config.key_budget(256, 3) <= 0.4
    even = MobaConfig(found.config.block_size, int(0.4 * 256 / found.config.block_size), 1, 1)
    tail = [passes.one_pass(model, ids, c, 128)["loss"] for ids in texts for c in (None, even)]
    assert max(abs(tail[1] - tail[0]), abs(tail[3] - tail[2])) > 3 * max(map(abs, found.chosen.rise))


def test_an_allowed_loss_is_kept_with_fewer_than_all_keys() -> None:
    model, texts = planted_model(), [tiny_ids(256)]
    options = Options(max_loss=0.05, setting=PER_QUERY, block_sizes=(8,), trailing=128, samples=16)
    found = calibrate(model, texts, options)
    assert found.chosen.worst is not None
    assert found.chosen.worst <= 0.05
    assert found.chosen.keys < 1
    assert "local cost" in found.report()
    assert [p.keys for p in found.curve] == sorted(p.keys for p in found.curve)


def test_allocation_is_optimal_on_a_small_table() -> None:
    table = {0: {2: 4.0, 4: 1.0}, 1: {2: 0.1, 4: 0.05}, 2: {2: 9.0, 4: 8.0}}
    costs = LocalCosts(LayerConfig(8, 1), 64, table)
    picked, total = allocate(costs, (2 + 4 + 8) / 24)
    assert picked == {0: 4, 1: 2, 2: 8}
    assert total == pytest.approx(1.1)
    config = config_of(costs, picked, 4)
    assert config.for_layer(2, 4) is None
    assert config.for_layer(3, 4) is None  # not measured, so it keeps full attention
    assert config.for_layer(0, 4) == LayerConfig(8, 4)
    assert allocate(costs, 1.0)[0] == {0: 8, 1: 8, 2: 8}
    assert allocate(costs, 0.01)[0] == {0: 2, 1: 2, 2: 2}


def test_local_errors_are_finite_if_the_chosen_keys_have_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.zeros(1, 64, 16), torch.zeros(1, 64, 16), torch.ones(1, 64, 16)
    q[..., 0], k[0, 0, 0] = 1.0, 1000.0  # the first key has all of the weight
    k[0, 1:8, 0] = -1000.0  # and the lowest score of a block
    at, identity = torch.tensor([63]), torch.nn.Identity()
    assert output_errors(q[:, at], k, v, at, LayerConfig(8, 1), [1, 8], 1.0, identity) == [16.0, 0.0]
    last_only = torch.tensor([0, 0, 0, 1 << 7], dtype=torch.int32)
    monkeypatch.setattr(local_shared, "select_shared", lambda *_, **__: last_only.view(1, 4, 1))
    found = local_shared.threshold_errors(q, k, v, at, SharedRule(8, 16, threshold=0.5), [0.5], 1.0, identity)
    assert found[0][1] == 16.0


@pytest.mark.parametrize("gate", ["mean", "mass"])
def test_local_errors_are_those_of_the_reference(gate: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 60, 16) * 2, torch.randn(2, 60, 16) * 2, torch.randn(2, 60, 12)
    project = torch.nn.Linear(48, 20, bias=False)
    positions = torch.tensor([10, 31, 59])
    with torch.no_grad():
        errors = output_errors(
            q[:, positions], k, v, positions, LayerConfig(8, 3, 1, 1, gate), [3, 5, 99], 0.25, project
        )
        packed = [x.transpose(0, 1) for x in (q, k, v)]
        out = {}
        for topk in (3, 5, 8):
            choice = select_blocks_ref(
                *packed[:2],
                block_size=8,
                topk=topk,
                sink_blocks=1,
                local_blocks=1,
                gate=gate,
                softmax_scale=0.25,
            )
            out[topk] = project(
                attend_ref(*packed, choice, block_size=8, softmax_scale=0.25)[0][positions].flatten(1)
            )
        expected = [float((out[topk] - out[8]).square().sum(1).mean()) for topk in (3, 5)]
    assert errors[:2] == pytest.approx(expected, rel=1e-3)
    assert errors[2] == pytest.approx(0, abs=1e-9)


def test_sensitivities_leave_the_model_alone_and_see_a_deaf_layer() -> None:
    model = tiny_model()
    weights = [p.requires_grad for p in model.parameters()]
    found = sensitivities(model, tiny_ids(64))
    assert set(found) == {0, 1, 2}
    assert all(value > 0 for value in found.values())
    assert [p.requires_grad for p in model.parameters()] == weights
    assert all(p.grad is None for p in model.parameters())


def test_a_stopped_run_goes_on_without_repeating_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts, store = planted_model(), [tiny_ids(128)], tmp_path / "store.json"
    options = Options(keys=0.5, setting=PER_QUERY, block_sizes=(8,), trailing=64, samples=8, store=store)
    made = []
    real = passes.one_pass

    def counted(*args: Any) -> dict[str, Any]:
        made.append(args)
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(passes, "one_pass", counted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, texts, options)
    again = calibrate(model, texts, options)
    assert len(made) == 3  # dense, the interrupted one, and that one again
    monkeypatch.undo()
    assert again == calibrate(model, texts, replace(options, store=None))
    with pytest.raises(ValueError, match="other settings"):
        calibrate(model, [tiny_ids(128, 5)], options)


def test_bad_arguments_are_refused() -> None:
    model, ids = tiny_model(), tiny_ids(64)
    for settings, message in (
        ({}, "one of max_loss and keys"),
        ({"keys": 0.5, "max_loss": 0.1}, "one of max_loss and keys"),
        ({"keys": 0.0}, "keys must be"),
        ({"keys": 1.5}, "keys must be"),
        ({"keys": math.nan}, "keys must be"),
        ({"max_loss": -1.0}, "max_loss must be"),
        ({"max_loss": math.nan}, "max_loss must be"),
        ({"max_loss": 0.1, "confirmations": 0}, "confirmations"),
        ({"keys": 0.5, "confirmations": -1}, "confirmations"),
        ({"keys": 0.5, "samples": 0}, "samples must be at least 1"),
        ({"keys": 0.5, "trailing": 0}, "trailing must be at least 1"),
        ({"keys": 0.5, "block_sizes": (0,)}, "block_sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            Options(**settings)  # type: ignore[arg-type]
    for texts in ([], [ids, tiny_ids(32)], [ids[0]]):
        with pytest.raises(ValueError, match="the same length"):
            calibrate(model, texts, Options(keys=0.5))
    with pytest.raises(ValueError, match="the same length"):
        calibrate(model, [ids], Options(keys=0.5), held_out=[tiny_ids(32)])


def test_the_model_card_names_the_settings_that_are_written(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "src")
    made = convert_checkpoint(tmp_path / "src", tmp_path / "dst", MobaConfig(8, 2))
    write_settings(made, MobaConfig(16, 3))
    card = (made / "README.md").read_text()
    assert "at most 3 blocks of 16 tokens" in card
    assert "at most 2 blocks of 8 tokens" not in card
    first, second = (
        card.index("convert_checkpoint('src', 'dst', MobaConfig(block_size=8"),
        card.index("write_settings(folder, MobaConfig(block_size=16, topk=3))"),
    )
    assert first < second
    report = verify_checkpoint(made, tmp_path / "src")
    assert report.passed, report


def test_settings_are_written_into_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = MobaConfig(8, 4, 1, 1, layers={"1": {"topk": 6}}, gate="mass")  # type: ignore[arg-type]
    write_settings(tmp_path, config)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["attn_implementation"] == "moba"
    assert MobaConfig.from_dict(values["moba"]) == config
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "moba"
    with pytest.raises(ValueError, match="layer 7"):
        write_settings(tmp_path, MobaConfig(8, 4, full_attention_layers=(7,)))
    assert sorted(p.name for p in tmp_path.iterdir() if "part" in p.name) == []


def test_only_the_settings_of_a_config_change(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = {**json.loads(path.read_text()), "about": "é"}
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    path.chmod(0o600)
    write_settings(tmp_path, MobaConfig(8, 4))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert '"é"' in path.read_text(encoding="utf-8")
    added = {"moba": MobaConfig(8, 4).to_dict(), "attn_implementation": "moba"}
    assert json.loads(path.read_text(encoding="utf-8")) == {**values, **added}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Ended(15)])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_an_error_while_writing_leaves_the_config_alone(
    error: BaseException, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    tiny_model().save_pretrained(tmp_path)
    before = snapshot(tmp_path)
    monkeypatch.setattr(os, where, fail)
    with pytest.raises(type(error)):
        write_settings(tmp_path, MobaConfig(8, 4))
    assert snapshot(tmp_path) == before


def test_a_flat_vision_language_config_still_loads(tmp_path: Path) -> None:
    build_model(tiny_config("qwen2_5_vl")).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    text = values.pop("text_config")
    text.pop("model_type")
    (tmp_path / "config.json").write_text(json.dumps({**text, **values}))
    write_settings(tmp_path, MobaConfig(8, 4))
    config = AutoModelForImageTextToText.from_pretrained(tmp_path).config
    assert config.text_config._attn_implementation == "moba"
    assert config.text_config.hidden_size == text["hidden_size"]


def test_how_the_model_was_loaded_does_not_matter() -> None:
    """A checkpoint that already has MoBA settings is measured dense."""
    model, texts = tiny_model(), [tiny_ids(128)]
    options = Options(keys=0.4, setting=PER_QUERY, block_sizes=(8,), trailing=64, samples=8)
    stock = calibrate(model, texts, options)
    with use_moba(model, MobaConfig(8, 2)):
        assert calibrate(model, texts, options) == stock


@pytest.mark.parametrize("change", ["model", "text", "trailing"])
def test_a_store_goes_on_with_what_it_was_made_of_only(tmp_path: Path, change: str) -> None:
    model, ids, store = tiny_model(), tiny_ids(128), tmp_path / "store.json"
    options = Options(keys=0.5, setting=PER_QUERY, block_sizes=(8,), trailing=64, samples=8, store=store)
    calibrate(model, [ids], options)
    if change == "model":
        model = tiny_model(seed=1)
    elif change == "text":
        ids = ids.flip(1)  # as long, and with the same sum
    else:
        options = replace(options, trailing=32)
    with pytest.raises(ValueError, match="other settings"):
        calibrate(model, [ids], options)


def test_a_budget_below_the_least_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of 8 tokens (own, first, neighbour) are 18.75 % of 128 tokens."""
    model, texts = tiny_model(), [tiny_ids(128)]
    options = Options(keys=0.18, setting=PER_QUERY, block_sizes=(8, 16), trailing=64, samples=8)
    with monkeypatch.context() as patch:
        patch.setattr(per_query, "local_costs", lambda *_, **__: pytest.fail("a pass was made"))
        with pytest.raises(ValueError, match=r"at least 18\.8% of the keys are attended"):
            calibrate(model, texts, options)
    found = calibrate(model, texts, replace(options, keys=0.19, block_sizes=(16, 8)))
    assert found.config.block_size == 8  # 16 cannot keep it
    assert found.chosen.keys == 0.1875 == min(p.keys for p in found.curve)
    assert len({p.keys for p in found.curve}) == len(found.curve)


def test_windows_and_layers_without_keys_are_in_the_budget_as_inspect_counts_them() -> None:
    model = tiny_windowed()
    options = Options(keys=0.3, setting=PER_QUERY, block_sizes=(8,), trailing=64, samples=8)
    found = calibrate(model, [tiny_ids(128)], options)
    counted = inspect_config(model.config, found.config, (128,)).lengths[0].key_budget
    assert found.chosen.keys == counted
    assert 0.25 < counted <= 0.3
    assert [i for i in range(4) if found.config.for_layer(i, 4) is not None] == [1, 3]
    with pytest.raises(ValueError, match=r"keys=0\.6 limits nothing: .* attends to 56\.2% of the keys"):
        calibrate(model, [tiny_ids(128)], replace(options, keys=0.6))


def test_a_choice_per_query_keeps_how_its_setting_decodes_and_decides_what_is_full() -> None:
    setting = MobaConfig(8, 4, 1, 0, (2,), decode="sparse", decode_max_len=3, gate="mass")
    options = Options(keys=0.5, setting=setting, trailing=64, samples=8)
    found = calibrate(tiny_model(), [tiny_ids(128)], options).config
    assert (found.decode, found.decode_max_len, found.gate) == ("sparse", 3, "mass")
    assert (found.block_size, found.sink_blocks, found.local_blocks) == (8, 1, 0)
    assert found.for_layer(2, 3) is not None


def test_a_report_without_sparse_layers_says_so() -> None:
    options = Options(keys=1.0, setting=PER_QUERY, block_sizes=(8,), trailing=32, samples=4)
    found = calibrate(tiny_model(), [tiny_ids(64)], options)
    assert found.report().endswith("Chosen: 100.0% of the keys; every layer keeps full attention")
