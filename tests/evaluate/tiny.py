"""Tiny models and ids for the evaluation tests."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    """A random Llama of three layers, four query heads and two kv heads, in fp32."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**sizes, **changes}), dtype=torch.float32)
    for name, parameter in model.named_parameters():  # makes attention far from uniform
        if parameter.ndim == 2:
            parameter.data *= 12 if "q_proj" in name or "k_proj" in name else 4
    return model.eval()


def tiny_ids(length: int, seed: int = 1) -> torch.Tensor:
    """`(1, length)` random ids below 97."""
    return torch.randint(0, 97, (1, length), generator=torch.Generator().manual_seed(seed))


def tiny_windowed() -> Any:
    """A qwen3 of four layers, of which the first and third have a window of 16 tokens."""
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
