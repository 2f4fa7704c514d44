"""Launch parameters for the kernels of the shared choice; the rules of `tuning` apply here too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from moba_hf.kernels.tuning import Tile, first_that_fits, fits

# Maximum memory for the row masses and for the block lists of a chunk of tiles, in bytes.
MASS_WORKSPACE = 1 << 30
LIST_WORKSPACE = 256 << 20


@dataclass(frozen=True)
class MassTile(Tile):
    """A `Tile` with `m` sampled rows (tiles x rows x heads) and `n` blocks per step.

    Attributes:
        wide: multiply all parts of the blocks of a step in one matrix product instead of one per part.
        hopper: run the Gluon kernel, `shared_hopper_mass`, with a warpgroup per 64 rows.
    """

    wide: bool = False
    hopper: bool = False


@dataclass(frozen=True)
class ChooseTile:
    """How `shared_choose` adds up the masses of a tile's rows, and chooses.

    Attributes:
        columns: blocks of a program that adds up rows.
        per_warp: blocks per warp.
        unroll: rows that the compiler takes at a time, so that their loads are in flight together.
        choice: blocks per step of a program that chooses.
    """

    columns: int
    per_warp: int
    unroll: int = 1
    choice: int = 1024


def choose_tile(blocks: int) -> ChooseTile:
    """The tile of `shared_choose` for rows of `blocks` masses.

    H200, tile 128, block 32, every 2nd row, ms at 8,192, 32,768 and 131,072 tokens: 4 rows at a time .030,
    .276 and 3.43, 8 rows .040, .228 and 2.91; 1,024 columns .030, .265 and 3.04 with 4 rows; 256 columns,
    or fewer blocks per warp, with 8 rows were slower than 512 x 256.
    """
    return ChooseTile(512, 256, 8 if blocks > 512 else 4)


@cache
def mass_tile(dim: int, itemsize: int, parts: int, device_capability: tuple[int, int]) -> MassTile:
    """The tile of `shared_mass`.

    Args:
        dim: padded head dim.
        itemsize: bytes per element.
        parts: number of parts in a block.
        device_capability: compute capability.
    """
    tiles = _MASS_FEW_PARTS if parts <= 2 else _MASS
    return first_that_fits(tiles, lambda x: mass_memory(x, dim, itemsize, parts), device_capability)


def mass_memory(tile: Tile, dim: int, itemsize: int, parts: int) -> int:
    """Bytes of shared memory for `shared_mass`: queries, their squares, and the vectors of `stages` steps."""
    half = max(16, dim // 2)
    vectors = tile.n * ((parts + 1) * dim + parts * half)
    return (tile.m * (dim + half) + tile.stages * vectors) * itemsize + 1024


_MASS = (
    MassTile(64, 16, 4, 3, True),
    MassTile(64, 16, 4, 2, True),
    MassTile(64, 16, 4, 1),
)
# H200, blocks of 32, every 4th row: 10.0 ms at 131,072 tokens, .630 ms at 32,768; 128 x 32 with 8 warps and
# three stages 9.66 and .655. Three stages, 64 x 16 and 128 x 16 were slower in an earlier kernel.
_MASS_FEW_PARTS = (MassTile(64, 32, 4, 2, True), *_MASS)
# By number of parts. H200, an earlier kernel, blocks of 32 (2 parts), every 2nd row, ms at 8,192, 32,768
# and 131,072 tokens: 64 blocks in two stages .103, .911 and 12.3; 32 blocks in three .095, .934 and 13.1,
# with four warpgroups .097, .979 and 13.1; the Triton kernel .112, 1.27 and 20.7. Blocks of 64 (4 parts),
# every 4th row, 32,768 tokens: 32 blocks in two stages .431, 16 in four .573, the Triton kernel .524.
HOPPER_MASS = {
    1: MassTile(128, 64, 4, 3, hopper=True),
    2: MassTile(128, 64, 4, 2, hopper=True),
    4: MassTile(128, 32, 4, 2, hopper=True),
}
# These hold query rows and loop over keys; 128 rows read keys half as often as 64.
_ATTEND = (
    Tile(128, 64, 8, 3),
    Tile(128, 64, 8, 2),
    Tile(64, 64, 4, 2),
    Tile(64, 32, 4, 2),
    Tile(32, 32, 4, 2),
)
_ATTEND_WIDE = (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(16, 16, 4, 1))


@cache
def attend_tile(
    dims: tuple[int, int], itemsize: int, tile: int, block_size: int, device_capability: tuple[int, int]
) -> Tile:
    """The tile of `shared_attend`; `m` divides `tile`, `n` is a multiple or a divisor of `block_size`."""
    for shape in _ATTEND_WIDE if max(dims) > 128 else _ATTEND:
        if shape.m <= tile and fits(shape.shared_memory(dims, itemsize), device_capability):
            return shape
    return Tile(16, 16, 4, 1)


_DQ = (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 16, 4, 1))
# H200, 131,072 tokens, 5 % of the pairs: 47 ms; 64 x 64 with two stages 59, with 8 warps and three stages 63.
_HELD = (Tile(32, 64, 4, 3), Tile(32, 64, 4, 2), Tile(32, 32, 4, 2), Tile(16, 16, 4, 1))


@dataclass(frozen=True)
class SharedBackwardTiles:
    """Tiles of the backward: `dq` holds rows and loops over keys, `held` holds keys and loops over rows."""

    dq: Tile
    held: Tile


def backward_tiles(
    dims: tuple[int, int], itemsize: int, tile: int, block_size: int, device_capability: tuple[int, int]
) -> SharedBackwardTiles:
    """The tiles of the backward; `m` divides `tile`, `held.n` divides `block_size`."""

    def first(shapes: tuple[Tile, ...], keys: int, holds_rows: bool) -> Tile:
        for shape in shapes:
            held, streamed = (shape.m, shape.n) if holds_rows else (shape.n, shape.m)
            memory = ((held + shape.stages * streamed) * sum(dims) + shape.m * shape.n) * itemsize + 2048
            if shape.m <= tile and shape.n <= keys and fits(memory, device_capability):
                return Tile(shape.m, shape.n, 8 if max(dims) > 128 else shape.warps, shape.stages)
        return Tile(16, 16, 4, 1)

    return SharedBackwardTiles(first(_DQ, 1 << 30, True), first(_HELD, block_size, False))


# Decode steps: programs per multiprocessor to aim for, most splits of the attention, and sections of the
# blocks, whose masses are added up apart. Where the masses of a step are averaged, columns per program and
# rows at a time; where blocks are chosen, columns at a time. They do not follow the number of slots of a
# cache, so that the choice does not depend on it.
STEP_PROGRAMS = 4
MOST_STEP_SPLITS = 64
STEP_SECTIONS = 64
STEP_COLUMNS = 256
STEP_ROWS = 4
STEP_CHOICE_COLUMNS = 1024

# Not measured yet: those of a prefill with fewer rows.
_STEP_MASS = (MassTile(64, 16, 4, 3), MassTile(64, 16, 4, 2), MassTile(64, 16, 4, 1))
_STEP_ATTEND = (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 2), Tile(16, 16, 4, 1))


def step_mass_tile(dim: int, itemsize: int, parts: int, device_capability: tuple[int, int]) -> MassTile:
    """The tile of the masses of a decode step; arguments as for `mass_tile`."""
    return first_that_fits(_STEP_MASS, lambda x: mass_memory(x, dim, itemsize, parts), device_capability)


def step_attend_tile(dims: tuple[int, int], itemsize: int, device_capability: tuple[int, int]) -> Tile:
    """The tile of `shared_steps_attend`: `m` heads at most, `n` keys."""
    return first_that_fits(_STEP_ATTEND, lambda x: x.shared_memory(dims, itemsize), device_capability)
