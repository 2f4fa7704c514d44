"""Appends new keys and values to a static cache and updates its length, in one launch.

Legend: HK kv heads, M new tokens, D and DV head dims.

A single program writes everything, because it reads the length first and increments it last. This is meant
for decode steps, whose few rows are not worth launching four operators.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.launch import INTERPRETED, device_of, head_dims, rows_contiguous
from moba_hf.kernels.layout import Constant, row_offset

# Maximum number of rows (batch x HK x M) that one program should write.
MAX_ROWS = 256
_CAN_TRAP = Constant(not INTERPRETED)


def append(keys: Tensor, values: Tensor, length: Tensor, key_states: Tensor, value_states: Tensor) -> None:
    """Writes states into slots `[length, length + M)` and adds M to `length`, in place.

    Slots beyond the end of the cache trap on the device, as torch's own index checks do.

    Args:
        keys, values: `(batch, HK, slots, D or DV)`, last dimension contiguous.
        length: int64, 0-d, number of filled slots.
        key_states, value_states: `(batch, HK, M, D or DV)`, any strides.
    """
    key_states, value_states = rows_contiguous(key_states), rows_contiguous(value_states)
    batch, num_kv_heads, count, head_dim = key_states.shape
    v_dim = value_states.shape[3]
    with device_of(keys):
        _append_kernel[(1,)](
            keys,
            values,
            length,
            key_states,
            value_states,
            keys.stride()[:3],
            values.stride()[:3],
            key_states.stride()[:3],
            value_states.stride()[:3],
            batch * num_kv_heads * count,
            num_kv_heads,
            count,
            keys.shape[2],
            ROWS=tuning.choices_for(keys).append_rows,
            num_warps=8,
            **head_dims(head_dim, v_dim),
        )


@triton.jit
def _copy_rows(
    to_ptr,
    from_ptr,
    batch,
    head,
    token,
    slot,
    mask,
    to_strides,
    from_strides,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    dim = tl.arange(0, PADDED)
    mask = mask[:, None] & (dim < DIM)[None, :]
    source = row_offset(batch, head, token, from_strides)
    target = row_offset(batch, head, slot, to_strides)
    states = tl.load(from_ptr + source[:, None] + dim[None, :], mask=mask)
    tl.store(to_ptr + target[:, None] + dim[None, :], states, mask=mask)


@triton.jit(do_not_specialize=["rows", "num_kv_heads", "count", "slots"])
def _append_kernel(
    key_ptr,
    value_ptr,
    length_ptr,
    new_key_ptr,
    new_value_ptr,
    k_strides,
    v_strides,
    nk_strides,
    nv_strides,
    rows,
    num_kv_heads,
    count,
    slots,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    length = tl.load(length_ptr)
    if _CAN_TRAP:
        if length + count > slots:
            tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        token = (row % count).to(tl.int64)
        head = (row // count % num_kv_heads).to(tl.int64)
        batch = (row // count // num_kv_heads).to(tl.int64)
        mask = (row < rows) & (length + token < slots)
        _copy_rows(
            key_ptr, new_key_ptr, batch, head, token, length + token, mask,
            k_strides, nk_strides, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip
        _copy_rows(
            value_ptr, new_value_ptr, batch, head, token, length + token, mask,
            v_strides, nv_strides, V_DIM, PADDED_V,
        )  # fmt: skip
    tl.debug_barrier()  # no warp may update the length before all have read it
    tl.store(length_ptr, length + count)
