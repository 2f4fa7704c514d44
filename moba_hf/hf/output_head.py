"""From last hidden states to logits, for code that does not call the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Entries of configs by which models change the result of their output embeddings; 1 or None: they do not.
_FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier")


def output_head(model: Any) -> Callable[[Tensor], Tensor]:
    """The function from last hidden states `(..., width)` to the logits `(..., vocabulary)` of `model`.

    Raises:
        ValueError: the model has no output embeddings, or scales logits in a way that is not known here.
    """
    embeddings = model.get_output_embeddings()
    if embeddings is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings: load it with a language-model head"
        )
    config = model.config.get_text_config()
    for name in _FACTORS:
        if getattr(config, name, None) not in (None, 1):
            raise ValueError(
                f"{type(model).__name__} changes its logits by {name}={getattr(config, name)}, which is not "
                "supported where logits are computed from hidden states"
            )
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is None:
        head: Callable[[Tensor], Tensor] = embeddings
        return head
    return lambda hidden: torch.tanh(embeddings(hidden) / cap) * cap
