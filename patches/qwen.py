"""Qwen2, Qwen2.5 and Qwen3: `layer_types` names window layers when `use_sliding_window` is set."""

from moba_hf.adapter import Adapter


class QwenAdapter(Adapter):
    """Dense Qwen models."""
