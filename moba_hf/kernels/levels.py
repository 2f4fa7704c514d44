"""Keeping the best scores of a row while scanning blocks, by max and min alone: what the gates are made of.

Legend: W classes (columns modulo the tile width), R levels kept per class.

A score becomes an int32 that sorts like it, with the number of its tile in the lowest bits, reversed: of
equal scores the earlier tile is larger. Per class the R largest are kept, sorted (`insert`). In the end the
largest class head is taken, the lower class of equals, and its class moves up (`take`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from moba_hf.kernels.launch import _UPCAST as INTERPRETED_JIT

EMPTY = tl.constexpr(-(2**31))  # no block
SPENT = tl.constexpr(-(2**31) + 1)  # a class that gave all its entries


def tile_bits(count: int) -> int:
    """Bits that number `count` tiles, at least 7.

    A shared minimum makes near ties break the same way in calls of any length, so that a prompt in chunks
    chooses as the whole does, up to 8,192 blocks.
    """
    return max(7, (count - 1).bit_length() if count > 0 else 0)


@triton.jit
def filled(value, LEVELS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """LEVELS tensors int32 `(M, N)` of one value."""
    levels = ()
    for _ in tl.static_range(LEVELS):
        levels = levels + (tl.full([M, N], value, tl.int32),)  # type: ignore[assignment]
    return levels


@triton.jit
def sortable(scores, tile, TILE_BITS: tl.constexpr):
    """int32 that sorts as `scores` fp32, lowest bits replaced so that earlier tiles are larger."""
    TILE_MASK: tl.constexpr = (1 << TILE_BITS) - 1
    flip: tl.constexpr = 0x7FFFFFFF - TILE_MASK
    return sortable_positive(scores, tile, TILE_BITS) ^ ((scores.to(tl.int32, bitcast=True) >> 31) & flip)


@triton.jit
def sortable_positive(scores, tile, TILE_BITS: tl.constexpr):
    """`sortable` for positive scores, in one operation; negative ones become some smaller key."""
    TILE_MASK: tl.constexpr = (1 << TILE_BITS) - 1
    bits = scores.to(tl.int32, bitcast=True)
    if INTERPRETED_JIT:
        return (bits & (-1 - TILE_MASK)) | (TILE_MASK - tile)
    else:  # the compiler makes two operations of it
        asm: tl.constexpr = "lop3.b32 $0, $1, $2, $3, 0xEA;"  # a & b | c
        return tl.inline_asm_elementwise(
            asm, "=r,r,r,r", [bits, -1 - TILE_MASK, TILE_MASK - tile], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def insert(levels, key, LEVELS: tl.constexpr):
    """`levels`, sorted down per class, with `key (M, N)` inserted and the least dropped."""
    result = ()
    for level in tl.static_range(LEVELS):
        result = result + (tl.maximum(levels[level], key),)  # type: ignore[assignment]
        key = tl.minimum(levels[level], key)
    return result


@triton.jit
def take(levels, active, column, BLOCK_N: tl.constexpr, LEVELS: tl.constexpr):
    """The largest class head of each active row and its class; `levels` after taking it."""
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
