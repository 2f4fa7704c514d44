"""Parts of models: the model inside wrappers, and the step from its last hidden states to logits."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
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


def check_virtual_tokens(model: Any) -> None:
    """Raises ValueError for prompt and prefix tuning of PEFT, which add their tokens to every call.

    So a text that is read in several calls would contain them several times, or not at all.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"{type(model).__name__} adds virtual tokens to every call, so it cannot read a text in parts: "
            "use a LoRA adapter, or model.get_base_model() for the model without its adapter"
        )


def check_tokens(model: Any, hidden: Tensor, tokens: int) -> None:
    """Raises ValueError unless `hidden (..., rows, width)` has as many rows as the text has tokens."""
    if hidden.shape[-2] != tokens:
        raise ValueError(
            f"{type(model).__name__} reads {hidden.shape[-2]} tokens where the text has {tokens}: virtual "
            "tokens (prompt tuning) are not supported here"
        )


def output_head(model: Any) -> Callable[[Tensor], Tensor]:
    """The function from last hidden states `(..., width)` to the logits `(..., vocabulary)` of `model`.

    Raises:
        ValueError: the model has no output embeddings, or scales logits in a way that is not known here.
            `check_head` finds heads that differ in another way.
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
                f"{type(model).__name__} changes its logits by {name}={getattr(config, name)}, {_UNSUPPORTED}"
            )
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is None:
        head: Callable[[Tensor], Tensor] = embeddings
        return head
    return lambda hidden: torch.tanh(embeddings(hidden) / cap) * cap


def logits_limit(model: Any, count: int) -> dict[str, int]:
    """The argument for logits of the last `count` tokens only; empty if the model always computes all."""
    return {"logits_to_keep": count} if "logits_to_keep" in signature(model.forward).parameters else {}


@torch.no_grad()
def check_head(model: Any, hidden: Tensor, logits: Tensor) -> None:
    """Raises ValueError unless `output_head(model)` computes the logits that the model itself computed.

    A head with dropout in training mode is random, so nothing can be compared.

    Args:
        hidden: last hidden states `(rows, width)` of a forward pass.
        logits: `(rows, vocabulary)`, the logits of the same pass.
    """
    head = output_head(model)
    parts = model.get_output_embeddings().modules()
    if any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in parts):
        return
    ours = head(hidden).float()
    theirs = logits.float().to(ours.device)  # accelerate moves outputs of a model to the device of its input
    same = ours.shape == theirs.shape
    if not same or (ours - theirs).abs().max() > _DIFFERENT * theirs.abs().max():  # NaN is no difference
        raise ValueError(
            f"{type(model).__name__} changes what its output embeddings compute, or their input, "
            f"{_UNSUPPORTED}"
        )


def check_layers(model: Any) -> None:
    """Stands in for `check_head` where the model computes no logits to compare with.

    Raises:
        ValueError: a layer with parameters is part of neither the decoder nor the output embeddings, so it
            may change the logits.
    """
    known = {
        id(module) for part in (model.base_model, model.get_output_embeddings()) for module in part.modules()
    }
    for name, module in model.named_modules():
        if module is not model and id(module) not in known and any(True for _ in module.parameters(False)):
            raise ValueError(
                f"{type(model).__name__} may compute its logits with more than its output embeddings "
                f"({name}), {_UNSUPPORTED}"
            )
