"""Llama: every layer is full causal attention."""

from moba_hf.hf.adapter import Adapter


class LlamaAdapter(Adapter):
    """Llama 1 to 3.x and models that keep its architecture (SmolLM2 for one)."""
