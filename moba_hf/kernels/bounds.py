"""The first and last real slot of each row of a padding mask, in one launch, for decode steps.

Torch operators need twenty launches for this, a noticeable part of a decode step of a small model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.launch import device_of
from moba_hf.kernels.layout import (
    SEQ_BATCH,
    SEQ_COLUMNS,
    SEQ_K_BEGIN,
    SEQ_K_END,
    SEQ_Q_BEGIN,
    SEQ_Q_END,
)


def row_bounds(given: Tensor, q_offset: int, q_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence table of rows with queries at slots `[q_offset, q_offset + q_len)`.

    Args:
        given: bool `(batch, >= q_offset + q_len)`, False for padding; slots after the queries are ignored.
        q_offset: slot of the first query.
        q_len: queries per row.

    Returns:
        `table`, int32 `(batch, 5)`, see `moba_hf.op.sequences`; `kv_start`, int64 `(batch,)`, the first real
        slot, 0 in a row that is all padding; and bool `(batch,)`, whether a row's real slots have no hole.
    """
    batch = given.shape[0]
    table = torch.empty(batch, SEQ_COLUMNS.value, dtype=torch.int32, device=given.device)
    kv_start = torch.empty(batch, dtype=torch.int64, device=given.device)
    unbroken = torch.empty(batch, dtype=torch.uint8, device=given.device)
    with device_of(given):
        _bounds_kernel[(batch,)](
            given.view(torch.uint8),
            table,
            kv_start,
            unbroken,
            *given.stride(),
            q_offset,
            q_len,
            BLOCK=tuning.choices_for(given).bounds_slots,
            num_warps=4,
        )
    return table, kv_start, unbroken.view(torch.bool)


@triton.jit(do_not_specialize=["row_stride", "slot_stride", "q_offset", "q_len"])
def _bounds_kernel(
    given_ptr,
    table_ptr,
    start_ptr,
    unbroken_ptr,
    row_stride,
    slot_stride,
    q_offset,
    q_len,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    written = q_offset + q_len
    first, count, begins = written, 0, 0
    for block in range(0, written, BLOCK):
        slot = block + tl.arange(0, BLOCK)
        at = given_ptr + row * row_stride + slot.to(tl.int64) * slot_stride
        real = (tl.load(at, mask=slot < written, other=0) != 0).to(tl.int32)
        before = tl.load(at - slot_stride, mask=(slot > 0) & (slot < written), other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(real > 0, slot, written), 0))
        count += tl.sum(real, 0)
        begins += tl.sum(tl.where(before, 0, real), 0)
    start = tl.where(count > 0, first, 0)
    end = start + count
    q_begin = tl.minimum(tl.maximum(start - q_offset, 0), q_len)
    q_end = tl.maximum(tl.minimum(tl.maximum(end - q_offset, 0), q_len), q_begin)
    table_ptr += row * SEQ_COLUMNS
    tl.store(table_ptr + SEQ_BATCH, row.to(tl.int32))
    tl.store(table_ptr + SEQ_Q_BEGIN, q_begin)
    tl.store(table_ptr + SEQ_Q_END, q_end)
    tl.store(table_ptr + SEQ_K_BEGIN, start)
    tl.store(table_ptr + SEQ_K_END, end)
    tl.store(start_ptr + row, start.to(tl.int64))
    tl.store(unbroken_ptr + row, tl.where(begins <= 1, 1, 0).to(tl.uint8))
