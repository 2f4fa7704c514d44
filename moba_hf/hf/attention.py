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

from moba_hf.config import NAME, LayerConfig, Rule
from moba_hf.hf.cache import LAYER_ATTRIBUTE
from moba_hf.hf.layer_plan import LayerPlan, adapter_of, layer_plan
from moba_hf.hf.loading import watch_loads
from moba_hf.hf.mask import COMPACT, bounds_of, moba_mask, stock_mask
from moba_hf.hf.packing import DOCUMENTS, Packing, check_separated, find_packing
from moba_hf.op.backends import choose_backend
from moba_hf.op.dense import dense_attention, dense_packed_attention
from moba_hf.op.gates import GATES
from moba_hf.op.numerics import default_scale
from moba_hf.op.ops import attention, check_tensors
from moba_hf.op.sequences import Sequences, batched_table
from moba_hf.op.shared_rule import SharedRule

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
_SPARSE_BY_OTHER_GATE = (
    'decode="sparse" with gate="{}" reads all cached keys at every step to score their blocks: a cache '
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
    sequences = None if mask is None else bounds_of(mask, q_len).sequences(kv_len)
    if packing is not None:
        longest = packing.max_seqlen
        sequences = Sequences(packing.table, longest, longest, by_row=False)
    layer, dtype = getattr(key, LAYER_ATTRIBUTE, None), key.dtype
    query, key, value = _autocast(query, key, value)
    check_tensors(query, key, value)
    layer = layer if key.dtype == dtype else None  # it keeps the means of keys before autocast
    scale = default_scale(query) if scaling is None else scaling
    backend = getattr(module, "moba_backend", "auto")
    return _attend((query, key, value), scale, sequences, packing, plan, backend, layer), None


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


def _attend(
    qkv: tuple[Tensor, Tensor, Tensor],
    scale: float,
    sequences: Sequences | None,
    packing: Packing | None,
    plan: LayerPlan,
    backend: str,
    layer: Any,
) -> Tensor:
    """Full attention where the plan or the rule says so, else MoBA, by the one backend chosen here.

    Args:
        sequences: where they lie; None: every row is one sequence without padding.
        layer: the MoBA cache layer that the keys come from, or None.
    """
    query, key, value = qkv
    q_len, kv_len = query.shape[2], key.shape[2]
    rule: Rule | None = plan.rule
    longest = kv_len if packing is None or sequences is None else sequences.max_seqlen_k
    if rule is not None and (q_len <= plan.full_len or plan.dense_len >= longest):
        rule = None
    if rule is None and packing is not None and torch.compiler.is_compiling():
        rule = LayerConfig(q_len, 1)  # one block holds any sequence: the same, as an operator that is traced
    backend = choose_backend(backend, query, key, value, rule)
    means = None
    if layer is not None and packing is None:
        layer.backend = backend
        means = _cached_means(layer, plan, key, sequences, sparse=rule is not None)
    if rule is None:
        if packing is not None:
            return dense_packed_attention(query, key, value, scale, packing.spans(), backend)
        return dense_attention(query, key, value, scale, sequences, backend)
    if sequences is None:
        table = batched_table(query.shape[0], q_len, kv_len, query.device)
        sequences = Sequences(table, q_len, kv_len)
    if q_len == 1 and packing is None and not torch.compiler.is_compiling():
        _warn_of_reads(rule, means)
    settings: Any = {"softmax_scale": scale, "backend": backend, "block_means": means}
    return attention(query, key, value, sequences, rule, **settings)[0]


def _cached_means(
    layer: Any, plan: LayerPlan, key: Tensor, sequences: Sequences | None, *, sparse: bool
) -> Tensor | None:
    """The means that the cache layer of `key` keeps, brought up to date where blocks are chosen by them.

    A static layer does so at every call: each finds it in the same state, and compiled graphs stay few.
    """
    if (
        plan.rule is None
        or isinstance(plan.rule, SharedRule)
        or plan.dense_len >= key.shape[2]
        or not (sparse or layer.is_compileable)
    ):
        return None
    kv_start = None if sequences is None else sequences.kv_start
    means: Tensor = layer.moba_means(key, kv_start, plan.rule.block_size)
    return means


def _warn_of_reads(rule: Rule, block_means: Tensor | None) -> None:
    """Warns once where a decode step reads every cached key to score blocks."""
    if not GATES[rule.gate].scores_means:
        logger.warning_once(_SPARSE_BY_OTHER_GATE.format(rule.gate))
    elif block_means is None:
        logger.warning_once(_SPARSE_WITHOUT_CACHE)


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
