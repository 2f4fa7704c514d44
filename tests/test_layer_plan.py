"""Which rule a layer follows: settings from disk, later changes, presets, and the messages about them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from model_checks import LENGTH, SMALL, close, logits, sdpa_logits, tiny_model, tokens
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, GPTNeoXConfig

from moba_hf import MobaConfig, patch_model
from moba_hf.hf import layer_plan


class messages:
    """Collects the warnings logged inside the block, as a new process would emit them."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog, self.logger = caplog, layer_plan.logger

    def __enter__(self) -> list[str]:
        type(self.logger).warning_once.cache_clear()
        self.level, self.said = self.logger.level, []
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.said.append(record.getMessage())
        self.logger.addHandler(self.handler)
        self.logger.setLevel(logging.WARNING)
        return self.said

    def __exit__(self, *error: object) -> None:
        self.logger.removeHandler(self.handler)
        self.logger.setLevel(self.level)


class TestLoading:
    def test_every_way_to_load(self, tmp_path: Path) -> None:
        """`config.moba` from disk decides, and every way to load runs the same MoBA."""
        moba = MobaConfig(8, 2, full_attention_layers=(-1,), layers={0: {"topk": 3}})
        model = tiny_model(moba=moba)
        ids = tokens(1, LENGTH)
        expected = logits(model, ids)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba")
        assert MobaConfig.from_dict(loaded.config.moba) == moba
        assert torch.equal(logits(loaded, ids), expected)

        plain = AutoModelForCausalLM.from_pretrained(tmp_path)  # the saved config names the implementation
        assert torch.equal(logits(plain, ids), expected)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
        assert MobaConfig.from_dict(stock.config.moba) == moba
        assert torch.equal(logits(stock, ids), sdpa_logits(model, ids))
        stock.set_attn_implementation("moba")
        assert torch.equal(logits(stock, ids), expected)

        base = AutoModel.from_pretrained(tmp_path, attn_implementation="moba")
        with torch.no_grad():
            assert torch.equal(model.lm_head(base(ids).last_hidden_state), expected)

        torch.manual_seed(1)
        head = AutoModelForSequenceClassification.from_pretrained(
            tmp_path, attn_implementation="moba", num_labels=3
        )
        with torch.no_grad():
            scores = head.score(base(ids).last_hidden_state[:, -1])
            assert close(head(ids).logits, scores)

    def test_a_preset_that_is_patched_in_is_saved_without_the_backend(self, tmp_path: Path) -> None:
        model = patch_model(tiny_model(moba=None), MobaConfig(8, 2, backend="reference"))
        model.save_pretrained(tmp_path)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path).config.moba
        assert saved == MobaConfig(8, 2).to_dict()

    def test_the_default_preset_is_announced_once(self, caplog: pytest.LogCaptureFixture) -> None:
        with messages(caplog) as said:
            model = tiny_model(moba=None)
            for _ in range(2):
                logits(model, tokens(1, LENGTH))
            patch_model(tiny_model(moba=None))
        assert len(said) == 1
        for part in (
            "'default'",
            "measured at 8K tokens",
            "block_size=",
            "tile=",
            "threshold=",
            "patch_model",
        ):
            assert part in said[0]

    def test_settings_that_are_given_are_not_announced(self, caplog: pytest.LogCaptureFixture) -> None:
        with messages(caplog) as said:
            logits(tiny_model(), tokens(1, LENGTH))
        assert said == []

    def test_settings_in_config_json_are_checked(self) -> None:
        model = tiny_model()
        model.config.moba = {"block_size": 8, "top_k": 2}
        with pytest.raises(ValueError, match="unknown MoBA settings: top_k"):
            logits(model, tokens(1, LENGTH))

    @pytest.mark.parametrize("how", ["replaced", "edited in place"])
    def test_settings_changed_later_are_followed(self, how: str) -> None:
        model = tiny_model()
        ids = tokens(1, LENGTH)
        before = logits(model, ids)
        if how == "replaced":
            model.config.moba = {"block_size": 8, "topk": 3}
        else:
            model.config.moba["topk"] = 3
        assert torch.equal(logits(model, ids), logits(tiny_model(moba=MobaConfig(8, 3)), ids))
        assert not torch.equal(logits(model, ids), before)

    @pytest.mark.parametrize("index", [3, -4])
    @pytest.mark.parametrize("name", ["full_attention_layers", "layers"])
    def test_layers_that_the_model_does_not_have(self, name: str, index: int) -> None:
        moba = MobaConfig(8, 2, **{name: [index] if name == "full_attention_layers" else {index: {}}})
        with pytest.raises(ValueError, match=f"{name} names layer {index}, but the model has 3 layers"):
            logits(tiny_model(moba=moba), tokens(1, LENGTH))
        model = tiny_model()
        with pytest.raises(ValueError, match=f"{name} names layer {index}"):
            patch_model(model, moba)
        assert model.config.moba == SMALL.to_dict()

    def test_an_unknown_architecture(self) -> None:
        config = GPTNeoXConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        )
        model = AutoModelForCausalLM.from_config(config)
        message = (
            "no MoBA adapter for model_type 'gpt_neox'; known: gemma3_text, llama, mini.*, qwen3_vl.*subclass"
        )
        with pytest.raises(ValueError, match=message):
            patch_model(model, SMALL)
        model.set_attn_implementation("moba")
        with pytest.raises(ValueError, match=message):
            logits(model, tokens(1, 10))

    def test_a_model_without_eligible_layers_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        with messages(caplog) as said:
            model = tiny_model("mistral", sliding_window=12)
            logits(model, tokens(1, LENGTH))
        assert said == ["No layer of this mistral model can use MoBA: sliding window of 12"]
