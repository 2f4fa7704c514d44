"""Which rule an attention layer follows: resolves config and adapter to a `LayerPlan`.

`layer_plan` is traced by torch.compile. A compiled graph contains the plan as a constant and is recompiled
when the settings change, see `_resolve`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import guard_scalar
from transformers.utils import logging

from moba_hf.config import DEFAULT_PRESET, NAME, MobaConfig
from moba_hf.hf.adapter import Adapter, find_adapter
from moba_hf.op.layer_rule import Rule
from moba_hf.op.registry import Registry
from moba_hf.op.shared_rule import SharedRule

# Attribute of an attention module that turns its rule off temporarily.
SUSPENDED = "moba_suspended"
# Attribute of an attention module: number of queries at the end of a row that attend every key in training.
TRAINED_TAIL = "moba_trained_tail"

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LayerPlan:
    """What one attention layer does, resolved from its config.

    Attributes:
        rule: the MoBA rule; None: full attention, also while `moba_hf.hf.patching.suspend_moba` is on.
        stock: why the layer keeps the stock implementation; None: it does not.
        decode_rule: the rule of decode steps; None: they attend to every key.
        decode_max_len: calls with at most this many queries are decode steps, unless the cache records the
            end of the prompt.
        dense_len: sequences of at most this many tokens get full attention.
        hears: tile size, if decode steps choose with the queries of the earlier rows of their tile. A cache
            then keeps the queries of the last rows, also of those that attended to every key. 0: they do not.
    """

    rule: Rule | None
    stock: str | None
    decode_rule: Rule | None
    decode_max_len: int
    dense_len: int = 0
    hears: int = 0


def moba_config(config: Any) -> MobaConfig:
    """The MoBA settings of a text config: its `moba`, else the preset "default" (with a warning, once)."""
    return _settings_of(getattr(config, "moba", None))


def common_tile(model: Any) -> int:
    """The least common multiple of the tiles of all layers; 1 if no layer shares a choice between queries."""
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != NAME:
        return 1
    moba = moba_config(config)
    layers = int(config.num_hidden_layers)
    rules = [moba.for_layer(i, layers) for i in range(layers)]
    return math.lcm(*(rule.tile for rule in rules if isinstance(rule, SharedRule)))


def _settings_of(raw: Any) -> MobaConfig:
    """Parses `config.moba`; the preset if it is None."""
    if raw is not None:
        moba = MobaConfig.from_dict(raw)
        if moba.backend != "auto":
            raise ValueError(
                "a stored config must not name a backend, because that depends on the machine: pass it to "
                f"patch_model(model, MobaConfig(..., backend={moba.backend!r}))"
            )
        return moba
    moba = MobaConfig.from_preset(DEFAULT_PRESET)
    logger.warning_once(
        f"No `moba` settings in the model's config: using the preset {DEFAULT_PRESET!r} "
        f"({moba.in_words()}), which was measured at 8K tokens. To choose other settings, pass a MobaConfig "
        "to moba_hf.patch_model or set config.moba."
    )
    return moba


def layer_plan(module: nn.Module) -> LayerPlan:
    """The plan of an attention module, cached on the module until its `config.moba` changes."""
    config: Any = module.config
    raw = getattr(config, "moba", None)
    layer_idx: Any = module.layer_idx
    if torch.compiler.is_dynamo_compiling():
        return _resolve(config, _constant(raw), int(layer_idx), bool(getattr(module, SUSPENDED, False)))
    suspended = bool(module.__dict__.get(SUSPENDED, False))  # a module looks slowly for what it lacks
    known: tuple[Any, bool, LayerPlan] | None = module.__dict__.get("_moba_plan")
    if known is None or known[0] != raw or known[1] != suspended:
        known = (copy.deepcopy(raw), suspended, _resolve(config, raw, int(layer_idx), suspended))
        module.__dict__["_moba_plan"] = known
    return known[2]


def _constant(raw: Any) -> Any:
    """`raw` with numbers that the graph is specialised to; with `dynamic=True` they would be symbols."""
    if isinstance(raw, dict):
        return {name: _constant(value) for name, value in raw.items()}
    if isinstance(raw, (list, tuple)):
        return type(raw)([_constant(value) for value in raw])
    return guard_scalar(raw) if isinstance(raw, (int, float)) else raw


def adapter_of(model_type: str) -> Adapter:
    """`find_adapter`, for use in traced functions too."""
    adapter: Adapter = getattr(_kept, _adapter_name(model_type))
    return adapter


# Objects that compiled graphs look up by name instead of computing them, see `_resolve`.
_kept = Registry()


def _keep(kind: str, of: object, make: Callable[[], object]) -> str:
    """The name under which `_kept` stores `make()`; `repr(of)` identifies its inputs."""
    return _kept.keep(f"{kind} {of!r}", make)


def _resolve(config: Any, raw: Any, layer_idx: int, suspended: bool) -> LayerPlan:
    """The plan of layer `layer_idx`; `raw` is `config.moba`, passed so that compiled graphs depend on it.

    This function is traced, and so are the adapter's methods. Functions whose result is a constant of the
    graph may only take and return plain values (torch before 2.13 accepts no config there), so they return
    the names under which they stored their results.
    """
    adapter = adapter_of(config.model_type)
    settings = _settings(raw)
    adapter.check(config, getattr(_kept, settings))
    stock = adapter.stock_reason(config, layer_idx)
    if stock is not None and not adapter.eligible_layers(config):
        _warn_of_no_layer(config.model_type, stock)
    facts = (adapter.num_layers(config), adapter.rotary_pairs)
    plan: LayerPlan = getattr(_kept, _plan(settings, layer_idx, *facts, stock, suspended))
    return plan


@torch.compiler.assume_constant_result
def _adapter_name(model_type: str) -> str:
    adapter = find_adapter(model_type)
    return _keep("adapter", (model_type, id(adapter)), lambda: adapter)


@torch.compiler.assume_constant_result
def _settings(raw: Any) -> str:
    return _keep("settings", raw, lambda: _settings_of(raw))


@torch.compiler.assume_constant_result
def _warn_of_no_layer(model_type: str, stock: str) -> bool:
    logger.warning_once(f"No layer of this {model_type} model can use MoBA: {stock}")
    return True


@torch.compiler.assume_constant_result
def _plan(
    settings: str, layer_idx: int, num_layers: int, rotary_pairs: str, stock: str | None, suspended: bool
) -> str:
    def make() -> LayerPlan:
        moba: MobaConfig = getattr(_kept, settings)
        whole = moba.for_layer(layer_idx, num_layers)
        hears = whole.tile if isinstance(whole, SharedRule) and moba.decode == "sparse" else 0
        rule = None if suspended else whole
        if rule is not None:
            rule = dataclasses.replace(rule, rotary_pairs=rotary_pairs)
        decode_rule = rule if moba.decode == "sparse" else None
        dense_len = 0 if rule is None else rule.dense_len
        return LayerPlan(rule, stock, decode_rule, moba.decode_max_len, dense_len, hears)

    return _keep("plan", (settings, layer_idx, num_layers, rotary_pairs, stock, suspended), make)
