"""Mistral, Ministral, and the vision-language model Mistral3, which contains one of them."""

from typing import Any

from moba_hf.config import MobaConfig
from moba_hf.hf.adapter import Adapter, find_adapter


class MistralAdapter(Adapter):
    """Mistral 7B, Nemo and Ministral 3; if `sliding_window` is set (v0.1), every layer is a window layer."""

    window_everywhere = True


class MinistralAdapter(Adapter):
    """Ministral 8B: `layer_types` mixes window and full layers."""


class Mistral3Adapter(Adapter):
    """Mistral3 and Ministral 3 with vision; delegates to the adapter of the text model inside."""

    text_config_key = "text_config"

    def stock_reason(self, config: Any, layer_idx: int) -> str | None:
        return find_adapter(config.model_type).stock_reason(config, layer_idx)

    def key_limit(self, config: Any, layer_idx: int) -> int | None:
        return find_adapter(config.model_type).key_limit(config, layer_idx)

    def check(self, config: Any, moba: MobaConfig) -> None:
        find_adapter(config.model_type).check(config, moba)
