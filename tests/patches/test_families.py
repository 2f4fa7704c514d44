"""Every family passes the contract or says what it cannot do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, VISION, tiny_config, vision_inputs
from transformers import AutoModelForImageTextToText

import moba_hf
from moba_hf import MobaConfig
from moba_hf.hf.adapter import find_adapter, known_families
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.testing import COVERING, LENGTH, SMALL, build_model, check_adapter

HYBRID = "linear-attention layers"
HIDDEN = "restart inside a row"
PACKING = {
    "qwen2_vl": HIDDEN,
    "qwen2_5_vl": HIDDEN,
    "qwen3_next": HYBRID,
    "qwen3_5": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe": HYBRID,
    "qwen3_5_moe_text": HYBRID,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_contract(family: str) -> None:
    config = tiny_config(family)
    report = check_adapter(type(find_adapter(config.model_type)), config, installed=True)
    assert report.skipped == {}
    assert PACKING.get(family, "separate") in report.packing


@pytest.mark.parametrize("family", ["mistral", "mixtral", "ministral3", "qwen3_moe"])
@torch.no_grad()
def test_a_window_in_every_layer_keeps_the_model_stock(family: str) -> None:
    config = tiny_config(family)
    config.sliding_window = 12
    model = build_model(config)
    assert find_adapter(family).eligible_layers(model.config) == []
    ids = torch.randint(1, 90, (1, LENGTH))
    expected = model(ids).logits
    with moba_hf.use_moba(model, SMALL):
        assert torch.equal(model(ids).logits, expected)


def test_eligible_layers_are_the_full_ones() -> None:
    for family, expected in [
        ("ministral", [1]),
        ("qwen2_moe-window", [1]),
        ("qwen3_next", [3]),
        ("qwen3_5_moe", [3]),
        ("qwen2_5_vl", [0, 1]),
    ]:
        config = tiny_config(family)
        adapter = find_adapter(config.model_type)
        assert adapter.eligible_layers(adapter.text_config(config)) == expected


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("choice", ["moba", {"text_config": "moba"}])
@torch.no_grad()
def test_the_vision_tower_stays_stock(family: str, choice: Any) -> None:
    """With an image in the prompt, logits equal sdpa's if topk covers all blocks, and differ otherwise."""
    config = tiny_config(family)
    config.get_text_config().moba = COVERING.to_dict()
    stock = build_model(tiny_config(family))
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=choice).eval()
    model.load_state_dict(stock.state_dict())
    inputs = vision_inputs(family, LENGTH)
    expected = stock(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)
    image = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_grid_thw")}
    if "image_grid_thw" in image:
        tower, other = model.model.visual, stock.model.visual
        arguments = (image["pixel_values"], image["image_grid_thw"])
    else:
        tower, other = model.model.vision_tower, stock.model.vision_tower
        arguments = (image["pixel_values"], inputs["image_sizes"])
    assert torch.equal(tower(*arguments)[0], other(*arguments)[0])
    model.config.get_text_config().moba = SMALL.to_dict()
    assert (model(**inputs).logits - expected).abs().max() > 1e-2


@torch.no_grad()
def test_qwen25_vl_packs_with_four_axes_or_cu_seq_lens() -> None:
    """With position ids of four axes or cu_seq_lens_q, each document gives the same as alone."""
    model = build_model(tiny_config("qwen2_5_vl"))
    ids = torch.randint(1, 90, (1, LENGTH))
    positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None]
    ends = torch.tensor([0, 20, LENGTH], dtype=torch.int32)
    with moba_hf.use_moba(model, SMALL):
        parts = [model(part, use_cache=False).logits for part in (ids[:, :20], ids[:, 20:])]
        for packed in (
            {"position_ids": positions.expand(4, 1, -1)},
            {"position_ids": positions, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
        ):
            logits = model(ids, use_cache=False, **packed).logits
            torch.testing.assert_close(logits, torch.cat(parts, dim=1), rtol=0, atol=1e-4)
        with pytest.raises(ValueError, match=HIDDEN):
            model(ids, position_ids=positions)


@torch.no_grad()
def test_a_mask_overlay_that_is_not_packing_is_refused() -> None:
    """Image tokens that see each other need transformers' dense mask, which MoBA refuses."""
    from transformers.masking_utils import create_causal_mask

    model = build_model(tiny_config("llama"))
    with moba_hf.use_moba(model, SMALL):
        mask = create_causal_mask(
            config=model.config,
            inputs_embeds=torch.zeros(1, LENGTH, 32),
            attention_mask=None,
            **cache_kwargs(create_causal_mask, None),
            or_mask_function=lambda b, h, q, k: (q < 9) & (k < 9),
        )
        with pytest.raises(ValueError, match="custom mask"):
            model(torch.randint(1, 90, (1, LENGTH)), attention_mask=mask)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("deepseek_v3", "latent attention"),
        ("deepseek_v32", "already sparse"),
        ("gemma3", "load only the text model"),
        ("gpt_oss", "learned sinks"),
        ("mistral4", "latent attention"),
        ("mistral_large4", "already sparse"),
        ("mistral_large4_text", "already sparse"),
        ("qwen4_exp", "already sparse"),
        ("qwen4_exp_text", "already sparse"),
    ],
)
def test_unsupported_families_are_refused_with_the_reason(model_type: str, reason: str) -> None:
    assert model_type not in known_families()
    with pytest.raises(ValueError, match=reason):
        find_adapter(model_type)


def test_a_mistral3_around_latent_attention_is_refused() -> None:
    adapter = find_adapter("mistral3")
    with pytest.raises(ValueError, match="latent attention"):
        adapter.check(SimpleNamespace(model_type="mistral4", num_hidden_layers=2), MobaConfig(8, 2))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_text_after_a_video_is_no_new_document(family: str) -> None:
    """Its positions start before those of the last frames; a mask of ones and no mask give the same."""
    model = build_model(tiny_config(family))
    ids = torch.randint(1, 90, (2, LENGTH))
    time = torch.cat(
        [torch.arange(5), 5 + 10 * torch.arange(4).repeat_interleave(4), torch.arange(7, LENGTH - 14)]
    )
    place = torch.cat([torch.arange(5), 5 + torch.tensor([0, 0, 1, 1] * 4), torch.arange(7, LENGTH - 14)])
    positions = torch.stack([time, place, place])[:, None].expand(3, 2, -1)
    with moba_hf.use_moba(model, SMALL):
        expected = model(ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits
        assert torch.equal(model(ids, position_ids=positions).logits, expected)
        again = torch.cat([positions[:, :, :40], positions[:, :, : LENGTH - 40]], dim=2)
        with pytest.raises(ValueError, match=HIDDEN):
            model(ids, attention_mask=torch.ones_like(ids), position_ids=again)
