"""Notices when transformers loads a MoBA checkpoint so that it would run dense attention.

A checkpoint says with `config.moba` that its model was made for MoBA, but which attention runs is decided at
each load: by the argument `attn_implementation`, else by the field of that name in config.json, else it is
dense. `from_pretrained` of transformers' models is therefore wrapped: it does and returns what it did, and
warns where the two disagree. Without `import moba_hf` nobody can notice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging

from moba_hf.config import NAME
from moba_hf.hf.adapter import find_adapter, has_adapter
from moba_hf.hf.parallel import check_tensor_parallel, tensor_parallel_ranks

logger = logging.get_logger(__name__)
_silent = False


def runs_dense(model: Any) -> str | None:
    """The attention implementation of a model that has `config.moba` but does not run it; else None."""
    config = getattr(model, "config", None)
    if config is None or not has_adapter(getattr(config, "model_type", "")):
        return None
    text = find_adapter(config.model_type).text_config(config)
    if getattr(text, "moba", None) is None or text._attn_implementation == NAME:
        return None
    return str(text._attn_implementation)


def warn_if_dense(model: Any) -> None:
    """Warns, once per implementation, about a model that has `config.moba` but does not run it."""
    running = None if _silent else runs_dense(model)
    if running is not None:
        logger.warning_once(
            f"This checkpoint has MoBA settings (config.moba), but was loaded with attn_implementation="
            f'{running!r}, so it runs full attention. Pass attn_implementation="moba" to from_pretrained, or '
            "call moba_hf.patch_model(model), to run it as it was made."
        )


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model of `config`, with its other towers if it has any."""
    nested = config.get_text_config() is not config
    return AutoModelForImageTextToText if nested else AutoModelForCausalLM


@contextmanager
def dense_on_purpose() -> Iterator[None]:
    """No warning inside the `with` block."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


def _check_ranks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses to spread a MoBA model over ranks that its heads do not fit, before weights are read."""
    ranks = tensor_parallel_ranks(kwargs)
    if ranks == 1:
        return
    config = kwargs.get("config")
    if config is None:
        names = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "trust_remote_code")
        config = AutoConfig.from_pretrained(
            args[0], **{name: kwargs[name] for name in names if name in kwargs}
        )
    chosen = kwargs.get("attn_implementation") or config._attn_implementation
    if chosen == NAME or (isinstance(chosen, dict) and NAME in chosen.values()):
        check_tensor_parallel(config, ranks)


def watch_loads() -> None:
    """Wraps `PreTrainedModel.from_pretrained`, once."""
    original: Any = PreTrainedModel.__dict__["from_pretrained"].__func__
    if getattr(original, "_moba_watched", False):
        return

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        _check_ranks(args, kwargs)
        loaded = original(cls, *args, **kwargs)
        warn_if_dense(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    from_pretrained._moba_watched = True  # type: ignore[attr-defined]
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment, method-assign]
