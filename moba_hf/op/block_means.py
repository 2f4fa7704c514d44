"""Running means (or other summaries, `gates.Kept`) of complete blocks, kept beside a layer's cached keys.

Legend: N cached slots, B block size, HK kv heads, D head dim, NB = capacity // B blocks.

A row's blocks start at its first real token, which only the attention function knows, so the means are
brought up to date by it, from the stored keys, with the routine that prefill uses: `Kept.take`, or
the backend's kernel, whose bits equal those of its prefill kernel. What is computed
is what the last calls completed: a decode step reads one block at most. Everything but the number of new
tokens is tensor arithmetic, so shapes never depend on data and nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moba_hf.op.backends import load_backend
from moba_hf.op.gates import Kept, KeptMeans
from moba_hf.op.operators import update_means_op

# Elements of keys that one step of an update may gather.
_GATHER_BUDGET = 1 << 24
MEANS = KeptMeans()


class BlockMeans:
    """Means of the complete blocks of one layer's cached keys.

    Attributes:
        block_size: tokens in a block; None: not known yet.
        static: the buffer of means keeps its address, for CUDA graphs.
        kept: what is kept of a block, the mean or what another gate needs.
        means: `(batch, HK, NB + 1, width)` in the dtype of the keys, `width` that of `kept` (D for means);
            the last block is a dump for writes that do not count. Blocks that are not complete hold anything
            finite.
        starts: int64 `(batch,)`, slot of each row's first real token; None: all 0.
        starts_read: the same on the host, where the caller has read it.
        behind: tokens that were cached since the means were up to date.
        empty: no mean has been taken yet, so the next start and block size are taken as they come.
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
        """Notes `count` new tokens."""
        self.behind += count

    def cropped(self, count: int, length: int) -> None:
        """Notes that the last `count` tokens went and `length` are left; whole blocks before them stay."""
        self.behind = max(0, self.behind - count)
        if self.behind >= length:
            self.forget(length)

    def forget(self, length: int) -> None:
        """Drops what is known; `length` cached tokens are to be looked at again."""
        self.behind, self.empty = length, True

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies `change` (a selection along dim 0) to the rows."""
        if self.means is not None:
            self.means = change(self.means)
        if self.starts is not None:
            self.starts = change(self.starts)
        self.starts_read = None

    def allocate(self, keys: Tensor, block_size: int, capacity: int) -> None:
        """Makes room for the blocks of `capacity` tokens, keeping the means that fit."""
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
        kept: Kept = MEANS,
    ) -> Tensor:
        """Means `(batch, HK, NB, D)` of the complete blocks of slots `[kv_start, length)`.

        Or what else is `kept` of them, `(batch, HK, NB, width)`.

        Args:
            keys: `(batch, HK, >= length, D)`, the cached keys.
            length: tokens cached; a 0-d tensor for a static cache.
            capacity: slots of the cache.
            kv_start: int `(batch,)`, slot of each row's first real token; None: all 0.
            block_size: tokens in a block. Another one than before, or another start, rebuilds the means.
            backend: the backend that was chosen for tensors like `keys`.
            starts_read: values of `kv_start` on the host, where they are known: saves waiting for the device.
            kept: what is kept of a block; other than before, all of it is taken anew.
        """
        same = self.block_size == block_size and self.kept == kept
        if not self.empty and not (same and self._starts_at(kv_start, starts_read)):
            self.forget(length if isinstance(length, int) else capacity)
        self.kept = kept
        means = self._room(keys, capacity, block_size)
        if self.empty:
            self._set_starts(kv_start, starts_read)
        if starts_read is not None and not any(starts_read):
            kv_start = None  # nothing is padded in front: the blocks of all rows lie in the same slots
        if self.behind:
            kernels = load_backend(backend).cache
            if kernels is not None and kept == MEANS and block_size >= kernels.min_block_size:
                on_device = length if isinstance(length, Tensor) else None
                slots = 0 if isinstance(length, Tensor) else length
                update_means_op(means, keys, kv_start, on_device, slots, self.behind, block_size, backend)
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
        """Whether the rows start where they did.

        Values on other devices than the CPU are compared when more than one token was added and the host does
        not know them: a start changes with a new prompt, never between decode steps, and a comparison waits
        for the device. Compiled and captured graphs cannot wait.
        """
        known = self.starts
        if known is None and kv_start is None:
            return True
        if known is None or kv_start is None:
            given = kv_start if known is None else known
            assert given is not None
            if _in_graph() or bool(given.any()):
                return False
            self._set_starts(
                kv_start, starts_read
            )  # the same in another form, so that later calls need not ask
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
        """Takes new means row by row, from slices of the keys."""
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
        """Takes new means of all rows at once; shapes depend on the number of new tokens only."""
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
    keys: Tensor, kv_start: Tensor | None, block_size: int, backend: str, kept: Kept = MEANS
) -> Tensor:
    """Means `(batch, HK, N // block_size, D)` of all complete blocks of `keys`, from each row's start.

    Or what else is `kept`, as `BlockMeans.bring_up` returns it.
    """
    means = BlockMeans()
    means.forget(keys.shape[2])
    return means.bring_up(keys, keys.shape[2], keys.shape[2], kv_start, block_size, backend, kept=kept)


def writable(x: Tensor) -> Tensor:
    """`x`, or a copy where it was made in inference mode and may not be written any more."""
    if torch.compiler.is_compiling():
        return x
    if x.is_inference() and not torch.is_inference_mode_enabled():
        return x.clone()
    return x


def _in_graph() -> bool:
    """Whether what runs is traced or captured, so that values cannot be looked at."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _on_host(x: Tensor) -> bool:
    """Whether reading values of `x` is free: on the CPU, outside tracing."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
