"""`evaluate` as a whole: when a store is reused, what is refused before any pass, what is shown."""

import errno
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_tasks import Bytes
from tiny import tiny_ids, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from moba_hf import MobaConfig
from moba_hf.checkpoints.inspection import inspect_config
from moba_hf.evaluate import passes, run
from moba_hf.evaluate.passes import attention, watch
from moba_hf.evaluate.results import Store
from moba_hf.evaluate.run import Tasks, evaluate, tables

SETTINGS = {"dense": None, "moba": MobaConfig(8, 3)}
ALL = ("perplexity", "agreement", "recall")


def measured(model: Any, ids: torch.Tensor, **given: Any) -> dict[str, Any]:
    return evaluate(model, None, {"text": ids}, SETTINGS, **given)


def test_a_run_stopped_anywhere_ends_in_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, store = tiny_model(), tiny_ids(96), tmp_path / "store.json"
    given = {"measures": ALL, "tasks": Tasks(["multi-needle"], [700], contexts=2)}

    def whole(kept: Path | None) -> dict[str, Any]:
        return evaluate(model, Bytes(), {"text": ids}, SETTINGS, store=kept, **given)

    expected, passed = whole(None), []
    real = passes.hidden_states
    stops = {2, 5}

    def stopping(*args: Any) -> torch.Tensor:
        passed.append(1)
        if len(passed) in stops:
            raise KeyboardInterrupt
        return real(*args)

    for module in ("perplexity", "agreement", "passes"):
        monkeypatch.setattr(sys.modules[f"moba_hf.evaluate.{module}"], "hidden_states", stopping)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            whole(store)
    monkeypatch.undo()
    assert whole(store) == expected
    assert whole(store) == expected  # nothing left to compute, and lists stay lists


def test_a_store_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store.json"
    store = Store(path, {})
    store.get("a", lambda: 1)
    path.chmod(0o600)
    store.get("b", lambda: 2)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Path, "replace", fail)
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            store.get("c", lambda: 3)
        del store.answers["c"]
        assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


def test_two_processes_keep_each_other_s_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.json"
    one, other = Store(path, {}), Store(path, {})
    write = Path.write_text

    def both(self: Path, *args: Any, **kwargs: Any) -> int:
        count = write(self, *args, **kwargs)
        monkeypatch.setattr(Path, "write_text", write)
        other.get("b", lambda: 2)  # the other process writes between our two steps
        return count

    monkeypatch.setattr(Path, "write_text", both)
    one.get("a", lambda: 1)
    one.get("c", lambda: 3)
    other.get("d", lambda: 4)
    assert Store(path, {}).answers.keys() >= {"a", "c", "d"}
    assert [file.name for file in tmp_path.iterdir()] == ["store.json"]
    path.unlink()
    Store(path, {"seed": 1}).get("a", lambda: 1)
    with pytest.raises(ValueError, match="other settings"):
        one.get("e", lambda: 5)


@pytest.mark.parametrize("change", ["model", "config", "dtype", "text", "seed"])
def test_a_store_goes_on_with_what_it_was_made_of_only(tmp_path: Path, change: str) -> None:
    ids, store = tiny_ids(64), tmp_path / "store.json"
    measured(tiny_model(), ids, store=store)
    model, given = tiny_model(), {"seed": 1} if change == "seed" else {}
    if change == "model":
        model.model.layers[2].mlp.down_proj.weight.data *= 1.01
    elif change == "config":
        model.config.rms_norm_eps = 1e-3
    elif change == "dtype":
        model = model.to(torch.bfloat16)
    elif change == "text":
        ids = ids.flip(1)  # as long, and with the same sum
    with pytest.raises(ValueError, match="other settings"):
        measured(model, ids, store=store, **given)
    if change == "model":
        with attention(
            tiny_model(), SETTINGS["moba"]
        ) as same:  # the current attention is not part of the identity
            assert measured(same, ids, store=store) == measured(tiny_model(), ids)


