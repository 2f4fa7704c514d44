"""What MoBA's cache layers share: the summaries of complete blocks, the place of the prompt, ordered moves.

The attention function finds a layer through the key tensor that `update` returns: an attribute of it, since
transformers passes no cache on. Where the attribute is lost, the summaries are taken anew from the keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moba_hf.hf.places import Prompt
from moba_hf.op.block_means import MEANS, BlockMeans
from moba_hf.op.gates import Kept

# Attribute by which a key tensor names the cache layer that it came from.
LAYER_ATTRIBUTE = "moba_layer"


class OrderedMoves:
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


class Summarised:
    """A cache layer that keeps summaries of its complete blocks and where its prompt ends.

    Attributes:
        block_means: the summaries.
        backend: the backend that the attention function chose for these keys; torch's own operators until
            then.
        prompt: where the prompt lies that `prefill` read; None: nobody closed the cache.
        reading: `prefill` is at work.
        assisted: assisted generation began on the empty layer.
    """

    block_means: BlockMeans
    backend = "portable"
    prompt: Prompt | None = None
    reading = False
    assisted = False

    def _extent(self) -> tuple[int | Tensor, int]:
        """Tokens that are cached, a 0-d tensor for a static layer, and the slots there are."""
        raise NotImplementedError

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
        return self.block_means.bring_up(keys.detach(), *self._extent(), *settings)


def alike(states: tuple[Tensor, ...], buffers: tuple[Tensor, ...] | list[Tensor]) -> bool:
    """Whether states can be written to buffers: the same rows, heads, dims, dtypes and devices."""
    return all(
        (x.shape[:2], x.shape[3], x.dtype, x.device) == (b.shape[:2], b.shape[3], b.dtype, b.device)
        for x, b in zip(states, buffers, strict=True)
    )


def tracked(*tensors: Tensor) -> bool:
    """Whether autograd watches what is done with them."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
