"""Tools for checks: tiny models with random weights and peaked attention, and recorded attention calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moba_hf.config import NAME
from moba_hf.hf.attention import moba_attention_forward
from moba_hf.hf.loading import auto_class


@dataclass
class Call:
    """One call of an attention layer. q, k, v: `(1, heads, length, dim)`; out: `(1, length, heads, dim)`."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scaling: float | None
    kwargs: dict[str, Any]
    out: Tensor

    @property
    def layer(self) -> int:
        """The number of the layer."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]


def build_model(config: Any) -> Any:
    """A model of `config` on the CPU, fp32, in eval mode, with random weights that make attention matter."""
    model = auto_class(config).from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:  # the usual std of 0.02 leaves attention nearly uniform
                weight.normal_(std=weight.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@contextmanager
def capture(name: str) -> Iterator[list[Call]]:
    """Records every call of the attention implementation `name`, "moba" or "sdpa"."""
    calls: list[Call] = []
    function = moba_attention_forward if name == NAME else sdpa_attention_forward

    def recording(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        out, _ = function(module, q, k, v, mask, **kwargs)
        calls.append(Call(module, q, k, v, mask, kwargs.get("scaling"), kwargs, out))
        return out, None

    ALL_ATTENTION_FUNCTIONS[name] = recording
    try:
        yield calls
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
