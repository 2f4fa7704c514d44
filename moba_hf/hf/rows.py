"""Where the rows of a forward lie: the mask function registered as "moba", and what its masks mean.

Transformers calls the mask function once per forward and hands the result to every layer. So the result is
`Rows`: it keeps what was given, looks at the values once (which waits for the device) when the first layer
asks, and gives all layers the same `Layout`. It looks at everything together: whether a mask is all ones,
whether it has holes, whether rows are packed. It never looks in compiled or captured graphs, nor for a decode
step on a device other than the CPU: bounds then stay on the device, and a hole raises there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from moba_hf.hf.parallel import refuse_lost_padding, refuse_ring_attention
from moba_hf.hf.spans import (
    HOLE,
    SHORT,
    Seen,
    check_axes,
    check_separated,
    joined,
    spans_of,
    spans_of_offsets,
)
from moba_hf.op.ops import check_values
from moba_hf.op.sequences import Sequences, batched_table, packed_table

_PACKED_UNDER_COMPILE = (
    "packed sequences under torch.compile: the position ids start again inside a row, which a compiled graph "
    "cannot look at; pass cu_seq_lens_q too (DataCollatorWithFlattening(return_flash_attn_kwargs=True))"
)
_OFFSETS_UNDER_COMPILE = (
    "cu_seq_lens_q must rise from 0 to at most the tokens of the call, equal cu_seq_lens_k, have no sequence "
    "longer than max_length_q, and name just the tokens that the attention mask does not call padding"
)
_CUSTOM = (
    "MoBA takes 2-D padding masks, got a custom mask under which tokens see later ones; use a stock "
    "attn_implementation for it"
)
# Rotary parameters of the models whose layers need position ids and may not give them to attention.
_KEPT = {"mrope_section", "llama_4_scaling_beta"}
# How far above the mask function the forward of a model is looked for.
_FRAMES = 8


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a forward lie.

    Attributes:
        sequences: for the operator.
        whole: each batch row is one sequence of all keys and nothing is padding, so no mask is needed.
        spans: `(batch row, begin, end)` of packed sequences; None: not packed, or not read to the host.
        starts: slot of each row's first real key; None: packed, or not read to the host.
    """

    sequences: Sequences
    whole: bool = False
    spans: list[list[int]] | None = None
    starts: tuple[int, ...] | None = None

    @property
    def packed(self) -> bool:
        """Whether a batch row may hold several sequences."""
        return not self.sequences.by_row

    def between(self, begin: int, end: int) -> Layout:
        """The same of queries `[begin, end)` alone, and the keys up to the last of them; not packed."""
        sequences = self.sequences
        row, q_begin, q_end, k_begin, k_end = sequences.table.unbind(1)
        k_end = torch.maximum(k_end - (q_end - end).clamp(min=0), k_begin)
        columns = [row, q_begin.clamp(begin, end) - begin, q_end.clamp(begin, end) - begin, k_begin, k_end]
        left_out = sequences.max_seqlen_q - end
        part = replace(
            sequences,
            table=torch.stack(columns, 1),
            max_seqlen_q=end - begin,
            max_seqlen_k=sequences.max_seqlen_k - left_out,
        )
        return replace(self, sequences=part)

    def to(self, device: torch.device) -> Layout:
        """The same for layers that lie on another device."""
        table, start = self.sequences.table.to(device), self.sequences.kv_start
        start = None if start is None else start.to(device)
        return replace(self, sequences=replace(self.sequences, table=table, kv_start=start))


