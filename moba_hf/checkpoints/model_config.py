"""Reads and checks the config.json of a checkpoint, and turns MoBA on in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moba_hf.checkpoints.safetensors_files import read_json_object
from moba_hf.config import NAME, MobaConfig
from moba_hf.hf.adapter import Adapter, find_adapter
from moba_hf.hf.loading import place_settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG = "config.json"
# Some checkpoints contain this field; when loaded, it would override the public one.
_PRIVATE = "_attn_implementation"
# Upper limits by name of the config value: one damaged number could otherwise cost hours or terabytes.
_LIMITS = (
    (re.compile(r".*(layers|depth)"), 1000),
    (re.compile(r".*(_size|_dim|_heads|_experts|_channels|_embeddings|_positions|_length)"), 1 << 28),
    (re.compile(r"num_labels"), 100_000),
)
_HEADS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def read_model_config(folder: Path) -> tuple[dict[str, Any], PreTrainedConfig]:
    """The config.json of a checkpoint, as JSON and as an instance of its config class.

    Raises:
        ValueError: config.json is missing, not JSON, or not a config of the model_type it names.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: {_explain_no_config(folder)}")
    values = read_json_object(path)
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{path}: has no model_type")
    try:
        adapter = find_adapter(model_type)  # for an unknown one, the message lists the supported families
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _check_limits(path, values)

    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[model_type].from_dict(deepcopy(values))
        place_settings(config)
        _check_text(adapter, adapter.text_config(config))
    except Exception as error:  # config classes may raise anything for bad values
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a config of model_type {model_type!r} ({reason})") from error
    return values, config


def check_config(config: PreTrainedConfig, moba: MobaConfig) -> Adapter:
    """The adapter for a model. Raises ValueError if there is none or if `moba` does not fit the model."""
    adapter = find_adapter(config.model_type)
    adapter.check(adapter.text_config(config), moba)
    return adapter


def read_settings(folder: Path, values: Mapping[str, Any], key: str | None) -> MobaConfig | None:
    """The MoBA settings in the JSON of a folder's config.json, or None.

    Raises:
        ValueError: the settings are invalid.
    """
    nested = values.get(key) if key is not None else None
    stored = (nested if isinstance(nested, Mapping) else values).get(NAME)
    try:
        return None if stored is None else MobaConfig.from_dict(stored)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def with_moba(values: Mapping[str, Any], moba: MobaConfig, key: str | None) -> dict[str, Any]:
    """The JSON of a config with MoBA turned on and everything else unchanged.

    Args:
        values: the JSON of config.json; it is not changed.
        moba: the settings to store.
        key: name of the nested text config, or None. If `values` has no such entry (some checkpoints have the
            text model's values at the top level), the settings go to the top level too.
    """
    values = {name: value for name, value in values.items() if name != _PRIVATE}
    if key is None:
        return {**values, NAME: moba.to_dict(), "attn_implementation": NAME}
    # A plain string would apply to the vision tower too. A choice already made for that tower is kept.
    chosen = values.get("attn_implementation")
    towers = chosen if isinstance(chosen, dict) else {}
    switch = {**towers, key: NAME}
    if not values.get(key):
        return {**values, NAME: moba.to_dict(), "attn_implementation": switch}
    text = {name: value for name, value in values[key].items() if name != _PRIVATE}
    values.pop(NAME, None)  # settings at the top level would contradict those of the text config
    return {**values, key: {**text, NAME: moba.to_dict()}, "attn_implementation": switch}


def _check_limits(path: Path, values: Mapping[str, Any], where: str = "") -> None:
    """Raises ValueError for an impossible number, here or in a nested config."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            _check_limits(path, value, f"{where}{name}.")
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if name in _HEADS and value < 1:
            raise ValueError(f"{path}: {where}{name} must be above 0, got {value}")
        for pattern, most in _LIMITS:
            if pattern.fullmatch(name) and not -most <= value <= most:
                raise ValueError(f"{path}: {where}{name} is {value}, beyond the limit of {most}")


def _check_text(adapter: Adapter, text: Any) -> None:
    """Raises ValueError for impossible sizes of attention layers."""
    for name in _HEADS:
        value = getattr(text, name, None)
        if value is None:  # the family's default, or stored under another name
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an int above 0, got {value!r}")
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if getattr(text, "head_dim", None) is None and text.hidden_size % heads:
        raise ValueError(f"hidden_size {text.hidden_size} is not a multiple of num_attention_heads {heads}")
    layer_types = getattr(text, "layer_types", None)
    if layer_types is not None and len(layer_types) != text.num_hidden_layers:
        raise ValueError(f"layer_types has {len(layer_types)} entries for {text.num_hidden_layers} layers")
    window = getattr(text, "sliding_window", None)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"sliding_window must be an int above 0, got {window!r}")
    dtype = getattr(text, "dtype", None)
    if dtype is not None and str(dtype).removeprefix("torch.") not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    for layer in range(text.num_hidden_layers):
        adapter.stock_reason(text, layer)


def _explain_no_config(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return "contains a PEFT adapter, not a model; merge it into its base model and convert that"
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"contains no config.json; to convert the GGUF file, pass its path: {folder / gguf[0]}"
    return "contains no config.json, so it is not a transformers checkpoint"
