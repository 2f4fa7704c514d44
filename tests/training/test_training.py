"""Recipes in transformers' Trainer: the switch, what is logged, what is saved, and resuming."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import RULE, Blocks, tiny, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from moba_hf import MobaConfig, use_moba
from moba_hf.config import LayerConfig
from moba_hf.hf.layer_plan import layer_plan
from moba_hf.training import RECIPES, MobaCallback, Recipe, recipe_of, trailing_loss


class Watch(TrainerCallback):
    """Number of completed steps -> the rule of every layer in the next step's forward pass."""

    def __init__(self) -> None:
        self.rules: dict[int, set[Any]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model = model.get_base_model() if hasattr(model, "get_base_model") else model

        def see(module: Any, *_: Any) -> None:
            rules = tuple(layer_plan(layer.self_attn).rule for layer in module.model.layers)
            self.rules.setdefault(state.global_step, set()).add(rules)

        if not self.rules:
            model.register_forward_pre_hook(see)


def arguments(folder: Path, steps: int = 6, **given: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **given,
    }
    return TrainingArguments(**settings)


def train(folder: Path, recipe: Any, model: Any = None, resume: Any = None, **given: Any) -> Trainer:
    trainer = Trainer(
        model=tiny() if model is None else model,
        args=arguments(folder, **given),
        train_dataset=Blocks(),
        eval_dataset=Blocks(4),
        callbacks=[MobaCallback(recipe, trailing_tokens=16), watch := Watch()],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.watch = watch
    return trainer


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal(a: Any, b: Any) -> None:
    first, second = weights(a), weights(b)
    assert all(torch.equal(first[name], second[name]) for name in first)


class TestRecipe:
    @pytest.mark.parametrize(
        ("share", "steps", "switch"),
        [
            (0, 10, 10),
            (0.1, 10, 9),
            (0.1, 30, 27),
            (0.25, 10, 7),
            (0.01, 5, 4),
            (0.5, 1, 0),
            (0.9, 1000, 100),
        ],
    )
    def test_switch_step(self, share: float, steps: int, switch: int) -> None:
        assert Recipe(full_share=share).switch_step(steps) == switch

    @pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
    def test_a_share_out_of_range(self, share: float) -> None:
        with pytest.raises(ValueError, match="full_share"):
            Recipe(full_share=share)

    def test_names(self) -> None:
        assert recipe_of("hybrid-time-depth") == Recipe(0.1, (-3, -2, -1))
        assert recipe_of(RECIPES["moba"]).settings(RULE) == RULE
        with pytest.raises(ValueError, match="unknown recipe 'hybrid'; known are moba"):
            MobaCallback("hybrid")


class TestSwitch:
    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_happens_at_its_step(self, tmp_path: Path, accumulate: int) -> None:
        given = {"gradient_accumulation_steps": accumulate}
        trainer = train(tmp_path, Recipe(full_share=0.3), steps=7, **given)
        rule = LayerConfig(8, 2)
        assert trainer.watch.rules == {i: {(rule, rule) if i < 4 else (None, None)} for i in range(7)}
        assert {layer_plan(layer.self_attn).rule for layer in trainer.model.model.layers} == {rule}

    def test_full_attention_is_that_of_sdpa(self, tmp_path: Path) -> None:
        """A run that switches before its first step gives the same weights as stock attention."""
        moba = train(tmp_path / "moba", Recipe(full_share=0.9), steps=3)
        stock = tiny(attention="sdpa")
        Trainer(model=stock, args=arguments(tmp_path / "stock", 3), train_dataset=Blocks()).train()
        assert all(line["moba_full"] for line in moba.state.log_history if "loss" in line)
        assert_equal(moba.model, stock)

    def test_depth(self, tmp_path: Path) -> None:
        trainer = train(tmp_path, Recipe(full_layers=(0,)), steps=2)
        assert trainer.watch.rules[1] == {(None, LayerConfig(8, 2))}
        assert trainer.model.config.moba["full_attention_layers"] == [0]

    def test_an_evaluation_under_another_rule_sees_it(self, tmp_path: Path) -> None:
        """`use_moba` inside the full-attention phase runs its own rule, then restores the phase."""
        seen = []

        class Evaluate(TrainerCallback):
            def on_step_end(
                self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
            ) -> None:
                attention = model.model.layers[0].self_attn
                with use_moba(model, MobaConfig(block_size=4, topk=2)):
                    seen.append(layer_plan(attention).rule)
                seen.append(layer_plan(attention).rule)

        Trainer(
            model=tiny(),
            args=arguments(tmp_path, 2),
            train_dataset=Blocks(),
            callbacks=[MobaCallback(Recipe(full_share=0.5)), Evaluate()],
        ).train()
        assert seen == [LayerConfig(4, 2), LayerConfig(8, 2), LayerConfig(4, 2), None]


class TestResume:
    @pytest.mark.parametrize("at", [2, 4], ids=["before the switch", "after it"])
    def test_is_bit_identical(self, tmp_path: Path, at: int) -> None:
        recipe, given = Recipe(full_share=0.5), {"save_strategy": "steps", "save_steps": 2}
        whole = train(tmp_path, recipe, gradient_accumulation_steps=2, **given)
        resumed = train(
            tmp_path,
            recipe,
            tiny(),
            str(tmp_path / f"checkpoint-{at}"),
            gradient_accumulation_steps=2,
            **given,
        )
        assert_equal(whole.model, resumed.model)
        rule = LayerConfig(8, 2)
        assert resumed.watch.rules == {i: {(rule, rule) if i < 3 else (None, None)} for i in range(at, 6)}
        names = ("loss", "trailing_loss", "moba_key_budget", "moba_full", "grad_norm")
        lines = [
            [{n: e[n] for n in names} for e in t.state.log_history if "loss" in e] for t in (whole, resumed)
        ]
        assert lines[0] == lines[1]


class TestLogs:
    def test_values(self, tmp_path: Path) -> None:
        trainer = train(tmp_path, Recipe(full_share=0.5), steps=2, eval_strategy="steps", eval_steps=1)
        lines = trainer.state.log_history
        train_lines = [line for line in lines if "loss" in line]
        assert [line["moba_key_budget"] for line in train_lines] == [16 / 64, 1.0]
        assert [line["moba_full"] for line in train_lines] == [0.0, 1.0]
        evaluated = [line for line in lines if "eval_loss" in line]
        model = trainer.model.eval()
        rows = Blocks(4).rows
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            logits = model(rows).logits[:, -17:-1]
        expected = F.cross_entropy(logits.flatten(0, 1), rows[:, -16:].flatten())
        assert evaluated[-1]["eval_trailing_loss"] == pytest.approx(float(expected), rel=1e-5)
        assert evaluated[-1]["eval_trailing_loss"] != pytest.approx(evaluated[-1]["eval_loss"], rel=1e-3)

    def test_first_line_is_the_loss_of_the_untrained_model(self, tmp_path: Path) -> None:
        """With two rows and one step, the logged value equals one computed from the Trainer's batch."""
        seen: list[Tensor] = []
        model = tiny()
        model.register_forward_pre_hook(lambda _m, _a, k: seen.append(k["input_ids"]), with_kwargs=True)
        trainer = train(tmp_path, "moba", model, steps=1)
        with torch.no_grad():
            logits = tiny()(seen[0]).logits[:, -17:-1]
        expected = F.cross_entropy(logits.flatten(0, 1), seen[0][:, -16:].flatten())
        assert trainer.state.log_history[0]["trailing_loss"] == pytest.approx(float(expected), rel=1e-5)

    def test_trailing_loss_counts_labels_only(self) -> None:
        logits, labels = torch.randn(2, 10, 7), torch.randint(0, 7, (2, 10))
        labels[1, 7:] = -100
        total, count = trailing_loss(logits, labels, 4)
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        assert int(count) == 5
        torch.testing.assert_close(total, each[:, -4:].sum())
        assert trailing_loss(logits, labels, 99)[1] == 9 + 6


class TestCheckpoints:
    def test_keep_moba_and_load_with_it(self, tmp_path: Path) -> None:
        """Also those of the final full-attention phase, and those of `save_model`."""
        trainer = train(tmp_path, Recipe(full_share=0.5), steps=2, save_strategy="steps", save_steps=1)
        trainer.save_model(str(tmp_path / "last"))
        ids = tokens(1, 64)
        with torch.no_grad():
            expected = trainer.model.eval()(ids).logits
        for name in ("checkpoint-1", "checkpoint-2", "last"):
            values = json.loads((tmp_path / name / "config.json").read_text())
            assert values["moba"] == RULE.to_dict()
            assert values["attn_implementation"] == "moba"
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            assert loaded.config._attn_implementation == "moba"
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, expected)

    def test_a_dense_load_warns(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        from transformers.utils import logging

        tiny().save_pretrained(tmp_path / "moba")
        config = tmp_path / "moba" / "config.json"  # as saved without moba_hf imported
        values = json.loads(config.read_text())
        del values["attn_implementation"]
        config.write_text(json.dumps(values))
        tiny(None, attention="sdpa").save_pretrained(tmp_path / "plain")
        logging.enable_propagation()
        level = logging.get_verbosity()
        logging.set_verbosity_warning()
        logging.warning_once.cache_clear()
        try:
            for folder, given, warns in (
                ("moba", {}, True),
                ("moba", {"attn_implementation": "eager"}, True),
                ("moba", {"attn_implementation": "moba"}, False),
                ("plain", {}, False),
            ):
                caplog.clear()
                AutoModelForCausalLM.from_pretrained(tmp_path / folder, **given)
                assert ("uses full attention" in caplog.text) == warns
            caplog.clear()
            train(tmp_path, "moba", AutoModelForCausalLM.from_pretrained(tmp_path / "moba"), steps=1)
            assert "training turns MoBA on" in caplog.text
        finally:
            logging.set_verbosity(level)
            logging.disable_propagation()


class TestTrainerOptions:
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, tmp_path: Path, reentrant: bool) -> None:
        plain = train(tmp_path, Recipe(full_share=0.5), steps=2)
        fields = {field.name for field in dataclasses.fields(TrainingArguments)}
        name = "activation" if "activation_checkpointing" in fields else "gradient"  # its older name
        given = {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant}}
        assert_equal(plain.model, train(tmp_path, Recipe(full_share=0.5), steps=2, **given).model)

    def test_gradient_accumulation(self, tmp_path: Path) -> None:
        one = train(tmp_path, "moba", steps=2, per_device_train_batch_size=4)
        two = train(tmp_path, "moba", steps=2, gradient_accumulation_steps=2)
        for name, value in weights(one.model).items():
            torch.testing.assert_close(value, weights(two.model)[name], rtol=1e-3, atol=1e-4)

    def test_bf16(self, tmp_path: Path) -> None:
        """Weights stay fp32, and the loss is close to that of fp32."""
        losses = [
            train(tmp_path, Recipe(full_share=0.5), steps=4, bf16=bf16).state.log_history
            for bf16 in (False, True)
        ]
        for a, b in zip(*losses, strict=True):
            if "loss" in a:
                assert a["loss"] == pytest.approx(b["loss"], abs=0.1)
                assert a["trailing_loss"] == pytest.approx(b["trailing_loss"], abs=0.2)
