"""Further text families: the tests of the first ones, experts and window layers included."""

from typing import Any, ClassVar

from family_contract import FamilyContract


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


class TestQwen2Moe(FamilyContract):
    """The window is known to the module alone."""

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
