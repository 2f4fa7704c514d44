"""What speaks transformers: the attention and mask functions, caches, adapters, patching, prefill."""
