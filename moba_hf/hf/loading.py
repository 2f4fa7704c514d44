"""Makes MoBA stay on when transformers saves and loads a model.

A checkpoint has its MoBA settings in `config.moba`, but every load decides again which attention runs: the
argument `attn_implementation`, else the field of that name in config.json, else dense attention. transformers
does not save that field. So four methods are wrapped: `__init__`, `from_pretrained` and `save_pretrained` of
`PreTrainedModel`, and `save_pretrained` of `PreTrainedConfig`. Construction moves MoBA settings from a
vision-language config to its text config, and refuses models that are to run MoBA but cannot. Loading warns
if a model with MoBA settings runs dense attention. Saving stores the field for a model that uses MoBA, a note
that names this package, and the module that the config may name (`moba_hf.hf.remote_code`). There is no
effect without `import moba_hf`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers.utils import logging

from moba_hf.config import NAME, MobaConfig
from moba_hf.hf.adapter import find_adapter, has_adapter
from moba_hf.hf.parallel import check_tensor_parallel, tensor_parallel_ranks
from moba_hf.hf.remote_code import write_missing_module

# File in a saved folder that says which package to import, because transformers' own error does not.
RECORD = "moba_hf.json"
LOADING = (
    "This checkpoint uses MoBA (Mixture of Block Attention). transformers supports attn_implementation="
    "'moba' after 'import moba_hf' (pip install moba-hf). Without it, pass attn_implementation='sdpa' for "
    "dense attention."
)

logger = logging.get_logger(__name__)
_silent: ContextVar[bool] = ContextVar("_silent", default=False)


def runs_dense(model: Any) -> str | None:
    """The attention implementation of a model that has `config.moba` but does not use MoBA; else None."""
    config = getattr(model, "config", None)
    if config is None or not has_adapter(getattr(config, "model_type", "")):
        return None
    text = find_adapter(config.model_type).text_config(config)
    if getattr(text, "moba", None) is None or text._attn_implementation == NAME:
        return None
    return str(text._attn_implementation)


def warn_if_dense(model: Any) -> None:
    """Warns, once per implementation, if a model has `config.moba` but does not use MoBA."""
    running = None if _silent.get() else runs_dense(model)
    if running is not None:
        logger.warning_once(
            f"This checkpoint has MoBA settings (config.moba), but was loaded with attn_implementation="
            f'{running!r}, so it uses full attention. To use MoBA, pass attn_implementation="moba" to '
            "from_pretrained or call moba_hf.patch_model(model)."
        )


def auto_class(config: Any) -> Any:
    """The auto class of transformers that loads a model with this config and its vision tower, if any."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )  # slow; `inspect` needs neither

    nested = config.get_text_config() is not config
    return AutoModelForImageTextToText if nested else AutoModelForCausalLM


