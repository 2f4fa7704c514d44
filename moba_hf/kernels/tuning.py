"""Every launch choice, in one table by compute capability, and the predicate that says whether it can run.

A choice depends on what is known before the launch only (head dims, block size, dtype width, topk,
capability), so a call never measures anything and equal calls run equal kernels. Numbers marked H200 were
measured in bf16 at head_dim 128, those of the forward's plain Triton tiles on prototypes; the others keep the
shared memory and registers of a tile alike. `tuning_backward` holds the tiles of the backward, `budgets` the
sizes that follow from memory.

To tune another GPU, give `TABLE` a line of its own: `(8, 0): replace(_DEFAULT, own=(...))`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import comb

import torch
from torch import Tensor

# Shared memory a program may use, in bytes, by compute capability; others get the smallest.
_SHARED_MEMORY = {
    (8, 0): 163 << 10,
    (8, 7): 163 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (10, 3): 227 << 10,
    (11, 0): 227 << 10,
}
_LEAST_SHARED_MEMORY = 99 << 10
# Calls with at most this many queries in a sequence take the decode kernel, on any GPU: caches rely on it.
DECODE_QUERIES = 16


@dataclass(frozen=True)
class Tile:
    """One kernel's shape.

    Attributes:
        m: query rows (tokens x heads, or pairs) of a tile.
        n: keys (or blocks, in the gate) of a tile.
        warps: warps of a program.
        stages: software pipeline depth.
    """

    m: int
    n: int
    warps: int
    stages: int

    def shared_memory(self, dims: tuple[int, int], itemsize: int) -> int:
        """Bytes that queries and `stages` tiles of keys and values take; `dims`: padded D and DV."""
        return (self.m * dims[0] + self.stages * self.n * sum(dims)) * itemsize

    def resident_memory(self, dims: tuple[int, int], itemsize: int) -> int:
        """Bytes that one tile of keys and values, held, and `stages - 1` tiles of queries take."""
        return (self.n * sum(dims) + (self.stages - 1) * self.m * max(dims)) * itemsize


@dataclass(frozen=True)
class RowTile:
    """Shape of a kernel that runs at memory speed: few rows, since larger tiles spill.

    Attributes:
        narrow, wide: rows of a program for head dims up to 128 and above.
        warps: warps of a program.
        unroll: slots of a row that are unrolled whole.
        steps: slots that are loaded at once where there are more.
    """

    narrow: int
    wide: int
    warps: int = 4
    unroll: int = 16
    steps: int = 8

    def rows(self, dim: int) -> int:
        """Rows of a program for head dim `dim`."""
        return self.narrow if dim <= 128 else self.wide


@dataclass(frozen=True)
class Choices:
    """The launch choices of one kind of GPU.

    Tuples hold tiles in order of preference; the first that fits shared memory is taken, else the last.

    Attributes:
        mean_gate: of the mean gate and of the scores of a decode step (`choose`). Its `m`, `n` and `warps`
            fix the order in which a score is summed, and `n` how many bits a score keeps
            (`levels.tile_bits`): the two kernels share them, or near ties would break differently in prefill
            and decode.
        mean_gate_most_levels: with more levels, the mean gate takes twice as many warps.
        mean_gate_registers: register limit of the mean gate by levels.
        gate_rest_warps: of the mean gate's second kernel.
        gate_rest_levels: most levels of the mass gate's second kernel: more would spill.
        gate_rest_programs: of a gate's second kernel, per processor.
        mass_gate, mass_gate_wide: up to 128 dims, above.
        wide: of own and routed blocks above 128 dims.
        own, routed, routed_long: `routed_long` from `long_block` keys of a block on.
        resident: rows, warps and stages where a block is the tile of keys.
        resident_tiles: tiles of rows that one program of the resident kernel runs through.
        dense_decode, dense_decode_programs, dense_decode_splits: of full attention of a few queries; programs
            per processor that the keys are split for, and most splits.
        decode_partials: calls with at most so many partial outputs may take the decode kernel.
        decode_segments: keys that one of its programs attends, least and most: longer blocks are split,
            shorter ones until there are `decode_programs` programs per processor.
        decode_keys: most keys of one of its tiles.
        decode_parts: partial outputs that `merge_parts` adds at once, least and most.
        choose_columns: columns of a program that scores for a decode step.
        choose_held: most keys that a program of `choose` holds in registers; `choose_many` and more: 8 warps.
        route_rows: rows of the kernel of pair keys: (tokens of a tile) x (query heads).
        route_tiles: tiles that one program of `routing` describes.
        append_rows: rows that `append` copies at once.
        merge, row_stats, sum_partials: of the kernels of these names.
        fold: numbers that one program of the backward folds.
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
    merge: RowTile
    row_stats: RowTile
    sum_partials: RowTile
    fold: int


