"""Keeps the best scores of a row during a scan over blocks, using max and min alone; shared by the gates.

Legend: W classes (columns modulo the tile width), R levels kept per class.

A score becomes an int32 that sorts like it, with the tile number in its lowest bits, reversed so that of
equal scores the earlier tile is larger. The R largest per class are kept in order (`insert`). At the end, the
largest class head is taken (among equals, that of the lower class), and its class moves up (`take`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from moba_hf.kernels.launch import _UPCAST as INTERPRETED_JIT
from moba_hf.kernels.layout import Constant

EMPTY = Constant(-(2**31))  # no block
SPENT = Constant(-(2**31) + 1)  # a class whose entries have all been taken


def tile_bits(count: int) -> int:
    """Number of bits that number `count` tiles, at least 7.

    The minimum makes near-ties break the same way in calls of any length up to 8,192 blocks, so that a prompt
    in chunks gets the same choice as the whole prompt.
    """
    return max(7, (count - 1).bit_length() if count > 0 else 0)


@triton.jit
def filled(value, LEVELS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """LEVELS int32 tensors `(M, N)` filled with `value`."""
    levels = ()
    for _ in tl.static_range(LEVELS):
        levels = levels + (tl.full([M, N], value, tl.int32),)  # type: ignore[assignment]
    return levels


@triton.jit
def sortable(scores, tile, TILE_BITS: tl.constexpr):
    """int32 keys that sort like fp32 `scores`; the lowest bits are replaced, so earlier tiles are larger."""
    TILE_MASK: tl.constexpr = (1 << TILE_BITS) - 1
    flip: tl.constexpr = 0x7FFFFFFF - TILE_MASK
    return sortable_positive(scores, tile, TILE_BITS) ^ ((scores.to(tl.int32, bitcast=True) >> 31) & flip)


@triton.jit
def sortable_positive(scores, tile, TILE_BITS: tl.constexpr):
    """`sortable` for positive scores, in one instruction; negative scores get some smaller key."""
    TILE_MASK: tl.constexpr = (1 << TILE_BITS) - 1
    bits = scores.to(tl.int32, bitcast=True)
    if INTERPRETED_JIT:
        return (bits & (-1 - TILE_MASK)) | (TILE_MASK - tile)
    else:  # the compiler would emit two instructions
        asm: tl.constexpr = "lop3.b32 $0, $1, $2, $3, 0xEA;"  # a & b | c
        return tl.inline_asm_elementwise(
            asm, "=r,r,r,r", [bits, -1 - TILE_MASK, TILE_MASK - tile], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def insert(levels, key, LEVELS: tl.constexpr):
    """`levels`, in descending order per class, with `key (M, N)` inserted and the smallest dropped."""
    result = ()
    for level in tl.static_range(LEVELS):
        result = result + (tl.maximum(levels[level], key),)  # type: ignore[assignment]
        key = tl.minimum(levels[level], key)
    return result


@triton.jit
def take(levels, active, column, BLOCK_N: tl.constexpr, LEVELS: tl.constexpr):
    """The largest class head of each row, its class, and `levels` after removing it from active rows."""
    best = tl.max(levels[0], 1)
    chosen = tl.min(tl.where(levels[0] == best[:, None], column[None, :], BLOCK_N), 1)
    hit = (column[None, :] == chosen[:, None]) & active[:, None]
    moved = ()
    for level in tl.static_range(LEVELS):
        if level + 1 < LEVELS:
            moved = moved + (tl.where(hit, levels[level + 1], levels[level]),)  # type: ignore[assignment]
        else:
            moved = moved + (tl.where(hit, SPENT, levels[level]),)  # type: ignore[assignment]
    return best, chosen, moved
