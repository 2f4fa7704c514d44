"""Qwen2 and Qwen3, also with window layers after the first."""

from typing import Any, ClassVar

from family_contract import FamilyContract


class TestQwen2(FamilyContract):
    model_type = "qwen2"


class TestQwen3(FamilyContract):
    model_type = "qwen3"


class TestQwenWithWindowLayers(FamilyContract):
    model_type = "qwen3"
    values: ClassVar[dict[str, Any]] = {
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 2,
    }
    eligible: ClassVar[list[int]] = [0, 1]
