"""Turns MoBA on and off in a loaded model; turning it off restores the exact previous state."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from moba_hf.config import NAME, MobaConfig, require_config
from moba_hf.hf.adapter import Adapter, find_adapter
from moba_hf.hf.layer_plan import SUSPENDED, moba_config
from moba_hf.op.backends import load_backend

# Attribute of attention modules that stores the state before `patch_model`. It is on the modules, because
# PEFT, torch.compile and the base model share them; it is plain data, so it survives copying and pickling.
_PREVIOUS = "_moba_previous"
# Attributes of attention modules that patching changes; not saved in checkpoints.
_ON_MODULES = ("moba_backend", SUSPENDED, _PREVIOUS)
# Field of a saved config that says which attention a plain load runs.
_SWITCH = "attn_implementation"
# The same state by id of the text config, because several models may share a config.
_BY_CONFIG: dict[int, tuple[weakref.ref[Any], _State]] = {}


@dataclass(frozen=True)
class _State:
    """What patching changes, as plain data.

    Attributes:
        implementation: the text config's attention implementation.
        settings: `(config.moba,)`; empty: the config had none.
        modules: the `_ON_MODULES` attributes of each attention module, in order.
        switch: `(config.attn_implementation,)` of the outer config, which `moba_hf.training` sets so that
            checkpoints load with MoBA; empty: the config had none.
    """

    implementation: str
    settings: tuple[Any, ...]
    modules: tuple[dict[str, Any], ...] = ()
    switch: tuple[Any, ...] = ()

    @classmethod
    def of(cls, model: Any, adapter: Adapter, text_config: Any) -> _State:
        modules = tuple(
            {name: module.__dict__[name] for name in _ON_MODULES if name in module.__dict__}
            for _, module in adapter.attention_layers(model)
        )
        held = model.config.__dict__
        switch = (held[_SWITCH],) if _SWITCH in held else ()
        return cls(text_config._attn_implementation, _settings(text_config), modules, switch)

    def restore(self, model: Any, adapter: Adapter, text_config: Any) -> None:
        if self.settings:
            text_config.moba = self.settings[0]
        elif hasattr(text_config, "moba"):
            del text_config.moba
        if text_config._attn_implementation != self.implementation:
            set_implementation(model, adapter, self.implementation)
        model.config.__dict__.pop(_SWITCH, None)
        if self.switch:
            model.config.__dict__[_SWITCH] = self.switch[0]
        modules = [module for _, module in adapter.attention_layers(model)]
        for module in modules:
            for name in ("_moba_plan", *_ON_MODULES):
                module.__dict__.pop(name, None)
        for module, attributes in zip(modules, self.modules, strict=False):
            module.__dict__.update(attributes)


def patch_model(model: Any, config: MobaConfig | None = None) -> Any:
    """Turns MoBA on in `model`, in place, and returns it.

    Models that share a config object are patched together, as with transformers' own
    `set_attn_implementation`.

    Args:
        model: a loaded transformers model of a known family; it may be wrapped by PEFT or `torch.compile`.
        config: the settings, stored as `config.moba` of the model's text config (without `backend`, which
            is stored on the modules). None: the current `config.moba`, else the preset "default".

    Raises:
        ValueError: unknown architecture or backend, settings that do not fit the model, or a model whose
            attention transformers cannot switch. The model is then unchanged.
    """
    adapter, text_config = _family(model)
    moba = moba_config(text_config) if config is None else config
    require_config("config", moba)
    adapter.check(text_config, moba)
    if moba.backend != "auto":
        load_backend(moba.backend)
    before = _State.of(model, adapter, text_config)
    text_config.moba = moba.to_dict()
    try:
        set_implementation(model, adapter, NAME)
    except BaseException:
        before.restore(model, adapter, text_config)
        raise
    for _, module in adapter.attention_layers(model):
        module.moba_backend = moba.backend  # type: ignore[assignment]
        module.__dict__.pop(SUSPENDED, None)
    _keep_previous(model, adapter, text_config, _previous(model, adapter, text_config) or before)
    return model


def unpatch_model(model: Any) -> Any:
    """Restores the attention implementation and `config.moba` that `model` had before `patch_model`.

    `model` may be the patched model, its base model, or either one wrapped by PEFT or `torch.compile` before
    or after patching. A model that was loaded with `attn_implementation="moba"` changes to "sdpa" and keeps
    its `config.moba`.

    Raises:
        ValueError: the model does not use MoBA.
    """
    adapter, text_config = _family(model)
    before = _previous(model, adapter, text_config)
    if before is None:
        if text_config._attn_implementation != NAME:
            raise ValueError(f"the model does not use MoBA but {text_config._attn_implementation!r}")
        before = _State("sdpa", _settings(text_config))
    _keep_previous(model, adapter, text_config, None)
    before.restore(model, adapter, text_config)
    return model


@dataclass(eq=False)
class _Use:
    """An active `use_moba`.

    Attributes:
        text_config: that of its model; uses with the same one change the same models.
        restore: what its end has to do, in order.
    """

    text_config: Any
    restore: list[Callable[[], None]]


# All active uses of `use_moba`, in the order in which they began.
_ACTIVE: list[_Use] = []


@contextmanager
def use_moba(model: Any, config: MobaConfig | None = None) -> Iterator[Any]:
    """Turns MoBA on inside the `with` block and restores the model afterwards, also after an exception.

    Several uses on the same model may end in any order, as those in generators do: the model has the settings
    of the one that began last, and is restored when all have ended.
    """
    adapter, text_config = _family(model)
    before, outer = _State.of(model, adapter, text_config), _previous_of_config(text_config)

    def restore() -> None:
        before.restore(model, adapter, text_config)
        _keep_for_config(text_config, outer)

    use = _Use(text_config, [restore])
    _ACTIVE.append(use)
    try:
        yield patch_model(model, config)
    finally:
        later = _ACTIVE[_ACTIVE.index(use) + 1 :]
        _ACTIVE.remove(use)
        heir = next((other for other in later if other.text_config is text_config), None)
        if heir is not None:  # `before` is what the model returns to when that one ends too
            heir.restore += use.restore
        else:
            for step in use.restore:
                step()


def _settings(text_config: Any) -> tuple[Any, ...]:
    return (text_config.moba,) if hasattr(text_config, "moba") else ()


def _previous(model: Any, adapter: Adapter, text_config: Any) -> _State | None:
    """The state before `patch_model`, from the model's modules or from a model with the same config."""
    for _, module in adapter.attention_layers(model):
        if _PREVIOUS in module.__dict__:
            return cast(_State, module.__dict__[_PREVIOUS])
    return _previous_of_config(text_config)


