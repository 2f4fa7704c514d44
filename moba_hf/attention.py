"""What transformers calls: the attention function and the mask function registered as "moba".

The attention function translates once: module and config say which rule the layer follows, the compact mask
or the position ids say where each sequence lies; below, `ops` knows nothing of models.

The mask function gives a compact mask `(batch, 1, 1, kv_len)`: 0 not written yet, 1 a real token, 2 padding;
int8 from a 2-D mask, uint8 where none was given. Its shape depends on nothing but the cache, so it works for
static caches, under compile, and costs `kv_len` bytes. Where it learns of packed rows, it gives int16 of that
shape instead: 1 where a document begins.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils import logging

from moba_hf.adapter import find_adapter
from moba_hf.cache import LAYER_ATTRIBUTE
from moba_hf.config import DEFAULT_PRESET, LayerConfig, MobaConfig
from moba_hf.dense import causal_mask, dense_attention, dense_packed_attention
from moba_hf.loading import NAME as NAME
from moba_hf.loading import watch_loads
from moba_hf.ops import attention_over, batched_moba_attention, check_tensors, check_values
from moba_hf.packing import (
    DOCUMENTS,
    Packing,
    begins_in_forward,
    check_separated,
    document_begins,
    find_packing,
)
from moba_hf.sequences import RowBounds

UNWRITTEN, REAL, PADDING = 0, 1, 2
COMPACT = (torch.int8, torch.uint8)
# Attribute of an attention module that turns its rule off for a while.
SUSPENDED = "moba_suspended"
# Attribute by which a compact mask names its bounds.
_BOUNDS = "_moba_bounds"
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


@dataclass(frozen=True)
class LayerPlan:
    """What one attention layer does, resolved from its config.

    Attributes:
        rule: the MoBA rule; None: full attention, also where `moba_hf.patching.suspend_moba` says so.
        stock: why the layer keeps the stock implementation; None: it does not.
        full_len: calls of at most this many queries attend every key; 0: none do.
        max_keys: the most keys a query attends under the rule.
    """

    rule: LayerConfig | None
    stock: str | None
    full_len: int
    max_keys: int = 0


def moba_config(config: Any) -> MobaConfig:
    """The MoBA settings of a text config: its `moba`, else the preset "default", which is said once."""
    return _settings_of(getattr(config, "moba", None))


def _settings_of(raw: Any) -> MobaConfig:
    """`config.moba` read, or the preset where it is None."""
    if raw is not None:
        return MobaConfig.from_dict(raw)
    moba = MobaConfig.from_preset(DEFAULT_PRESET)
    logger.warning_once(
        f"No `moba` settings in the model's config: using the preset {DEFAULT_PRESET!r} (block_size="
        f"{moba.block_size}, topk={moba.topk}, sink_blocks={moba.sink_blocks}, local_blocks="
        f"{moba.local_blocks}), which was measured at 8K tokens. Pass a MobaConfig to "
        "moba_hf.patch_model, or set config.moba, to choose."
    )
    return moba


def layer_plan(module: nn.Module) -> LayerPlan:
    """The plan of an attention module, kept on it until its `config.moba` changes.

    A compiled graph holds the plan as a constant and is compiled again when `config.moba` changes.
    """
    config: Any = module.config
    raw = getattr(config, "moba", None)
    suspended = bool(getattr(module, SUSPENDED, False))
    layer_idx: Any = module.layer_idx
    if torch.compiler.is_dynamo_compiling():
        return _resolve(config, raw, int(layer_idx), suspended)
    known: tuple[Any, bool, LayerPlan] | None = module.__dict__.get("_moba_plan")
    if known is None or known[0] != raw or known[1] != suspended:
        known = (copy.deepcopy(raw), suspended, _resolve(config, raw, int(layer_idx), suspended))
        module.__dict__["_moba_plan"] = known
    return known[2]


class _Kept:
    """What compiled graphs look up by name instead of computing it, see `_resolve`.

    An object, not a dict: a graph that is being traced sees attributes that are set meanwhile.
    """


_kept: Any = _Kept()


def _keep(kind: str, of: object, make: Callable[[], object]) -> str:
    """The name under which `_kept` has `make()`; `repr(of)` tells what it is made of."""
    name = f"{kind} {of!r}"
    if not hasattr(_kept, name):
        setattr(_kept, name, make())
    return name


def _resolve(config: Any, raw: Any, layer_idx: int, suspended: bool) -> LayerPlan:
    """The plan of layer `layer_idx`; `raw` is `config.moba`, named so that compiled graphs depend on it.

    It is traced. Functions whose result a graph holds as constant take and give plain values only (torch
    before 2.13 takes no config there), so they give names of what they made; the adapter's are traced.
    """
    adapter = getattr(_kept, _adapter_of(config.model_type))
    settings = _settings(raw)
    adapter.check(config, getattr(_kept, settings))
    stock = adapter.stock_reason(config, layer_idx)
    if stock is not None and not adapter.eligible_layers(config):
        _warn_of_no_layer(config.model_type, stock)
    plan: LayerPlan = getattr(_kept, _plan(settings, layer_idx, adapter.num_layers(config), stock, suspended))
    return plan


@torch._dynamo.assume_constant_result
def _adapter_of(model_type: str) -> str:
    adapter = find_adapter(model_type)
    return _keep("adapter", (model_type, id(adapter)), lambda: adapter)


@torch._dynamo.assume_constant_result
def _settings(raw: Any) -> str:
    return _keep("settings", raw, lambda: _settings_of(raw))


@torch._dynamo.assume_constant_result
def _warn_of_no_layer(model_type: str, stock: str) -> bool:
    logger.warning_once(f"No layer of this {model_type} model can use MoBA: {stock}")
    return True


@torch._dynamo.assume_constant_result
def _plan(settings: str, layer_idx: int, num_layers: int, stock: str | None, suspended: bool) -> str:
    def make() -> LayerPlan:
        moba: MobaConfig = getattr(_kept, settings)
        rule = None if suspended else moba.for_layer(layer_idx, num_layers)
        full_len = moba.decode_max_len if moba.decode == "full" else 0
        return LayerPlan(rule, stock, full_len, 0 if rule is None else rule.max_keys)

    return _keep("plan", (settings, layer_idx, num_layers, stock, suspended), make)


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
        attention_mask: the compact mask of `moba_mask`, None, or a stock mask for a stock layer.

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
    batch, _, q_len, head_dim = query.shape
    kv_len = key.shape[2]
    documents = attention_mask if attention_mask is not None and attention_mask.dtype == DOCUMENTS else None
    if documents is not None:
        attention_mask = None
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    stock = plan.stock or (f"sliding window of {window}" if window else None)
    _refuse_keywords(kwargs, ("cache",) if stock is not None else tuple(_REFUSED))
    if stock is None:
        _refuse_unsupported(attention_mask, dropout, q_len, kv_len, kwargs)
    padding_given = attention_mask is not None and attention_mask.dtype != torch.uint8
    if stock is not None and attention_mask is not None and attention_mask.shape[2:] == (q_len, q_len):
        padding_given = q_len != kv_len  # a square mask itself shows what is padding, see check_separated
    packing = find_packing(
        kwargs,
        batch,
        q_len,
        kv_len,
        padding_given=padding_given,
        documents=documents,
        asker=(module.config, int(module.layer_idx)),  # type: ignore[arg-type]
    )
    if stock is not None:
        if packing is not None and not torch.compiler.is_compiling():
            check_separated(attention_mask, packing, stock)
        mask = _stock_mask(attention_mask, q_len)
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if packing is not None:
        _check_packing(module.config, kwargs)
    bounds = None if attention_mask is None else _bounds_of(attention_mask, q_len)
    means = None if packing is not None else _cached_means(plan, key, bounds, q_len)
    query, key, value = _autocast(query, key, value)
    check_tensors(query, key, value)
    means = means if means is not None and means.dtype == key.dtype else None  # of keys before autocast
    scale = head_dim**-0.5 if scaling is None else scaling
    backend = getattr(module, "moba_backend", "auto")
    return _attend(query, key, value, scale, bounds, packing, plan, backend, means), None


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


def moba_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    config: Any = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The compact mask `(batch_size, 1, 1, kv_length)`; None when nothing is padded, packed or unwritten.

    Window and chunk layers (`local_size`), custom overlays and bidirectional models get transformers' own
    dense mask. Called by transformers with keywords only, once per forward.
    """
    bidirectional = kwargs.get("allow_is_bidirectional_skip") or not getattr(config, "is_causal", True)
    stock = local_size is not None or use_vmap or bidirectional
    if not stock and mask_function not in (None, causal_mask_function) and not torch.compiler.is_compiling():
        begins = document_begins(mask_function, batch_size, kv_length, device)
        stock = begins is None or attention_mask is not None
        if not stock and begins is not None and begins.any():
            return begins[:, None, None, :].to(DOCUMENTS)
    if stock:
        if mask_function is not None:
            kwargs["mask_function"] = mask_function
        return sdpa_mask(
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
            **kwargs,
        )
    if attention_mask is None and isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length:
        if q_length < 2 or q_offset > 0 or torch.compiler.is_compiling():
            return None
        begins = begins_in_forward(batch_size, q_length)
        return None if begins is None else begins[:, None, None, :].to(DOCUMENTS)
    slot = torch.arange(kv_length, device=device) + kv_offset
    real = written = (slot < q_offset + q_length)[None].expand(batch_size, -1)
    if attention_mask is not None:
        missing = kv_offset + kv_length - attention_mask.shape[1]
        given = nn.functional.pad(attention_mask.to(torch.bool), (0, max(0, missing)))
        real = written & given[:, kv_offset : kv_offset + kv_length]
    dtype = torch.uint8 if attention_mask is None else torch.int8
    mask = (written.to(dtype) * PADDING - real.to(dtype))[:, None, None, :]
    if attention_mask is None:
        begin = torch.zeros(batch_size, dtype=torch.int64, device=device)
        first = begin + (q_offset - kv_offset)
        _keep_bounds(mask, RowBounds.of(begin, first + q_length, first, q_length))
    elif torch.compiler.is_compiling():
        _keep_bounds(mask, row_bounds(mask, q_length))
    return mask


