"""config.json of a checkpoint: read and checked, and with MoBA turned on in it."""

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
# Some checkpoints carry this; on loading it would win over the public field.
_PRIVATE = "_attn_implementation"
# What one damaged number would turn into hours or terabytes: names of config values and the most they may be.
_LIMITS = (
    (re.compile(r".*(layers|depth)"), 1000),
    (re.compile(r".*(_size|_dim|_heads|_experts|_channels|_embeddings|_positions|_length)"), 1 << 28),
    (re.compile(r"num_labels"), 100_000),
)
_HEADS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def read_model_config(folder: Path) -> tuple[dict[str, Any], PreTrainedConfig]:
    """config.json of a checkpoint, as JSON and as the config class of its model_type.

    Raises:
        ValueError: config.json is missing, not JSON, or not a config of the model_type it names.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: {_explain_no_config(folder)}")
    values = read_json_object(path)
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{path}: names no model_type")
    try:
        adapter = find_adapter(model_type)  # an unknown one is told with the families there are
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _check_limits(path, values)

    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[model_type].from_dict(deepcopy(values))
        place_settings(config)
        _check_text(adapter, adapter.text_config(config))
    except Exception as error:  # config classes raise what they like on bad values
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a config of model_type {model_type!r} ({reason})") from error
    return values, config


def check_config(config: PreTrainedConfig, moba: MobaConfig) -> Adapter:
    """The adapter of a model; ValueError when it has none or when `moba` does not fit the model."""
    adapter = find_adapter(config.model_type)
    adapter.check(adapter.text_config(config), moba)
    return adapter


def read_settings(folder: Path, values: Mapping[str, Any], key: str | None) -> MobaConfig | None:
    """The MoBA settings in the JSON of a folder's config.json; None: there are none.

    Raises:
        ValueError: they are no MoBA settings.
    """
    nested = values.get(key) if key is not None else None
    stored = (nested if isinstance(nested, Mapping) else values).get(NAME)
    try:
        return None if stored is None else MobaConfig.from_dict(stored)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def with_moba(values: Mapping[str, Any], moba: MobaConfig, key: str | None) -> dict[str, Any]:
    """The JSON of a config with MoBA turned on, everything else as it is.

    Args:
        values: the JSON of config.json; not changed.
        moba: the settings to store.
        key: name of the nested text config, or None. Where `values` has no such entry (published flat, the
            text model's values at the top level), the settings stand at the top level too.
    """
    values = {name: value for name, value in values.items() if name != _PRIVATE}
    if key is None:
        return {**values, NAME: moba.to_dict(), "attn_implementation": NAME}
    # A plain string would reach the vision tower too; a choice made for it is kept.
    chosen = values.get("attn_implementation")
    towers = chosen if isinstance(chosen, dict) else {}
    switch = {**towers, key: NAME}
    if not values.get(key):
        return {**values, NAME: moba.to_dict(), "attn_implementation": switch}
    text = {name: value for name, value in values[key].items() if name != _PRIVATE}
    return {**values, key: {**text, NAME: moba.to_dict()}, "attn_implementation": switch}


def _check_limits(path: Path, values: Mapping[str, Any], where: str = "") -> None:
    """Raises ValueError for a number that no model has, here or in a nested config."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            _check_limits(path, value, f"{where}{name}.")
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if name in _HEADS and value < 1:
            raise ValueError(f"{path}: {where}{name} must be above 0, got {value}")
        for pattern, most in _LIMITS:
            if pattern.fullmatch(name) and not -most <= value <= most:
                raise ValueError(f"{path}: {where}{name} is {value}, more than the {most} that are allowed")


def _check_text(adapter: Adapter, text: Any) -> None:
    """Raises ValueError for sizes that no attention layer can have."""
    for name in _HEADS:
        value = getattr(text, name, None)
        if value is None:  # left to the family, or under another name
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an int above 0, got {value!r}")
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if getattr(text, "head_dim", None) is None and text.hidden_size % heads:
        raise ValueError(f"hidden_size {text.hidden_size} is no multiple of num_attention_heads {heads}")
    layer_types = getattr(text, "layer_types", None)
    if layer_types is not None and len(layer_types) != text.num_hidden_layers:
        raise ValueError(f"layer_types names {len(layer_types)} layers of {text.num_hidden_layers}")
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
        return "holds a PEFT adapter, not a model; merge it into its base model and convert that"
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"holds no config.json; to convert the GGUF file pass it itself: {folder / gguf[0]}"
    return "holds no config.json, so it is not a transformers checkpoint"
