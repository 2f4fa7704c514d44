"""`use_moba_cache`: `generate` builds MoBA's cache layers by default."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any, ClassVar

import transformers
from transformers import GenerationMixin, cache_utils
from transformers.cache_utils import Cache

from moba_hf.config import NAME
from moba_hf.hf.dynamic_layer import MobaLayer
from moba_hf.hf.static_layer import MobaStaticLayer

_FULL = "full_attention"
# The private method of GenerationMixin that creates the cache, and what to do if it has changed.
_PREPARE = "_prepare_cache_for_generation"
_WRITTEN_FOR = (
    f"this moba_hf was written for transformers 5.17 to 5.24, but {transformers.__version__} is installed: "
    "pass MobaCache(model.config, max_cache_len=prompt + new tokens) to generate instead"
)


class _Defaults:
    """The defaults of transformers that `use_moba_cache` replaces; nested uses install them only once."""

    _TABLES = (
        (cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, MobaLayer),
        (cache_utils.STATIC_LAYER_TYPE_MAPPING, MobaStaticLayer),
    )
    _previous: ClassVar[tuple[Any, ...]] = ()
    _ours: ClassVar[Any] = None

    @classmethod
    def install(cls) -> None:
        prepare = getattr(GenerationMixin, _PREPARE, None)
        if prepare is None:
            raise RuntimeError(f"GenerationMixin no longer has {_PREPARE}; {_WRITTEN_FOR}")
        cls._ours = _with_reserve(prepare)
        cls._previous = (prepare, *(table[_FULL] for table, _ in cls._TABLES))
        setattr(GenerationMixin, _PREPARE, cls._ours)
        for table, layer in cls._TABLES:
            table[_FULL] = layer

    @classmethod
    def remove(cls) -> None:
        """Restores the previous defaults, except those that somebody else has replaced in the meantime."""
        prepare, *layers = cls._previous
        if getattr(GenerationMixin, _PREPARE, None) is cls._ours:
            setattr(GenerationMixin, _PREPARE, prepare)
        for (table, ours), layer in zip(cls._TABLES, layers, strict=True):
            if table[_FULL] is ours:
                table[_FULL] = layer


# All active uses of `use_moba_cache`.
_ACTIVE: list[use_moba_cache] = []


class use_moba_cache:
    """Makes `generate` build MoBA cache layers by default, for every model in this process.

    Called as a function, it stays on until `undo()`; as a context manager, until the block ends. The previous
    default returns when the last use has ended, in whatever order they end::

        moba_hf.use_moba_cache()
        with moba_hf.use_moba_cache():
            model.generate(...)

    Dynamic caches are allocated for the longest text that the call may produce.

    Raises:
        RuntimeError: `generate` creates its cache differently in this release of transformers.
    """

    def __init__(self) -> None:
        if not _ACTIVE:
            _Defaults.install()
        _ACTIVE.append(self)

    def undo(self) -> None:
        """Ends this use; the last one to end restores the previous default."""
        if self in _ACTIVE:
            _ACTIVE.remove(self)
            if not _ACTIVE:
                _Defaults.remove()

    def __enter__(self) -> use_moba_cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _caches(model_kwargs: dict[str, Any]) -> list[Cache]:
    """The caches among a model's arguments, whatever their names are in this release."""
    return [value for value in model_kwargs.values() if isinstance(value, Cache)]


def _runs_moba(model: Any) -> bool:
    return model.config.get_text_config(decoder=True)._attn_implementation == NAME


def _with_reserve(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `prepare` so that the layers of the cache that it creates know how many slots the call needs.

    No public hook knows both the cache that `generate` creates and the maximum length that it computes.
    """
    signature = inspect.signature(prepare)
    missing = {"self", "generation_config", "model_kwargs", "max_cache_length"} - set(signature.parameters)
    if missing:
        raise RuntimeError(
            f"GenerationMixin.{_PREPARE} no longer takes {', '.join(sorted(missing))}; {_WRITTEN_FOR}"
        )

    @wraps(prepare)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not _ACTIVE:  # another wrapper still calls this one
            return prepare(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        model_kwargs, length = given["model_kwargs"], int(given["max_cache_length"])
        before = _caches(model_kwargs)
        result = prepare(*args, **kwargs)
        caches = _caches(model_kwargs)
        if not caches and given["generation_config"].use_cache and _runs_moba(given["self"]):
            raise RuntimeError(
                f"use_moba_cache() cannot find the cache that generate created; {_WRITTEN_FOR}"
            )
        for cache in caches:
            if not any(cache is other for other in before):
                for layer in cache.layers:
                    if isinstance(layer, MobaLayer):
                        layer.reserve = length
        return result

    return wrapped
