"""The attention function that transformers calls for "moba".

It is the boundary between models and `ops`, which knows nothing about models: `layer_plan` finds the rule of
the layer from module and config, and `rows` finds the sequences from the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

from moba_hf.config import NAME
from moba_hf.hf.cache_layer import LAYER_ATTRIBUTE
from moba_hf.hf.layer_plan import TRAINED_TAIL, LayerPlan, adapter_of, layer_plan
from moba_hf.hf.layout import Layout
from moba_hf.hf.loading import watch_loads
from moba_hf.hf.mask import moba_mask
from moba_hf.hf.places import DECODE, DENSE, PREFILL, row_kinds
from moba_hf.hf.recent_queries import FixedQueries, RecentQueries, last_rows
from moba_hf.hf.rows import Rows
from moba_hf.op.backends import choose_backend, reads_chosen_only
from moba_hf.op.dense import (
    causal_mask,
    dense_attention,
    dense_packed_attention,
    dense_tail_attention,
)
from moba_hf.op.inputs import check_tensors
from moba_hf.op.layer_rule import LayerConfig, Rule
from moba_hf.op.numerics import default_scale
from moba_hf.op.ops import attention, kept_of
from moba_hf.op.shared_prompt import prompt_attention
from moba_hf.op.shared_rule import SharedRule

# Keyword arguments of other attention variants; ignoring them would give wrong results.
_REFUSED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sink parameters",
    "sinks": "attention sink parameters",
    "position_bias": "position biases",
    "cache": "the paged cache of continuous batching",
    "indices": "keys chosen by the model itself",
}

_SPARSE_WITHOUT_CACHE = (
    'decode="sparse" without a MobaCache reads all cached keys at every step to score their blocks; pass '
    "moba_hf.MobaCache(model.config) to generate as its cache, or call moba_hf.use_moba_cache() once"
)
_SHARED_WITHOUT_CACHE = (
    'decode="sparse" of a shared choice without a MobaCache: each step chooses blocks by its own query, '
    "so tokens differ from those with a MobaCache, and reads all cached keys to score blocks; pass "
    "moba_hf.MobaCache(model.config) to generate as its cache, or call moba_hf.use_moba_cache() once"
)
_SPARSE_WITHOUT_KERNEL = (
    'decode="sparse" reads all cached keys at every step to score their blocks, because backend "{}" has no '
    "kernel for decode steps of this rule"
)
_ASSISTED = (
    'assisted and prompt-lookup generation under decode="full": several candidates are verified at a time by '
    "the prefill rule, whereas plain generation attends to every key, so tokens may differ. To get the same "
    'tokens, read the prompt into the cache with moba_hf.prefill, or set decode="sparse"'
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
    """Returns the attention output `(batch, q_len, num_heads, v_dim)` and None, as transformers expects.

    Args:
        module: an attention layer with `config` and `layer_idx`.
        query: `(batch, num_heads, q_len, head_dim)`.
        key: `(batch, num_kv_heads, kv_len, head_dim)`.
        value: `(batch, num_kv_heads, kv_len, v_dim)`.
        attention_mask: the result of `moba_mask`, None, or a stock mask for a stock layer.

    Raises:
        ValueError: an unsupported feature: dropout, custom masks, soft-capping, sinks, a paged cache,
            `output_attentions`, padding masks with holes, or more queries than keys.
    """
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal) and "cache" not in kwargs:
        mask = attention_mask
        if isinstance(mask, Rows):  # the model is causal: use the mask that its stock layers would get
            mask = _stock_mask(module, mask, query.device, "not causal", kwargs)
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    plan = layer_plan(module)
    rows, q_len = attention_mask, query.shape[2]
    if rows is None:  # no mask was requested, or a wrapper of the attention function dropped it
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
    custom = rows.dense if isinstance(rows, Rows) else rows
    if custom is not None:
        raise ValueError(
            f"MoBA supports 2-D padding masks only, got a custom mask of {custom.dtype} "
            f"{tuple(custom.shape)}; use a stock attn_implementation for it"
        )
    assert isinstance(rows, Rows)
    backend = getattr(module, "moba_backend", "auto")
    layout = rows.layout(kwargs, query.device, backend)
    if layout.packed:
        _check_packing(module.config, rows, kwargs)
    layer, dtype = getattr(key, LAYER_ATTRIBUTE, None), key.dtype
    query, key, value = _autocast(query, key, value)
    check_tensors(query, key, value)
    layer = layer if key.dtype == dtype else None  # its means are of the keys before autocast
    scale = default_scale(query) if scaling is None else scaling
    if layer is None and layout.whole and q_len == key.shape[2] <= plan.dense_len:  # whatever the kind of row
        return dense_attention(query, key, value, scale, whole=True), None
    tail = int(getattr(module, TRAINED_TAIL, 0))
    if tail > 0 and q_len == key.shape[2] and plan.rule is not None and not layout.packed:
        return _attend_with_tail((query, key, value), scale, layout, plan, backend, tail), None
    return _attend((query, key, value), scale, layout, plan, backend, layer), None


def _stock_mask(
    module: nn.Module, rows: Rows, device: torch.device, stock: str, kwargs: dict[str, Any]
) -> Tensor | None:
    """The mask of a layer that keeps the stock implementation; `stock` says why.

    Raises:
        ValueError: the mask does not separate packed sequences. In a model with MoBA layers, these make the
            same check.
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
    return causal_mask(layout.sequences, 0, rows.q_len, rows.kv_len)


