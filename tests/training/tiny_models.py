"""Tiny models and token data for the training tests."""

from __future__ import annotations

from typing import Any

import torch
from model_checks import tiny_model
from torch import Tensor
from torch.utils.data import Dataset

from moba_hf import MobaConfig

RULE = MobaConfig(block_size=8, topk=2)
HYBRID = MobaConfig(block_size=8, topk=2, full_attention_layers=(-1,))
VOCABULARY = 97


def tiny(rule: MobaConfig | None = RULE, model_type: str = "llama", attention: str = "moba") -> Any:
    """A random model with two layers in training mode, the same in every call."""
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 512, "eos_token_id": 2}
    return tiny_model(model_type, rule, attention, **sizes).train()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY - 1, shape, generator=torch.Generator().manual_seed(seed))


class Blocks(Dataset[dict[str, Tensor]]):
    """`count` rows of `length` tokens with labels."""

    def __init__(self, count: int = 64, length: int = 64) -> None:
        self.rows = tokens(count, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def grads(model: Any) -> dict[str, Tensor]:
    """Parameter name -> gradient; clears the gradients."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def backward(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step."""
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), grads(model)


def checkpointed(model: Any, reentrant: bool) -> Any:
    """`model` with gradient checkpointing, under the name used by this release of transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    return model
