"""The tiles of the backward's attention kernels, which extend the table in `tuning`, with a memory model."""

from __future__ import annotations

from dataclasses import dataclass

from moba_hf.kernels.tuning import Tile, first_that_fits, fits

# Shared memory of a backward kernel in addition to its tiles: indices, lse and delta, barriers.
_BACKWARD_OVERHEAD = 2048
# These hold n keys and loop over m rows at a time; the sums of dk and dv, n x (D + DV), are in registers. A
# tile that holds the whole block computes dq too. For longer blocks half as many keys are faster, since two
# programs then fit on an SM (H200, 512 / 3: routed 11.4 against 12.1 ms, own 3.9 against 4.2 ms).
_HELD_WHOLE = (Tile(64, 128, 8, 3), Tile(64, 128, 8, 2), Tile(32, 128, 8, 3))
_HELD = (Tile(64, 64, 4, 3), Tile(32, 64, 4, 2), Tile(32, 32, 4, 2), Tile(16, 16, 4, 1))
_HELD_OWN = (Tile(32, 64, 4, 3), *_HELD[1:])
_HELD_WIDE = (
    Tile(64, 64, 8, 2),
    Tile(32, 64, 8, 2),
    Tile(32, 32, 4, 2),
    Tile(16, 16, 4, 1),
)  # dims above 128
# These hold m rows and loop over n keys at a time.
_DQ = (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 16, 4, 1))
# Columns of tensor memory, on GPUs whose matrix unit uses it.
_TENSOR_MEMORY = 512


@dataclass(frozen=True)
class BackwardTiles:
    """The tiles of the backward's kernels.

    Attributes:
        held: for routed blocks; holds keys and values and loops over rows. If the block fits `n`, this kernel
            computes dq too.
        own: the same for own blocks.
        dq: for routed blocks longer than `held.n`; holds rows and loops over keys.
        own_dq: the same for own blocks longer than `own.n`.
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
        """Shared memory for rows, for keys (in flight too), and for copies that the matrix unit needs."""
        elements = (tile.m + (tile.stages - 1 + (kind > 8)) * tile.n) * sum(dims)
        copied = {8: tile.m * tile.n, 9: 0, 10: tile.n * dims[0]}[kind]
        return (elements + copied) * itemsize + _BACKWARD_OVERHEAD

    dq = first_that_fits(_DQ, streamed, device_capability)
    if wide:
        dq = Tile(dq.m, dq.n, 8 if dq.m == 64 else 4, dq.stages)
    routed: tuple[Tile, ...] = _HELD
    own: tuple[Tile, ...] = _HELD_OWN if max(dims) > 64 else _HELD
    if wide:
        # on Ampere, with values much wider than keys, ptxas spills everything at 8 warps
        routed = _HELD_WIDE[2:] if kind == 8 and min(dims) <= 64 else _HELD_WIDE
        own = routed if len(routed) == 2 else _HELD_WIDE[1:]
    elif kind == 8:  # fewer spills
        routed, own = _HELD[1:] if max(dims) <= 64 else _HELD, _HELD_OWN
    return BackwardTiles(held(routed, True), held(own, False), dq, dq)


def _matrix_unit(device_capability: tuple[int, int]) -> int:
    """Generation of the matrix unit: 8 reads registers, 9 shared memory, 10 writes to tensor memory."""
    return {9: 9, 10: 10, 11: 10}.get(device_capability[0], 8)


def _held_memory(
    tile: Tile, dims: tuple[int, int], itemsize: int, whole: bool, routed: bool, kind: int
) -> int:
    """Bytes of shared memory that Triton 3.6 allocates for a kernel that holds keys; a test compares.

    Tiles of rows in flight: routed rows wait for their index first, so a stage counts half. Tensor cores that
    read shared memory keep one more tile, those with tensor memory two more.
    """
    flight = max(1, (tile.stages - 1) // (2 if routed else 1)) + kind - 8
    elements = (tile.n + flight * tile.m) * sum(dims)
    if whole:
        elements += tile.m * max(tile.n, dims[0])  # transposed ds, outgoing dq
        if not routed:
            elements += (tile.stages - 1) * tile.m * dims[0]  # the routed dq, in flight
        if tile.m < 64 and kind > 8:
            elements += tile.n * dims[0]  # with few rows, dq comes from registers: another copy of the keys
    elif kind == 8:
        elements += tile.m * tile.n  # p and ds are exchanged between threads
    return elements * itemsize + _BACKWARD_OVERHEAD


def _held_columns(tile: Tile, dims: tuple[int, int], whole: bool) -> int:
    """Columns of tensor memory of that kernel: dk, dv, scores, dp, narrowed p and ds, dq; half at 64 keys."""
    columns = (sum(dims) + 3 * tile.m) * min(tile.n, 128) // 128 if tile.n >= 64 else 0
    return columns + (dims[0] if whole and tile.m >= 64 else 0)
