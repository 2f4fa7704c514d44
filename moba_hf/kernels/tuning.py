"""Tile choices, in one table, and the predicate that says whether a choice can run.

A choice depends on what is known before the launch only (head dims, block size, dtype width, topk,
capability), so a call never measures anything and equal calls run equal kernels. Numbers marked H200 were
measured in bf16 at head_dim 128, those of the forward's plain Triton tiles on prototypes; the others keep the
shared memory and registers of a tile alike.
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
# Stored rows of a partial output, its lse, the pair's key, and the sort's keys and permutation, in bytes.
_PAIR_OVERHEAD = 4 + 2 + 2 + 8 + 8
# Most memory for partial outputs of a chunk of queries, in bytes; larger runs a few per cent faster.
WORKSPACE = 4 << 30
# Calls with at most this many queries in a sequence, and partial outputs in all, take the decode kernel.
DECODE_QUERIES = 16
DECODE_PARTIALS = 1 << 20
# Keys that one program of the decode kernel attends, least and most: longer blocks are split, shorter ones
# until there are so many programs per processor. H200: 512 programs unsplit 17.5 us, split in two 18.7.
DECODE_SEGMENTS, DECODE_PROGRAMS = (64, 512), 3
# Full attention of a few queries: programs per processor that the keys are split for, and most splits.
DENSE_DECODE_PROGRAMS, DENSE_DECODE_SPLITS = 2, 128


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


# H200: 4 warps and 64 rows beat larger tiles for gate, own blocks and blocks of up to a few hundred keys.
GATE = Tile(m=64, n=64, warps=4, stages=3)
# H200, 131,072 tokens, 32/64, head_dim 128: 69 ms with 4 warps, though they spill 100 bytes, 100 ms with 8,
# which do not; 64 x 64 with 8 warps 88 ms, with one stage 97. Above 128 dims, unmeasured, 4 warps spill more.
_MASS_GATE = (Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1))
_MASS_GATE_WIDE = (Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), *_MASS_GATE[2:])
_WIDE = (
    Tile(64, 64, 8, 2),
    Tile(64, 32, 8, 2),
    Tile(32, 32, 4, 2),
    Tile(16, 16, 4, 1),
)  # head dims above 128
_OWN = (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 16, 4, 1))
_ROUTED = (
    Tile(64, 64, 4, 3),
    Tile(64, 64, 4, 2),
    Tile(64, 32, 4, 2),
    Tile(32, 32, 4, 2),
    Tile(16, 16, 4, 1),
)
_ROUTED_LONG = (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), *_ROUTED)
_DENSE_DECODE = (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 2), Tile(16, 16, 4, 1))
_RESIDENT = ((64, 4, 3), (64, 4, 2))  # the block is the tile of keys
# Tiles of rows that one program of the resident kernel runs through; H200: 8, 16, 32 within 6 %.
RESIDENT_TILES = 16

# Gluon kernels for Hopper: rows are 64 per consumer warpgroup, `stages` those of the key ring.
HOPPER_OWN = Tile(128, 64, 4, 4)
HOPPER_STREAM = (Tile(128, 128, 4, 2), Tile(128, 64, 4, 4))
HOPPER_RESIDENT = Tile(
    192, 128, 4, 2
)  # blocks of `n` keys: below, Triton's is faster (11.8 to 13.0 ms at 64)
# What `own` runs beside HOPPER_OWN, for incomplete blocks in the same tiles of queries.
OWN_PARTIAL = Tile(128, 64, 8, 2)


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


def gate_tile(head_dim: int, device_capability: tuple[int, int]) -> Tile:
    """The tile of the gate; `head_dim` padded. Fewer stages where shared memory is small."""
    for stages in range(GATE.stages, 1, -1):
        tile = Tile(GATE.m, GATE.n, GATE.warps, stages)
        if fits(tile.shared_memory((head_dim, 0), 2), device_capability):
            return tile
    return Tile(GATE.m, GATE.n, GATE.warps, 1)


def own_tile(dims: tuple[int, int], itemsize: int, device_capability: tuple[int, int]) -> Tile:
    """The tile of the own-block kernel; `dims`: padded head dims of keys and values."""
    return _first(_WIDE if max(dims) > 128 else _OWN, dims, itemsize, device_capability)


def dense_decode_tile(dims: tuple[int, int], itemsize: int, device_capability: tuple[int, int]) -> Tile:
    """The tile of full attention of a few queries; two programs to a processor hide each other's waits."""
    for tile in _DENSE_DECODE:
        if fits(tile.shared_memory(dims, itemsize), device_capability, DENSE_DECODE_PROGRAMS):
            return tile
    return _DENSE_DECODE[-1]


