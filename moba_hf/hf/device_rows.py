"""The layout of a forward if values cannot be read: in graphs, and in decode steps on a GPU.

Bounds stay on the device as tensors, and invalid values make an assertion on the device fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moba_hf.hf.layout import Layout
from moba_hf.hf.spans import HOLE, SHORT
from moba_hf.op.backends import CacheKernels
from moba_hf.op.sequences import Sequences, batched_table, packed_table

if TYPE_CHECKING:
    from moba_hf.hf.rows import Rows

_PACKED_UNDER_COMPILE = (
    "packed sequences under torch.compile: the position ids restart inside a row, but a compiled graph "
    "cannot read them; pass cu_seq_lens_q too (DataCollatorWithFlattening(return_flash_attn_kwargs=True))"
)
_OFFSETS_UNDER_COMPILE = (
    "cu_seq_lens_q must rise from 0 to at most the tokens of the call, equal cu_seq_lens_k, have no sequence "
    "longer than max_length_q, and cover exactly the tokens that are not padding in the attention mask"
)


def on_device(rows: Rows) -> Layout:
    """The layout without reading values: bounds stay on the device, and a hole fails an assertion there."""
    batch, q_len, kv_len, device = rows.batch, rows.q_len, rows.kv_len, rows.device
    plain = rows.given is None and isinstance(rows.q_offset, int) and rows.q_offset + q_len == kv_len
    if plain:
        table = batched_table(batch, q_len, kv_len, device)
        return Layout(Sequences(table, q_len, kv_len), whole=True)
    offset = torch.zeros(batch, dtype=torch.int64, device=device) + rows.q_offset
    if rows.given is None:
        kv_start, kv_end = torch.zeros_like(offset), offset + q_len
    else:
        real = _real(rows)
        kv_start, kv_end = _bounds(real)
        if isinstance(rows.q_offset, Tensor):
            assert_later(rows.q_offset + q_len <= rows.given.shape[1], SHORT)
    table = batched_table(batch, q_len, kv_len, device, kv_start, kv_end, offset)
    return Layout(Sequences(table, q_len, kv_len, True, kv_start))


def by_kernel(rows: Rows, kernels: CacheKernels) -> Layout:
    """`on_device` with a single kernel, for a decode step whose rows all end at the same slot."""
    assert rows.given is not None
    assert isinstance(rows.q_offset, int)
    table, kv_start, unbroken = kernels.row_bounds(rows.given.to(torch.bool), rows.q_offset, rows.q_len)
    assert_later(unbroken.all(), f"the attention mask {HOLE}")
    return Layout(Sequences(table, rows.q_len, rows.kv_len, True, kv_start))


def in_graph(rows: Rows, kwargs: dict[str, Any]) -> Layout:
    """The layout inside a graph. Packing needs offsets; without them it fails an assertion."""
    offsets = kwargs.get("cu_seq_lens_q")
    if offsets is None:
        assert_not_packed(rows, kwargs)
        return on_device(rows) if rows.known is None else rows.known
    other, bound = kwargs.get("cu_seq_lens_k"), kwargs.get("max_length_q")
    longest = rows.q_len if bound is None else int(bound)
    lengths = offsets.diff()
    fits = ((lengths >= 0) & (lengths <= longest)).all() & (offsets[0] == 0) & (offsets[-1] <= rows.q_len)
    if other is not None:
        fits = fits & (other == offsets).all()
    if rows.given is not None:
        named = torch.arange(rows.q_len, device=rows.device) < offsets[-1]
        fits = fits & ((_real(rows) == named).all() | _real(rows).all())
    assert_later(fits, _OFFSETS_UNDER_COMPILE)
    return Layout(Sequences(packed_table(offsets, offsets), longest, longest, by_row=False))


def assert_not_packed(rows: Rows, kwargs: dict[str, Any]) -> None:
    positions = kwargs.get("position_ids")
    if rows.q_len == 1 or positions is None or positions.ndim != 2 or positions.shape[1] != rows.q_len:
        return
    rises = positions.diff(dim=1) > 0
    if rows.given is not None:
        slot = torch.arange(rows.q_len, device=rows.device) + rows.q_offset
        real = rows.given[:, slot.clamp(max=rows.given.shape[1] - 1)]
        rises = rises | ~(real[:, 1:] & real[:, :-1])
    assert_later(nn.functional.pad(rises, (1, 0), value=True).all(), _PACKED_UNDER_COMPILE)


def _real(rows: Rows) -> Tensor:
    """Bool `(batch, kv_len)`: slots that have been written and are not padding."""
    assert rows.given is not None
    given, written = rows.given.to(torch.bool), rows.q_offset + rows.q_len
    if isinstance(written, int) and given.shape[1] == rows.kv_len == written:
        return given  # a step with a dynamic cache: every slot is written; saves operators
    missing = rows.kv_len - given.shape[1]
    given = nn.functional.pad(given, (0, max(0, missing)))[:, : rows.kv_len]
    return given & (torch.arange(rows.kv_len, device=rows.device) < written)


def _bounds(real: Tensor) -> tuple[Tensor, Tensor]:
    """First slot and end of each row of `real`, int64 `(batch,)`; a hole fails an assertion on the device.

    All reductions over a row here and in `assert_not_packed` have the same length: torch 2.11 cannot compile
    long ones for a GPU that differ by one slot.
    """
    start, count = real.to(torch.uint8).argmax(dim=1), real.sum(dim=1)
    begins = (real & ~nn.functional.pad(real, (1, 0))[:, :-1]).sum(dim=1)
    assert_later((begins <= 1).all(), f"the attention mask {HOLE}")
    return start, start + count


def assert_later(holds: Tensor, message: str) -> None:
    """Raises RuntimeError asynchronously if `holds` (0-d) is False; ignores meta tensors."""
    if holds.device.type != "meta":
        torch._assert_async(holds, message)
