"""How a gate is launched: its tile, its levels, and what follows from them; the numbers are in `tuning`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import comb

from moba_hf.kernels import tuning
from moba_hf.kernels.tuning import Tile, first_that_fits, fits


def gate_tile(dim: int, itemsize: int, parts: int, device_capability: tuple[int, int]) -> Tile:
    """The tile of a gate; `dim`: padded head dim, `parts`: parts in a block, 0 for the mean gate."""
    found = tuning.choices(device_capability)
    if parts > 0:
        tiles = found.mass_gate_wide if dim > 128 else found.mass_gate
        return first_that_fits(tiles, lambda x: mass_gate_memory(x, dim, itemsize, parts), device_capability)
    tile = found.mean_gate
    while tile.stages > 1 and not fits(tile.shared_memory((dim, 0), itemsize), device_capability):
        tile = replace(tile, stages=tile.stages - 1)
    return tile


@dataclass(frozen=True)
class GateLaunch:
    """The launch parameters of a gate's two kernels.

    Attributes:
        warps: warps of the first kernel.
        max_registers: register limit of both kernels; None: no limit.
        rest_warps: warps of the second kernel.
        rest_levels: levels of the second kernel.
        rest_programs: programs per SM of the second kernel.
    """

    warps: int
    max_registers: int | None
    rest_warps: int
    rest_levels: int
    rest_programs: int


def gate_launch(tile: Tile, levels: int, parts: int, device_capability: tuple[int, int]) -> GateLaunch:
    """The launch of a gate with `levels` per class; `parts`: parts in a block, 0 for the mean gate."""
    found = tuning.choices(device_capability)
    if parts > 0:
        rest_levels = min(levels, found.gate_rest_levels)
        return GateLaunch(tile.warps, None, tile.warps, rest_levels, found.gate_rest_programs)
    warps = tile.warps * (2 if levels > found.mean_gate_most_levels else 1)
    registers = dict(found.mean_gate_registers).get(levels)
    return GateLaunch(warps, registers, found.gate_rest_warps, levels, found.gate_rest_programs)


def mass_gate_memory(tile: Tile, dim: int, itemsize: int, parts: int) -> int:
    """Bytes of shared memory that the mass gate needs: queries, their squares, and vectors of blocks.

    Up to 4 parts are unrolled and the loop over blocks is pipelined; each stage then holds the means and
    variances of all parts and the smallest keys. With a single stage, one part is held at a time. More than 4
    parts form a loop of their own, which Triton pipelines three deep. 256 bytes are reserved for barriers (at
    most 144 are used on sm_100).
    """
    vectors = 6 if parts > 4 else 2 if tile.stages == 1 else tile.stages * (2 * parts + 1)
    return (2 * tile.m + vectors * tile.n) * dim * itemsize + 256


def gate_levels(count: int, max_blocks: int, width: int) -> tuple[int, bool]:
    """How many entries R the gate keeps per class, and whether the first kernel alone is always exact.

    A class consists of the columns that are equal modulo `width`. R entries are exact if no row can take more
    than R from a class. Otherwise R is the smallest number with which less than 1 % of random rows need the
    second kernel: the `count` best fall into classes at random, and `comb(count, R) / width ** (R - 1)` is an
    upper bound of the probability that R of them share one.
    """
    exact = min(count, -(-max_blocks // width))
    if exact <= 4:
        return max(1, exact), True
    levels = 3
    while levels < exact and levels < 8 and comb(count, levels) >= 0.01 * width ** (levels - 1):
        levels += 1
    return levels, levels == exact
