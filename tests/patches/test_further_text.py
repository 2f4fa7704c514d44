"""The family contract for further text families, with experts and window layers."""

from typing import Any, ClassVar

import pytest
from family_contract import FamilyContract

from moba_hf import MobaConfig
from moba_hf.hf.adapter import find_adapter


class TestMixtral(FamilyContract):
    model_type = "mixtral"
    values: ClassVar[dict[str, Any]] = {"num_local_experts": 4, "num_experts_per_tok": 2}


class TestMinistral3(FamilyContract):
    model_type = "ministral3"


class TestMinistral(FamilyContract):
    """Window layers around a full one."""

    model_type = "ministral"
    values: ClassVar[dict[str, Any]] = {
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    eligible: ClassVar[list[int]] = [1]


class TestGemma3(FamilyContract):
    """Window layers with their own rotary base, normalised queries and keys, another softmax scale."""

    model_type = "gemma3_text"
    values: ClassVar[dict[str, Any]] = {
        "query_pre_attn_scalar": 16,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    }
    eligible: ClassVar[list[int]] = [1]

    def test_an_encoder_is_refused(self, model: Any) -> None:
        model.config.use_bidirectional_attention = True
        with pytest.raises(ValueError, match="use_bidirectional_attention"):
            find_adapter("gemma3_text").check(model.config, MobaConfig(8, 3))


class TestQwen2Moe(FamilyContract):
    """Only the module knows the window, not the config."""

    model_type = "qwen2_moe"
    values: ClassVar[dict[str, Any]] = {
        "use_sliding_window": True,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    }
    eligible: ClassVar[list[int]] = [1, 2]


class TestQwen3Moe(FamilyContract):
    model_type = "qwen3_moe"
    values: ClassVar[dict[str, Any]] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    }
