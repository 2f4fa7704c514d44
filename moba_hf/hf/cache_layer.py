"""What MoBA's cache layers share: summaries of complete blocks, the end of the prompt, ordered copies.

transformers does not pass the cache to the attention function. So the key tensor that `update` returns has an
attribute that refers to its cache layer. If it is lost, the summaries are recomputed from the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moba_hf.hf.places import Prompt
from moba_hf.op.block_means import BlockMeans
from moba_hf.op.gates import Kept

# Attribute of a key tensor that refers to its cache layer.
LAYER_ATTRIBUTE = "moba_layer"


class OrderedMoves:
    """Orders the copies of an offloading cache, which offloads on one stream and prefetches on another.

    transformers does not synchronise the two. So a prefetch could read host memory before the copy to it has
    finished, or overwrite device memory that has been freed but is still read by queued kernels.
    """

    device: Any
    _work: torch.cuda.Stream | None = None

    def _begin_move(self) -> None:
        """Call this on the compute stream before a copy to the CPU is queued."""
        if torch.device(self.device).type == "cuda":
            self._work = torch.cuda.current_stream(self.device)

    def _follow_work(self) -> None:
        """Makes the current stream, on which the layer is copied back, wait for the work queued so far."""
        if self._work is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._work)

    def _end_moves(self) -> None:
        """Waits for copies in flight; rows may be changed only after that."""
        if self._work is not None:
            torch.cuda.synchronize(self.device)


class Summarised:
    """A cache layer that keeps summaries of its complete blocks and records where its prompt ends.

    Attributes:
        block_means: the summaries.
        backend: the backend that the attention function chose for these keys; "portable" until then.
        prompt: the prompt that `prefill` read; None: the end of the prompt is not marked.
        reading: `prefill` is running.
        assisted: assisted generation began on the empty layer.
    """

    block_means: BlockMeans
    backend = "portable"
    prompt: Prompt | None = None
    reading = False
    assisted = False

    def _extent(self) -> tuple[int | Tensor, int]:
        """Number of cached tokens (a 0-d tensor in a static layer) and number of slots."""
        raise NotImplementedError

    def first_slot(self, count: int) -> Any:
        """The slot of the first of the last `count` tokens; an int64 0-d tensor in a static layer."""
        return self._extent()[0] - count

    def moba_means(
        self,
        keys: Tensor,
        kv_start: Tensor | None,
        block_size: int,
        starts_read: tuple[int, ...] | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """Up-to-date summaries of complete blocks; `keys` is what `update` returned. See `BlockMeans`."""
        settings: tuple[Any, ...] = (kv_start, block_size, self.backend, starts_read, kept)
        return self.block_means.bring_up(keys.detach(), *self._extent(), *settings)


def alike(states: tuple[Tensor, ...], buffers: tuple[Tensor, ...] | list[Tensor]) -> bool:
    """Whether states can be written to buffers: rows, heads, dims, dtypes and devices are equal."""
    return all(
        (x.shape[:2], x.shape[3], x.dtype, x.device) == (b.shape[:2], b.shape[3], b.dtype, b.device)
        for x, b in zip(states, buffers, strict=True)
    )


def check_shapes(states: Sequence[Tensor], buffers: Sequence[Tensor], advice: str) -> None:
    """Raises ValueError if rows, heads or dims of the states differ from those of the buffers.

    Args:
        advice: what to do before using the cache for other prompts.
    """
    for x, buffer in zip(states, buffers, strict=True):
        if (x.shape[:2], x.shape[3]) != (buffer.shape[:2], buffer.shape[3]):
            held, given = ((*y.shape[:2], y.shape[3]) for y in (buffer, x))
            raise ValueError(
                f"the cache contains states of (batch, heads, dim) {held}, got {given}: {advice} "
                "for other prompts; for beams or several sequences of one prefilled "
                "prompt, call batch_repeat_interleave(count) first"
            )


def check_crop(tokens_to_remove: int) -> None:
    """Raises ValueError if the argument of a layer's `crop` is positive."""
    if tokens_to_remove > 0:
        raise ValueError(
            "crop takes the number of tokens to remove from the end as a negative number, "
            f"got {tokens_to_remove}"
        )


def tracked(*tensors: Tensor) -> bool:
    """Whether autograd records operations on any of `tensors`."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