def _previous_of_config(text_config: Any) -> _State | None:
    """The state before `patch_model` of a model with this config."""
    reference, state = _BY_CONFIG.get(id(text_config), (None, None))
    return state if reference is not None and reference() is text_config else None


def _keep_previous(model: Any, adapter: Adapter, text_config: Any, state: _State | None) -> None:
    """Stores `state` on every attention module and for the config; None: deletes it."""
    for _, module in adapter.attention_layers(model):
        module.__dict__.pop(_PREVIOUS, None)
        if state is not None:
            module.__dict__[_PREVIOUS] = state
    _keep_for_config(text_config, state)


def _keep_for_config(text_config: Any, state: _State | None) -> None:
    key = id(text_config)
    _BY_CONFIG.pop(key, None)
    if state is not None:
        _BY_CONFIG[key] = (weakref.ref(text_config, lambda _: _BY_CONFIG.pop(key, None)), state)


def suspend_moba(model: Any, suspended: bool = True) -> Any:
    """Switches every MoBA layer of `model` to full attention, or back to its rule, in place; returns `model`.

    The attention implementation and `config.moba` do not change, so a checkpoint saved meanwhile is a MoBA
    checkpoint, and packed and padded batches are handled as before.

    Raises:
        ValueError: the model does not use MoBA.
    """
    adapter, text_config = _family(model)
    if text_config._attn_implementation != NAME:
        raise ValueError(f"the model does not use MoBA but {text_config._attn_implementation!r}")
    for _, module in adapter.attention_layers(model):
        if suspended:
            setattr(module, SUSPENDED, True)
        else:
            module.__dict__.pop(SUSPENDED, None)
    return model


def _family(model: Any) -> tuple[Adapter, Any]:
    """The adapter and the text config of a model."""
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} is not a transformers model: it cannot switch attention")
    adapter = find_adapter(model.config.model_type)
    return adapter, adapter.text_config(model.config)


def set_implementation(model: Any, adapter: Adapter, name: str) -> None:
    """Sets the attention implementation of the text model of `model` to `name`; vision towers keep theirs.

    Raises:
        ValueError: transformers cannot set it for this model.
    """
    key = adapter.nested_key(model.config)
    model.set_attn_implementation(name if key is None else {key: name})
    text_config = adapter.text_config(model.config)
    if text_config._attn_implementation != name:  # transformers only warns
        raise ValueError(
            f"the attention implementation of {type(model).__name__} cannot be set: its source defines an "
            "attention class that does not use transformers' attention interface"
        )
