"""Adapters, one per model family: they say where the attention layers are and which may run MoBA."""
