"""Parts of models: the model inside wrappers, and the step from its last hidden states to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Entries of configs by which models change the result of their output embeddings; 1 or None: they do not.
_FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier")
# Logits that differ by more than this share of the largest are not those of the head; rounding is far below.
_DIFFERENT = 0.02
_UNSUPPORTED = "which is not supported where logits are computed from hidden states"


def inner_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, a compiled model or a wrapper such as DDP."""
    for _ in range(4):
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif not hasattr(model, "set_attn_implementation") and hasattr(model, "module"):
            model = model.module
    return model


def output_head(model: Any) -> Callable[[Tensor], Tensor]:
    """The function from last hidden states `(..., width)` to the logits `(..., vocabulary)` of `model`.

    Raises:
        ValueError: the model has no output embeddings, has other layers beside them, or scales logits in a
            way that is not known here. `check_head` finds heads that differ in another way.
    """
    embeddings = model.get_output_embeddings()
    if embeddings is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings: load it with a language-model head"
        )
    if (layer := _layer_beside(model, embeddings)) is not None:
        raise ValueError(
            f"{type(model).__name__} computes its logits with more than its output embeddings ({layer}), "
            f"{_UNSUPPORTED}"
        )
    config = model.config.get_text_config()
    for name in _FACTORS:
        if getattr(config, name, None) not in (None, 1):
            raise ValueError(
                f"{type(model).__name__} changes its logits by {name}={getattr(config, name)}, {_UNSUPPORTED}"
            )
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is None:
        head: Callable[[Tensor], Tensor] = embeddings
        return head
    return lambda hidden: torch.tanh(embeddings(hidden) / cap) * cap


@torch.no_grad()
def check_head(model: Any, hidden: Tensor, logits: Tensor) -> None:
    """Raises ValueError unless `output_head(model)` computes the logits that the model itself computed.

    Args:
        hidden: last hidden states `(rows, width)` of a forward pass.
        logits: `(rows, vocabulary)`, the logits of the same pass.
    """
    ours, theirs = output_head(model)(hidden).float(), logits.float()
    same = ours.shape == theirs.shape
    if not same or (ours - theirs).abs().max() > _DIFFERENT * theirs.abs().max():  # NaN is no difference
        raise ValueError(
            f"{type(model).__name__} changes what its output embeddings compute, or their input, "
            f"{_UNSUPPORTED}"
        )


def _layer_beside(model: Any, embeddings: nn.Module) -> str | None:
    """Name of a module with parameters that belongs neither to the decoder nor to the output embeddings."""
    known = {id(module) for part in (model.base_model, embeddings) for module in part.modules()}
    for name, module in model.named_modules():
        if module is not model and id(module) not in known and any(True for _ in module.parameters(False)):
            return str(name)
    return None
