"""Mixtral: Mistral with experts, which attention does not see."""

from moba_hf.hf.adapter import Adapter


class MixtralAdapter(Adapter):
    """Mixtral 8x7B and 8x22B; with `sliding_window` every layer is a window layer."""

    window_everywhere = True
