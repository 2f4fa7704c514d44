"""The mask function that is registered as "moba"; transformers calls it once per forward and layer type."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from moba_hf.hf.parallel import refuse_lost_padding, refuse_ring_attention
from moba_hf.hf.rows import Masks, Rows, check_length

# Rotary parameters of models whose layers may not pass their position ids to the attention function.
_KEPT = {"mrope_section", "llama_4_scaling_beta"}
# How many frames above the mask function to search for the forward of the model.
_FRAMES = 8


def moba_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | Rows | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    config: Any = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | Rows | None:
    """The `Rows` of a forward; transformers calls it with keywords only, once per forward and layer type.

    For layers with sliding windows or chunks (`local_size`), the `Rows` contains transformers' own dense
    mask. For custom overlays and bidirectional models, the result is that mask itself.

    Raises:
        ValueError: the mask is shorter than the cache and the call together, or Ulysses would drop it, or the
            model runs under ring attention.
    """
    if not torch.compiler.is_compiling():
        refuse_ring_attention()
        if not isinstance(attention_mask, Rows):
            refuse_lost_padding(attention_mask)
    if isinstance(attention_mask, Rows):  # `generate` has called this before the forward, for a static cache
        return attention_mask
    bidirectional = kwargs.get("allow_is_bidirectional_skip") or not getattr(config, "is_causal", True)
    overlay = mask_function not in (None, causal_mask_function)
    alone = attention_mask is None and q_length == kv_length
    custom = bidirectional or use_vmap or (overlay and not alone and local_size is None)
    dense = None
    if custom or local_size is not None:
        dense = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            device=device,
            config=config,
            use_vmap=use_vmap,
            **({} if mask_function is None else {"mask_function": mask_function}),
            **kwargs,
        )
    if custom:
        return dense
    if attention_mask is not None and isinstance(q_offset, int):
        check_length(attention_mask.shape[1], q_offset, q_length)
    neighbours = None
    if overlay and alone and q_length > 1:
        row, query = (
            torch.arange(batch_size, device=device)[:, None],
            torch.arange(1, q_length, device=device),
        )
        pairs = [mask_function(row, 0, query, query - 1), mask_function(row, 0, query - 1, query)]
        neighbours = torch.stack([x.expand(batch_size, -1) for x in pairs])
    hidden = (
        q_length > 1 and isinstance(q_offset, int) and q_offset == 0 and not torch.compiler.is_compiling()
    )
    return Rows(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        device,
        Masks(
            given=attention_mask,
            neighbours=neighbours,
            hidden=_hidden_positions(config, batch_size, q_length) if hidden else None,
            dense=dense,
            windowed=local_size is not None,
        ),
    )


def _hidden_positions(config: Any, batch: int, length: int) -> Tensor | None:
    """Position ids of the running forward, for models whose layers do not pass them to attention.

    Vision-language models do not pass on M-RoPE ids `(3, batch, length)`, nor Ministral 3 its ids
    `(batch, length)` before transformers 5.18. So only the stack frame of their `forward` shows whether the
    caller packs documents, which would be mixed.
    """
    if not _KEPT & set(getattr(config, "rope_parameters", None) or {}):
        return None
    frame = sys._getframe(2)
    for _ in range(_FRAMES):
        known = frame.f_locals
        if frame.f_code.co_name == "forward" and "inputs_embeds" in known:
            ids = known.get("position_ids")
            if not isinstance(ids, Tensor) or known.get("text_position_ids") is not None:
                return None
            if ids.ndim == 2 and ids.shape[1] == length:
                return ids.expand(batch, length)
            return ids.expand(3, batch, length) if ids.ndim == 3 and ids.shape[::2] == (3, length) else None
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None