@contextmanager
def dense_on_purpose() -> Iterator[None]:
    """Suppresses the warning inside the `with` block."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def place_settings(config: Any) -> None:
    """Moves MoBA settings from the outer config, if they are there, to its text config, in place.

    Raises:
        ValueError: the text config has different settings.
    """
    if config is None or not has_adapter(getattr(config, "model_type", "")):
        return
    text = find_adapter(config.model_type).text_config(config)
    if text is config or getattr(config, "moba", None) is None:
        return
    if getattr(text, "moba", None) not in (None, config.moba):
        key = find_adapter(config.model_type).text_config_key
        raise ValueError(
            f"the config contains two different MoBA settings: {config.moba} outside its {key}, and "
            f"{text.moba} inside, which would be used: delete the first"
        )
    text.moba = config.moba
    del config.moba


@contextmanager
def switch_kept(model: Any) -> Iterator[None]:
    """Inside the block, a config to be saved has MoBA as `attn_implementation` only if its model uses it."""
    config = getattr(model, "config", None)
    if config is None or not has_adapter(getattr(config, "model_type", "")):
        yield
        return
    text = find_adapter(config.model_type).text_config(config)
    runs = text._attn_implementation == NAME and getattr(text, "moba", None) is not None
    held = dict(config.__dict__)
    if runs == _has_switch(config) or (runs and "attn_implementation" in held):
        yield
        return
    if runs:
        key = find_adapter(config.model_type).text_config_key
        config.attn_implementation = NAME if text is config else {key: NAME}
    else:  # training turned MoBA on, and somebody turned it off again
        del config.__dict__["attn_implementation"]
    try:
        yield
    finally:
        config.__dict__.pop("attn_implementation", None)
        if "attn_implementation" in held:
            config.attn_implementation = held["attn_implementation"]


def check_supported(model: Any) -> None:
    """Raises ValueError, before weights are read, if a model is to run MoBA and cannot.

    A model without an adapter is refused if it is a language model. Others may hold parts that MoBA supports,
    or that are not causal and keep the stock implementation.
    """
    config = model.config
    if config._attn_implementation != NAME:
        return
    if not has_adapter(config.model_type):
        alone = config.get_text_config() is config and not getattr(config, "is_encoder_decoder", False)
        if alone and model.can_generate():
            find_adapter(config.model_type)  # raises, unless the adapter is being tried
        return
    adapter = find_adapter(config.model_type)
    text = adapter.text_config(config)
    if text._attn_implementation == NAME and getattr(text, "moba", None) is not None:
        adapter.check(text, MobaConfig.from_dict(text.moba))


def _check_ranks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises ValueError, before weights are read, if the heads of a MoBA model do not fit the ranks."""
    ranks = tensor_parallel_ranks(kwargs)
    if ranks == 1:
        return
    config = kwargs.get("config")
    if config is None:
        from transformers import AutoConfig

        names = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "trust_remote_code")
        config = AutoConfig.from_pretrained(
            args[0], **{name: kwargs[name] for name in names if name in kwargs}
        )
    chosen = kwargs.get("attn_implementation") or config._attn_implementation
    if chosen == NAME or (isinstance(chosen, dict) and NAME in chosen.values()):
        check_tensor_parallel(config, ranks)


def watch_loads() -> None:
    """Wraps the construction, loading and saving of `PreTrainedModel`, and the saving of its config, once."""
    from transformers import PreTrainedConfig, PreTrainedModel

    original: Any = PreTrainedModel.__dict__["from_pretrained"].__func__
    if getattr(original, "_moba_watched", False):
        return

    construct = PreTrainedModel.__init__

    @functools.wraps(construct)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        place_settings(config)  # before the text model takes its config; also of models without a checkpoint
        construct(self, config, *args, **kwargs)
        check_supported(self)

    PreTrainedModel.__init__ = init  # type: ignore[method-assign]

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        _check_ranks(args, kwargs)
        loaded = original(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        warn_if_dense(model)
        return loaded

    from_pretrained._moba_watched = True  # type: ignore[attr-defined]
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment, method-assign]

    saves: Any = PreTrainedModel.__dict__["save_pretrained"]

    @functools.wraps(saves)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        with switch_kept(self):
            return saves(self, save_directory, *args, **kwargs)

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]

    saves_config: Any = PreTrainedConfig.__dict__["save_pretrained"]

    # Our files are written with the config, because saving a model may upload its folder at the end.
    @functools.wraps(saves_config)
    def save_config(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = saves_config(self, save_directory, *args, **kwargs)
        folder = Path(save_directory)
        if _has_switch(self) and not (folder / RECORD).exists():
            (folder / RECORD).write_text(json.dumps({"about": LOADING}, indent=2) + "\n", encoding="utf-8")
        write_missing_module(folder, self)
        return result

    PreTrainedConfig.save_pretrained = save_config  # type: ignore[method-assign]


def _has_switch(config: Any) -> bool:
    """Whether the field `attn_implementation` of a config turns MoBA on."""
    field = config.__dict__.get("attn_implementation")
    return field == NAME or (isinstance(field, dict) and NAME in field.values())