def _attend(
    qkv: tuple[Tensor, Tensor, Tensor],
    scale: float,
    layout: Layout,
    plan: LayerPlan,
    backend: str,
    layer: Any,
) -> Tensor:
    """Attends with the rule of each row: that of prefill, of decoding, or full attention (see `row_kinds`).

    Args:
        layer: the MoBA cache layer that the keys come from, or None.
    """
    query, key, value = qkv
    q_len, kv_len = query.shape[2], key.shape[2]
    layer = None if layout.packed else layer
    kinds = row_kinds(layer, q_len, kv_len, plan.decode_max_len)
    if layer is not None and layer.assisted:
        _warn_of_assistance(plan, q_len, kv_len)
    recent = _recent(layer, plan)
    known = None if recent is None else recent.follow(query, layer.first_slot(q_len), plan.hears)
    outs = []
    for begin, end, kind in kinds:
        rows, keys, where = (query, key, value), key, layout
        if len(kinds) > 1:
            seen = kv_len - (q_len - end)
            rows = (query[:, :, begin:end], key[:, :, :seen], value[:, :, :seen])
            where = layout.between(begin, end)
        rule = {PREFILL: plan.rule, DENSE: None, DECODE: plan.decode_rule}[kind]
        heard = None
        if recent is not None and kind == DECODE:
            heard = last_rows(known, query[:, :, :begin], plan.hears - 1)
        call = _Call(rows, scale, where, rule, kind == DECODE, heard)
        outs.append(_attend_rows(call, plan, backend, layer, keys))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _attend_with_tail(
    qkv: tuple[Tensor, Tensor, Tensor],
    scale: float,
    layout: Layout,
    plan: LayerPlan,
    backend: str,
    tail: int,
) -> Tensor:
    """Attends by the rule, except that the last `tail` queries of each row attend every key up to their own.

    Raises:
        ValueError: the batch has padding.
    """
    if not layout.whole:
        raise ValueError("a dense tail in training needs rows without padding; pack the rows instead")
    query, key, value = qkv
    end = query.shape[2] - tail
    if end <= 0:
        return dense_attention(query, key, value, scale, whole=True)
    begun = query[:, :, :end], key[:, :, :end], value[:, :, :end]
    out = _attend(begun, scale, layout.between(0, end), plan, backend, None)
    return torch.cat([out, dense_tail_attention(query[:, :, end:], key, value, scale)], dim=1)


def _recent(layer: Any, plan: LayerPlan) -> RecentQueries | FixedQueries | None:
    """Where the cache layer keeps the earlier queries that decode steps need; None: it keeps none.

    In compiled graphs only static layers keep them; elsewhere their number differs from call to call.
    """
    recent = None if plan.hears == 0 else getattr(layer, "recent", None)
    return None if recent is None or (torch.compiler.is_compiling() and not recent.in_graphs) else recent


@dataclass(frozen=True)
class _Call:
    """Rows of a call that follow the same rule.

    Attributes:
        qkv: their queries, and the keys and values up to the last query.
        layout: the sequences in them.
        rule: the rule; None: attend to every key.
        steps: they are decode steps.
        heard: `(batch, num_heads, rows, head_dim)`, queries of the rows just before them, with which steps
            of a shared choice choose too; None: each step chooses by its own query alone.
    """

    qkv: tuple[Tensor, Tensor, Tensor]
    scale: float
    layout: Layout
    rule: Rule | None
    steps: bool
    heard: Tensor | None = None


