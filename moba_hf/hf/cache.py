"""The cache for models that use MoBA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from moba_hf.config import MobaConfig
from moba_hf.hf.dynamic_layer import MobaLayer
from moba_hf.hf.static_layer import MobaStaticLayer
from moba_hf.op.numerics import check_int


class MobaCache(Cache):
    """A cache for models that use MoBA, a drop-in replacement for transformers' dynamic or static cache.

    Full-attention layers keep their keys and values in preallocated buffers, together with the means (or the
    summaries of another gate) of complete blocks, and record where the prompt that `prefill` read ends. Other
    layer types (sliding, linear) are transformers' own.

    Args:
        config: the model's config.
        max_cache_len: slots to allocate, at least 1: prompt + new tokens, if known. Required for a static
            cache. A dynamic cache grows by an eighth whenever it is full.
        static: fixed shapes, for `torch.compile` and CUDA graphs.
        offloading: keep layers on the CPU while they are not in use (needs a GPU).
        offload_only_non_sliding: do not offload sliding layers.

    Raises:
        ValueError: a static cache without `max_cache_len`, a `max_cache_len` below 1, or offloading without a
            CUDA device.
        TypeError: `max_cache_len` is not an int, or `config` is not a config.
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
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config must be the model's config (model.config), got {type(config).__name__}")
        if static and max_cache_len is None:
            raise ValueError("a static MobaCache needs max_cache_len: prompt length + max_new_tokens")
        if max_cache_len is not None:
            check_int("max_cache_len", max_cache_len, minimum=1)
        if offloading and not torch.cuda.is_available():
            raise ValueError(
                "offloading moves layers between a CUDA device and the CPU, but there is no CUDA device"
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
        """Called before tokens may be removed: at the start of assisted generation, or after its first call.

        Assisted generation passes the whole prompt to its first call, whatever the cache contains. So a cache
        that `prefill` has just filled is emptied, but still records where the prompt ends.
        """
        ours = [layer for layer in self.layers if isinstance(layer, MobaLayer)]
        if ours and all(layer.at_prompt_end for layer in ours):
            for layer in self.layers:
                layer.rewind() if isinstance(layer, MobaLayer) else layer.reset()
        super().activate_past_recording()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row, e.g. for beams. Raises ValueError if a layer cannot."""
        self._check_rows("batch_repeat_interleave")
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at `indices`. Raises ValueError if a layer cannot."""
        self._check_rows("batch_select_indices")
        super().batch_select_indices(indices)

    def _check_rows(self, method: str) -> None:
        """Without this check, transformers would fail after it has changed the first layers."""
        if unfit := [type(layer).__name__ for layer in self.layers if not hasattr(layer, method)]:
            raise ValueError(
                f"the cache contains a {unfit[0]}, which has no {method}: read the prompt once for every row"
            )


def _block_size(text_config: Any, layer_idx: int, capacity: int) -> int | None:
    """Block size in `config.moba` of a layer that chooses blocks by means; None: unknown or another gate."""
    raw = getattr(text_config, "moba", None)
    if raw is None:
        return None
    moba = raw if isinstance(raw, MobaConfig) else MobaConfig.from_dict(raw)
    rule = moba.for_layer(layer_idx, int(text_config.num_hidden_layers))
    if rule is None or rule.gate != "mean" or rule.dense_len >= capacity:
        return None
    return rule.block_size