class Rows:
    """What the mask function gives to every layer of a forward.

    Args:
        batch, q_len, kv_len: sizes of the queries and keys; `kv_len` counts the slots of a static cache.
        q_offset: slot of the first query; a 0-d tensor for a static cache.
        device: of the queries.
        given: bool `(batch, length)`, the 2-D attention mask, False for padding.
        neighbours: see `spans.Seen`.
        hidden: position ids that layers do not get, `(3, batch, q_len)` (M-RoPE) or `(batch, q_len)`.
        dense: the mask that transformers made for a layer with a window.
        windowed: whether these are the rows of such layers; `dense` may be None for them too.
    """

    ndim = 4  # for transformers, which counts the dimensions of a mask and leaves 4-D ones alone

    def __init__(
        self,
        batch: int,
        q_len: int,
        kv_len: int,
        q_offset: int | Tensor,
        device: torch.device | str,
        *,
        given: Tensor | None = None,
        neighbours: Tensor | None = None,
        hidden: Tensor | None = None,
        dense: Tensor | None = None,
        windowed: bool = False,
    ):
        # torch.jit.trace makes tensors of sizes
        self.batch, self.q_len, self.kv_len = (
            int(size) if isinstance(size, Tensor) else size for size in (batch, q_len, kv_len)
        )
        # the counter of a static cache, which has moved on when the first layer asks
        self.q_offset = q_offset.clone() if isinstance(q_offset, Tensor) else q_offset
        self.device = torch.device(device)
        self.given, self.neighbours, self.hidden = given, neighbours, hidden
        self.dense, self.windowed = dense, windowed
        self._seen: Seen | None = None
        self._layouts: dict[torch.device, Layout] = {}
        self._known: Layout | None = None
        if not windowed and (q_len == 1 or not self._may_look({})):
            self._known = self._unpacked({})  # before a graph begins, if it does not contain this

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of the mask it stands for."""
        return self.batch, 1, 1, self.kv_len

    def layout(self, kwargs: dict[str, Any], device: torch.device) -> Layout:
        """Where the sequences lie; the first layer that asks looks, for all.

        Args:
            kwargs: keywords of the attention function: `position_ids`, `cu_seq_lens_q` and what goes with it.
            device: where the layer lies.

        Raises:
            ValueError: a mask with a hole or too short, packed sequences that cannot be told apart or lie on
                top of a filled cache, offsets that do not fit.
        """
        if kwargs.get("cu_seq_lens_q") is not None:
            self._check_no_cache()
            if self.batch != 1:
                raise ValueError(f"cu_seq_lens_q describes one packed row, got a batch of {self.batch}")
        if not self._may_look(kwargs):
            return self._in_graph(kwargs)
        found = self._layouts.get(device)
        if found is None:
            origin = self._layouts.get(self.device) or self._known or self._unpacked(kwargs)
            self._layouts[self.device] = origin
            found = self._layouts[device] = origin if device == self.device else origin.to(device)
        return found

    def check_separated(self, kwargs: dict[str, Any], what: str) -> None:
        """Raises ValueError unless the masks of stock layers (`what` says why) keep packed rows apart."""
        if self._may_look(kwargs):
            if self.q_len > 1:
                check_separated(self._look(kwargs), what)
            return
        offsets = kwargs.get("cu_seq_lens_q")
        if offsets is None:
            self._assert_not_packed(kwargs)
        elif self.neighbours is None and offsets.shape[0] > 2:
            raise ValueError(joined(what))
        elif self.neighbours is not None:
            begins = offsets[1:-1]
            inside = (begins > 0) & (begins < self.q_len)
            sees = self.neighbours[0, 0][(begins - 1).clamp(0, self.q_len - 2)]
            _assert_later(~(inside & sees).any(), joined(what))

    def _may_look(self, kwargs: dict[str, Any]) -> bool:
        """Whether values can be read: not in a graph that is traced or captured, nor where there are none."""
        held = (self.given, self.q_offset, self.neighbours, self.hidden)
        given = (kwargs.get(name) for name in ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k"))
        return _may_look(self.device) and not any(isinstance(x, FakeTensor) for x in (*held, *given))

    def _unpacked(self, kwargs: dict[str, Any]) -> Layout:
        """The layout by a look where it is allowed, else from the device."""
        to_read = self.given if self.given is not None else self.q_offset
        if not self._may_look(kwargs) or (
            self.q_len == 1 and isinstance(to_read, Tensor) and not check_values(to_read)
        ):
            return self._on_device()
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
        """All values that say where rows lie, read at once: the one place that waits for the device."""
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
            _check_length(real.shape[1], q_offset, self.q_len)
            real = real[:, : q_offset + self.q_len].astype(bool)
        if "neighbours" in values:
            values["neighbours"] = values["neighbours"].astype(bool)
        self._seen = Seen(self.batch, self.q_len, self.kv_len, q_offset, real, **values)
        return self._seen

    def _by_row(self, seen: Seen, spans: np.ndarray) -> Layout:
        """The layout of rows with one sequence each, or none."""
        start, end = np.zeros((2, self.batch), dtype=np.int64)
        start[spans[:, 0]], end[spans[:, 0]] = spans[:, 1], spans[:, 2]
        q_begin = (start - seen.q_offset).clip(0, self.q_len)
        q_end = np.maximum((end - seen.q_offset).clip(0, self.q_len), q_begin)
        table = np.stack([np.arange(self.batch), q_begin, q_end, start, end], axis=1)
        plain = self.given is None and isinstance(self.q_offset, int) and seen.end == self.kv_len
        kv_start = None if plain else self._copied(start)
        sequences = Sequences(self._copied(table.astype(np.int32)), self.q_len, self.kv_len, True, kv_start)
        # a static cache never counts as whole, so that its graphs stay one
        whole = isinstance(self.q_offset, int) and seen.end == self.kv_len and not seen.padded()
        return Layout(sequences, whole=whole, starts=tuple(start.tolist()))

    def _packed(self, spans: np.ndarray) -> Layout:
        table = self._copied(spans[:, [0, 1, 2, 1, 2]].astype(np.int32))
        longest = int((spans[:, 2] - spans[:, 1]).max(initial=0))
        return Layout(Sequences(table, longest, longest, by_row=False), spans=spans.tolist())

    def _copied(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)

    def _on_device(self) -> Layout:
        """The layout where nothing can be read: bounds stay on the device, a hole raises there."""
        batch, q_len, kv_len, device = self.batch, self.q_len, self.kv_len, self.device
        plain = self.given is None and isinstance(self.q_offset, int) and self.q_offset + q_len == kv_len
        if plain:
            table = batched_table(batch, q_len, kv_len, device)
            return Layout(Sequences(table, q_len, kv_len), whole=True)
        offset = torch.zeros(batch, dtype=torch.int64, device=device) + self.q_offset
        if self.given is None:
            kv_start, kv_end = torch.zeros_like(offset), offset + q_len
        else:
            real = self._real()
            kv_start, kv_end = _bounds(real)
            if isinstance(self.q_offset, Tensor):
                _assert_later(self.q_offset + q_len <= self.given.shape[1], SHORT)
        table = batched_table(batch, q_len, kv_len, device, kv_start, kv_end, offset)
        return Layout(Sequences(table, q_len, kv_len, True, kv_start))

    def _real(self) -> Tensor:
        """Bool `(batch, kv_len)`: slots that are written and no padding."""
        assert self.given is not None
        given, written = self.given.to(torch.bool), self.q_offset + self.q_len
        if isinstance(written, int) and given.shape[1] == self.kv_len == written:
            return given  # a step of a dynamic cache: every slot is written, few operators matter
        missing = self.kv_len - given.shape[1]
        given = nn.functional.pad(given, (0, max(0, missing)))[:, : self.kv_len]
        return given & (torch.arange(self.kv_len, device=self.device) < written)

    def _in_graph(self, kwargs: dict[str, Any]) -> Layout:
        """The layout inside a graph: offsets tell of packing; without them it is asserted to be absent."""
        offsets = kwargs.get("cu_seq_lens_q")
        if offsets is None:
            self._assert_not_packed(kwargs)
            return self._on_device() if self._known is None else self._known
        other, bound = kwargs.get("cu_seq_lens_k"), kwargs.get("max_length_q")
        longest = self.q_len if bound is None else int(bound)
        lengths = offsets.diff()
        fits = ((lengths >= 0) & (lengths <= longest)).all() & (offsets[0] == 0) & (offsets[-1] <= self.q_len)
        if other is not None:
            fits = fits & (other == offsets).all()
        if self.given is not None:
            named = torch.arange(self.q_len, device=self.device) < offsets[-1]
            fits = fits & ((self._real() == named).all() | self._real().all())
        _assert_later(fits, _OFFSETS_UNDER_COMPILE)
        return Layout(Sequences(packed_table(offsets, offsets), longest, longest, by_row=False))

    def _assert_not_packed(self, kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids")
        if self.q_len == 1 or positions is None or positions.ndim != 2 or positions.shape[1] != self.q_len:
            return
        rises = positions.diff(dim=1) > 0
        if self.given is not None:
            slot = torch.arange(self.q_len, device=self.device) + self.q_offset
            real = self.given[:, slot.clamp(max=self.given.shape[1] - 1)]
            rises = rises | ~(real[:, 1:] & real[:, :-1])
        _assert_later(rises.all(), _PACKED_UNDER_COMPILE)

    def _check_no_cache(self) -> None:
        if self.q_len != self.kv_len:
            raise ValueError(
                f"packed sequences need all their keys in the call, got {self.q_len} queries over "
                f"{self.kv_len} keys: start from an empty dynamic cache or pass use_cache=False"
            )


def moba_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | Rows | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    config: Any = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | Rows | None:
    """The rows of a forward; transformers calls it with keywords only, once per forward and kind of layer.

    Layers with windows or chunks (`local_size`) get transformers' own dense mask inside their `Rows`; custom
    overlays and bidirectional models get that mask itself.

    Raises:
        ValueError: a mask that is shorter than the cache and the call together, or that Ulysses would drop,
            or ring attention.
    """
    if not torch.compiler.is_compiling():
        refuse_ring_attention()
        if not isinstance(attention_mask, Rows):
            refuse_lost_padding(attention_mask)
    if isinstance(attention_mask, Rows):  # made by `generate` before the forward, for a static cache
        return attention_mask
    bidirectional = kwargs.get("allow_is_bidirectional_skip") or not getattr(config, "is_causal", True)
    overlay = mask_function not in (None, causal_mask_function)
    alone = attention_mask is None and q_length == kv_length
    custom = bidirectional or use_vmap or (overlay and not alone and local_size is None)
    dense = None
    if custom or local_size is not None:
        dense = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            device=device,
            config=config,
            use_vmap=use_vmap,
            **({} if mask_function is None else {"mask_function": mask_function}),
            **kwargs,
        )
    if custom:
        return dense
    if attention_mask is not None and isinstance(q_offset, int):
        _check_length(attention_mask.shape[1], q_offset, q_length)
    neighbours = None
    if overlay and alone and q_length > 1:
        row, query = (
            torch.arange(batch_size, device=device)[:, None],
            torch.arange(1, q_length, device=device),
        )
        pairs = [mask_function(row, 0, query, query - 1), mask_function(row, 0, query - 1, query)]
        neighbours = torch.stack([x.expand(batch_size, -1) for x in pairs])
    hidden = (
        q_length > 1 and isinstance(q_offset, int) and q_offset == 0 and not torch.compiler.is_compiling()
    )
    return Rows(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        device,
        given=attention_mask,
        neighbours=neighbours,
        hidden=_hidden_positions(config, batch_size, q_length) if hidden else None,
        dense=dense,
        windowed=local_size is not None,
    )


def _bounds(real: Tensor) -> tuple[Tensor, Tensor]:
    """First slot and last + 1 of the rows of `real`, int64 `(batch,)`; a hole raises on the device."""
    start, count = real.view(torch.uint8).argmax(dim=1), real.sum(dim=1)
    begins = (real[:, 1:] > real[:, :-1]).sum(dim=1) + real[:, 0]
    _assert_later((begins <= 1).all(), f"the attention mask {HOLE}")
    return start, start + count


def _hidden_positions(config: Any, batch: int, length: int) -> Tensor | None:
    """Position ids of the forward that asks for a mask, where its layers give attention none.

    Vision-language models keep M-RoPE ids, `(3, batch, length)`, to themselves, and Ministral 3 its ids,
    `(batch, length)`, before transformers 5.18. So only the frame of their `forward` tells whether a caller
    packs documents, which would be mixed.
    """
    if not _KEPT & set(getattr(config, "rope_parameters", None) or {}):
        return None
    frame = sys._getframe(2)
    for _ in range(_FRAMES):
        known = frame.f_locals
        if frame.f_code.co_name == "forward" and "inputs_embeds" in known:
            ids = known.get("position_ids")
            if not isinstance(ids, Tensor) or known.get("text_position_ids") is not None:
                return None
            if ids.ndim == 2 and ids.shape[1] == length:
                return ids.expand(batch, length)
            return ids.expand(3, batch, length) if ids.ndim == 3 and ids.shape[::2] == (3, length) else None
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def _may_look(device: torch.device) -> bool:
    """Whether values on `device` can be read: not in a graph that is traced or captured."""
    if torch.compiler.is_compiling() or device.type == "meta":
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _assert_later(holds: Tensor, message: str) -> None:
    """Raises RuntimeError when the device finds that `holds`, 0-d, is False; a meta tensor has no value."""
    if holds.device.type != "meta":
        torch._assert_async(holds, message)


def _read(tensors: dict[str, Tensor | None], device: torch.device) -> dict[str, np.ndarray]:
    """Values of the integer and bool tensors that are given, as int32 on the host, by one copy."""
    given = {name: x for name, x in tensors.items() if x is not None}
    if not given:
        return {}
    flat = torch.cat([x.detach().reshape(-1).to(device, torch.int32) for x in given.values()]).cpu().numpy()
    parts = np.split(flat, np.cumsum([x.numel() for x in given.values()])[:-1])
    return {name: part.reshape(x.shape) for (name, x), part in zip(given.items(), parts, strict=True)}


def _check_length(length: int, q_offset: int, q_len: int) -> None:
    if length < q_offset + q_len:
        raise ValueError(
            f"{SHORT}: it has {length}, the cache holds {q_offset} tokens and the call {q_len} more"
        )
