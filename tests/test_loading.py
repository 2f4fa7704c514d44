"""A model that cannot run MoBA is refused when it is built, before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import edit_json, save_tiny
from model_checks import tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moba_hf import MobaConfig


def gpt2() -> Any:
    return AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=96)


def without_weights(folder: Path, **changes: Any) -> Path:
    """A checkpoint whose weights cannot be read, with changed fields of its config."""
    save_tiny(folder)
    edit_json(folder / "config.json", **changes)
    (folder / "model.safetensors").write_bytes(b"not weights")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moba": {"block_size": 0, "topk": 2}}, "block_size must be at least 1, got 0"),
        ({"moba": {"block_size": 8}}, "a MoBA config needs topk"),
        (
            {"moba": {"block_size": 8, "topk": 2, "full_attention_layers": [7]}},
            "names layer 7, but the model has 3",
        ),
    ],
)
def test_unfit_settings_before_the_weights(changes: Any, message: str, tmp_path: Path) -> None:
    folder = without_weights(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="moba")
    with pytest.raises(Exception, match=r"(?i)header"):  # dense attention does not need the settings
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def test_settings_of_another_type() -> None:
    config = tiny_config("llama", None)
    config.moba = "fine"
    with pytest.raises(TypeError, match=r"must be a mapping, .* got 'fine'"):
        AutoModelForCausalLM.from_config(config, attn_implementation="moba")


def test_a_language_model_without_an_adapter() -> None:
    with pytest.raises(ValueError, match="no MoBA adapter for model_type 'gpt2'"):
        AutoModelForCausalLM.from_config(gpt2(), attn_implementation="moba")
    assert AutoModelForCausalLM.from_config(gpt2(), attn_implementation="sdpa") is not None


def test_models_that_are_not_language_models_are_built() -> None:
    """A tower of another model, which keeps the stock implementation."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = AutoConfig.for_model("siglip_vision_model", image_size=8, patch_size=4, **sizes)
    assert AutoModel.from_config(config, attn_implementation="moba").config._attn_implementation == "moba"


def test_a_model_without_settings_is_built_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """They may still be set by `patch_model`."""
    assert not hasattr(tiny_model(moba=None).config, "moba")
    assert not caplog.records
    assert tiny_model(moba=MobaConfig(8, 2)).config.moba["topk"] == 2
