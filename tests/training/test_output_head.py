"""Code that computes logits from hidden states refuses heads that do more than their output embeddings."""

from __future__ import annotations

from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import RULE, Blocks, tiny, tokens
from transformers import DynamicCache, LlamaForCausalLM, Trainer, TrainingArguments

from moba_hf import prefill
from moba_hf.config import NAME
from moba_hf.evaluate.agreement import agreement
from moba_hf.evaluate.perplexity import token_losses
from moba_hf.evaluate.tasks import ask, read
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.training import LongRowTrainer, MobaCallback
from moba_hf.training import callback as callback_module


class DeepHead(LlamaForCausalLM):
    """A head with a layer before its output embeddings, as that of ModernBERT's decoder."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.lm_head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh(), self.lm_head)
        self.post_init()

    def get_output_embeddings(self) -> Any:
        return self.lm_head[2]


class ScaledHead(LlamaForCausalLM):
    """A head that halves its logits, which no layer and no entry of the config shows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    forward.__signature__ = signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]


class HeadBeside(LlamaForCausalLM):
    """A further head that takes no part in the logits, as those of reward models and speculative decoding."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.value = torch.nn.Linear(config.hidden_size, 1)


class AllLogits(DeepHead):
    """A deep head that cannot limit its logits to the last tokens."""

    def forward(self, input_ids: Any, use_cache: bool = True) -> Any:  # type: ignore[override]
        return super().forward(input_ids, use_cache=use_cache)


class Fused(DeepHead):
    """The loss without logits, as fused losses compute it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = None
        return output

    forward.__signature__ = signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]


def with_head(kind: Any) -> Any:
    """A tiny model of class `kind` that uses MoBA."""
    torch.manual_seed(0)
    model = kind(tiny().config)
    model.set_attn_implementation(NAME)
    return model


def trained(trainer_class: Any, model: Any, tmp_path: Path, **given: Any) -> Any:
    """A trainer after one step."""
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
        save_strategy="no", per_device_train_batch_size=2,
    )  # fmt: skip
    trainer = trainer_class(model=model, args=settings, train_dataset=Blocks(2, 60), **given)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", [DeepHead, ScaledHead])
def test_a_head_that_does_more_than_its_output_embeddings_is_refused(kind: Any, tmp_path: Path) -> None:
    model, ids = with_head(kind), tokens(1, 60)
    for fails in (
        lambda: token_losses(model, ids, RULE),
        lambda: agreement(model, ids, RULE),
        lambda: trained(LongRowTrainer, deepcopy(model), tmp_path),
    ):
        with pytest.raises(ValueError, match="where logits are computed from hidden states"):
            fails()


def test_a_deep_head_without_logits_to_compare_with_is_refused() -> None:
    with pytest.raises(ValueError, match=r"more than its output embeddings \(lm_head.0\)"):
        token_losses(with_head(AllLogits), tokens(1, 60), RULE)


def test_a_head_beside_that_of_the_logits_changes_nothing(tmp_path: Path) -> None:
    model, ids = with_head(HeadBeside), tokens(1, 60)
    plain = with_head(LlamaForCausalLM)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(token_losses(model.eval(), ids, RULE), token_losses(plain.eval(), ids, RULE))
    assert trained(LongRowTrainer, model, tmp_path).state.global_step == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from PEFT
def test_dropout_in_the_head_is_no_difference(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    low = peft.LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(with_head(LlamaForCausalLM), low)
    assert trained(LongRowTrainer, model, tmp_path).state.global_step == 1
    scaled = peft.get_peft_model(with_head(ScaledHead), low)
    with pytest.raises(ValueError, match="where logits are computed from hidden states"):
        token_losses(scaled.eval(), tokens(1, 60), RULE)


def test_questions_are_answered_by_the_head_of_the_model() -> None:
    model, ids = with_head(DeepHead).eval(), tokens(1, 40)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **cache_kwargs(model, cache))
        questions = [tokens(1, 5, seed=seed)[0] for seed in range(12)]
        found = [ask(model, cache, ids[0], [one], 1, None, dense=False) for one in questions]
        expected = [model(torch.cat([ids[0], one])[None]).logits[0, -1].argmax() for one in questions]
    assert found == [[[int(token)]] for token in expected]


def test_a_fused_loss_of_such_a_head_trains_without_a_trailing_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(callback_module.logger, "warning_once", warnings.append)
    trainer = trained(Trainer, with_head(Fused), tmp_path, callbacks=[MobaCallback()])
    assert "trailing_loss" not in trainer.state.log_history[0]
    assert any("no trailing_loss" in warning for warning in warnings)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from PEFT
@pytest.mark.parametrize("evaluated", [token_losses, agreement])
def test_a_model_inside_peft_is_evaluated_with_its_adapter(evaluated: Any) -> None:
    peft = pytest.importorskip("peft")
    low = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped, ids = peft.get_peft_model(tiny(), low).eval(), tokens(1, 60)
    found = evaluated(wrapped, ids, RULE)
    with wrapped.disable_adapter():
        without = evaluated(wrapped, ids, RULE)
    merged = evaluated(wrapped.merge_and_unload(), ids, RULE)
    if evaluated is token_losses:
        torch.testing.assert_close(found, merged, rtol=1e-4, atol=1e-4)
        assert (found - without).abs().max() > 0.1
    else:
        assert found.kl == pytest.approx(merged.kl, rel=1e-3)
        assert found.kl != pytest.approx(without.kl, rel=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from PEFT
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused_where_they_would_be_counted_wrongly(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tuned = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, ids = peft.get_peft_model(tiny(), tuned).eval(), tokens(1, 60)
    with pytest.raises(ValueError, match="adds virtual tokens to every call"):
        prefill(model, ids, chunk_size=16, progress=False)
    with pytest.raises(ValueError, match="adds virtual tokens to every call"):
        read(model, ids, DynamicCache(config=model.config))
    assert prefill(model.get_base_model(), ids, chunk_size=16, progress=False).get_seq_length() == 59
    if kind == "PromptTuningConfig":
        for fails in (
            lambda: token_losses(model, ids, RULE),
            lambda: trained(LongRowTrainer, model, tmp_path),
        ):
            with pytest.raises(ValueError, match="reads 64 tokens where the text has 60"):
                fails()
    else:
        with torch.no_grad():
            expected = model(ids, labels=ids).loss
        assert torch.allclose(token_losses(model, ids, RULE).mean(), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from PEFT
def test_a_prefill_of_a_peft_model_computes_no_logits_but_the_last() -> None:
    peft = pytest.importorskip("peft")
    low = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model, rows = peft.get_peft_model(tiny(), low).eval(), list[int]()
    model.get_output_embeddings().register_forward_hook(lambda module, given, out: rows.append(out.shape[1]))
    prefill(model, tokens(1, 60), chunk_size=16, progress=False)
    assert set(rows) == {1}
