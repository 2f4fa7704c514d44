"""A saved MoBA model loads as one, and its folder names the package that it needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from checkpoints import save_tiny
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, modeling_utils

from moba_hf import MobaConfig, convert_checkpoint, patch_model, unpatch_model
from moba_hf.testing import build_model
from moba_hf.training import Recipe, turn_on

sys.path.append(str(Path(__file__).parent / "patches"))
from families import tiny_config

MOBA = MobaConfig(8, 2)


def saved_switch(folder: Path) -> object:
    return json.loads((folder / "config.json").read_text()).get("attn_implementation")


def test_a_loaded_conversion_is_saved_as_one(tmp_path: Path) -> None:
    folder = convert_checkpoint(save_tiny(tmp_path / "src"), tmp_path / "dst", MOBA)
    for name in ("again", "and again"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        folder = tmp_path / name
        model.save_pretrained(folder)
        assert "attn_implementation" not in model.config.__dict__
        assert saved_switch(folder) == "moba"
        assert "import moba_hf" in json.loads((folder / "moba_hf.json").read_text())["about"]
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert reloaded.config._attn_implementation == "moba"
    assert reloaded.config.moba == MOBA.to_dict()


def test_a_vision_language_model_keeps_its_text_model_alone_on_moba(tmp_path: Path) -> None:
    model = patch_model(build_model(tiny_config("qwen2_5_vl")), MOBA)
    model.save_pretrained(tmp_path)
    assert saved_switch(tmp_path) == {"text_config": "moba"}
    config = AutoModelForImageTextToText.from_pretrained(tmp_path).config
    assert config.text_config._attn_implementation == "moba"
    assert config.vision_config._attn_implementation == "sdpa"


def test_models_that_do_not_run_moba_are_saved_as_before(tmp_path: Path) -> None:
    model = patch_model(build_model(tiny_config("llama")), MOBA)
    unpatch_model(model)
    model.save_pretrained(tmp_path / "plain")
    assert saved_switch(tmp_path / "plain") is None
    assert not (tmp_path / "plain" / "moba_hf.json").exists()


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
@pytest.mark.parametrize("off", [unpatch_model, lambda model: stock(model)], ids=["unpatched", "switched"])
def test_a_model_trained_with_moba_is_saved_as_what_it_runs(off: Any, family: str, tmp_path: Path) -> None:
    """Training stores the switch in the config, which must not outlive MoBA: the saved model would run it."""
    model = build_model(tiny_config(family))
    turn_on(model, Recipe(), MOBA)
    model.save_pretrained(tmp_path / "on")
    assert saved_switch(tmp_path / "on") == ("moba" if family == "llama" else {"text_config": "moba"})
    off(model)
    model.save_pretrained(tmp_path / "off")
    assert saved_switch(tmp_path / "off") is None
    assert not (tmp_path / "off" / "moba_hf.json").exists()
    patch_model(model, MOBA).save_pretrained(tmp_path / "again")
    assert saved_switch(tmp_path / "again") == saved_switch(tmp_path / "on")


def stock(model: Any) -> None:
    """Turns MoBA off as transformers does, which leaves `config.moba`."""
    nested = model.config.model_type != "llama"
    model.set_attn_implementation({"text_config": "sdpa"} if nested else "sdpa")


def test_the_files_are_there_when_a_save_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = convert_checkpoint(save_tiny(tmp_path / "src"), tmp_path / "dst", MOBA, remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(made)
    uploaded: list[str] = []

    def upload(_self: object, folder: Path, *_args: object, **_kwargs: object) -> None:
        uploaded.extend(path.name for path in Path(folder).iterdir())

    monkeypatch.setattr(modeling_utils, "hf_api", Mock())
    monkeypatch.setattr(modeling_utils, "create_and_tag_model_card", Mock())
    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert {"config.json", "model.safetensors", "moba_hf.json", "modeling_moba.py"} <= {*uploaded}


def test_a_failed_save_leaves_no_switch_behind(tmp_path: Path) -> None:
    model = patch_model(build_model(tiny_config("llama")), MOBA)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        model.save_pretrained(tmp_path / "file" / "x")
    assert "attn_implementation" not in model.config.__dict__
