"""Mixtral: Mistral with experts, which make no difference to attention."""

from moba_hf.hf.adapter import Adapter


class MixtralAdapter(Adapter):
    """Mixtral 8x7B and 8x22B; if `sliding_window` is set, every layer is a window layer."""

    window_everywhere = True
