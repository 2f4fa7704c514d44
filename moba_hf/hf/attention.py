"""What transformers calls for "moba": the attention function.

It translates once: module and config say which rule the layer follows (`layer_plan`), the mask says where
each sequence lies (`rows`); below, `ops` knows nothing of models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

from moba_hf.config import NAME, LayerConfig
from moba_hf.hf.cache import LAYER_ATTRIBUTE
from moba_hf.hf.layer_plan import LayerPlan, adapter_of, layer_plan
from moba_hf.hf.loading import watch_loads
from moba_hf.hf.rows import Layout, Rows, moba_mask
from moba_hf.op.dense import causal_mask, dense_attention, dense_packed_attention
from moba_hf.op.ops import attention_over, batched_moba_attention, check_tensors
from moba_hf.op.sequences import RowBounds, Sequences

# Keyword arguments of other attention variants, which would change the result if they were ignored.
_REFUSED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sink parameters",
    "sinks": "attention sink parameters",
    "position_bias": "position biases",
    "cache": "the paged cache of continuous batching",
    "indices": "a choice of keys made by the model itself",
}

_SPARSE_WITHOUT_CACHE = (
    'decode="sparse" without a MobaCache reads all cached keys at every step to take their means; pass '
    "past_key_values=moba_hf.MobaCache(model.config) to generate, or call moba_hf.use_moba_cache() once"
)
_SPARSE_BY_MASS = (
    'decode="sparse" with gate="mass" reads all cached keys at every step to score their blocks: a cache '
    'keeps the means of blocks, not what that gate needs; gate="mean" reads the chosen blocks alone'
)

logger = logging.get_logger(__name__)


def moba_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Rows | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention output `(batch, q_len, num_heads, v_dim)` as transformers' interface wants it, and None.

    Args:
        module: an attention layer with `config` and `layer_idx`.
        query: `(batch, num_heads, q_len, head_dim)`. key, value: `(batch, num_kv_heads, kv_len, ...)`.
        attention_mask: what `rows.moba_mask` made, None, or a stock mask for a stock layer.

    Raises:
        ValueError: what MoBA cannot honour: dropout, custom masks, soft-capping, sinks, a paged cache,
            `output_attentions`, padding masks with holes, more queries than keys.
    """
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal) and "cache" not in kwargs:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    plan = layer_plan(module)
    rows, q_len = attention_mask, query.shape[2]
    if rows is None:  # nobody asked for a mask, or a wrapper of the attention dropped it
        rows = Rows(query.shape[0], q_len, key.shape[2], key.shape[2] - q_len, query.device)
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    stock = plan.stock or (f"sliding window of {window}" if window else None)
    if stock is not None:
        _refuse_keywords(kwargs, ("cache",))
        mask = _stock_mask(module, rows, query.device, stock, kwargs) if isinstance(rows, Rows) else rows
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_keywords(kwargs, tuple(_REFUSED))
    _refuse_unsupported(dropout, q_len, key.shape[2], kwargs)
    if not isinstance(rows, Rows) or rows.windowed:
        given = rows.dense if isinstance(rows, Rows) else rows
        raise ValueError(
            f"MoBA takes 2-D padding masks, got a custom mask{_described(given)}; use a stock "
            "attn_implementation for it"
        )
    layout = rows.layout(kwargs, query.device)
    if layout.packed:
        _check_packing(module.config, rows, kwargs)
    means = None if layout.packed else _cached_means(plan, key, layout.sequences.kv_start, q_len)
    query, key, value = _autocast(query, key, value)
    check_tensors(query, key, value)
    means = means if means is not None and means.dtype == key.dtype else None  # of keys before autocast
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    backend = getattr(module, "moba_backend", "auto")
    return _attend(query, key, value, scale, layout, plan, backend, means), None


def _stock_mask(
    module: nn.Module, rows: Rows, device: torch.device, stock: str, kwargs: dict[str, Any]
) -> Tensor | None:
    """The mask of a layer that keeps the stock implementation; `stock` says why.

    Raises:
        ValueError: packed sequences that the mask does not separate, in a model without any MoBA layer: where
            there is one, it looks.
    """
    config: Any = module.config
    if rows.q_len > 1 and not adapter_of(config.model_type).eligible_layers(config):
        rows.check_separated(kwargs, stock)
    if rows.windowed:
        return rows.dense if rows.dense is None else rows.dense.to(device)
    layout = rows.layout(kwargs, device)
    if layout.packed:
        rows.check_separated(kwargs, stock)
    if layout.whole and rows.q_len in (1, rows.kv_len):
        return None
    return causal_mask(_bounds(layout.sequences, rows.q_len), 0, rows.q_len, rows.kv_len)


