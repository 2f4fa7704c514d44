"""Compiles the kernels that a call would launch, for any GPU, on a machine without one.

`compiled(call, capability)` runs the host code on CPU tensors, records the launches instead of executing
them, and compiles each distinct kernel with its arguments. It returns registers, spills and shared memory as
reported by `ptxas`. `python tests/kernels/kernel_aot.py` prints a table of the main variants.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from forced import fewer_levels
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moba_hf.config import LayerConfig
from moba_hf.kernels import (
    append,
    attend,
    attend_backward,
    choose_blocks,
    dense_decode_attention,
    row_bounds,
    select_blocks,
    tuning,
    update_block_means,
)
from moba_hf.kernels.forward import Forced
from moba_hf.kernels.launch import INTERPRETED
from moba_hf.kernels.sparse_decode import decode_attention
from moba_hf.kernels.tuning_backward import BackwardTiles
from moba_hf.op.sequences import Attended, Sequences, batched_table

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Report:
    """The `ptxas` report of one kernel: 32-bit registers per thread, spilled bytes, whether it serialised the
    warpgroup matrix products, shared memory in bytes, columns of tensor memory (compute capability 10)."""

    kernel: str
    capability: int
    warps: int
    registers: int
    spills: int
    serialised: bool
    shared: int
    columns: int


def recorded(
    call: Callable[[], object], *, only_compiled: bool = False
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, arguments, keywords) of the launches that `call` makes, or of those that it only compiles;
    none is executed."""
    launches = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if warmup == only_compiled:
            launches.append((self, args, kwargs))

    with mock.patch.object(triton.JITFunction, "run", record):
        call()
    return launches


def source_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ASTSource, dict[str, int]]:
    """A launch, specialised as Triton would do: dtypes, divisibility by 16, ones as constants."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}

    def typed(place: tuple[int, ...], value: Any, constant: bool, special: bool) -> Any:
        """The type of the argument at `place`; records what Triton knows about its value."""
        if isinstance(value, tuple) and not constant:
            return tuple(typed((*place, j), x, False, special) for j, x in enumerate(value))
        if constant or value is None or (special and type(value) is int and value == 1):
            constants[place] = value
            return "constexpr"
        if isinstance(value, Tensor) or (type(value) is int and special and value % 16 == 0):
            attributes[place] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return "*" + _TYPES[value.dtype]
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape},{value.layout!r}>"
        if isinstance(value, float):
            return "fp32"
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, parameter in enumerate(kernel.params):
        special = not parameter.do_not_specialize
        signature[parameter.name] = typed((i,), values[parameter.name], parameter.is_constexpr, special)
    options = {key: kwargs[key] for key in ("num_warps", "num_stages", "maxnreg") if kwargs.get(key)}
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return source(kernel, signature, constants, attributes), options


def compile_launch(launch: tuple[Any, tuple[Any, ...], dict[str, Any]], capability: int) -> Report:
    """Compiles one launch for compute capability `capability`, as 80, 90, 100."""
    source, options = source_of(*launch)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    said = _ptxas(built.asm["ptx"], capability)
    memory = built.metadata.shared, built.metadata.tmem_size or 0
    return Report(launch[0].__name__, capability, options.get("num_warps", 4), *said, *memory)


def _ptxas(ptx: str, capability: int) -> tuple[int, int, bool]:
    """Registers per thread, spilled bytes, and whether wgmma is serialised, by the `ptxas` of triton."""
    binary = get_ptxas(capability).path
    target = re.search(r"\.target (\S+)", ptx).group(1).rstrip(",")  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [binary, "-v", f"--gpu-name={target}", str(file), "-o", str(Path(folder) / "out")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(x) for x in re.findall(r"Used (\d+) registers", said))
    spills = sum(int(x) for x in re.findall(r"(\d+) bytes spill stores", said))
    return registers, spills, "are serialized" in said


def forward_call(
    *,
    length: int = 4096,
    num_heads: int = 4,
    num_kv_heads: int = 1,
    head_dim: int = 128,
    v_dim: int | None = None,
    block_size: int = 128,
    topk: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    queries: int | None = None,
    packed: bool = True,
    levels: int | None = None,
    resident: bool | None = None,
    gate: str = "mean",
) -> Callable[[], object]:
    """A call that selects and attends; values are never computed."""
    queries = length if queries is None else queries

    def tensor(rows: int, heads: int, dim: int) -> Tensor:
        if packed:
            return torch.empty(rows, heads, dim, dtype=dtype).transpose(0, 1)[None]
        return torch.empty(1, heads, rows, dim, dtype=dtype)

    def call() -> None:
        q = tensor(queries, num_heads, head_dim)
        k, v = tensor(length, num_kv_heads, head_dim), tensor(length, num_kv_heads, v_dim or head_dim)
        table = batched_table(1, queries, length, q.device)
        sequences, scale = Sequences(table, queries, length), head_dim**-0.5
        with fewer_levels(levels) if levels else nullcontext():
            choice = select_blocks(q, k, sequences, LayerConfig(block_size, topk, gate=gate), scale)
        attend(q, k, v, choice, sequences, block_size, scale, forced=Forced(resident=resident))

    return call


def backward_call(
    *,
    length: int = 4096,
    num_heads: int = 4,
    num_kv_heads: int = 1,
    head_dim: int = 128,
    v_dim: int | None = None,
    block_size: int = 128,
    topk: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    tiles: BackwardTiles | None = None,
) -> Callable[[], object]:
    """A call of the backward on packed tensors; values are never computed."""

    def tensor(heads: int, dim: int) -> Tensor:
        return torch.empty(length, heads, dim, dtype=dtype).transpose(0, 1)[None]

    def call() -> None:
        q, k, v = (
            tensor(*x)
            for x in ((num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, v_dim or head_dim))
        )
        out = torch.empty(1, length, num_heads, v_dim or head_dim, dtype=dtype)
        lse = torch.empty(1, num_heads, length)
        choice = torch.zeros(1, length, num_heads, topk, dtype=torch.int32)
        sequences = Sequences(batched_table(1, length, length, q.device), length, length)
        saved = Attended(q, k, v, out, lse, choice)
        attend_backward(out, lse, saved, sequences, block_size, head_dim**-0.5, tiles=tiles)

    return call


def decode_call(
    *,
    length: int = 1 << 17,
    queries: int = 1,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    v_dim: int | None = None,
    block_size: int = 128,
    topk: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> Callable[[], object]:
    """A decode step, sparse and dense, on a static cache; values are never computed."""

    def call() -> None:
        def tensor(heads: int, rows: int, dim: int) -> Tensor:
            return torch.empty(1, heads, rows, dim, dtype=dtype)

        q = tensor(num_heads, queries, head_dim)
        k, v = (tensor(num_kv_heads, length, x) for x in (head_dim, v_dim or head_dim))
        new = [tensor(num_kv_heads, queries, x.shape[3]) for x in (k, v)]
        means, at = tensor(num_kv_heads, length // block_size, head_dim), torch.tensor(length)
        table, start = batched_table(1, queries, length, q.device), torch.zeros(1, dtype=torch.int64)
        row_bounds(torch.ones(1, length, dtype=torch.bool), length - queries, queries)
        append(k, v, at, *new)
        update_block_means(means, k, start, at, queries, block_size)
        choice = choose_blocks(q, means, table, length, block_size, topk, 0, 0)
        sequences = Sequences(table, queries, length)
        decode_attention(q, k, v, choice, sequences, block_size, head_dim**-0.5, by_row=True)
        dense_decode_attention(q, k, v, table, head_dim**-0.5)

    return call


def recorded_for(
    call: Callable[[], object], capability: int
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The launches that `call` makes on a GPU of compute capability `capability`, as 80, 90, 100."""
    assert not INTERPRETED, "unset TRITON_INTERPRET"
    with mock.patch.object(tuning, "capability", return_value=divmod(capability, 10)):
        return recorded(call)


