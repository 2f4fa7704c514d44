"""All launch parameters, in one table by compute capability, and the predicate that says whether a tile fits.

They depend only on what is known before the launch (head dims, block size, dtype width, topk, capability). So
nothing is autotuned at run time, and equal calls run equal kernels. Numbers marked H200 were measured in bf16
at head_dim 128, those of the forward's plain Triton tiles on prototypes; the other tiles were chosen to use
similar amounts of shared memory and registers. `tuning_gate` says how a gate is launched, `tuning_backward`
holds the tiles of the backward, `budgets` the sizes that depend on memory.

To tune another GPU, add a line to `TABLE`: `(8, 0): replace(_DEFAULT, own=(...))`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

# Shared memory per program, in bytes, by compute capability; other GPUs get the smallest.
_SHARED_MEMORY = {
    (8, 0): 163 << 10,
    (8, 7): 163 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (10, 3): 227 << 10,
    (11, 0): 227 << 10,
}
_LEAST_SHARED_MEMORY = 99 << 10
# Calls with at most this many queries per sequence use the decode kernel on every GPU; caches rely on it.
DECODE_QUERIES = 16


@dataclass(frozen=True)
class Tile:
    """The tile of a kernel.

    Attributes:
        m: query rows in a tile (tokens x heads, or pairs).
        n: keys in a tile (in the gate, blocks).
        warps: warps per program.
        stages: depth of the software pipeline.
    """

    m: int
    n: int
    warps: int
    stages: int

    def arguments(self) -> dict[str, int]:
        """The launch arguments that a kernel takes from its tile, by name."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "STAGES": self.stages, "num_warps": self.warps}

    def shared_memory(self, dims: tuple[int, int], itemsize: int) -> int:
        """Bytes for queries and `stages` tiles of keys and values; `dims`: padded D and DV."""
        return (self.m * dims[0] + self.stages * self.n * sum(dims)) * itemsize

    def resident_memory(self, dims: tuple[int, int], itemsize: int) -> int:
        """Bytes for one resident tile of keys and values and `stages - 1` tiles of queries."""
        return (self.n * sum(dims) + (self.stages - 1) * self.m * max(dims)) * itemsize


SomeTile = TypeVar("SomeTile", bound=Tile)


@dataclass(frozen=True)
class RowTile:
    """The tile of a memory-bound kernel; it has few rows, since larger tiles spill.

    Attributes:
        narrow: rows per program for head dims up to 128.
        wide: rows per program for larger head dims.
        warps: warps per program.
        unroll: a loop over up to this many slots is fully unrolled.
        steps: with more slots, the number of slots loaded at once.
    """

    narrow: int
    wide: int
    warps: int = 4
    unroll: int = 16
    steps: int = 8

    def rows(self, dim: int) -> int:
        """Rows per program for head dim `dim`."""
        return self.narrow if dim <= 128 else self.wide


