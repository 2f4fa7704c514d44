"""Cache layers that write into preallocated buffers and keep the means of complete blocks.

The attention function finds a layer through the key tensor that `update` returns: an attribute of it, since
transformers passes no cache on. Where the attribute is lost, the means are taken anew from the keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import GenerationMixin, cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from moba_hf.config import NAME, MobaConfig
from moba_hf.hf.places import Prompt
from moba_hf.op.backends import CacheKernels, load_backend
from moba_hf.op.block_means import MEANS, BlockMeans, writable
from moba_hf.op.gates import Kept
from moba_hf.op.numerics import check_int

# Attribute by which a key tensor names the cache layer that it came from.
LAYER_ATTRIBUTE = "moba_layer"
# Slots that a buffer grows by at least; beyond eight times as many, it grows by an eighth.
_MIN_GROWTH = 64
_FULL = "full_attention"
# The method of GenerationMixin that makes the cache, private, and what to do when it has changed.
_PREPARE = "_prepare_cache_for_generation"
_WRITTEN_FOR = (
    f"this moba_hf was written for transformers 5.17 to 5.24, {transformers.__version__} is installed: pass "
    "MobaCache(model.config, max_cache_len=prompt + new tokens) to generate instead"
)


class _OrderedMoves:
    """Orders what an offloading cache copies from two streams: it offloads on one and prefetches on another.

    Nothing in transformers makes the prefetch wait. So it could read host memory before the copy to it has
    ended, and write to device memory whose freed tensor queued kernels still read.
    """

    device: Any
    _work: torch.cuda.Stream | None = None

    def _begin_move(self) -> None:
        """Called on the stream that computes, before a copy to the CPU is queued."""
        if torch.device(self.device).type == "cuda":
            self._work = torch.cuda.current_stream(self.device)

    def _follow_work(self) -> None:
        """Makes the current stream, on which the layer comes back, wait for the work queued so far."""
        if self._work is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._work)

    def _end_moves(self) -> None:
        """Waits for the copies in flight, before rows are changed wherever they lie."""
        if self._work is not None:
            torch.cuda.synchronize(self.device)


class MobaLayer(_OrderedMoves, DynamicLayer):
    """A dynamic cache layer: a decode step writes one slot and neither copies nor reads the others.

    Keys and values lie in the first slots of larger buffers, which grow by an eighth when they are full.

    Args:
        max_cache_len: slots to allocate at first; 0: as needed.

    Attributes:
        backend: the backend that the attention function chose for these keys; torch's own operators until
            then.
        prompt: where the prompt lies that `prefill` read; None: nobody closed the cache.
        reading: `prefill` is at work.
        assisted: assisted generation began on the empty layer.
    """

    prompt: Prompt | None = None
    reading = False
    assisted = False

    def __init__(self, max_cache_len: int = 0, **kwargs: Any):
        self._buffers: list[Tensor] | None = None
        self._length = 0
        self._assist_from: int | None = None
        self.reserve = max_cache_len
        self.backend = "portable"
        self.block_means = BlockMeans()
        super().__init__(**kwargs)

    @property
    def keys(self) -> Tensor | None:
        """Cached keys `(batch, num_kv_heads, length, head_dim)`, a view."""
        return None if self._buffers is None else self._buffers[0][:, :, : self._length]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._assign(0, value)

    @property
    def values(self) -> Tensor | None:
        """Cached values `(batch, num_kv_heads, length, v_dim)`, a view."""
        return None if self._buffers is None else self._buffers[1][:, :, : self._length]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._assign(1, value)

    def _assign(self, which: int, value: Tensor | None) -> None:
        """Handles an assignment from outside: the tensor becomes the buffer, and the means are dropped."""
        if value is None:
            self._buffers, self._length = None, 0
        else:
            self._buffers = self._buffers or [value, value]
            self._buffers[which] = value
            self._length = value.shape[-2] if value.dim() > 1 else 0
        self.block_means.forget(self._length)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._length = 0
        self._buffers = [
            x.new_empty((*x.shape[:2], self.reserve, x.shape[3])) for x in (key_states, value_states)
        ]
        self.block_means.forget(0)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends `(batch, num_kv_heads, new, dim)` states; returns views of all cached keys and values."""
        count = key_states.shape[2]
        self._check_assisted(count)
        if not self.is_initialized or (self._length == 0 and not self._fits(key_states, value_states)):
            self.lazy_initialization(key_states, value_states)
        assert self._buffers is not None
        end = self._length + count
        states = (key_states, value_states)
        self._check_shapes(*states)
        self._widen(*states)
        if _tracked(*states, *self._buffers):
            self._buffers = [
                torch.cat([old[:, :, : self._length], new], dim=2)
                for old, new in zip(self._buffers, states, strict=True)
            ]
        else:
            if end > self._buffers[0].shape[2]:
                self._grow(end + max(_MIN_GROWTH, end // 8))
            self._buffers = [writable(x) for x in self._buffers]
            for buffer, new in zip(self._buffers, states, strict=True):
                buffer[:, :, self._length : end] = new
        self._length = end
        self.block_means.appended(count)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, values

    def _fits(self, *states: Tensor) -> bool:
        """Whether empty buffers can take states like these."""
        assert self._buffers is not None
        return all(
            (x.shape[:2], x.shape[3], x.dtype, x.device) == (b.shape[:2], b.shape[3], b.dtype, b.device)
            for x, b in zip(states, self._buffers, strict=True)
        )

    def _check_shapes(self, *states: Tensor) -> None:
        """Raises ValueError unless states have the rows, heads and dims of the buffers."""
        assert self._buffers is not None
        for x, buffer in zip(states, self._buffers, strict=True):
            if (x.shape[:2], x.shape[3]) != (buffer.shape[:2], buffer.shape[3]):
                held, given = ((*y.shape[:2], y.shape[3]) for y in (buffer, x))
                raise ValueError(
                    f"the cache holds states of (batch, heads, dim) {held}, got {given}: reset() it for "
                    "other prompts; for beams or several sequences of one prefilled prompt, repeat it first "
                    "by batch_repeat_interleave(count)"
                )

    def _widen(self, *states: Tensor) -> None:
        """Takes the buffers to the dtype that they and the states promote to, as after autocast."""
        assert self._buffers is not None
        for i, x in enumerate(states):
            dtype = torch.promote_types(self._buffers[i].dtype, x.dtype)
            if dtype != self._buffers[i].dtype:
                self._buffers[i] = self._buffers[i].to(dtype)
                self.block_means.forget(self._length)

    def _grow(self, capacity: int) -> None:
        assert self._buffers is not None
        for i, old in enumerate(self._buffers):
            new = old.new_empty((*old.shape[:2], capacity, old.shape[3]))
            new[:, :, : self._length] = old[:, :, : self._length]
            self._buffers[i] = new

    def moba_means(
        self,
        keys: Tensor,
        kv_start: Tensor | None,
        block_size: int,
        starts_read: tuple[int, ...] | None = None,
        kept: Kept = MEANS,
    ) -> Tensor:
        """What is kept of complete blocks, up to date; `keys` is what `update` returned. See `BlockMeans`."""
        assert self._buffers is not None
        settings: tuple[Any, ...] = (kv_start, block_size, self.backend, starts_read, kept)
        return self.block_means.bring_up(keys.detach(), self._length, self._buffers[0].shape[2], *settings)

    def get_seq_length(self) -> int:
        return self._length

    def reset(self) -> None:
        """Empties the layer and opens it; its buffers stay for the next prompt."""
        self._length, self._assist_from = 0, None
        self.prompt, self.assisted = None, False
        self.block_means.forget(0)

    @property
    def at_prompt_end(self) -> bool:
        """Whether the layer holds what one `prefill` read from its first token on, and no more."""
        prompt = self.prompt
        return prompt is not None and prompt.begin == 0 and self._length == prompt.end

    def rewind(self) -> None:
        """Empties the layer, but where the prompt ends stays known: the same rows are read once more."""
        prompt = self.prompt
        self.reset()
        self.prompt = prompt

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: a positive number, as in transformers' dynamic cache.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number, the tokens to remove from the end, got {tokens_to_remove}"
            )
        self._assist_from = None  # assisted generation appends first; who crops at once appends no prompt
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        removed = min(-tokens_to_remove, self._length)
        self._length -= removed
        self.block_means.cropped(removed, self._length)

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies a selection of rows; only the slots in use are moved."""
        if self._buffers is None or self._length == 0:
            return
        self._end_moves()
        capacity = self._buffers[0].shape[2]
        for i, old in enumerate(self._buffers):
            rows = change(old[:, :, : self._length])
            new = rows.new_empty((*rows.shape[:2], capacity, rows.shape[3]))
            new[:, :, : self._length] = rows
            self._buffers[i] = new
        self.block_means.map_rows(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda x: x[indices.to(x.device) if isinstance(indices, Tensor) else indices])

    def offload(self) -> None:
        """Moves keys and values to the CPU; the means stay where they are used."""
        if self._buffers is not None:
            self._begin_move()
            self._buffers = [x.to("cpu", non_blocking=True) for x in self._buffers]

    def prefetch(self) -> None:
        if self._buffers is not None:
            self._follow_work()
            self._buffers = [x.to(self.device, non_blocking=True) for x in self._buffers]

    def activate_past_recording(self) -> None:
        """Called when tokens may be taken back: when assisted generation begins, or after a first call."""
        self._assist_from = self._length or None
        self.assisted = self._length == 0 and self.prompt is None

    def _check_assisted(self, count: int) -> None:
        """Raises when assisted generation appends a whole prompt to a cache that already holds its start."""
        filled, self._assist_from = self._assist_from, None
        if filled is not None and count > 1:
            raise ValueError(
                f"assisted and prompt-lookup generation would append the whole prompt to the {filled} tokens "
                "that this cache holds: pass a new or reset cache, or one that moba_hf.prefill has just read "
                "the prompt into, or generate without assistance"
            )


def _tracked(*tensors: Tensor) -> bool:
    """Whether autograd watches what is done with them."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class MobaStaticLayer(_OrderedMoves, StaticLayer):
    """A static cache layer with means of complete blocks, for `torch.compile` and CUDA graphs.

    Args:
        max_cache_len: slots of the buffers.
        block_size: tokens in a block; None: taken from the first call.

    Attributes:
        backend, prompt, reading: as in `MobaLayer`.
    """

    prompt: Prompt | None = None
    reading = False
    assisted = False

    def __init__(self, max_cache_len: int, block_size: int | None = None, **kwargs: Any):
        super().__init__(max_cache_len=max_cache_len, **kwargs)
        self.backend = "portable"
        self.block_means = BlockMeans(block_size, static=True)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self.block_means.block_size is not None:
            assert self.keys is not None
            self.block_means.allocate(self.keys, self.block_means.block_size, self.max_cache_len)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        kernels = self._kernels_for(key_states, value_states)
        if kernels is not None:
            keys, values = self.keys, self.values
            assert keys is not None
            assert values is not None
            kernels.append(keys, values, self.cumulative_length, key_states, value_states)
        else:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
        # calls that take no means count once: what is compiled must not see a number that keeps rising
        means = self.block_means
        means.behind = self.max_cache_len if means.behind else key_states.shape[2]
        keys = keys.view(keys.shape)  # a new tensor: the attribute must not tie the buffer to its own layer
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, values

    def _kernels_for(self, *states: Tensor) -> CacheKernels | None:
        """Kernels that append so few rows at once; under compile torch's own operators are fused."""
        if not self.is_initialized or torch.compiler.is_compiling() or _tracked(*states):
            return None
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        fits = all(
            (x.shape[:2], x.shape[3], x.dtype, x.device) == (b.shape[:2], b.shape[3], b.dtype, b.device)
            for x, b in zip(states, (keys, values), strict=True)
        )
        kernels = load_backend(self.backend).cache if fits else None
        if kernels is None or not 0 < states[0][..., 0].numel() <= kernels.max_append_rows:
            return None
        return kernels

    def moba_means(
        self,
        keys: Tensor,
        kv_start: Tensor | None,
        block_size: int,
        starts_read: tuple[int, ...] | None = None,
        kept: Kept = MEANS,
    ) -> Tensor:
        """What is kept of complete blocks, up to date; `keys` is what `update` returned. See `BlockMeans`."""
        settings: tuple[Any, ...] = (kv_start, block_size, self.backend, starts_read, kept)
        return self.block_means.bring_up(keys.detach(), self.cumulative_length, self.max_cache_len, *settings)

    def activate_past_recording(self) -> None:
        """Called at the start of assisted generation, which takes tokens back: a static layer cannot."""
        raise ValueError(
            "assisted and prompt-lookup generation need a dynamic cache, this one is static: pass "
            "MobaCache(model.config), or generate without assistance"
        )

    def reset(self) -> None:
        super().reset()
        self.prompt = None
        self.block_means.forget(0)

    def offload(self) -> None:
        if self.is_initialized:
            self._begin_move()
        super().offload()

    def prefetch(self) -> None:
        self._follow_work()
        super().prefetch()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._end_moves()
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        if self.is_initialized:
            self.block_means.map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))