def compiled(call: Callable[[], object], capability: int, named: str = "") -> list[Report]:
    """One report per distinct kernel that `call` launches and whose name contains `named`."""
    launches = recorded_for(call, capability)
    return [compile_launch(launch, capability) for launch in launches if named in launch[0].__name__]


MAIN: dict[str, dict[str, Any]] = {
    "128/8": {},
    "128/8 long gate": {"length": 1 << 20, "queries": 64, "levels": 3, "num_heads": 4},
    "64/16 long gate": {"block_size": 64, "topk": 16, "length": 1 << 17, "queries": 64},
    "512/3": {"block_size": 512, "topk": 3},
    "4096/12": {"block_size": 4096, "topk": 12, "length": 1 << 17, "queries": 64},
    "128/8 streaming": {"resident": False},
    "128/8 fp16 d64": {"head_dim": 64, "dtype": torch.float16},
    "96/5 d96 g3": {"head_dim": 96, "block_size": 96, "topk": 5, "num_heads": 3},
    "128/8 d256": {"head_dim": 256},
    "128/8 d192 v128": {"head_dim": 192, "v_dim": 128},
    "decode 128/8": {"queries": 1},
    "topk 64": {"topk": 64, "length": 1 << 17, "queries": 64},
    "mass 32/64": {"gate": "mass", "block_size": 32, "topk": 64, "length": 1 << 17, "queries": 64},
    "mass 64/16 d64": {"gate": "mass", "block_size": 64, "topk": 16, "head_dim": 64},
    "mass 128/8 d256": {"gate": "mass", "head_dim": 256},
}
DECODE: dict[str, dict[str, Any]] = {
    "step 128/16": {},
    "step 128/16 512K": {"length": 1 << 19},
    "step 128/16, 16 tokens": {"queries": 16},
    "step 32/64 fp16 d64": {"block_size": 32, "topk": 64, "head_dim": 64, "dtype": torch.float16},
    "step 4096/12 d192 v128": {"block_size": 4096, "topk": 12, "head_dim": 192, "v_dim": 128},
    "step 16/8 d256, 2M": {"block_size": 16, "topk": 8, "head_dim": 256, "length": 1 << 21, "num_heads": 8},
}


def main() -> None:
    capabilities = [int(x) for x in sys.argv[1:]] or [90]
    print("| variant | sm | kernel | warps | registers | spills B | shared B |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for capability in capabilities:
        calls = {name: forward_call(**variant) for name, variant in MAIN.items()}
        calls |= {name: decode_call(**variant) for name, variant in DECODE.items()}
        for name, call in calls.items():
            for r in compiled(call, capability):
                cells = (r.capability, r.kernel, r.warps, r.registers, r.spills, r.shared)
                print(f"| {name} |", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
