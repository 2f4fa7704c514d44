"""A dynamic cache layer that writes into preallocated buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from moba_hf.hf.cache_layer import (
    LAYER_ATTRIBUTE,
    OrderedMoves,
    Summarised,
    alike,
    check_crop,
    check_shapes,
    tracked,
)
from moba_hf.hf.recent_queries import RecentQueries
from moba_hf.op.block_means import BlockMeans, writable

# The least number of slots that a buffer grows by; longer buffers grow by an eighth.
_MIN_GROWTH = 64


class MobaLayer(OrderedMoves, Summarised, DynamicLayer):
    """A dynamic cache layer in which a decode step writes one slot and does not copy the others.

    Keys and values occupy the first slots of larger buffers, which grow by an eighth when they are full.

    Args:
        max_cache_len: initial number of slots; 0: as needed.

    Attributes:
        recent: the queries of the last rows, if decode steps need them to choose blocks.
    """

    def __init__(self, max_cache_len: int = 0, **kwargs: Any):
        self._buffers: list[Tensor] | None = None
        self._length = 0
        self._assist_from: int | None = None
        self.reserve = max_cache_len
        self.block_means = BlockMeans()
        self.recent = RecentQueries()
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
        """Handles an external assignment: the tensor becomes the buffer, and the means are discarded."""
        if value is None:
            self._buffers, self._length = None, 0
        else:
            self._buffers = self._buffers or [value, value]
            self._buffers[which] = value
            self._length = value.shape[-2] if value.dim() > 1 else 0
        self._forget()

    def _forget(self) -> None:
        """Discards everything that was computed from the cached tokens."""
        self.block_means.forget(self._length)
        self.recent.forget()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._length = 0
        self._buffers = [
            x.new_empty((*x.shape[:2], self.reserve, x.shape[3])) for x in (key_states, value_states)
        ]
        self._forget()
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends `(batch, num_kv_heads, new, dim)` states; returns views of all cached keys and values."""
        count = key_states.shape[2]
        self._check_assisted(count)
        states = (key_states, value_states)
        held = self._buffers
        if not self.is_initialized or held is None or (self._length == 0 and not alike(states, held)):
            self.lazy_initialization(key_states, value_states)
        assert self._buffers is not None
        end = self._length + count
        check_shapes(states, self._buffers, "call reset() before using it")
        self._widen(*states)
        if tracked(*states, *self._buffers):
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

    def _widen(self, *states: Tensor) -> None:
        """Converts the buffers to the dtype that they and the states promote to, e.g. after autocast."""
        assert self._buffers is not None
        for i, x in enumerate(states):
            dtype = torch.promote_types(self._buffers[i].dtype, x.dtype)
            if dtype != self._buffers[i].dtype:
                self._buffers[i] = self._buffers[i].to(dtype)
                self._forget()

    def _grow(self, capacity: int) -> None:
        assert self._buffers is not None
        for i, old in enumerate(self._buffers):
            new = old.new_empty((*old.shape[:2], capacity, old.shape[3]))
            new[:, :, : self._length] = old[:, :, : self._length]
            self._buffers[i] = new

    def _extent(self) -> tuple[int | Tensor, int]:
        assert self._buffers is not None
        return self._length, self._buffers[0].shape[2]

    def get_seq_length(self) -> int:
        return self._length

    def reset(self) -> None:
        """Empties the layer and forgets its prompt; its buffers are kept for the next prompt."""
        self._length, self._assist_from = 0, None
        self.prompt, self.assisted = None, False
        self._forget()

    @property
    def at_prompt_end(self) -> bool:
        """Whether the layer contains exactly what one `prefill` into an empty cache has read."""
        prompt = self.prompt
        return prompt is not None and prompt.begin == 0 and self._length == prompt.end

    def rewind(self) -> None:
        """Empties the layer but keeps the end of the prompt, because the same prompt is read again."""
        prompt = self.prompt
        self.reset()
        self.prompt = prompt

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: the number is positive.
        """
        check_crop(tokens_to_remove)
        self._assist_from = None  # assisted generation would append the prompt before it crops
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        removed = min(-tokens_to_remove, self._length)
        self._length -= removed
        self.block_means.cropped(removed, self._length)
        self.recent.cropped(self._length)

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies a selection of rows; only slots in use are copied."""
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
        self.recent.map_rows(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda x: x[indices.to(x.device) if isinstance(indices, Tensor) else indices])

    def offload(self) -> None:
        """Moves keys and values to the CPU; the means stay on the device."""
        if self._buffers is not None:
            self._begin_move()
            self._buffers = [x.to("cpu", non_blocking=True) for x in self._buffers]

    def prefetch(self) -> None:
        if self._buffers is not None:
            self._follow_work()
            self._buffers = [x.to(self.device, non_blocking=True) for x in self._buffers]

    def activate_past_recording(self) -> None:
        """Called before tokens may be removed: when assisted generation starts, or after its first call."""
        self._assist_from = self._length or None
        self.assisted = self._length == 0 and self.prompt is None

    def _check_assisted(self, count: int) -> None:
        """Raises if assisted generation would append a whole prompt to a cache that already has its start."""
        filled, self._assist_from = self._assist_from, None
        if filled is not None and count > 1:
            raise ValueError(
                f"assisted and prompt-lookup generation would append the whole prompt to the {filled} tokens "
                "already in this cache: pass a new or reset cache, or one that moba_hf.prefill has just "
                "filled with the prompt, or generate without assistance"
            )
