"""What transformers calls for "moba": the attention function.

It translates once: module and config say which rule the layer follows (`layer_plan`), the compact mask or the
position ids say where each sequence lies (`mask`, `packing`); below, `ops` knows nothing of models.
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
from moba_hf.hf.mask import COMPACT, bounds_of, moba_mask, stock_mask
from moba_hf.hf.packing import DOCUMENTS, Packing, check_separated, find_packing
from moba_hf.op.dense import dense_attention, dense_packed_attention
from moba_hf.op.ops import attention_over, batched_moba_attention, check_tensors
from moba_hf.op.sequences import RowBounds

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
    "moba_hf.MobaCache(model.config) to generate as its cache, or call moba_hf.use_moba_cache() once"
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
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention output `(batch, q_len, num_heads, v_dim)` as transformers' interface wants it, and None.

    Args:
        module: an attention layer with `config` and `layer_idx`.
        query: `(batch, num_heads, q_len, head_dim)`. key, value: `(batch, num_kv_heads, kv_len, ...)`.
        attention_mask: the compact mask of `mask.moba_mask`, None, or a stock mask for a stock layer.

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
    mask, documents = attention_mask, None
    if mask is not None and mask.dtype == DOCUMENTS:
        mask, documents = None, mask
    q_len, kv_len = query.shape[2], key.shape[2]
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    stock = plan.stock or (f"sliding window of {window}" if window else None)
    _refuse_keywords(kwargs, ("cache",) if stock is not None else tuple(_REFUSED))
    if stock is None:
        _refuse_unsupported(mask, dropout, q_len, kv_len, kwargs)
    packing = _packing_of(module, query, kv_len, mask, documents, stock, kwargs)
    if stock is not None:
        if packing is not None and not torch.compiler.is_compiling():
            check_separated(mask, packing, stock)
        mask = stock_mask(mask, q_len)
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if packing is not None:
        _check_packing(module.config, kwargs)
    bounds = None if mask is None else bounds_of(mask, q_len)
    means = None if packing is not None else _cached_means(plan, key, bounds, q_len)
    query, key, value = _autocast(query, key, value)
    check_tensors(query, key, value)
    means = means if means is not None and means.dtype == key.dtype else None  # of keys before autocast
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    backend = getattr(module, "moba_backend", "auto")
    return _attend(query, key, value, scale, bounds, packing, plan, backend, means), None


def _packing_of(
    module: nn.Module,
    query: Tensor,
    kv_len: int,
    mask: Tensor | None,
    documents: Tensor | None,
    stock: str | None,
    kwargs: dict[str, Any],
) -> Packing | None:
    """`find_packing` of a call of `module`; `stock`: why the layer keeps the stock implementation."""
    batch, _, q_len, _ = query.shape
    padding_given = mask is not None and mask.dtype != torch.uint8
    if stock is not None and mask is not None and mask.shape[2:] == (q_len, q_len):
        padding_given = q_len != kv_len  # a square mask itself shows what is padding, see check_separated
    return find_packing(
        kwargs,
        batch,
        q_len,
        kv_len,
        padding_given=padding_given,
        documents=documents,
        asker=(module.config, int(module.layer_idx)),  # type: ignore[arg-type]
    )


def _cached_means(plan: LayerPlan, key: Tensor, bounds: RowBounds | None, q_len: int) -> Tensor | None:
    """The means that the cache layer of `key` keeps, brought up to date where blocks are chosen by them.

    A static layer does so at every call: each finds it in the same state, and compiled graphs stay few.
    """
    layer: Any = getattr(key, LAYER_ATTRIBUTE, None)
    if layer is None or plan.rule is None or plan.max_keys >= key.shape[2]:
        return None
    if q_len <= plan.full_len and not layer.is_compileable:
        return None
    kv_start = None if bounds is None else bounds.kv_start
    return layer.moba_means(key, kv_start, plan.rule.block_size)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bounds: RowBounds | None,
    packing: Packing | None,
    plan: LayerPlan,
    backend: str,
    block_means: Tensor | None,
) -> Tensor:
    """Full attention where the plan or the rule says so, else MoBA."""
    q_len, kv_len = query.shape[2], key.shape[2]
    longest = kv_len if packing is None else packing.max_seqlen
    rule = plan.rule
    if rule is None or q_len <= plan.full_len or plan.max_keys >= longest:
        if packing is None:
            return dense_attention(query, key, value, scale, bounds)
        if not torch.compiler.is_compiling():
            return dense_packed_attention(query, key, value, scale, packing.spans())
        rule = LayerConfig(q_len, 1)  # one block holds any sequence: the same, as an operator that is traced
    settings: dict[str, Any] = {
        "block_size": rule.block_size,
        "topk": rule.topk,
        "sink_blocks": rule.sink_blocks,
        "local_blocks": rule.local_blocks,
        "gate": rule.gate,
    }
    if packing is not None:
        return attention_over(
            query,
            key,
            value,
            packing.table,
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
        kv_start=None if bounds is None else bounds.kv_start,
        table=None if bounds is None else bounds.table,
        softmax_scale=scale,
        backend=backend,
        block_means=block_means,
        **settings,
    )[0]


def _check_packing(config: Any, kwargs: dict[str, Any]) -> None:
    """Raises ValueError when the model around the attention layers mixes packed documents."""
    given = tuple(name for name, value in kwargs.items() if value is not None)
    reason = adapter_of(config.model_type).packing_refusal(config, given)
    if reason is not None:
        raise ValueError(f"{config.model_type} cannot take packed sequences: {reason}")


def _refuse_keywords(kwargs: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"MoBA does not support {_REFUSED[name]} ({name}); use a stock attn_implementation"
            )


def _refuse_unsupported(
    mask: Tensor | None, dropout: float, q_len: int, kv_len: int, kwargs: dict[str, Any]
) -> None:
    if dropout:
        raise ValueError(
            f"MoBA has no attention dropout, got {dropout}; set attention_dropout=0 in the config"
        )
    if kwargs.get("output_attentions"):
        raise ValueError('MoBA returns no attention weights; use attn_implementation="eager" for them')
    if mask is not None and (mask.dtype not in COMPACT or mask.ndim != 4 or mask.shape[2] != 1):
        raise ValueError(
            f"MoBA takes 2-D padding masks, got a custom mask of {mask.dtype} {tuple(mask.shape)}; "
            "use a stock attn_implementation for it"
        )
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
