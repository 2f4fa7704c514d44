"""Forward passes shared by the evaluations: dense or MoBA, hidden states, and a dense pass with a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from moba_hf.config import MobaConfig
from moba_hf.hf.adapter import Adapter, find_adapter
from moba_hf.hf.identity import identity_of
from moba_hf.hf.output_head import (
    check_head,
    check_layers,
    check_tokens,
    inner_model,
    logits_limit,
    output_head,
)
from moba_hf.hf.patching import set_implementation, use_moba
from moba_hf.op.inputs import require_tensor
from moba_hf.op.layer_rule import Rule
from moba_hf.op.numerics import default_scale
from moba_hf.op.shared_rule import SharedRule
from moba_hf.progress import advanced_by, progress_bar

__all__ = ["attention", "family_of", "identity_of"]

_PROBED = "moba_probe"
# (layer index, attention module, q (H, N, D), k (HK, N, D), v (HK, N, Dv), softmax scale)
Probe = Callable[[int, nn.Module, Tensor, Tensor, Tensor, float], None]


def family_of(model: Any) -> tuple[Adapter, Any]:
    """The adapter for `model`, and the model's text config."""
    adapter = find_adapter(model.config.model_type)
    return adapter, adapter.text_config(model.config)


@contextmanager
def attention(model: Any, config: MobaConfig | None) -> Iterator[Any]:
    """Runs `model` with MoBA under `config`, or dense for None, and restores it afterwards."""
    if config is not None:
        with use_moba(model, config):
            yield model
        return
    with _implementation(model, "sdpa"):
        yield model


@contextmanager
def _implementation(model: Any, name: str) -> Iterator[None]:
    """Sets the attention implementation of the text model, and restores it afterwards."""
    adapter, text_config = family_of(model)
    previous = text_config._attn_implementation
    set_implementation(model, adapter, name)
    try:
        yield
    finally:
        set_implementation(model, adapter, previous)


@contextmanager
def passes_bar(model: Any, what: str, passes: int) -> Iterator[Any]:
    """A progress bar over `passes` forward passes of `model` inside the block, advanced by every layer."""
    modules = [module for _, module in family_of(model)[0].attention_layers(model)]
    with progress_bar(what, passes * len(modules), " layers") as bar, advanced_by(bar, modules):
        yield bar


def check_ids(ids: Tensor) -> None:
    """Raises TypeError or ValueError unless `ids` is a tensor `(1, length)` with at least two tokens."""
    require_tensor("ids", ids)
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(f"ids must be (1, length) with at least two tokens, got {tuple(ids.shape)}")


@torch.no_grad()
def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """Last hidden states `(length, width)` of `ids (1, length)`, from one pass without a cache.

    Raises:
        ValueError: `logits` would not compute the model's logits from them, or they are more than `ids`
            (prompt tuning adds tokens).
    """
    inner, kept = inner_model(model), list[Any]()
    ids = ids.to(model.device)
    last = logits_limit(inner, 1)
    if not last:  # logits of a whole text may not fit
        check_layers(inner)
        found: Tensor = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        return found
    hook = inner.base_model.register_forward_hook(lambda module, given, output: kept.append(output))
    try:
        outputs = model(input_ids=ids, use_cache=False, **last)
    finally:
        hook.remove()
    hidden: Tensor = kept[0].last_hidden_state[0]
    check_tokens(model, hidden, ids.shape[1])
    check_head(inner, hidden[-1:], outputs.logits[0, -1:])
    return hidden


@torch.no_grad()
def logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits of `hidden (n, width)`, fp32 `(n, vocabulary)`."""
    return output_head(inner_model(model))(hidden).float()


def _probed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    probe: Probe | None = module.__dict__.get("_moba_probe")
    if probe is not None:
        scale = kwargs.get("scaling") or default_scale(query)
        probe(int(module.layer_idx), module, query[0], key[0], value[0], float(scale))  # type: ignore[arg-type]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@torch.no_grad()
def watch(model: Any, ids: Tensor, probe: Probe) -> None:
    """One dense pass over `ids (1, length)` that calls `probe` for every layer eligible for MoBA."""
    adapter, text_config = family_of(model)
    eligible = set(adapter.eligible_layers(text_config))
    modules = [m for i, m in adapter.attention_layers(model) if i in eligible]
    AttentionInterface.register(_PROBED, _probed_attention)
    AttentionMaskInterface.register(_PROBED, sdpa_mask)
    try:
        for module in modules:
            module.__dict__["_moba_probe"] = probe
        with _implementation(model, _PROBED):
            hidden_states(model, ids)
    finally:
        for module in modules:
            module.__dict__.pop("_moba_probe", None)


def sample_positions(length: int, count: int, seed: int) -> Tensor:
    """`count` distinct, sorted positions from the last three quarters of a text, int64 `(count,)`."""
    first = length // 4
    order = torch.randperm(length - first, generator=torch.Generator().manual_seed(seed))
    return (order[:count] + first).sort().values


def ranked_by_rule(scores: Tensor, positions: Tensor, rule: Rule) -> Tensor:
    """`scores (H, M, blocks)` with infinity for own and kept blocks and -infinity for future blocks.

    Args:
        positions: positions of the queries, `(M,)`. Under a shared choice, all blocks that the query's tile
            overlaps, up to the query, count as own.
    """
    column = torch.arange(scores.shape[2], device=scores.device)
    later = column > (positions // rule.block_size)[:, None]
    begin = positions // rule.tile * rule.tile if isinstance(rule, SharedRule) else positions
    forced = rule.forces(column, (begin // rule.block_size)[:, None]) & ~later
    return scores.masked_fill(later, -torch.inf).masked_fill(forced, torch.inf)


def attention_rows(q: Tensor, k: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Causal attention weights, fp32 `(H, M, N)`, of the queries `q (H, M, D)` at `positions (M,)`."""
    queries = q.float().reshape(k.shape[0], -1, q.shape[2])
    scores = (queries @ k.float().transpose(1, 2) * scale).view(q.shape[0], q.shape[1], k.shape[1])
    later = torch.arange(k.shape[1], device=q.device) > positions[:, None]
    return scores.masked_fill_(later, -torch.inf).softmax(2)
