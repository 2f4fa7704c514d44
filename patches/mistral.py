"""Mistral: with `sliding_window` set (v0.1), every layer is a window layer and caches the window only."""

from typing import Any

from moba_hf.adapter import Adapter


class MistralAdapter(Adapter):
    """Mistral 7B and Nemo; layers of a model with a window stay stock."""

    def stock_reason(self, config: Any, layer_idx: int) -> str | None:
        window = getattr(config, "sliding_window", None)
        return None if window is None else f"sliding window of {window}"