def test_what_cannot_be_measured_is_refused_before_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_one", lambda *_: pytest.fail("a pass was made"))
    model, ids = tiny_model(), tiny_ids(64)
    for given, message in (
        ({"measures": ["perplexity", "perplexty"]}, "unknown measure 'perplexty'"),
        ({"tasks": Tasks(["poem"], [100])}, "unknown task 'poem'"),
        ({"tasks": Tasks(["needle"], [100], contexts=0)}, "contexts must be at least 1"),
        ({"tasks": Tasks(["needle"])}, "tasks need lengths"),
    ):
        with pytest.raises(ValueError, match=message):
            measured(model, ids, **given)
    with pytest.raises(ValueError, match="nothing to measure"):
        evaluate(model, None, {}, SETTINGS)


def test_every_measure_is_shown_alone() -> None:
    model, ids = tiny_model(), tiny_ids(64)
    for measure, shown in (
        ("perplexity", "trailing loss"),
        ("agreement", "top-1"),
        ("recall", "oracle mass"),
    ):
        result = measured(model, ids, measures=[measure])
        table = tables(result)
        assert shown in table
        assert "| moba |" in table
    result = measured(model, ids, measures=["agreement"])
    assert f"{result['agreement']['text']['moba']['kl']:.4f}" in tables(result)


def hybrid() -> Any:
    """Three linear-attention layers and one full-attention layer, whose attention is far from uniform."""
    config = AutoConfig.for_model(
        "qwen3_next",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_the_key_budget_is_that_of_inspect() -> None:
    """Layers without keys do not count; window layers count the keys in the window."""
    model, ids = hybrid(), tiny_ids(64)
    config = MobaConfig(8, 3, full_attention_layers=(0,))
    result = evaluate(model, None, {"text": ids}, {"moba": config})
    row = inspect_config(model.config, config, (64,)).lengths[0]
    assert row.key_budget == 3 * 8 / 64
    assert result["keys"]["text"]["moba"] == [row.key_budget, row.pair_share]


def test_a_dense_pass_leaves_the_vision_tower_as_it_was() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"depth": 1, "num_heads": 2, "patch_size": 4, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    images = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92}
    config = AutoConfig.for_model(
        "qwen2_vl", text_config={**sizes, **heads}, vision_config=vision, vision_end_token_id=93, **images
    )
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(config, attn_implementation={"text_config": "moba"})
    model.set_attn_implementation({"vision_config": "eager"})

    def implementations() -> tuple[str, str]:
        parts = (model.config.text_config, model.config.vision_config)
        return tuple(part._attn_implementation for part in parts)  # type: ignore[return-value]

    assert implementations() == ("moba", "eager")
    ids = tiny_ids(40) % 80
    watch(model.eval(), ids, lambda *_: None)
    assert implementations() == ("moba", "eager")
    with attention(model, None):
        assert implementations() == ("sdpa", "eager")
    assert implementations() == ("moba", "eager")


@pytest.mark.parametrize("change", [("0.5", "0.25"), ('"answers"', '"answer"'), ("{", ""), ('"a"', '"b"')])
def test_a_store_that_was_changed_is_refused(change: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "store.json"
    Store(path, {"x": 1}).get("a", lambda: 0.5)
    assert Store(path, {"x": 1}).get("a", lambda: 1) == 0.5
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(ValueError, match=r"store\.json"):
        Store(path, {"x": 1})


def test_a_text_that_is_not_utf8_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenizer(text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=torch.tensor([[ord(char) for char in text]]))

    warnings: list[str] = []
    monkeypatch.setattr(run.logger, "warning", warnings.append)
    path = tmp_path / "my text.txt"
    path.write_text("caf\u00e9 " * 20, encoding="utf-8")
    assert run.read_ids(tokenizer, path, 50).shape == (1, 50)
    assert not warnings
    path.write_text("caf\u00e9 " * 20, encoding="latin-1")
    assert run.read_ids(tokenizer, path, 50).shape == (1, 50)
    assert "20 of the first 100 characters" in warnings[0]
