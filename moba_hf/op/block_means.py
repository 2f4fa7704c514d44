"""Running means (or other summaries, see `gates.Kept`) of complete blocks, kept with a layer's cached keys.

Legend: N cached slots, B block size, HK kv heads, D head dim, NB = capacity // B blocks.

A row's blocks start at its first real token, which only the attention function knows. So the attention
function updates the means, from the stored keys, with the same routine as prefill: `Kept.take`, or the
backend's kernel, whose results are bit-identical to its prefill kernel. Only blocks that were completed since
the last update are computed: a decode step reads at most one block. Except for the number of new tokens,
everything is tensor arithmetic, so shapes do not depend on data and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moba_hf.op.backends import load_backend
from moba_hf.op.gates import Kept, KeptMass, KeptMeans
from moba_hf.op.operators import update_means_op

# Number of key elements that one step of an update may gather.
_GATHER_BUDGET = 1 << 24
MEANS = KeptMeans()


class BlockMeans:
    """Means of the complete blocks of one layer's cached keys.

    Attributes:
        block_size: tokens per block; None: not known yet.
        static: the buffer of means keeps its address, for CUDA graphs.
        kept: the kind of summary: the mean, or what another gate needs.
        means: `(batch, HK, NB + 1, width)` in the dtype of the keys, with the `width` of `kept` (D for
            means). Writes to be discarded go to the last block. Incomplete blocks have arbitrary finite
            values.
        starts: int64 `(batch,)`, slot of each row's first real token; None: all 0.
        starts_read: `starts` on the host, if the caller has read it.
        behind: number of tokens cached since the last update.
        empty: there are no means yet, so the next update may have any starts and block size.
    """

    def __init__(self, block_size: int | None = None, *, static: bool = False):
        self.block_size = block_size
        self.static = static
        self.kept: Kept = MEANS
        self.means: Tensor | None = None
        self.starts: Tensor | None = None
        self.starts_read: tuple[int, ...] | None = None
        self.behind = 0
        self.empty = True

    def appended(self, count: int) -> None:
        """Records that `count` tokens were added."""
        self.behind += count

    def cropped(self, count: int, length: int) -> None:
        """Records that the last `count` tokens were removed and `length` are left."""
        self.behind = max(0, self.behind - count)
        if self.behind >= length:
            self.forget(length)

    def forget(self, length: int) -> None:
        """Discards all means; `length` cached tokens must be read again."""
        self.behind, self.empty = length, True

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies `change`, a selection along dim 0, to the rows."""
        if self.means is not None:
            self.means = change(self.means)
        if self.starts is not None:
            self.starts = change(self.starts)
        self.starts_read = None

    def allocate(self, keys: Tensor, block_size: int, capacity: int) -> None:
        """Allocates means for the blocks of `capacity` tokens, and copies the existing ones that fit."""
        width = self.kept.width(keys.shape[3], block_size)
        shape = (*keys.shape[:2], capacity // block_size + 1, width)
        means = keys.new_zeros(shape)
        old = self.means
        if old is not None and not self.empty and (*old.shape[:2], old.shape[3]) == (*shape[:2], width):
            kept = min(old.shape[2], shape[2]) - 1
            means[:, :, :kept] = old[:, :, :kept]
        if self.static and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(means)
        self.means, self.block_size = means, block_size

    def bring_up(
        self,
        keys: Tensor,
        length: int | Tensor,
        capacity: int,
        kv_start: Tensor | None,
        block_size: int,
        backend: str,
        starts_read: tuple[int, ...] | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """Updates and returns the summaries of the complete blocks of slots `[kv_start, length)`.

        Args:
            keys: `(batch, HK, >= length, D)`, the cached keys.
            length: number of cached tokens; a 0-d tensor for a static cache.
            capacity: slots of the cache.
            kv_start: int `(batch,)`, slot of each row's first real token; None: all 0.
            block_size: tokens per block.
            backend: the backend that was chosen for tensors like `keys`.
            starts_read: values of `kv_start` on the host, if known; saves waiting for the device.
            kept: the kind of summary; None: the mean. If `kv_start`, `block_size` or `kept` has changed, all
                are recomputed.

        Returns:
            `(batch, HK, NB, width)`; for means `width` is D.
        """
        kept = MEANS if kept is None else kept
        same = self.block_size == block_size and self.kept == kept
        if not self.empty and not (same and self._starts_at(kv_start, starts_read)):
            self.forget(length if isinstance(length, int) else capacity)
        self.kept = kept
        means = self._room(keys, capacity, block_size)
        if self.empty:
            self._set_starts(kv_start, starts_read)
        if starts_read is not None and not any(starts_read):
            kv_start = None  # no padding on the left, so the blocks of all rows are in the same slots
        if self.behind:
            kernels = load_backend(backend).cache
            if kernels is not None and kernels.summarizes(kept, keys.shape[3], block_size):
                on_device = length if isinstance(length, Tensor) else None
                slots = 0 if isinstance(length, Tensor) else length
                pairs = kept.rotary_pairs if isinstance(kept, KeptMass) else None
                given = (kv_start, on_device, slots, self.behind, block_size, backend, pairs)
                update_means_op(means, keys, *given)
            elif isinstance(length, int) and (kv_start is None or _on_host(keys)):
                self._update_slices(keys, length, kv_start)
            else:
                self._update_gathered(keys, length, kv_start)
        self.behind, self.empty = 0, False
        return means[:, :, :-1]

    def _room(self, keys: Tensor, capacity: int, block_size: int) -> Tensor:
        means = self.means
        fits = (
            means is not None
            and self.block_size == block_size
            and means.shape[:2] == keys.shape[:2]
            and means.shape[2] > capacity // block_size
            and means.shape[3] == self.kept.width(keys.shape[3], block_size)
            and means.dtype == keys.dtype
            and means.device == keys.device
        )
        if not fits:
            self.allocate(keys, block_size, capacity)
        assert self.means is not None
        self.means = writable(self.means)
        return self.means

    def _starts_at(self, kv_start: Tensor | None, starts_read: tuple[int, ...] | None) -> bool:
        """Whether the rows start at the same slots as before.

        A comparison on a GPU waits for the device. If the host does not know the values, they are compared
        only when more than one token was added, because starts change with a new prompt, not between decode
        steps. Compiled and captured graphs cannot wait.
        """
        known = self.starts
        if known is None and kv_start is None:
            return True
        if known is None or kv_start is None:
            given = kv_start if known is None else known
            assert given is not None
            if _in_graph() or bool(given.any()):
                return False
            self._set_starts(kv_start, starts_read)  # None and zeros are equal: later calls need not compare
            return True
        if starts_read is not None and self.starts_read is not None:
            return starts_read == self.starts_read
        if _in_graph() or not (_on_host(known) or self.behind > 1):
            return True
        return torch.equal(known, kv_start)

    def _set_starts(self, kv_start: Tensor | None, starts_read: tuple[int, ...] | None) -> None:
        self.starts_read = starts_read
        if kv_start is None:
            self.starts = None
        elif self.starts is None or self.starts.shape != kv_start.shape:
            self.starts = kv_start.clone()
        else:
            self.starts = writable(self.starts)
            self.starts.copy_(kv_start)

    def _update_slices(self, keys: Tensor, length: int, kv_start: Tensor | None) -> None:
        """Computes new means row by row from slices of the keys."""
        assert self.means is not None
        assert self.block_size is not None
        size, seen = self.block_size, length - self.behind
        step = max(1, _GATHER_BUDGET // (keys[0, :, 0].numel() * size * keys.shape[0]))
        starts = [0] if kv_start is None else kv_start.tolist()
        for row, start in enumerate(starts):
            rows = slice(None) if kv_start is None else slice(row, row + 1)
            last = (length - start) // size
            for begin in range(max(0, seen - start) // size, last, step):
                end = min(last, begin + step)
                slots = slice(start + begin * size, start + end * size)
                self.means[rows, :, begin:end] = self.kept.take(keys[rows, :, slots], size)

    def _update_gathered(self, keys: Tensor, length: int | Tensor, kv_start: Tensor | None) -> None:
        """Computes new means of all rows at once; shapes depend only on the number of new tokens."""
        assert self.means is not None
        assert self.block_size is not None
        batch, heads, slots, dim = keys.shape
        size = self.block_size
        start = torch.zeros(1, dtype=torch.int64, device=keys.device) if kv_start is None else kv_start
        first = (length - self.behind - start).clamp(min=0) // size
        windows = -(-self.behind // size)
        step = max(1, _GATHER_BUDGET // (batch * heads * dim * size))
        for begin in range(0, windows, step):
            number = torch.arange(begin, min(windows, begin + step), device=keys.device)
            block = (first[:, None] + number).expand(batch, -1)
            slot = start[:, None, None] + block[..., None] * size + torch.arange(size, device=keys.device)
            index = slot.reshape(batch, 1, -1, 1).clamp(max=slots - 1)
            new = self.kept.take(keys.gather(2, index.expand(-1, heads, -1, dim)), size)
            complete = (block + 1) * size <= length - start[:, None]
            place = torch.where(complete, block, self.means.shape[2] - 1)
            self.means.scatter_(2, place[:, None, :, None].expand(-1, heads, -1, new.shape[3]), new)


def block_means_of(
    keys: Tensor, kv_start: Tensor | None, block_size: int, backend: str, kept: Kept | None = None
) -> Tensor:
    """Summaries of all complete blocks of `keys`, from each row's start; see `BlockMeans.bring_up`."""
    means = BlockMeans()
    means.forget(keys.shape[2])
    return means.bring_up(keys, keys.shape[2], keys.shape[2], kv_start, block_size, backend, kept=kept)


def writable(x: Tensor) -> Tensor:
    """`x`, or a copy if it was created in inference mode and so must not be written now."""
    if torch.compiler.is_compiling():
        return x
    if x.is_inference() and not torch.is_inference_mode_enabled():
        return x.clone()
    return x


def _in_graph() -> bool:
    """Whether the code is being traced or captured, so that values cannot be read."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _on_host(x: Tensor) -> bool:
    """Whether reading values of `x` is free: on the CPU, outside tracing."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