class MobaCache(Cache):
    """A cache for models that run MoBA; does what transformers' dynamic (static) cache does.

    Full-attention layers keep their keys and values in preallocated buffers, beside the means (or what else
    the rule needs) of complete blocks, and know where the prompt that `prefill` read ends; other layer types
    (sliding, linear) are transformers' own.

    Args:
        config: the model's config.
        max_cache_len: slots to allocate, at least 1: prompt + new tokens, where known. A dynamic cache grows
            beyond it, and without it, by an eighth at a time; a static cache needs it.
        static: fixed shapes, for `torch.compile` and CUDA graphs.
        offloading: keep layers on the CPU while they are not used (needs a GPU).
        offload_only_non_sliding: leave sliding layers where they are.

    Raises:
        ValueError: a static cache without `max_cache_len`, one below 1, offloading without a CUDA device.
        TypeError: `max_cache_len` not an int.
    """

    def __init__(
        self,
        config: Any,
        *,
        max_cache_len: int | None = None,
        static: bool = False,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
    ):
        if static and max_cache_len is None:
            raise ValueError("a static MobaCache needs max_cache_len: prompt length + max_new_tokens")
        if max_cache_len is not None:
            check_int("max_cache_len", max_cache_len, minimum=1)
        if offloading and not torch.cuda.is_available():
            raise ValueError(
                "offloading moves layers between a CUDA device and the CPU: there is no such device"
            )
        size = max_cache_len or 0
        text_config = config.get_text_config(decoder=True)
        stock: Cache = DynamicCache(config=text_config)
        if static:
            stock = StaticCache(config=text_config, max_cache_len=size)
        layers: list[Any] = []
        for index, layer in enumerate(stock.layers):
            if type(layer) in (StaticLayer, MobaStaticLayer):
                layer = MobaStaticLayer(size, block_size=_block_size(text_config, index, size))
            elif type(layer) in (DynamicLayer, MobaLayer):
                layer = MobaLayer(size)
            layers.append(layer)
        super().__init__(
            layers=layers, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding
        )

    def activate_past_recording(self) -> None:
        """Called when tokens may be taken back: at the start of assisted generation, or after a first call.

        Assisted generation gives the whole prompt to its first call, whatever a cache holds. So a cache that
        `prefill` has just filled is emptied for it and remembers where the prompt ends.
        """
        ours = [layer for layer in self.layers if isinstance(layer, MobaLayer)]
        if ours and all(layer.at_prompt_end for layer in ours):
            for layer in self.layers:
                layer.rewind() if isinstance(layer, MobaLayer) else layer.reset()
        super().activate_past_recording()


