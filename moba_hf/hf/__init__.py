"""The transformers side: attention and mask functions, caches, adapters, patching, prefill."""
