"""`convert` and `verify` on checkpoints of the other families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import tiny_config
from transformers import AutoModelForImageTextToText

from moba_hf import convert_checkpoint
from moba_hf.checkpoints.inspection import inspect_checkpoint
from moba_hf.checkpoints.verify import verify_checkpoint
from moba_hf.testing import SMALL, build_model


@pytest.mark.parametrize(
    "family", ["mixtral", "mistral3", "qwen2_moe-window", "qwen3_next", "qwen3_5_moe", "qwen3_vl_moe"]
)
def test_convert_and_verify(family: str, tmp_path: Path) -> None:
    model = build_model(tiny_config(family))
    model.save_pretrained(tmp_path / "src")
    convert_checkpoint(tmp_path / "src", tmp_path / "dst", SMALL)
    report = verify_checkpoint(tmp_path / "dst", tmp_path / "src")
    assert report.passed, report.checks[-1].detail
    result = inspect_checkpoint(tmp_path / "dst")
    assert result.moba == SMALL
    assert [row.index for row in result.layers if row.kind == "moba"]


@torch.no_grad()
def test_a_vision_language_config_published_flat(tmp_path: Path) -> None:
    """Qwen2.5-VL on the Hub has the text model's values at the top level; none may be lost."""
    model = build_model(tiny_config("qwen2_5_vl"))
    src, dst = tmp_path / "src", tmp_path / "dst"
    model.save_pretrained(src)
    values = json.loads((src / "config.json").read_text())
    text = values.pop("text_config")
    text.pop("model_type")
    (src / "config.json").write_text(json.dumps({**text, **values}))
    convert_checkpoint(src, dst, SMALL)
    assert verify_checkpoint(dst, src).passed
    loaded = AutoModelForImageTextToText.from_pretrained(dst, attn_implementation="sdpa").eval()
    ids = torch.randint(1, 90, (1, 40))
    assert torch.equal(loaded(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
