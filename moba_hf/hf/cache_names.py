"""The keyword for a cache: `cache` since transformers 5.24, `past_key_values` before.

Newer releases warn about the old name, and remote code may accept only the old one. So the name is taken from
the signature of the called function, or, if the signature has neither, from the transformers release.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from typing import Any

from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")
# The name in this release, used when a signature contains neither, as that of `generate`.
_NAME = next(name for name in CACHE_NAMES if name in {f.name for f in fields(BaseModelOutputWithPast)})


def cache_kwargs(call: nn.Module | Callable[..., Any], cache: Cache | None) -> dict[str, Cache | None]:
    """`cache` as the keyword argument of `call`, a model or one of its methods::

    model(ids, **cache_kwargs(model, cache))
    model.generate(ids, **cache_kwargs(model.generate, cache))
    """
    function = call.forward if isinstance(call, nn.Module) else call
    parameters = signature(function).parameters
    return {next((name for name in CACHE_NAMES if name in parameters), _NAME): cache}


def cache_of(outputs: Any) -> Cache | None:
    """The cache in the outputs of a forward or of `generate`."""
    return getattr(outputs, next((name for name in CACHE_NAMES if hasattr(outputs, name)), _NAME))


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that one of our functions was passed, under either name.

    Raises:
        ValueError: both are given.
        TypeError: it is not a cache, for example the name of one.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError(
            "cache and past_key_values are two names of the same argument: pass only one of them"
        )
    given = past_key_values if cache is None else cache
    if given is not None and not isinstance(given, Cache):
        raise TypeError(
            f"cache must be a Cache of transformers or None, got {given!r}: "
            "pass moba_hf.MobaCache(model.config)"
        )
    return given
