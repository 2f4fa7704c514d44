"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: MoBA in the text model; the vision tower stays stock."""

from moba_hf.hf.adapter import Adapter


class QwenVLAdapter(Adapter):
    """`layer_types` of the text config marks window layers (Qwen2.x-VL) or linear attention (Qwen3.5)."""

    text_config_key = "text_config"
