"""When the Gluon kernels for Hopper are used, and how they are launched.

They need the warpgroup matrix units and the tensor memory accelerator of compute capability 9.0. Gluon's API
is young and changes between releases, so the first use on a device compiles one variant of each kernel to
check that the installed Triton accepts them. If it does not, or if the sizes do not fit, `own` and `routed`
compute the same in plain Triton.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
import triton
from torch import Tensor

from moba_hf.kernels import tuning
from moba_hf.kernels.inputs import Inputs
from moba_hf.kernels.launch import INTERPRETED, device_of, num_processors
from moba_hf.kernels.layout import INFO_COLUMNS
from moba_hf.kernels.routing import Routes
from moba_hf.kernels.tiling import make_tiling, tile_table
from moba_hf.op.sequences import batched_table

_DIMS = (64, 128)


@cache
def _kernels(name: str) -> Any:
    """Imports a module of Gluon kernels on first use."""
    return import_module(f"moba_hf.kernels.hopper.{name}")


def available(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the Gluon kernels support these `(batch, heads, length, dim)` tensors on this machine."""
    if INTERPRETED or tuning.capability(q.device) != (9, 0):
        return False
    if q.shape[3] not in _DIMS or v.shape[3] not in _DIMS or 128 % (q.shape[1] // k.shape[1]):
        return False
    a, b, c, _ = q.stride()
    fits = a % 8 == b % 8 == c % 8 == 0 and _addressable(k) and _addressable(v)
    return fits and compiles(q.device)


@cache
def compiles(device: torch.device) -> bool:
    """Whether the installed Triton compiles the Gluon kernels for `device`; warns once if it does not."""
    try:
        for block_size in (tuning.HOPPER.resident.n, 4 * tuning.HOPPER.resident.n):
            _compile(device, block_size)
    except Exception as error:  # a future release of the compiler may raise anything
        warnings.warn(
            f"Triton {triton.__version__} does not compile the Gluon kernels of moba_hf "
            f"({type(error).__name__}: {_first_cause(error)}): plain Triton kernels run instead, with the "
            "same results but slower; CONTRIBUTING.md names the releases of Triton that are tested",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _first_cause(error: BaseException) -> str:
    """The last line of the root error; Triton wraps another error around it for each function."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _compile(device: torch.device, block_size: int) -> None:
    """Compiles the kernels for own and routed blocks of `block_size`, without launching them."""
    length, group, dim = 2 * block_size, 4, 128
    q = torch.empty(1, group, length, dim, dtype=torch.bfloat16, device=device)
    k = q[:, :1]
    lse = torch.empty(1, group, length, device=device)
    table = batched_table(1, length, length, device)
    tile = tuning.HOPPER.own_partial.m // group
    tiling = make_tiling(q, k, table, length, length, block_size=block_size, tile=tile)
    numbers = torch.empty(length, INFO_COLUMNS.value, dtype=torch.int32, device=device)
    routes = Routes(numbers.long(), numbers, numbers, numbers, 2, tuning.HOPPER.resident.m)
    inputs = Inputs(q, k, k, tiling, 1.0)
    own_attention(inputs, 0, q, lse, False, compile_only=True)
    found = routed_tile(block_size, (dim, dim))
    assert found is not None
    routed_attention(inputs, routes, q, lse[..., :8], 0, *found, compile_only=True)


def _start(kernel: Any, q: Tensor, args: tuple[Any, ...], compile_only: bool, **constants: Any) -> None:
    """Launches a persistent kernel, one program per multiprocessor of `q`'s GPU, or only compiles it."""
    grid = (num_processors(q),)
    with device_of(q):
        if compile_only:
            kernel.warmup(*args, grid=grid, **constants)
        else:
            kernel[grid](*args, **constants)


def _addressable(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can read `x`: 16-byte strides, last dimension contiguous."""
    *steps, last = x.stride()
    return last == 1 and x.data_ptr() % 16 == 0 and min(steps) > 0 and not any(step % 8 for step in steps)


def takes_own(block_size: int) -> bool:
    """Whether `own_attention` supports blocks of this size."""
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
    compile_only: bool = False,
) -> None:
    """`own.own_attention` for complete blocks only, with the same arguments."""
    q, k, v, tiling = inputs.q, inputs.k, inputs.v, inputs.tiling
    tile = tuning.HOPPER.own
    args = (
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
    )
    _start(
        _kernels("own").own_kernel,
        q,
        args,
        compile_only,
        G=q.shape[1] // k.shape[1],
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
    compile_only: bool = False,
) -> None:
    """`routed.routed_attention` with the same arguments; `tile` and `resident` come from `routed_tile`."""
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
    args = (
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
    )
    _start(kernel, q, args, compile_only, **constants, num_warps=4)


def _descriptor(x: Tensor, rows: int, columns: int | None = None) -> Any:
    """Tensor descriptor for TMA to read `x (batch, heads, length, dim)`, `rows` tokens at a time.

    Args:
        columns: columns read at a time; None: all.
    """
    kind, layout = _descriptor_kind()
    return kind(x, list(x.shape), list(x.stride()), [1, 1, rows, columns or x.shape[3]], layout)


@cache
def _descriptor_kind() -> tuple[Any, Any]:
    """The class of descriptors, and their layout in shared memory."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor, gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