@dataclass(frozen=True)
class Choices:
    """The launch parameters for one kind of GPU.

    A tuple holds tiles in order of preference: the first one that fits shared memory is used, or the last if
    none fits.

    Attributes:
        mean_gate: tile of the mean gate and of the scores of a decode step (`choose`). Its `m`, `n` and
            `warps` determine the order in which a score is summed, and its `n` how many bits a score keeps
            (`levels.tile_bits`). The two kernels must share it, or near-ties would break differently in
            prefill and decode.
        mean_gate_most_levels: with more levels, the mean gate uses twice as many warps.
        mean_gate_registers: register limit of the mean gate, by number of levels.
        gate_rest_warps: warps of the mean gate's second kernel.
        gate_rest_levels: maximum levels of the mass gate's second kernel; more would spill.
        gate_rest_programs: programs per SM of a gate's second kernel.
        mass_gate: tiles of the mass gate up to 128 dims.
        mass_gate_wide: tiles of the mass gate above 128 dims.
        wide: tiles for own and routed blocks above 128 dims.
        own: tiles for own blocks.
        routed: tiles for routed blocks.
        routed_long: tiles for routed blocks of at least `long_block` keys.
        long_block: see `routed_long`.
        resident: rows, warps and stages of the resident kernel, whose tile of keys is a block.
        resident_tiles: number of row tiles that one program of the resident kernel processes.
        dense_decode: tiles of full attention for a few queries.
        dense_decode_programs: programs per SM to aim for when its keys are split.
        dense_decode_splits: maximum number of its splits.
        decode_partials: calls with at most this many partial outputs may use the decode kernel.
        decode_segments: minimum and maximum keys attended by one of its programs: longer blocks are split;
            shorter ones are split until there are `decode_programs` programs per SM.
        decode_programs: see `decode_segments`.
        decode_keys: maximum keys in one of its tiles.
        decode_parts: minimum and maximum number of partial outputs that `merge_parts` adds at once.
        choose_columns: columns per program that scores for a decode step.
        choose_held: maximum keys that a program of `choose` holds in registers.
        choose_many: with at least this many, `choose` uses 8 warps.
        route_rows: rows of the pair-key kernel: (tokens in a tile) x (query heads).
        route_tiles: number of tiles that one program of `routing` describes.
        append_rows: number of rows that `append` copies at once.
        bounds_slots: number of slots of a padding mask that `row_bounds` reads at once.
        merge, row_stats, sum_partials: tiles of the kernels with these names.
        fold: number of values that one program of the backward's fold kernel adds.
    """

    mean_gate: Tile
    mean_gate_most_levels: int
    mean_gate_registers: tuple[tuple[int, int], ...]
    gate_rest_warps: int
    gate_rest_levels: int
    gate_rest_programs: int
    mass_gate: tuple[Tile, ...]
    mass_gate_wide: tuple[Tile, ...]
    wide: tuple[Tile, ...]
    own: tuple[Tile, ...]
    routed: tuple[Tile, ...]
    routed_long: tuple[Tile, ...]
    long_block: int
    resident: tuple[tuple[int, int, int], ...]
    resident_tiles: int
    dense_decode: tuple[Tile, ...]
    dense_decode_programs: int
    dense_decode_splits: int
    decode_partials: int
    decode_segments: tuple[int, int]
    decode_programs: int
    decode_keys: int
    decode_parts: tuple[int, int]
    choose_columns: int
    choose_held: int
    choose_many: int
    route_rows: int
    route_tiles: int
    append_rows: int
    bounds_slots: int
    merge: RowTile
    row_stats: RowTile
    sum_partials: RowTile
    fold: int


_SMALL = (Tile(32, 32, 4, 2), Tile(16, 16, 4, 1))
_ROUTED = (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), *_SMALL)
_DEFAULT = Choices(
    # H200: 4 warps and 64 rows beat larger tiles in the gate, for own blocks, and for routed blocks of up to
    # a few hundred keys.
    mean_gate=Tile(m=64, n=64, warps=4, stages=3),
    mean_gate_most_levels=4,
    mean_gate_registers=((2, 168),),  # three programs per SM instead of two
    gate_rest_warps=8,
    gate_rest_levels=6,
    gate_rest_programs=2,
    # H200, 131,072 tokens, 32/64, head_dim 128: 69 ms with 4 warps, although they spill 100 bytes; 100 ms
    # with 8 warps, which do not spill; 64 x 64 with 8 warps 88 ms, with one stage 97 ms. Above 128 dims (not
    # measured) 4 warps spill more.
    mass_gate=(Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
    mass_gate_wide=(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
    wide=(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), *_SMALL),
    own=(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), *_SMALL),
    routed=_ROUTED,
    routed_long=(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), *_ROUTED),
    long_block=1024,
    resident=((64, 4, 3), (64, 4, 2)),
    resident_tiles=16,  # H200: 8, 16, 32 within 6 %
    dense_decode=(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), *_SMALL),
    dense_decode_programs=2,
    dense_decode_splits=128,
    decode_partials=1 << 20,
    decode_segments=(64, 512),
    decode_programs=3,  # H200: 512 programs take 17.5 us unsplit, 18.7 us split in two
    decode_keys=64,
    decode_parts=(16, 32),
    choose_columns=128,
    choose_held=8192,
    choose_many=4096,
    route_rows=64,
    route_tiles=128,
    append_rows=16,
    bounds_slots=4096,
    merge=RowTile(16, 8),
    row_stats=RowTile(32, 16),
    sum_partials=RowTile(16, 8),
    fold=1024,
)
# By compute capability; other GPUs use `_DEFAULT`.
TABLE: dict[tuple[int, int], Choices] = {}