def mass_gate_tile(dim: int, itemsize: int, parts: int, device_capability: tuple[int, int]) -> Tile:
    """The tile of the mass gate; `dim`: padded head dim, `parts` of a block."""
    tiles = _MASS_GATE_WIDE if dim > 128 else _MASS_GATE
    for tile in tiles:
        if fits(mass_gate_memory(tile, dim, itemsize, parts), device_capability):
            return tile
    return tiles[-1]


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
    keys = 1 << max(4, (block_size - 1).bit_length())
    if block_size <= 128 and resident is not False:
        for m, warps, stages in _RESIDENT:
            tile = Tile(m, keys, warps, stages)
            # two programs to a processor hide the gather; one is taken only when asked for
            if fits(tile.resident_memory(dims, itemsize), device_capability, 1 if resident else 2):
                return tile, True
    choices: tuple[Tile, ...] = _ROUTED
    if max(dims) > 128:
        choices = _WIDE
    elif block_size >= 1024:
        choices = _ROUTED_LONG
    tile = _first(choices, dims, itemsize, device_capability)
    return Tile(tile.m, min(tile.n, keys), tile.warps, tile.stages), False


def _first(
    choices: tuple[Tile, ...], dims: tuple[int, int], itemsize: int, device_capability: tuple[int, int]
) -> Tile:
    for tile in choices:
        if fits(tile.shared_memory(dims, itemsize), device_capability):
            return tile
    return choices[-1]


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


def chunk_rows(rows: int, num_heads: int, routed_slots: int, v_dim: int, itemsize: int, budget: int) -> int:
    """Query rows of a chunk so that its partial outputs and pairs stay within `budget` bytes."""
    row_bytes = num_heads * routed_slots * (v_dim * itemsize + _PAIR_OVERHEAD)
    pairs = num_heads * routed_slots  # numbered in int32 within a chunk
    chunk = max(1, min(budget // max(1, row_bytes), (2**31 - 1) // max(1, pairs)))
    if chunk >= rows:
        return max(1, rows)
    even = -(-rows // -(-rows // chunk))  # chunks of equal size
    return min(chunk, -(-even // 64) * 64)


# Most memory for pairs and sums of a group of kv heads in the backward, in bytes.
BACKWARD_WORKSPACE = 3 << 30
# Bytes per pair of the sums that segments of a block's pairs write apart; fewer mean longer segments.
_SEGMENT_BYTES = 32
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


# Shared memory of a backward kernel beyond its tiles: indices, lse and delta, barriers.
_BACKWARD_OVERHEAD = 2048


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


def segment_rows(block_size: int, head_dim: int, v_dim: int, multiple: int) -> int:
    """Pairs of a segment: its fp32 sums, `block_size * (head_dim + v_dim)`, take `_SEGMENT_BYTES` each."""
    rows = max(1024, block_size * (head_dim + v_dim) * 4 // _SEGMENT_BYTES)
    return -(-rows // multiple) * multiple


def backward_split(q: Tensor, k: Tensor, v: Tensor, slots: int, budget: int) -> tuple[int, int]:
    """Kv heads of a group and query rows of a chunk, so that pairs and sums stay within `budget` bytes."""
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, rows = k.shape[1], max(1, batch * q_len)
    pairs = num_heads // num_kv_heads * slots  # of a row and kv head
    row_bytes = max(1, pairs * (head_dim * q.element_size() + _PAIR_OVERHEAD + _SEGMENT_BYTES))
    sum_bytes = k.shape[0] * k.shape[2] * (head_dim + v.shape[3]) * 4
    fit = min(budget // (rows * row_bytes + sum_bytes), (2**31 - 1) // max(1, pairs * rows))
    if fit >= 1:
        groups = -(-num_kv_heads // min(fit, num_kv_heads))
        return -(-num_kv_heads // groups), rows
    chunk = max(1, min(max(budget - sum_bytes, budget // 4) // row_bytes, (2**31 - 1) // max(1, pairs)))
    if chunk >= rows:
        return 1, rows
    even = -(-rows // -(-rows // chunk))
    return 1, min(chunk, -(-even // 64) * 64)


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
