"""Memory layout: names for the columns of the tables that kernels read, and the addresses of tensor rows.

Strides are passed as one tuple `(batch, head, token)` per tensor; last dimensions are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl


class Constant(tl.constexpr):
    """A constant of kernels. Triton compares those of a kernel at each launch; this makes it quick."""

    def __ne__(self, other: object) -> bool:
        return bool(self.value != getattr(other, "value", other))


# A sequence: one row of the int32 table `(S, SEQ_COLUMNS)` of `moba_hf.op.sequences`.
SEQ_COLUMNS = Constant(5)
SEQ_BATCH = Constant(0)
SEQ_Q_BEGIN = Constant(1)
SEQ_Q_END = Constant(2)
SEQ_K_BEGIN = Constant(3)
SEQ_K_END = Constant(4)

# A tile of queries (see `tiling.tile_table`), a run of pairs (see `routing`), or a tile of a shared choice
# (see `shared_plan`): int32; the last column is unused and pads a row to 32 bytes.
INFO_COLUMNS = Constant(8)

TILE_BATCH = Constant(0)
TILE_BEFORE = Constant(1)  # keys of the block before the tile
TILE_ORIGIN = Constant(2)  # query index of the first token; may be negative
TILE_LOW = Constant(3)  # first query of the sequence in the chunk; TILE_HIGH is past the last
TILE_HIGH = Constant(4)
TILE_FIRST_KEY = Constant(5)  # slot of the block's first key
TILE_COMPLETE = Constant(6)  # whether the block is complete

RUN_BEGIN = Constant(0)  # its first pair; RUN_END is past the last
RUN_END = Constant(1)
RUN_BATCH = Constant(2)
RUN_KV_HEAD = Constant(3)
RUN_FIRST_KEY = Constant(4)  # slot of the block's first key
RUN_BIN = Constant(5)
RUN_PART = Constant(6)  # its index within the bin

PLAN_BATCH = Constant(0)
PLAN_Q_BEGIN = Constant(1)  # its first query; PLAN_Q_END is past the last
PLAN_Q_END = Constant(2)
PLAN_POSITION = Constant(3)  # position of the first query
PLAN_K_BEGIN = Constant(4)  # first key slot of the sequence; PLAN_K_END is past the last
PLAN_K_END = Constant(5)
PLAN_FIRST_BLOCK = Constant(6)  # flat number of the sequence's block 0

# Row statistics of the backward, fp32 `(..., STAT_COLUMNS)`: see `backward_rows`.
STAT_COLUMNS = Constant(2)
STAT_LSE = Constant(0)
STAT_DELTA = Constant(1)

# Totals of the masses of a sampled row, fp32 `(..., TOTAL_COLUMNS)`: see `shared_mass.Masses`.
TOTAL_COLUMNS = Constant(2)
TOTAL_HIGH = Constant(0)
TOTAL_MASS = Constant(1)
# log2 of the mass of nothing: it adds nothing to a row that has candidates.
LOWEST = Constant(-1e30)

LOG2_E = Constant(1.4426950408889634)
LN_2 = Constant(0.6931471805599453)


@triton.jit
def head_offset(batch, head, strides):
    """int64 element offset of token 0 of a head."""
    return batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def row_offset(batch, head, token, strides):
    """int64 element offset of a token's row in a head."""
    return head_offset(batch, head, strides) + token.to(tl.int64) * strides[2]


@triton.jit
def step_place(table_ptr, item, length):
    """Batch row (int64), query, position (-1 for padding) and first slot of decode step `item`."""
    batch = item // length
    query = item % length
    seq = table_ptr + batch * SEQ_COLUMNS
    q_begin = tl.load(seq + SEQ_Q_BEGIN)
    q_end = tl.load(seq + SEQ_Q_END)
    k_begin = tl.load(seq + SEQ_K_BEGIN)
    real = (query >= q_begin) & (query < q_end)
    position = tl.where(real, query + tl.load(seq + SEQ_K_END) - k_begin - q_end, -1)
    return batch.to(tl.int64), query, position, k_begin


@triton.jit
def plan_tile(tile_ptr, tile):
    """A tile's batch row (int64), query range (begin, end), first position, and first key slot (int64)."""
    info = tile_ptr + tile.to(tl.int64) * INFO_COLUMNS
    batch = tl.load(info + PLAN_BATCH).to(tl.int64)
    q_begin = tl.load(info + PLAN_Q_BEGIN)
    q_end = tl.load(info + PLAN_Q_END)
    position = tl.load(info + PLAN_POSITION)
    return batch, q_begin, q_end, position, tl.load(info + PLAN_K_BEGIN).to(tl.int64)


@triton.jit
def pair_coordinates(HALF: tl.constexpr, PADDED_HALF: tl.constexpr, HALVES: tl.constexpr):
    """Numbers of the rotary pairs, and the two coordinates of each; numbers from HALF on are padding."""
    pair = tl.arange(0, PADDED_HALF)
    first = pair if HALVES else 2 * pair
    second = pair + HALF if HALVES else 2 * pair + 1
    return pair, first, second


@triton.jit
def completed_block(start_ptr, batch, length, behind, block_size, ON_DEVICE: tl.constexpr):
    """The block that ends in this program's window of new tokens, if any, for updates of a cache.

    Returns the first slot of the batch row, the block's number (both int64), and whether it is complete.
    """
    start = batch * 0
    if start_ptr is not None:
        start = tl.load(start_ptr + batch).to(tl.int64)
    if ON_DEVICE:
        length = tl.load(length)
    tokens = length.to(tl.int64) - start
    block = tl.maximum(tokens - behind, 0) // block_size + tl.program_id(0)
    return start, block, (block + 1) * block_size <= tokens


@triton.jit
def load_rows(ptr, offset, mask, DIM: tl.constexpr, PADDED: tl.constexpr, EVEN: tl.constexpr):
    """Rows `(N, PADDED)` at element offsets `offset (N,)`; 0 beyond DIM and, unless EVEN, outside `mask`."""
    dim = tl.arange(0, PADDED)
    at = ptr + offset[:, None] + dim[None, :]
    if EVEN and DIM == PADDED:
        return tl.load(at)
    elif EVEN:
        return tl.load(at, mask=(dim < DIM)[None, :], other=0.0)
    else:
        return tl.load(at, mask=mask[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, offset, rows, mask, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Stores `rows (N, PADDED)`, of the pointer's dtype, at element offsets `offset (N,)` inside `mask`."""
    dim = tl.arange(0, PADDED)
    tl.store(ptr + offset[:, None] + dim[None, :], rows, mask=mask[:, None] & (dim < DIM)[None, :])