def _attend_rows(call: _Call, plan: LayerPlan, backend: str, layer: Any, cached: Tensor) -> Tensor:
    """Attention of rows that follow the same rule; `cached` are the keys that the cache layer returned."""
    query, key, value = call.qkv
    q_len, kv_len = query.shape[2], key.shape[2]
    layout, sequences, rule = call.layout, call.layout.sequences, call.rule
    longest = sequences.max_seqlen_k if layout.packed else kv_len
    if rule is not None and plan.dense_len >= longest:
        rule = None
    if rule is None and _needs_table(layout, query, kv_len):
        rule = LayerConfig(q_len, 1)  # a single block: full attention with sequence bounds on the device
    backend = choose_backend(backend, query, key, value, rule)
    kept = None
    if layer is not None:
        layer.backend = backend
        kept = _cached(layer, plan, cached, layout, rule, steps=call.steps)
    if rule is None:
        if layout.spans is not None:
            return dense_packed_attention(query, key, value, call.scale, layout.spans)
        return dense_attention(query, key, value, call.scale, sequences, backend, whole=layout.whole)
    steps = call.steps and not layout.packed
    if isinstance(rule, SharedRule) and layout.whole and q_len == kv_len and not steps:
        return prompt_attention(query, key, value, sequences, rule, softmax_scale=call.scale, backend=backend)
    if steps and not torch.compiler.is_compiling():
        _warn_of_reads(rule, kept, backend)
    settings: Any = {"softmax_scale": call.scale, "backend": backend, "block_means": kept, "steps": steps}
    return attention(query, key, value, sequences, rule, **settings, heard=call.heard)[0]


def _needs_table(layout: Layout, query: Tensor, kv_len: int) -> bool:
    """Whether full attention must use the sequence table on the device instead of torch's kernels.

    This happens only in compiled graphs: for packed sequences, and for a padded prefill on a GPU, where torch
    would need a mask, which is slow.
    """
    if layout.packed:
        return layout.spans is None
    padded = not layout.whole and torch.compiler.is_compiling()
    return padded and query.shape[2] == kv_len and query.device.type != "cpu"


def _cached(
    layer: Any, plan: LayerPlan, key: Tensor, layout: Layout, rule: Rule | None, *, steps: bool
) -> Tensor | None:
    """Up-to-date block summaries from the cache layer of `key`; None if this call does not use them.

    Every call uses means. The summaries of other gates are used only by decode steps that read chosen blocks
    only. A static layer is updated in every call, so that its state is always the same and few graphs are
    compiled.
    """
    if plan.rule is None or plan.dense_len >= key.shape[2]:
        return None
    always = plan.rule.gate == "mean"
    if not (rule is not None and (steps or always)) and not layer.is_compileable:
        return None
    if not always and (plan.decode_rule is None or not reads_chosen_only(layer.backend, plan.rule)):
        return None
    # must not become a constant of a compiled graph, which would be recompiled for every prompt
    read = None if torch.compiler.is_compiling() else layout.starts
    block_size, what = plan.rule.block_size, kept_of(plan.rule)
    kept: Tensor = layer.moba_means(key, layout.sequences.kv_start, block_size, read, what)
    return kept


def _warn_of_reads(rule: Rule, kept: Tensor | None, backend: str) -> None:
    """Warns once if a decode step reads every cached key to score blocks, or hears no earlier queries."""
    if not reads_chosen_only(backend, rule):
        if rule.gate != "mean" or kept is None:
            logger.warning_once(_SPARSE_WITHOUT_KERNEL.format(backend))
    elif kept is None:
        logger.warning_once(_SHARED_WITHOUT_CACHE if isinstance(rule, SharedRule) else _SPARSE_WITHOUT_CACHE)


def _warn_of_assistance(plan: LayerPlan, q_len: int, kv_len: int) -> None:
    """Warns once if assisted generation follows a different rule than plain generation."""
    if plan.rule is not None and plan.decode_rule is None and q_len > 1 and kv_len > plan.dense_len:
        logger.warning_once(_ASSISTED)


def _check_packing(config: Any, rows: Rows, kwargs: dict[str, Any]) -> None:
    """Raises ValueError if other parts of the model mix packed documents."""
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
        raise ValueError('MoBA returns no attention weights; use attn_implementation="eager" to get them')
    if q_len > kv_len:
        raise ValueError(f"more queries ({q_len}) than keys ({kv_len})")


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Converts tensors to the autocast dtype, as torch's own attention does; no change without autocast."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta tensors have no autocast
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def register() -> None:
    """Registers the "moba" attention and mask functions with transformers, and wraps saving and loading."""
    AttentionInterface.register(NAME, moba_attention_forward)
    AttentionMaskInterface.register(NAME, moba_mask)
    watch_loads()