def row_bounds(mask: Tensor, q_len: int) -> RowBounds:
    """Where each row's real tokens lie, from a compact mask.

    Raises:
        ValueError: a row whose real tokens are not contiguous (read on the CPU, see `ops.check_values`).
    """
    flat = mask[:, 0, 0]
    real = flat == REAL
    kv_start = real.int().argmax(dim=1)
    kv_end = torch.where(real.any(dim=1), flat.shape[1] - real.flip(1).int().argmax(dim=1), 0)
    if check_values(mask):
        holes = (real.sum(dim=1) != kv_end - kv_start).nonzero()
        if len(holes):
            raise ValueError(
                f"the attention mask of batch row {int(holes[0])} has holes: MoBA takes padding before and "
                "after a row's tokens, not between them"
            )
    return RowBounds.of(kv_start, kv_end, (flat != UNWRITTEN).sum(dim=1) - q_len, q_len)


def _bounds_of(mask: Tensor, q_len: int) -> RowBounds:
    """`row_bounds` of a compact mask, taken once for all layers that get the same mask."""
    known: tuple[int, RowBounds] | None = getattr(mask, _BOUNDS, None)
    if known is not None and known[0] == _version(mask) and known[1].q_len == q_len:
        return known[1]
    bounds = row_bounds(mask, q_len)
    if not torch.compiler.is_compiling():  # a graph would have to put the attribute on its input
        _keep_bounds(mask, bounds)
    return bounds


def _keep_bounds(mask: Tensor, bounds: RowBounds) -> None:
    setattr(mask, _BOUNDS, (_version(mask), bounds))


def _version(mask: Tensor) -> int:
    """Changes when `mask` is written to, as far as that can be told."""
    return 0 if torch.compiler.is_compiling() or mask.is_inference() else mask._version


def _stock_mask(mask: Tensor | None, q_len: int) -> Tensor | None:
    """A mask that the stock implementation understands: a compact one is written out."""
    if mask is None or mask.dtype not in COMPACT:
        return mask
    return causal_mask(_bounds_of(mask, q_len), 0, q_len, mask.shape[3])


def _check_packing(config: Any, kwargs: dict[str, Any]) -> None:
    """Raises ValueError when the model around the attention layers mixes packed documents."""
    given = tuple(name for name, value in kwargs.items() if value is not None)
    reason = getattr(_kept, _adapter_of(config.model_type)).packing_refusal(config, given)
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