_SMALL = (Tile(32, 32, 4, 2), Tile(16, 16, 4, 1))
_ROUTED = (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), *_SMALL)
_DEFAULT = Choices(
    # H200: 4 warps and 64 rows beat larger tiles for gate, own blocks and blocks of up to a few hundred keys.
    mean_gate=Tile(m=64, n=64, warps=4, stages=3),
    mean_gate_most_levels=4,
    mean_gate_registers=((2, 168),),  # three programs to a processor instead of two
    gate_rest_warps=8,
    gate_rest_levels=6,
    gate_rest_programs=2,
    # H200, 131,072 tokens, 32/64, head_dim 128: 69 ms with 4 warps, though they spill 100 bytes, 100 ms with
    # 8, which do not; 64 x 64 with 8 warps 88 ms, with one stage 97. Above 128 dims, unmeasured, 4 warps
    # spill more.
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
    decode_programs=3,  # H200: 512 programs unsplit 17.5 us, split in two 18.7
    decode_keys=64,
    decode_parts=(16, 32),
    choose_columns=128,
    choose_held=8192,
    choose_many=4096,
    route_rows=64,
    route_tiles=128,
    append_rows=16,
    merge=RowTile(16, 8),
    row_stats=RowTile(32, 16),
    sum_partials=RowTile(16, 8),
    fold=1024,
)
# By compute capability; others take `_DEFAULT`.
TABLE: dict[tuple[int, int], Choices] = {}


@dataclass(frozen=True)
class HopperChoices:
    """The tiles of the Gluon kernels: rows are 64 per consumer warpgroup, `stages` those of the key ring.

    Attributes:
        own: of complete own blocks.
        own_partial: what plain Triton runs beside `own`, for incomplete blocks: the same tiles of queries, so
            `m` must be that of `own`.
        stream: of long blocks, in order of preference.
        resident: of blocks of `n` keys; below, Triton's is faster (11.8 to 13.0 ms at 64).
        resident_registers: of a consumer warp, by consumer warpgroups.
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
    properties = torch.cuda.get_device_properties(device)  # unlike get_device_capability, dynamo folds it
    return properties.major, properties.minor


def fits(memory: int, device_capability: tuple[int, int], programs: int = 1) -> bool:
    """Whether `programs` programs of `memory` bytes of shared memory each fit a processor."""
    return memory * programs <= _SHARED_MEMORY.get(device_capability, _LEAST_SHARED_MEMORY)


def choices(device_capability: tuple[int, int]) -> Choices:
    """The launch choices of a GPU."""
    return TABLE.get(device_capability, _DEFAULT)


def choices_for(x: Tensor) -> Choices:
    """The launch choices of the GPU that holds `x`."""
    return choices(capability(x.device))


def gate_tile(dim: int, itemsize: int, parts: int, device_capability: tuple[int, int]) -> Tile:
    """The tile of a gate; `dim`: padded head dim, `parts` of a block, 0 for the mean gate."""
    found = choices(device_capability)
    if parts > 0:
        tiles = found.mass_gate_wide if dim > 128 else found.mass_gate
        fit = (x for x in tiles if fits(mass_gate_memory(x, dim, itemsize, parts), device_capability))
        return next(fit, tiles[-1])
    best = found.mean_gate
    for stages in range(best.stages, 1, -1):  # fewer where shared memory is small
        tile = Tile(best.m, best.n, best.warps, stages)
        if fits(tile.shared_memory((dim, 0), itemsize), device_capability):
            return tile
    return Tile(best.m, best.n, best.warps, 1)


@dataclass(frozen=True)
class GateLaunch:
    """How the two kernels of a gate are launched.

    Attributes:
        warps, max_registers: of the first kernel (`max_registers` of both); None: no limit.
        rest_warps, rest_levels, rest_programs: of the second; programs per processor.
    """

    warps: int
    max_registers: int | None
    rest_warps: int
    rest_levels: int
    rest_programs: int


def gate_launch(tile: Tile, levels: int, parts: int, device_capability: tuple[int, int]) -> GateLaunch:
    """The launch of a gate that keeps `levels` per class; `parts` of a block, 0 for the mean gate."""
    found = choices(device_capability)
    if parts > 0:
        rest_levels = min(levels, found.gate_rest_levels)
        return GateLaunch(tile.warps, None, tile.warps, rest_levels, found.gate_rest_programs)
    warps = tile.warps * (2 if levels > found.mean_gate_most_levels else 1)
    registers = dict(found.mean_gate_registers).get(levels)
    return GateLaunch(warps, registers, found.gate_rest_warps, levels, found.gate_rest_programs)


def own_tile(dims: tuple[int, int], itemsize: int, device_capability: tuple[int, int]) -> Tile:
    """The tile of the own-block kernel; `dims`: padded head dims of keys and values."""
    found = choices(device_capability)
    return _first(found.wide if max(dims) > 128 else found.own, dims, itemsize, device_capability)


def dense_decode_tile(dims: tuple[int, int], itemsize: int, device_capability: tuple[int, int]) -> Tile:
    """The tile of full attention of a few queries; two programs to a processor hide each other's waits."""
    found = choices(device_capability)
    return _first(found.dense_decode, dims, itemsize, device_capability, found.dense_decode_programs)