def _block_size(text_config: Any, layer_idx: int, capacity: int) -> int | None:
    """The block size of a layer whose blocks are chosen, as far as `config.moba` tells."""
    raw = getattr(text_config, "moba", None)
    if raw is None:
        return None
    moba = raw if isinstance(raw, MobaConfig) else MobaConfig.from_dict(raw)
    rule = moba.for_layer(layer_idx, int(text_config.num_hidden_layers))
    if rule is None or rule.gate != "mean" or rule.dense_len >= capacity:
        return None  # blocks are not chosen, or not by their means
    return rule.block_size


class _Defaults:
    """The defaults of transformers that `use_moba_cache` replaces; installed once, however many use it."""

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
            raise RuntimeError(f"GenerationMixin has no {_PREPARE} any more; {_WRITTEN_FOR}")
        cls._ours = _with_reserve(prepare)
        cls._previous = (prepare, *(table[_FULL] for table, _ in cls._TABLES))
        setattr(GenerationMixin, _PREPARE, cls._ours)
        for table, layer in cls._TABLES:
            table[_FULL] = layer

    @classmethod
    def remove(cls) -> None:
        """Puts back what is still ours; what somebody else has replaced since stays."""
        prepare, *layers = cls._previous
        if getattr(GenerationMixin, _PREPARE, None) is cls._ours:
            setattr(GenerationMixin, _PREPARE, prepare)
        for (table, ours), layer in zip(cls._TABLES, layers, strict=True):
            if table[_FULL] is ours:
                table[_FULL] = layer