@dataclass(frozen=True)
class HopperChoices:
    """The tiles of the Gluon kernels, with 64 rows per consumer warpgroup and the `stages` of the key ring.

    Attributes:
        own: tile for complete own blocks.
        own_partial: tile of the plain Triton kernel that runs alongside for incomplete own blocks. Both use
            the same tiles of queries, so its `m` must equal that of `own`.
        stream: tiles for long blocks, in order of preference.
        resident: tile for blocks of `n` keys; for shorter blocks the Triton kernel is faster (11.8 against
            13.0 ms at 64).
        resident_registers: number of consumer warpgroups -> registers per thread of a consumer warp.
    """

    own: Tile
    own_partial: Tile
    stream: tuple[Tile, ...]
    resident: Tile
    resident_registers: dict[int, int]

    def __post_init__(self) -> None:
        assert self.own.m == self.own_partial.m, "both run the same tiles of queries"


HOPPER = HopperChoices(
    own=Tile(128, 64, 4, 4),
    own_partial=Tile(128, 64, 8, 2),
    stream=(Tile(128, 128, 4, 2), Tile(128, 64, 4, 4)),
    resident=Tile(192, 128, 4, 2),
    resident_registers={2: 232, 3: 160},
)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; (9, 0) for the interpreter."""
    if device.type != "cuda":
        return (9, 0)
    properties = torch.cuda.get_device_properties(
        device
    )  # dynamo can fold this, but not get_device_capability
    return properties.major, properties.minor


def fits(memory: int, device_capability: tuple[int, int], programs: int = 1) -> bool:
    """Whether `programs` programs with `memory` bytes of shared memory each fit on an SM."""
    return memory * programs <= _SHARED_MEMORY.get(device_capability, _LEAST_SHARED_MEMORY)


def first_that_fits(
    tiles: tuple[SomeTile, ...],
    memory: Callable[[SomeTile], int],
    device_capability: tuple[int, int],
    programs: int = 1,
) -> SomeTile:
    """The first tile whose `memory` in bytes `programs` programs on an SM have each, or the last tile."""
    return next((tile for tile in tiles if fits(memory(tile), device_capability, programs)), tiles[-1])


def choices(device_capability: tuple[int, int]) -> Choices:
    """The launch parameters for a compute capability."""
    return TABLE.get(device_capability, _DEFAULT)


def choices_for(x: Tensor) -> Choices:
    """The launch parameters for the GPU that holds `x`."""
    return choices(capability(x.device))


def own_tile(dims: tuple[int, int], itemsize: int, device_capability: tuple[int, int]) -> Tile:
    """The tile of the own-block kernel; `dims`: padded head dims of keys and values."""
    found = choices(device_capability)
    return _first(found.wide if max(dims) > 128 else found.own, dims, itemsize, device_capability)


def dense_decode_tile(dims: tuple[int, int], itemsize: int, device_capability: tuple[int, int]) -> Tile:
    """The tile of full attention for a few queries; two programs per SM hide each other's latency."""
    found = choices(device_capability)
    return _first(found.dense_decode, dims, itemsize, device_capability, found.dense_decode_programs)


def routed_tile(
    dims: tuple[int, int],
    itemsize: int,
    block_size: int,
    device_capability: tuple[int, int],
    resident: bool | None = None,
) -> tuple[Tile, bool]:
    """The tile of the routed kernel, and whether it is the kernel that keeps a block's keys resident.

    H200: the resident kernel wins for blocks of 128 keys (275 against 209 TFLOP/s). From 1,024 keys on, 128
    rows and 128 keys with 8 warps are used (481 TFLOP/s, against 455 to 485 for 64 x 64, which spills).

    Args:
        resident: True or False forces the answer if the block fits.
    """
    found = choices(device_capability)
    keys = 1 << max(4, (block_size - 1).bit_length())
    if block_size <= 128 and resident is not False:
        for m, warps, stages in found.resident:
            tile = Tile(m, keys, warps, stages)
            # two programs per SM hide the gather's latency; one per SM is used only on request
            if fits(tile.resident_memory(dims, itemsize), device_capability, 1 if resident else 2):
                return tile, True
    tiles = found.routed
    if max(dims) > 128:
        tiles = found.wide
    elif block_size >= found.long_block:
        tiles = found.routed_long
    tile = _first(tiles, dims, itemsize, device_capability)
    return Tile(tile.m, min(tile.n, keys), tile.warps, tile.stages), False


def _first(
    tiles: tuple[Tile, ...],
    dims: tuple[int, int],
    itemsize: int,
    device_capability: tuple[int, int],
    programs: int = 1,
) -> Tile:
    """`first_that_fits` for tiles of queries, keys and values."""
    return first_that_fits(tiles, lambda x: x.shared_memory(dims, itemsize), device_capability, programs)
