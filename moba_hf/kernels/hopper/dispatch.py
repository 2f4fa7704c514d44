"""Where the Gluon kernels for Hopper are used, and how they are launched.

They need warpgroup matrix units and the tensor memory accelerator of compute capability 9.0, and the Triton
they were written for: Gluon's API is young and changes from release to release. Everywhere else, and wherever
`takes_*` say no, `own` and `routed` compute the same in plain Triton.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import triton
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.inputs import Inputs
from moba_hf.kernels.launch import INTERPRETED, device_of, num_processors
from moba_hf.kernels.routing import Routes
from moba_hf.kernels.tiling import tile_table

_TRITON = ("3.6.",)  # releases whose Gluon these kernels are tested with
_DIMS = (64, 128)


@cache
def _kernels(name: str) -> Any:
    """A module of Gluon kernels."""
    return import_module(f"moba_hf.kernels.hopper.{name}")


def available(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these `(batch, heads, length, dim)` tensors, and this machine, suit the Gluon kernels."""
    if INTERPRETED or tuning.capability(q.device) != (9, 0) or not triton.__version__.startswith(_TRITON):
        return False
    if q.shape[3] not in _DIMS or v.shape[3] not in _DIMS or 128 % (q.shape[1] // k.shape[1]):
        return False
    return all(_addressable(x) for x in (k, v)) and all(s % 8 == 0 for s in q.stride()[:3])


def _addressable(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can read `x`: 16-byte steps, last dimension contiguous."""
    steps = [x.stride(i) for i in range(3)]
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in steps)


def takes_own(block_size: int) -> bool:
    """Whether blocks of this size go to `own`."""
    return block_size % tuning.HOPPER.own.n == 0


def routed_tile(block_size: int, dims: tuple[int, int]) -> tuple[tuning.Tile, bool] | None:
    """The tile of the routed kernel, and whether the block stays resident; None: no kernel for this size."""
    if block_size == tuning.HOPPER.resident.n and dims[0] == dims[1]:
        return tuning.HOPPER.resident, True
    if block_size < 2 * tuning.HOPPER.resident.n:
        return None
    for tile in tuning.HOPPER.stream:
        if block_size % tile.n == 0:
            return tile, False
    return None


def own_attention(
    inputs: Inputs,
    chunk: int,
    out: Tensor,
    lse: Tensor,
    final: bool,
) -> None:
    """What `own.own_attention` does, for complete blocks only; arguments as there."""
    q, k, v, tiling = inputs.q, inputs.k, inputs.v, inputs.tiling
    tile, group = tuning.HOPPER.own, q.shape[1] // k.shape[1]
    with device_of(q):
        _kernels("own").own_kernel[(num_processors(q),)](
            q,
            _descriptor(k, tile.n),
            _descriptor(v, tile.n),
            out,
            lse,
            tile_table(tiling, chunk, q.shape[2]),
            tiling.tile_offset[chunk],
            tiling.num_seqs,
            k.shape[1],
            q.shape[2],
            q.stride()[:3],
            inputs.softmax_scale,
            G=group,
            TILE=tiling.tile,
            BLOCK_SIZE=tiling.block_size,
            BLOCK_N=tile.n,
            D=q.shape[3],
            DV=v.shape[3],
            STAGES=tile.stages,
            FINAL=final,
            num_warps=4,
        )


def routed_attention(
    inputs: Inputs,
    routes: Routes,
    partial: Tensor,
    partial_lse: Tensor,
    first_row: int,
    tile: tuning.Tile,
    resident: bool,
) -> None:
    """What `routed.routed_attention` does; arguments as there, `tile` and `resident` of `routed_tile`."""
    q, k, v, block_size = inputs.q, inputs.k, inputs.v, inputs.tiling.block_size
    keys = block_size if resident else tile.n
    constants: dict[str, Any] = {
        "SLOTS": partial_lse.shape[-1],
        "HEADS": q.shape[1],
        "ONE_BATCH": q.shape[0] == 1,
        "BLOCK_SIZE": block_size,
        "D": q.shape[3],
    }
    if resident:
        kernel, consumers = _kernels("resident").resident_kernel, tile.m // 64
        constants |= {"CONSUMERS": consumers, "REGISTERS": tuning.HOPPER.resident_registers[consumers]}
    else:
        kernel = _kernels("stream").stream_kernel
        constants |= {"BLOCK_N": tile.n, "DV": v.shape[3], "STAGES": tile.stages}
    with device_of(q):
        kernel[(num_processors(q),)](
            q,
            _descriptor(k, keys),
            _descriptor(v, keys),
            partial,
            partial_lse,
            routes.pairs,
            routes.tile_info,
            routes.tile_begin,
            routes.num_bins,
            first_row,
            q.shape[2],
            q.stride()[:3],
            inputs.softmax_scale,
            **constants,
            num_warps=4,
        )


def _descriptor(x: Tensor, rows: int) -> Any:
    """`x (batch, heads, length, dim)` as the tensor memory accelerator reads it, `rows` tokens at a time."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, 1, rows, x.shape[3]]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
