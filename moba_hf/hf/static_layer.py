"""A static cache layer, for `torch.compile` and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from moba_hf.hf.cache_layer import (
    LAYER_ATTRIBUTE,
    OrderedMoves,
    Summarised,
    alike,
    check_crop,
    check_shapes,
    tracked,
)
from moba_hf.hf.recent_queries import FixedQueries
from moba_hf.op.backends import CacheKernels, load_backend
from moba_hf.op.block_means import BlockMeans


class MobaStaticLayer(OrderedMoves, Summarised, StaticLayer):
    """A static cache layer with means of complete blocks, for `torch.compile` and CUDA graphs.

    Args:
        max_cache_len: slots of the buffers.
        block_size: tokens per block; None: that of the first call.

    Attributes:
        recent: the queries of the last rows, if decode steps need them to choose blocks.
    """

    def __init__(self, max_cache_len: int, block_size: int | None = None, **kwargs: Any):
        super().__init__(max_cache_len=max_cache_len, **kwargs)
        self.block_means = BlockMeans(block_size, static=True)
        self.recent = FixedQueries()

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
            if self.is_initialized:  # kernels take only states that fit
                assert self.keys is not None
                assert self.values is not None
                check_shapes((key_states, value_states), (self.keys, self.values), "create another cache")
            keys, values = super().update(key_states, value_states, *args, **kwargs)
        # a running count would make torch.compile recompile at every step, so `behind` takes few values
        means = self.block_means
        means.behind = self.max_cache_len if means.behind else key_states.shape[2]
        self.recent.appended()
        keys = keys.view(keys.shape)  # a view: the buffer itself must not refer to its own layer
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, values

    def _kernels_for(self, *states: Tensor) -> CacheKernels | None:
        """Kernels that append these states; None: torch's own, for many rows and under compile."""
        if not self.is_initialized or torch.compiler.is_compiling() or tracked(*states):
            return None
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        kernels = load_backend(self.backend).cache if alike(states, (keys, values)) else None
        if kernels is None or not 0 < states[0][..., 0].numel() <= kernels.max_append_rows:
            return None
        return kernels

    def _extent(self) -> tuple[int | Tensor, int]:
        return self.cumulative_length, self.max_cache_len

    def activate_past_recording(self) -> None:
        """Refuses assisted generation, which removes tokens: a static layer cannot."""
        raise ValueError(
            "assisted and prompt-lookup generation need a dynamic cache, but this one is static: pass "
            "MobaCache(model.config), or generate without assistance"
        )

    def reset(self) -> None:
        super().reset()
        self.prompt = None
        self.block_means.forget(0)
        self.recent.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens; StaticLayer of transformers 5.17 has no such method.

        If these include tokens of a prompt that `prefill` read, the end of the prompt is no longer marked.

        Raises:
            ValueError: the number is positive.
        """
        check_crop(tokens_to_remove)
        if self.is_initialized:
            self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)
            self.recent.cropped(-tokens_to_remove)
            if self.prompt is not None and int(self.cumulative_length) < self.prompt.end:
                self.prompt = None

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
            self.recent.map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row; new buffers are allocated, so graphs are compiled again."""
        self._replace_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at `indices`; new buffers are allocated, so graphs are compiled again."""
        self._replace_rows(lambda x: x[indices.to(x.device) if isinstance(indices, Tensor) else indices])

    def _replace_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies a selection of rows, which may change their number; StaticLayer has no such method."""
        if not self.is_initialized:
            return
        self._end_moves()
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = change(self.keys), change(self.values)
        self.batch_size = self.keys.shape[0]
        self.block_means.map_rows(change)
        self.recent.map_rows(change)
        for buffer in (self.keys, self.values, self.block_means.means, self.recent.queries):
            if buffer is not None and not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(buffer)