def _cached_means(plan: LayerPlan, key: Tensor, kv_start: Tensor | None, q_len: int) -> Tensor | None:
    """The means that the cache layer of `key` keeps, brought up to date where blocks are chosen by them.

    A static layer does so at every call: each finds it in the same state, and compiled graphs stay few.
    """
    layer: Any = getattr(key, LAYER_ATTRIBUTE, None)
    if layer is None or plan.rule is None or plan.max_keys >= key.shape[2]:
        return None
    if q_len <= plan.full_len and not layer.is_compileable:
        return None
    return layer.moba_means(key, kv_start, plan.rule.block_size)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    layout: Layout,
    plan: LayerPlan,
    backend: str,
    block_means: Tensor | None,
) -> Tensor:
    """Full attention where the plan or the rule says so, else MoBA."""
    q_len, kv_len = query.shape[2], key.shape[2]
    sequences = layout.sequences
    longest = sequences.max_seqlen_k if layout.packed else kv_len
    rule = plan.rule
    if rule is None or q_len <= plan.full_len or plan.max_keys >= longest:
        if not layout.packed:
            return dense_attention(
                query, key, value, scale, None if layout.whole else _bounds(sequences, q_len)
            )
        if layout.spans is not None:
            return dense_packed_attention(query, key, value, scale, layout.spans)
        rule = LayerConfig(q_len, 1)  # one block holds any sequence: the same, as an operator that is traced
    settings: dict[str, Any] = {
        "block_size": rule.block_size,
        "topk": rule.topk,
        "sink_blocks": rule.sink_blocks,
        "local_blocks": rule.local_blocks,
        "gate": rule.gate,
    }
    if layout.packed:
        return attention_over(
            query,
            key,
            value,
            sequences.table,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scale,
            backend=backend,
            **settings,
        )[0]
    if (block_means is None or rule.gate == "mass") and q_len == 1 and not torch.compiler.is_compiling():
        logger.warning_once(_SPARSE_BY_MASS if rule.gate == "mass" else _SPARSE_WITHOUT_CACHE)
    return batched_moba_attention(
        query,
        key,
        value,
        kv_start=sequences.kv_start,
        table=sequences.table,
        softmax_scale=scale,
        backend=backend,
        block_means=block_means,
        **settings,
    )[0]


def _bounds(sequences: Sequences, q_len: int) -> RowBounds:
    """The bounds of sequences that are batch rows."""
    _, _, q_end, start, end = sequences.table.long().unbind(1)
    return RowBounds(start, end, end - q_end, q_len, sequences.table)


def _check_packing(config: Any, rows: Rows, kwargs: dict[str, Any]) -> None:
    """Raises ValueError when the model around the MoBA layers mixes packed documents."""
    adapter = adapter_of(config.model_type)
    given = tuple(name for name, value in kwargs.items() if value is not None)
    reason = adapter.packing_refusal(config, given)
    if reason is not None:
        raise ValueError(f"{config.model_type} cannot take packed sequences: {reason}")
    for index in range(adapter.num_layers(config)):
        stock = adapter.stock_reason(config, index)
        if stock is not None and adapter.key_limit(config, index) != 0:
            rows.check_separated(kwargs, stock)
            return


def _described(mask: Tensor | None) -> str:
    return "" if mask is None else f" of {mask.dtype} {tuple(mask.shape)}"


def _refuse_keywords(kwargs: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"MoBA does not support {_REFUSED[name]} ({name}); use a stock attn_implementation"
            )


def _refuse_unsupported(dropout: float, q_len: int, kv_len: int, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"MoBA has no attention dropout, got {dropout}; set attention_dropout=0 in the config"
        )
    if kwargs.get("output_attentions"):
        raise ValueError('MoBA returns no attention weights; use attn_implementation="eager" for them')
    if q_len > kv_len:
        raise ValueError(f"more queries ({q_len}) than keys ({kv_len})")


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, tensors in its dtype, as torch's own attention does."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def register() -> None:
    """Registers "moba" with transformers: attention and mask function, and a look at what it loads."""
    AttentionInterface.register(NAME, moba_attention_forward)
    AttentionMaskInterface.register(NAME, moba_mask)
    watch_loads()
