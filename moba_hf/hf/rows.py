"""Interprets the masks, position ids and offsets of a forward.

transformers calls the mask function (`hf.mask`) once per forward and passes the result, a `Rows`, to every
layer. `Rows` stores its arguments. When the first layer needs the layout, it reads their values once (which
waits for the device): whether a mask is all ones, whether it has holes, whether rows are packed. All layers
get the same `Layout`. Values are never read in compiled or captured graphs, nor for a decode step on a GPU:
bounds then stay on the device (`hf.device_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from moba_hf.hf.device_rows import assert_later, assert_not_packed, by_kernel, in_graph, on_device
from moba_hf.hf.layout import Layout, may_look
from moba_hf.hf.spans import (
    SHORT,
    Seen,
    check_axes,
    check_separated,
    joined,
    spans_of,
    spans_of_offsets,
)
from moba_hf.op.backends import cache_kernels
from moba_hf.op.inputs import check_values
from moba_hf.op.sequences import Sequences, constant_table

_CUSTOM = (
    "MoBA supports 2-D padding masks only, got a custom mask that lets tokens attend to later ones; use a "
    "stock attn_implementation for it"
)
_READ_AS_THEY_ARE = (torch.bool, torch.int32, torch.int64)


@dataclass(frozen=True)
class Masks:
    """The masks and hidden position ids of a forward.

    Attributes:
        given: bool `(batch, length)`, the 2-D attention mask, False for padding.
        neighbours: see `spans.Seen`.
        hidden: position ids that layers do not get, `(3, batch, q_len)` (M-RoPE) or `(batch, q_len)`.
        dense: the mask that transformers created for layers with a sliding window.
        windowed: the rows are for layers with a sliding window; `dense` may still be None.
    """

    given: Tensor | None = None
    neighbours: Tensor | None = None
    hidden: Tensor | None = None
    dense: Tensor | None = None
    windowed: bool = False


class Rows:
    """The result of the mask function, which every layer of a forward gets.

    Args:
        batch: rows of the batch.
        q_len: queries per row.
        kv_len: keys per row; with a static cache, its number of slots.
        q_offset: slot of the first query; a 0-d tensor for a static cache.
        device: device of the queries.
        masks: the masks of the forward; None: there are none.

    Attributes:
        known: the layout, if it is known before the first layer needs it.
    """

    ndim = 4  # transformers does not change a 4-D mask

    def __init__(
        self,
        batch: int,
        q_len: int,
        kv_len: int,
        q_offset: int | Tensor,
        device: torch.device | str,
        masks: Masks | None = None,
    ):
        masks = Masks() if masks is None else masks
        # torch.jit.trace turns sizes into tensors
        self.batch, self.q_len, self.kv_len = (
            int(size) if isinstance(size, Tensor) else size for size in (batch, q_len, kv_len)
        )
        # a static cache's counter will have advanced by the time the first layer reads it, so copy it
        self.q_offset = q_offset.clone() if isinstance(q_offset, Tensor) else q_offset
        self.device = torch.device(device)
        self.given, self.neighbours, self.hidden = masks.given, masks.neighbours, masks.hidden
        self.dense, self.windowed = masks.dense, masks.windowed
        self._seen: Seen | None = None
        self._layouts: dict[torch.device, Layout] = {}
        self.known: Layout | None = None
        if not self.windowed and ((q_len == 1 and not self._by_kernel()) or not self._may_look({})):
            self.known = self._unpacked({})  # before a graph begins, if the graph does not contain this

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the mask that it represents."""
        return self.batch, 1, 1, self.kv_len

    def layout(self, kwargs: dict[str, Any], device: torch.device, backend: str = "auto") -> Layout:
        """The sequences of the forward. The first call reads the values; later calls reuse the result.

        Args:
            kwargs: keyword arguments of the attention function: `position_ids`, `cu_seq_lens_q` etc.
            device: device of the layer.
            backend: backend whose kernel finds the bounds of a decode step without reading values.

        Raises:
            ValueError: a mask has a hole or is too short, packed sequences cannot be separated or are
                combined with a filled cache, or offsets do not fit.
        """
        found = self._layouts.get(device)
        if found is not None and may_look(device):  # an earlier layer has checked everything
            return found
        if kwargs.get("cu_seq_lens_q") is not None:
            self._check_no_cache()
            if self.batch != 1:
                raise ValueError(f"cu_seq_lens_q describes one packed row, got a batch of {self.batch}")
        if not self._may_look(kwargs):
            return in_graph(self, kwargs)
        origin = self._layouts.get(self.device) or self.known or self._unpacked(kwargs, backend)
        self._layouts[self.device] = origin
        found = self._layouts[device] = origin if device == self.device else origin.to(device)
        return found

    def check_separated(self, kwargs: dict[str, Any], what: str) -> None:
        """Raises ValueError if masks of stock layers (`what`: why they are stock) mix packed sequences."""
        if self._may_look(kwargs):
            if self.q_len > 1:
                check_separated(self._look(kwargs), what)
            return
        offsets = kwargs.get("cu_seq_lens_q")
        if offsets is None:
            assert_not_packed(self, kwargs)
        elif self.neighbours is None and offsets.shape[0] > 2:
            raise ValueError(joined(what))
        elif self.neighbours is not None:
            begins = offsets[1:-1]
            inside = (begins > 0) & (begins < self.q_len)
            sees = self.neighbours[0, 0][(begins - 1).clamp(0, self.q_len - 2)]
            assert_later(~(inside & sees).any(), joined(what))

    def _may_look(self, kwargs: dict[str, Any]) -> bool:
        """Whether values can be read: not in a traced or captured graph, and not of fake tensors."""
        held = (self.given, self.q_offset, self.neighbours, self.hidden)
        given = (kwargs.get(name) for name in ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k"))
        return may_look(self.device) and not any(isinstance(x, FakeTensor) for x in (*held, *given))

    def _would_wait(self) -> bool:
        """Whether reading the values of this decode step would wait for the device."""
        to_read = self.given if self.given is not None else self.q_offset
        return self.q_len == 1 and isinstance(to_read, Tensor) and not check_values(to_read)

    def _by_kernel(self) -> bool:
        """Whether a kernel can find the bounds, if the backend of the layer has one."""
        return self.given is not None and isinstance(self.q_offset, int) and self._would_wait()

    def _unpacked(self, kwargs: dict[str, Any], backend: str = "auto") -> Layout:
        """The layout, from values on the host if they may be read, else with bounds on the device."""
        if not self._may_look(kwargs):
            return on_device(self)
        if self._would_wait():
            kernels = cache_kernels(backend, self.device) if self._by_kernel() else None
            return on_device(self) if kernels is None else by_kernel(self, kernels)
        seen = self._look(kwargs)
        if seen.offsets_q is not None:
            return self._packed(spans_of_offsets(seen, kwargs))
        check_axes(seen)
        if seen.neighbours is not None and seen.neighbours[1].any():
            raise ValueError(_CUSTOM)
        if not seen.padded() and not seen.may_restart():
            every = np.arange(self.batch)
            spans, packed = np.stack([every, 0 * every, 0 * every + seen.end], axis=1), False
        else:
            spans, packed = spans_of(seen)
        if packed:
            self._check_no_cache()
            return self._packed(spans)
        return self._by_row(seen, spans)

    def _look(self, kwargs: dict[str, Any]) -> Seen:
        """Reads all values at once; only here does this class wait for the device."""
        if self._seen is not None:
            return self._seen
        positions = kwargs.get("position_ids")
        if positions is not None and (positions.ndim != 2 or positions.shape[1] != self.q_len):
            positions = None
        axes, hidden = self.hidden, None
        if axes is not None and axes.ndim == 2:
            axes, hidden = None, axes
        positions = hidden if positions is None else positions
        offsets_q, offsets_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
        values = _read(
            {
                "q_offset": self.q_offset if isinstance(self.q_offset, Tensor) else None,
                "real": self.given,
                "positions": None if self.q_len == 1 else positions,
                "axes": axes if offsets_q is None else None,
                "neighbours": self.neighbours,
                "offsets_q": offsets_q,
                "offsets_k": None if offsets_k is offsets_q else offsets_k,
            },
            self.device,
        )
        q_offset = int(values.pop("q_offset", self.q_offset))
        real = values.pop("real", None)
        if real is not None:
            check_length(real.shape[1], q_offset, self.q_len)
            real = real[:, : q_offset + self.q_len].astype(bool)
        if "neighbours" in values:
            values["neighbours"] = values["neighbours"].astype(bool)
        self._seen = Seen(self.batch, self.q_len, self.kv_len, q_offset, real, **values)
        return self._seen

    def _by_row(self, seen: Seen, spans: np.ndarray) -> Layout:
        """The layout of rows that have at most one sequence each."""
        start, end = np.zeros((2, self.batch), dtype=np.int64)
        start[spans[:, 0]], end[spans[:, 0]] = spans[:, 1], spans[:, 2]
        q_begin = (start - seen.q_offset).clip(0, self.q_len)
        q_end = np.maximum((end - seen.q_offset).clip(0, self.q_len), q_begin)
        table = np.stack([np.arange(self.batch), q_begin, q_end, start, end], axis=1)
        plain = self.given is None and isinstance(self.q_offset, int) and seen.end == self.kv_len
        # a static cache never counts as whole, so that one graph serves all steps
        whole = isinstance(self.q_offset, int) and seen.end == self.kv_len and not seen.padded()
        kv_start = None if plain or (whole and self.q_len == 1) else self._copied(start)
        there = constant_table(self._copied(table.astype(np.int32)), covers=whole)
        sequences = Sequences(there, self.q_len, self.kv_len, True, kv_start)
        return Layout(sequences, whole=whole, starts=tuple(start.tolist()))

    def _packed(self, spans: np.ndarray) -> Layout:
        table = constant_table(self._copied(spans[:, [0, 1, 2, 1, 2]].astype(np.int32)))
        longest = int((spans[:, 2] - spans[:, 1]).max(initial=0))
        return Layout(Sequences(table, longest, longest, by_row=False), spans=spans.tolist())

    def _copied(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)

    def _check_no_cache(self) -> None:
        if self.q_len != self.kv_len:
            raise ValueError(
                f"all keys of packed sequences must be in the call, got {self.q_len} queries and "
                f"{self.kv_len} keys: start with an empty dynamic cache or pass use_cache=False"
            )


def _read(tensors: dict[str, Tensor | None], device: torch.device) -> dict[str, np.ndarray]:
    """Copies the integer and bool tensors that are not None to the host, in one transfer per call."""
    given = {name: x for name, x in tensors.items() if x is not None}
    if not given:
        return {}
    if all(x.device.type == "cpu" and x.dtype in _READ_AS_THEY_ARE for x in given.values()):
        return {name: x.numpy() for name, x in given.items()}
    flat = torch.cat([x.detach().reshape(-1).to(device, torch.int32) for x in given.values()]).cpu().numpy()
    parts = np.split(flat, np.cumsum([x.numel() for x in given.values()])[:-1])
    return {name: part.reshape(x.shape) for (name, x), part in zip(given.items(), parts, strict=True)}


def check_length(length: int, q_offset: int, q_len: int) -> None:
    if length < q_offset + q_len:
        raise ValueError(
            f"{SHORT}: it has length {length}, but the cache has {q_offset} tokens and the call {q_len} more"
        )
