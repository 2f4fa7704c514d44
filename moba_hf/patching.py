"""Switching MoBA on and off in a loaded model, exactly undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moba_hf.adapter import Adapter, find_adapter
from moba_hf.attention import NAME, moba_config
from moba_hf.config import MobaConfig

# What a patched model's attribute of this name holds: (attention implementation, text config's `moba`).
_PREVIOUS = "_moba_previous"
_MISSING = object()


def patch_model(model: Any, config: MobaConfig | None = None) -> Any:
    """Turns MoBA on in `model`, in place, and returns it.

    Args:
        model: a loaded transformers model of a known family.
        config: the settings, kept as `config.moba` of the model's text config (without `backend`, which
            stays on the loaded modules). None: what `config.moba` holds, else the preset "default".

    Raises:
        ValueError: unknown architecture, settings that do not fit the model, or a model whose attention
            transformers cannot switch. The model is then as it was.
    """
    adapter, text_config = _family(model)
    moba = moba_config(text_config) if config is None else config
    if not isinstance(moba, MobaConfig):
        raise TypeError(f"config must be a MobaConfig, got {type(moba).__name__}")
    adapter.check(text_config, moba)
    previous = _state(text_config)
    text_config.moba = moba.to_dict()
    try:
        _set_implementation(model, adapter, NAME)
    except BaseException:
        _restore(model, adapter, text_config, previous)
        raise
    for _, module in adapter.attention_layers(model):
        module.moba_backend = moba.backend  # type: ignore[assignment]
    if _PREVIOUS not in model.__dict__:
        model.__dict__[_PREVIOUS] = previous
    return model


def unpatch_model(model: Any) -> Any:
    """Gives `model` back the attention implementation and `config.moba` it had before `patch_model`.

    A model that was loaded with `attn_implementation="moba"` goes to "sdpa" and keeps its `config.moba`.

    Raises:
        ValueError: the model does not run MoBA.
    """
    adapter, text_config = _family(model)
    previous = model.__dict__.pop(_PREVIOUS, None)
    if previous is None:
        if text_config._attn_implementation != NAME:
            raise ValueError(f"the model does not run MoBA but {text_config._attn_implementation!r}")
        previous = ("sdpa", getattr(text_config, "moba", _MISSING))
    _restore(model, adapter, text_config, previous)
    return model


@contextmanager
def use_moba(model: Any, config: MobaConfig | None = None) -> Iterator[Any]:
    """MoBA inside the `with` block; before and after, the model is the same, exceptions included."""
    adapter, text_config = _family(model)
    state = _state(text_config)
    outer = model.__dict__.get(_PREVIOUS)
    backends = [
        (module, module.__dict__.get("moba_backend", _MISSING))
        for _, module in adapter.attention_layers(model)
    ]
    try:
        yield patch_model(model, config)
    finally:
        _restore(model, adapter, text_config, state)
        model.__dict__.pop(_PREVIOUS, None)
        if outer is not None:
            model.__dict__[_PREVIOUS] = outer
        for module, backend in backends:
            if backend is not _MISSING:
                module.moba_backend = backend


def _family(model: Any) -> tuple[Adapter, Any]:
    """The adapter of a model and its text config."""
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} is not a transformers model: it cannot switch attention")
    adapter = find_adapter(model.config.model_type)
    return adapter, adapter.text_config(model.config)


def _state(text_config: Any) -> tuple[str, Any]:
    return text_config._attn_implementation, getattr(text_config, "moba", _MISSING)


def _restore(model: Any, adapter: Adapter, text_config: Any, state: tuple[str, Any]) -> None:
    implementation, moba = state
    if moba is not _MISSING:
        text_config.moba = moba
    elif hasattr(text_config, "moba"):
        del text_config.moba
    if text_config._attn_implementation != implementation:
        _set_implementation(model, adapter, implementation)
    for _, module in adapter.attention_layers(model):
        module.__dict__.pop("_moba_plan", None)
        module.__dict__.pop("moba_backend", None)


def _set_implementation(model: Any, adapter: Adapter, name: str) -> None:
    key = adapter.text_config_key
    nested = key is not None and hasattr(model.config, key)
    model.set_attn_implementation({key: name} if nested else name)
    text_config = adapter.text_config(model.config)
    if text_config._attn_implementation != name:  # transformers only warns
        raise ValueError(
            f"{type(model).__name__} does not let its attention implementation be set: its source defines an "
            "attention class of its own that does not use transformers' attention interface"
        )
