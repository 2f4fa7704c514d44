"""Llama: every layer is full causal attention."""

from moba_hf.hf.adapter import Adapter


class LlamaAdapter(Adapter):
    """Llama 1 to 3.x, and models with the same architecture (such as SmolLM2)."""