def mass_gate_memory(tile: Tile, dim: int, itemsize: int, parts: int) -> int:
    """Bytes of shared memory that the mass gate takes: queries, their squares, and vectors of blocks.

    Up to 4 parts are unrolled and the loop over blocks is pipelined, means and variances of all parts and the
    smallest keys in every stage; one stage holds one part at a time. More parts are a loop of its own, which
    Triton pipelines three deep. 256 bytes are for barriers (at most 144 on sm_100).
    """
    vectors = 6 if parts > 4 else 2 if tile.stages == 1 else tile.stages * (2 * parts + 1)
    return (2 * tile.m + vectors * tile.n) * dim * itemsize + 256


def routed_tile(
    dims: tuple[int, int],
    itemsize: int,
    block_size: int,
    device_capability: tuple[int, int],
    resident: bool | None = None,
) -> tuple[Tile, bool]:
    """The tile of the routed kernel, and whether a block's keys stay resident while rows stream past.

    H200: resident wins at blocks of 128 keys (275 against 209 TFLOP/s); from 1,024 keys on 128 rows and 128
    keys with 8 warps do (481 against 455 to 485 for 64 x 64, which spills).

    Args:
        resident: True or False forces the answer where the block fits.
    """
    found = choices(device_capability)
    keys = 1 << max(4, (block_size - 1).bit_length())
    if block_size <= 128 and resident is not False:
        for m, warps, stages in found.resident:
            tile = Tile(m, keys, warps, stages)
            # two programs to a processor hide the gather; one is taken only when asked for
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
    """The first tile of which so many programs fit a processor, else the last."""
    fit = (x for x in tiles if fits(x.shared_memory(dims, itemsize), device_capability, programs))
    return next(fit, tiles[-1])


def gate_levels(count: int, max_blocks: int, width: int) -> tuple[int, bool]:
    """How many entries the gate keeps per class, and whether that alone is always exact.

    A class is the columns equal modulo `width`. Keeping R per class is exact when no row can take more than R
    from a class; otherwise R is the least for which under 1 % of random rows would need the second kernel:
    the `count` best fall on classes at random, and `comb(count, R) / width ** (R - 1)` bounds the chance that
    R of them share one.
    """
    exact = min(count, -(-max_blocks // width))
    if exact <= 4:
        return max(1, exact), True
    levels = 3
    while levels < exact and levels < 8 and comb(count, levels) >= 0.01 * width ** (levels - 1):
        levels += 1
    return levels, levels == exact


def unsupported_device(x: Tensor) -> str | None:
    """Why kernels cannot run where `x` lives, or None."""
    from moba_hf.kernels.launch import INTERPRETED

    if x.device.type == "cuda":
        if INTERPRETED:
            return None
        if torch.version.hip is not None:
            return "it is tuned for NVIDIA GPUs; AMD is not supported"
        if capability(x.device) < (8, 0):
            return f"it needs compute capability 8.0 or later, this GPU has {capability(x.device)}"
        return None
    if x.device.type == "cpu" and INTERPRETED:
        return None
    return f"it needs a CUDA device, or TRITON_INTERPRET=1 on CPU tensors; q is on {x.device}"
