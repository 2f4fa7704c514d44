"""Qwen2, Qwen2.5, Qwen3 and Qwen3-Next, dense and with experts."""

from moba_hf.hf.adapter import Adapter


class QwenAdapter(Adapter):
    """`layer_types` marks window layers (Qwen2-MoE included) and linear-attention layers.

    In Qwen3-Next, only the full-attention layers, one in four, call the attention interface.
    """


class Qwen3MoeAdapter(Adapter):
    """Qwen3-MoE has no `layer_types`: if `use_sliding_window` is set, every layer is a window layer."""

    window_everywhere = True
