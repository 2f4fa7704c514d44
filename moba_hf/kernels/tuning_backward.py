"""The tiles of the backward's attention kernels: a part of the table in `tuning`, with its memory model."""

from __future__ import annotations

from dataclasses import dataclass

from moba_hf.kernels.tuning import Tile, fits

# Shared memory of a backward kernel beyond its tiles: indices, lse and delta, barriers.
_BACKWARD_OVERHEAD = 2048
# Keys held (n), rows streamed past them (m): the sums of dk and dv are n x (D + DV) in registers. A tile that
# holds the whole block gives dq too; in longer blocks half as many keys are faster, since two programs then
# share a processor (H200, 512 / 3: routed 11.4 against 12.1 ms, own 3.9 against 4.2).
_HELD_WHOLE = (Tile(64, 128, 8, 3), Tile(64, 128, 8, 2), Tile(32, 128, 8, 3))
_HELD = (Tile(64, 64, 4, 3), Tile(32, 64, 4, 2), Tile(32, 32, 4, 2), Tile(16, 16, 4, 1))
_HELD_OWN = (Tile(32, 64, 4, 3), *_HELD[1:])
_HELD_WIDE = (
    Tile(64, 64, 8, 2),
    Tile(32, 64, 8, 2),
    Tile(32, 32, 4, 2),
    Tile(16, 16, 4, 1),
)  # dims above 128
# Rows held (m), keys streamed past them (n).
_DQ = (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 16, 4, 1))
# Columns of tensor memory on GPUs that multiply there.
_TENSOR_MEMORY = 512


@dataclass(frozen=True)
class BackwardTiles:
    """Shapes of the backward's kernels.

    Attributes:
        held, own: keys and values held, rows streamed: routed and own blocks. If the block fits `n`, it
            gives dq too.
        dq, own_dq: rows held, keys streamed; for blocks longer than `held.n`, `own.n`.
    """

    held: Tile
    own: Tile
    dq: Tile
    own_dq: Tile


def backward_tiles(
    dims: tuple[int, int], itemsize: int, block_size: int, device_capability: tuple[int, int]
) -> BackwardTiles:
    """The tiles of a backward; `dims`: padded head dims of keys and values."""
    keys = 1 << max(4, (block_size - 1).bit_length())
    wide = max(dims) > 128
    kind = _matrix_unit(device_capability)

    def held(choices: tuple[Tile, ...], routed: bool) -> Tile:
        if 64 < keys <= 128 and not wide:
            choices = _HELD_WHOLE + choices
        for tile in choices:
            tile = Tile(tile.m, min(tile.n, keys), tile.warps if keys >= tile.n else 4, tile.stages)
            whole = keys == tile.n
            memory = _held_memory(tile, dims, itemsize, whole, routed, kind)
            columns = _held_columns(tile, dims, whole) if kind == 10 else 0
            if fits(memory, device_capability) and columns <= _TENSOR_MEMORY:
                break
        return tile

    def streamed(tile: Tile) -> int:
        """Rows and keys, those in flight too, and what the matrix unit wants copied."""
        elements = (tile.m + (tile.stages - 1 + (kind > 8)) * tile.n) * sum(dims)
        copied = {8: tile.m * tile.n, 9: 0, 10: tile.n * dims[0]}[kind]
        return (elements + copied) * itemsize + _BACKWARD_OVERHEAD

    dq = next((x for x in _DQ if fits(streamed(x), device_capability)), _DQ[-1])
    if wide:
        dq = Tile(dq.m, dq.n, 8 if dq.m == 64 else 4, dq.stages)
    routed: tuple[Tile, ...] = _HELD
    own: tuple[Tile, ...] = _HELD_OWN if max(dims) > 64 else _HELD
    if wide:
        # 8 warps with much wider values than keys: ptxas gives up on Ampere and spills all
        routed = _HELD_WIDE[2:] if kind == 8 and min(dims) <= 64 else _HELD_WIDE
        own = routed if len(routed) == 2 else _HELD_WIDE[1:]
    elif kind == 8:  # fewer spills
        routed, own = _HELD[1:] if max(dims) <= 64 else _HELD, _HELD_OWN
    return BackwardTiles(held(routed, True), held(own, False), dq, dq)


def _matrix_unit(device_capability: tuple[int, int]) -> int:
    """Which generation multiplies: 8 from registers, 9 from shared memory, 10 into tensor memory."""
    return {9: 9, 10: 10, 11: 10}.get(device_capability[0], 8)


def _held_memory(
    tile: Tile, dims: tuple[int, int], itemsize: int, whole: bool, routed: bool, kind: int
) -> int:
    """Shared memory, in bytes, that Triton 3.6 gives a kernel that holds keys; the tests compare with it.

    Rows in flight: routed ones wait for their index first, so a stage brings half a tile; tensor cores that
    read shared memory keep one more, those with tensor memory two.
    """
    flight = max(1, (tile.stages - 1) // (2 if routed else 1)) + kind - 8
    elements = (tile.n + flight * tile.m) * sum(dims)
    if whole:
        elements += tile.m * max(tile.n, dims[0])  # ds transposed, dq on its way out
        if not routed:
            elements += (tile.stages - 1) * tile.m * dims[0]  # the routed dq, in flight
        if tile.m < 64 and kind > 8:
            elements += tile.n * dims[0]  # dq of so few rows is multiplied from registers: keys once more
    elif kind == 8:
        elements += tile.m * tile.n  # p and ds change threads
    return elements * itemsize + _BACKWARD_OVERHEAD


def _held_columns(tile: Tile, dims: tuple[int, int], whole: bool) -> int:
    """Columns of tensor memory of the same: dk, dv, scores, dp, both narrowed, dq; 64 keys take half."""
    columns = (sum(dims) + 3 * tile.m) * min(tile.n, 128) // 128 if tile.n >= 64 else 0
    return columns + (dims[0] if whole and tile.m >= 64 else 0)
