"""Tiny configs of every family, built in memory, with shortened layer patterns of the real models."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig

_TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
_LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_WINDOWS = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
_MROPE = {
    "hidden_size": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
# Image token ids lie outside the range from which tests draw ids.
_IMAGE_IDS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
_QWEN2_VISION = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN3_VISION = {
    **_QWEN2_VISION,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 32,
    "patch_size": 4,
}


def _vl(model_type: str, vision: dict[str, Any], text: dict[str, Any]) -> Any:
    """A vision-language config around a text config."""
    return CONFIG_MAPPING[model_type](
        text_config={**_TEXT, **text}, vision_config=vision, tie_word_embeddings=False, **_IMAGE_IDS
    )


def _mistral3(text_type: str) -> Any:
    return CONFIG_MAPPING["mistral3"](
        text_config={**_TEXT, "model_type": text_type, "sliding_window": None},
        vision_config=_PIXTRAL,
        image_token_index=90,
        vision_feature_layer=-1,
    )


def _text(model_type: str, **values: Any) -> Any:
    return AutoConfig.for_model(model_type, **{**_TEXT, **values})


def tiny_config(family: str) -> Any:
    """A new tiny config; `family` is a model_type, with the suffix "-window" for some window layers."""
    return _MAKERS[family]()


_MAKERS: dict[str, Any] = {
    "gemma3_text": lambda: _text("gemma3_text", query_pre_attn_scalar=16, **_WINDOWS),
    "llama": lambda: _text("llama"),
    "mistral": lambda: _text("mistral", sliding_window=None),
    "mixtral": lambda: _text("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "ministral": lambda: _text("ministral", **_WINDOWS),
    "ministral3": lambda: _text("ministral3"),
    "mistral3": lambda: _mistral3("mistral"),
    "mistral3-ministral3": lambda: _mistral3("ministral3"),
    "qwen2": lambda: _text("qwen2"),
    "qwen2-window": lambda: _text("qwen2", use_sliding_window=True, **_WINDOWS),
    "qwen3": lambda: _text("qwen3"),
    "qwen3-window": lambda: _text("qwen3", use_sliding_window=True, **_WINDOWS),
    "qwen2_moe": lambda: _text("qwen2_moe", **_EXPERTS),
    "qwen2_moe-window": lambda: _text("qwen2_moe", use_sliding_window=True, **_EXPERTS, **_WINDOWS),
    "qwen3_moe": lambda: _text("qwen3_moe", **_EXPERTS),
    "qwen3_next": lambda: _text("qwen3_next", **_EXPERTS, **_LINEAR),
    "qwen3_5_text": lambda: _text("qwen3_5_text", **_LINEAR),
    "qwen3_5_moe_text": lambda: _text("qwen3_5_moe_text", **_EXPERTS, **_LINEAR),
    "qwen2_vl": lambda: _vl(
        "qwen2_vl", {**_QWEN2_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}, _MROPE
    ),
    "qwen2_5_vl": lambda: _vl(
        "qwen2_5_vl",
        {
            **_QWEN2_VISION,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        _MROPE,
    ),
    "qwen3_vl": lambda: _vl("qwen3_vl", {**_QWEN3_VISION, "out_hidden_size": 64}, _MROPE),
    "qwen3_vl_moe": lambda: _vl(
        "qwen3_vl_moe", {**_QWEN3_VISION, "out_hidden_size": 64}, {**_EXPERTS, **_MROPE}
    ),
    "qwen3_5": lambda: _vl("qwen3_5", _QWEN3_VISION, _LINEAR),
    "qwen3_5_moe": lambda: _vl("qwen3_5_moe", _QWEN3_VISION, {**_EXPERTS, **_LINEAR}),
}
FAMILIES = sorted(_MAKERS)
VISION = [f for f in FAMILIES if "_vl" in f or f.startswith("mistral3") or f in ("qwen3_5", "qwen3_5_moe")]


def vision_inputs(family: str, length: int) -> dict[str, Any]:
    """Inputs for a prompt of `length` tokens with one image of 4 x 4 patches (8 x 8 for Mistral3)."""
    pixtral = family.startswith("mistral3")
    size = 16 if pixtral else 4
    ids = torch.randint(1, 90, (1, length))
    ids[0, 10 : 10 + size] = 90
    mask = torch.ones_like(ids)
    if pixtral:
        pixels = torch.randn(1, 3, 32, 32)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": pixels,
            "image_sizes": torch.tensor([[32, 32]]),
        }
    ids[0, 9], ids[0, 10 + size] = 92, 93
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 90).int(),
    }
