"""Qwen2, Qwen2.5, Qwen3 and Qwen3-Next, dense and with experts."""

from moba_hf.hf.adapter import Adapter


class QwenAdapter(Adapter):
    """`layer_types` names window layers (also where only the module knows, as in Qwen2-MoE) and linear ones.

    Of Qwen3-Next only the full-attention layers, one in four, call the attention interface.
    """


class Qwen3MoeAdapter(Adapter):
    """Qwen3-MoE has no `layer_types`: with `use_sliding_window` every layer is a window layer."""

    window_everywhere = True