# Every `use_moba_cache` that has not ended.
_ACTIVE: list[use_moba_cache] = []


class use_moba_cache:
    """Makes `generate` build MoBA cache layers by default, for every model in this process.

    Called plainly it stays on; as a context manager, or by `undo()`, what was there before comes back when
    no other use is left, in whatever order they end::

        moba_hf.use_moba_cache()
        with moba_hf.use_moba_cache():
            model.generate(...)

    Dynamic caches are then allocated for the longest text that the call may produce.

    Raises:
        RuntimeError: a release of transformers in which `generate` makes its cache in another way.
    """

    def __init__(self) -> None:
        if not _ACTIVE:
            _Defaults.install()
        _ACTIVE.append(self)

    def undo(self) -> None:
        """Ends this use; with the last one, what was there before comes back."""
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
    """The caches among a model's arguments, whatever this release calls them."""
    return [value for value in model_kwargs.values() if isinstance(value, Cache)]


def _runs_moba(model: Any) -> bool:
    return model.config.get_text_config(decoder=True)._attn_implementation == NAME


def _with_reserve(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """`prepare`, telling the layers of a cache that it made how many slots the call will need.

    No public place knows both the cache that `generate` makes and the length that it settles on.
    """
    signature = inspect.signature(prepare)
    missing = {"self", "generation_config", "model_kwargs", "max_cache_length"} - set(signature.parameters)
    if missing:
        raise RuntimeError(
            f"GenerationMixin.{_PREPARE} takes no {', '.join(sorted(missing))} any more; {_WRITTEN_FOR}"
        )

    @wraps(prepare)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not _ACTIVE:  # somebody else's wrapper has kept this one
            return prepare(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        model_kwargs, length = given["model_kwargs"], int(given["max_cache_length"])
        before = _caches(model_kwargs)
        result = prepare(*args, **kwargs)
        caches = _caches(model_kwargs)
        if not caches and given["generation_config"].use_cache and _runs_moba(given["self"]):
            raise RuntimeError(f"generate prepared no cache that use_moba_cache() can find; {_WRITTEN_FOR}")
        for cache in caches:
            if not any(cache is other for other in before):
                for layer in cache.layers:
                    if isinstance(layer, MobaLayer):
                        layer.reserve = length
        return result

    return wrapped
