"""Numbers the tiles of queries and the blocks of keys of each sequence, without reading from the device.

Legend: S sequences, B block size, T flat query rows (batch * q_len), HK kv heads, NB flat blocks.

Queries are split into *tiles* of at most TILE tokens that are aligned to blocks and never cross one: tile
`block * TILES_PER_BLOCK + part` of a sequence holds positions `[part * TILE, (part + 1) * TILE)` of that
block. So all queries of a tile share an own block, and a tile covers the same tokens in every chunk of
queries. The blocks that a later query may choose, `(k_len - 1) // B` per sequence, are numbered across all
sequences: block `i` of sequence `s` is flat block `block_offset[s] + i`.
A small kernel writes the running totals `tile_offset (chunks, S + 1)`, per chunk of rows, and
`block_offset (S + 1)`; other kernels find their sequence by bisection. Grids use upper bounds of the totals
that the host knows; programs beyond the actual total return at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_hf.kernels.launch import cdiv, device_of, next_power_of_2
from moba_hf.kernels.layout import (
    INFO_COLUMNS,
    SEQ_BATCH,
    SEQ_COLUMNS,
    SEQ_K_BEGIN,
    SEQ_K_END,
    SEQ_Q_BEGIN,
    SEQ_Q_END,
    TILE_BATCH,
    TILE_BEFORE,
    TILE_COMPLETE,
    TILE_FIRST_KEY,
    TILE_HIGH,
    TILE_LOW,
    TILE_ORIGIN,
)
from moba_hf.op.sequences import derived


@dataclass(frozen=True)
class Tiling:
    """The numbering of one call.

    Attributes:
        table: int32 `(S, 5)`, contiguous; see `moba_hf.op.sequences`.
        block_offset: int32 `(S + 1,)`, flat number of each sequence's block 0.
        tile_offset: int32 `(chunks, S + 1)`, number of each sequence's first tile in a chunk.
        num_seqs: S.
        block_size: B.
        tile: maximum number of tokens in a tile.
        tiles_per_block: number of tiles per block.
        num_blocks: upper bound, known on the host, of the number of flat blocks.
        max_blocks: the same for a single sequence.
        chunk_rows: flat query rows in a chunk.
        num_rows: T.
        max_seqlen_q: upper bound, known on the host, of the queries of one sequence.
        tile_tables: the results of `tile_table` so far, by chunk.
    """

    table: Tensor
    block_offset: Tensor
    tile_offset: Tensor
    num_seqs: int
    block_size: int
    tile: int
    tiles_per_block: int
    num_blocks: int
    max_blocks: int
    chunk_rows: int
    num_rows: int
    max_seqlen_q: int
    tile_tables: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_chunks(self) -> int:
        return self.tile_offset.shape[0]

    @property
    def max_tiles(self) -> int:
        """Upper bound of a chunk's tiles: each has a query; n consecutive ones need at most n * rate + 3."""
        rate = self.tiles_per_block
        whole = self.chunk_rows * rate // self.block_size + 1 + 3 * self.num_seqs
        each = self.num_seqs * (min(self.max_seqlen_q, self.chunk_rows) * rate // self.block_size + 4)
        return max(1, min(self.chunk_rows, whole, each))


def head_split(group_size: int, rows: int) -> tuple[int, int]:
    """Query heads per program and tokens per tile, such that heads x tokens fit `rows`."""
    heads = min(group_size, rows)
    return heads, max(1, rows // heads)


def make_tiling(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_size: int,
    tile: int,
    chunk_rows: int | None = None,
) -> Tiling:
    """The numbering of `q (batch, H, q_len, D)` and `k (batch, HK, kv_len, D)`; one kernel launch.

    A constant table gets one for all layers of a forward, see `derived`.

    Args:
        table: int32 `(S, 5)`, see `moba_hf.op.sequences`.
        tile: maximum number of tokens in a tile; reduced to make the tiles of a block even.
        chunk_rows: flat query rows per chunk; None: all.
    """
    limits = (max_seqlen_q, max_seqlen_k, block_size, tile, chunk_rows)
    key = ("tiling", q.shape[0], q.shape[2], k.shape[0], k.shape[2], *limits)
    return derived(table, key, lambda: _new_tiling(q, k, table, *limits))


def _new_tiling(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    tile: int,
    chunk_rows: int | None,
) -> Tiling:
    rows, num_seqs = q.shape[0] * q.shape[2], table.shape[0]
    parts = cdiv(block_size, min(tile, block_size))
    chunk_rows = max(1, rows if chunk_rows is None else min(chunk_rows, rows))
    chunks = max(1, cdiv(rows, chunk_rows))
    max_seqlen_k = min(max_seqlen_k, k.shape[2])
    max_blocks = max(0, max_seqlen_k - 1) // block_size
    table = table.contiguous().detach()  # another object: a kept tiling must not keep `table` alive
    block_offset = torch.empty(num_seqs + 1, dtype=torch.int32, device=q.device)
    tile_offset = torch.empty(chunks, num_seqs + 1, dtype=torch.int32, device=q.device)
    tiling = Tiling(
        table=table,
        block_offset=block_offset,
        tile_offset=tile_offset,
        num_seqs=num_seqs,
        block_size=block_size,
        tile=cdiv(block_size, parts),
        tiles_per_block=parts,
        num_blocks=min(num_seqs * max_blocks, max(0, k.shape[0] * k.shape[2] - 1) // block_size),
        max_blocks=max_blocks,
        chunk_rows=chunk_rows,
        num_rows=rows,
        max_seqlen_q=min(max_seqlen_q, q.shape[2]),
    )
    with device_of(q):
        _tiling_kernel[(chunks,)](
            table,
            block_offset,
            tile_offset,
            num_seqs,
            q.shape[2],
            chunk_rows,
            block_size,
            TILE=tiling.tile,
            TILES_PER_BLOCK=parts,
            BLOCK_S=min(1024, next_power_of_2(max(1, num_seqs))),
        )
    return tiling


def tile_table(tiling: Tiling, chunk: int, q_len: int) -> Tensor:
    """Description of each query tile of a chunk, int32 `(max_tiles, INFO_COLUMNS)`, made once.

    `layout` names the columns. Rows beyond the actual number of tiles stay unwritten.
    """
    if chunk in tiling.tile_tables:
        return tiling.tile_tables[chunk]
    first_row = chunk * tiling.chunk_rows
    result = torch.empty(tiling.max_tiles, INFO_COLUMNS.value, dtype=torch.int32, device=tiling.table.device)
    with device_of(tiling.table):
        _tile_table_kernel[(tiling.max_tiles,)](
            result,
            tiling.table,
            tiling.tile_offset[chunk],
            tiling.num_seqs,
            q_len,
            first_row,
            min(tiling.chunk_rows, tiling.num_rows - first_row),
            tiling.block_size,
            TILE=tiling.tile,
            TILES_PER_BLOCK=tiling.tiles_per_block,
            num_warps=1,
        )
    tiling.tile_tables[chunk] = result
    return result


@triton.jit(do_not_specialize=["num_seqs", "q_len", "chunk_rows"])
def _tiling_kernel(
    table_ptr,
    block_offset_ptr,
    tile_offset_ptr,
    num_seqs,
    q_len,
    chunk_rows,
    block_size,
    TILE: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Running totals of tiles and blocks over the sequences, for one chunk."""
    chunk = tl.program_id(0)
    tile_offset_ptr += chunk.to(tl.int64) * (num_seqs + 1)
    num_tiles = tl.zeros([], tl.int32)
    num_blocks = tl.zeros([], tl.int32)
    for start in range(0, num_seqs, BLOCK_S):
        seq = start + tl.arange(0, BLOCK_S)
        mask = seq < num_seqs
        row = table_ptr + seq * SEQ_COLUMNS
        batch = tl.load(row + SEQ_BATCH, mask=mask, other=0)
        q_begin = tl.load(row + SEQ_Q_BEGIN, mask=mask, other=0)
        q_end = tl.load(row + SEQ_Q_END, mask=mask, other=0)
        k_len = tl.load(row + SEQ_K_END, mask=mask, other=0) - tl.load(row + SEQ_K_BEGIN, mask=mask, other=0)
        low, high = clip_queries(batch, q_begin, q_end, q_len, chunk.to(tl.int64) * chunk_rows, chunk_rows)
        first = low + k_len - q_end
        last = high - 1 + k_len - q_end
        first = first // block_size * TILES_PER_BLOCK + first % block_size // TILE
        last = last // block_size * TILES_PER_BLOCK + last % block_size // TILE
        tiles = tl.where(mask & (high > low), last - first + 1, 0)
        blocks = tl.where(mask & (k_len > 0), (k_len - 1) // block_size, 0)
        tl.store(tile_offset_ptr + seq, num_tiles + tl.cumsum(tiles, 0) - tiles, mask=mask)
        tl.store(block_offset_ptr + seq, num_blocks + tl.cumsum(blocks, 0) - blocks, mask=mask & (chunk == 0))
        num_tiles += tl.sum(tiles, 0)
        num_blocks += tl.sum(blocks, 0)
    tl.store(tile_offset_ptr + num_seqs, num_tiles)
    if chunk == 0:
        tl.store(block_offset_ptr + num_seqs, num_blocks)


@triton.jit
def clip_queries(batch, q_begin, q_end, q_len, first_row, num_rows):
    """The queries `[low, high)` of a sequence among flat rows `[first_row, first_row + num_rows)`."""
    base = first_row - batch.to(tl.int64) * q_len
    low = tl.maximum(q_begin.to(tl.int64), base).to(tl.int32)
    high = tl.minimum(q_end.to(tl.int64), base + num_rows).to(tl.int32)
    return low, high


@triton.jit
def bisect(offset_ptr, num_seqs, number):
    """The sequence that contains `number`: the last one whose offset is at most `number`."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(offset_ptr + middle) <= number
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def find_tile(
    table_ptr,
    tile_offset_ptr,
    num_seqs,
    q_len,
    first_row,
    num_rows,
    number,
    block_size,
    TILE: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr,
):
    """Description of query tile `number` of a chunk.

    Returns its sequence, batch row, own block, first position, query index of position 0 (may be negative),
    query range `[low, high)`, and the sequence's first key slot and number of keys. The tile's tokens are the
    positions `first + i`, `i < TILE`, that lie in the block and in the query range.
    """
    seq = bisect(tile_offset_ptr, num_seqs, number)
    row = table_ptr + seq * SEQ_COLUMNS
    batch = tl.load(row + SEQ_BATCH)
    q_end = tl.load(row + SEQ_Q_END)
    k_begin = tl.load(row + SEQ_K_BEGIN)
    k_len = tl.load(row + SEQ_K_END) - k_begin
    low, high = clip_queries(batch, tl.load(row + SEQ_Q_BEGIN), q_end, q_len, first_row, num_rows)
    position = low + k_len - q_end
    tile = position // block_size * TILES_PER_BLOCK + position % block_size // TILE
    tile += number - tl.load(tile_offset_ptr + seq)
    own = tile // TILES_PER_BLOCK
    first = own * block_size + tile % TILES_PER_BLOCK * TILE
    return seq, batch, own, first, q_end - k_len, low, high, k_begin, k_len


@triton.jit
def tile_rows(
    own,
    first,
    origin,
    low,
    high,
    part,
    group_size,
    block_size,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Token within the tile, query index, head within the group, and mask, each `(M,)`, of a program's rows.

    A row is a token and a head. `part` says which HEADS of the group's heads the program handles; the other
    arguments come from `find_tile`.
    """
    row = tl.arange(0, BLOCK_M)
    token = row // HEADS
    in_group = part * HEADS + row % HEADS
    position = first + token
    query = position + origin
    mask = (token < TILE) & (position < (own + 1) * block_size) & (query >= low) & (query < high)
    return token, query, in_group, mask & (in_group < group_size)


@triton.jit(do_not_specialize=["num_seqs", "q_len", "first_row", "num_rows", "block_size"])
def _tile_table_kernel(
    result_ptr,
    table_ptr,
    tile_offset_ptr,
    num_seqs,
    q_len,
    first_row,
    num_rows,
    block_size,
    TILE: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr,
):
    number = tl.program_id(0)
    if number < tl.load(tile_offset_ptr + num_seqs):
        _, batch, own, first, origin, low, high, k_begin, k_len = find_tile(
            table_ptr,
            tile_offset_ptr,
            num_seqs,
            q_len,
            first_row,
            num_rows,
            number,
            block_size,
            TILE,
            TILES_PER_BLOCK,
        )
        result_ptr += number.to(tl.int64) * INFO_COLUMNS
        tl.store(result_ptr + TILE_BATCH, batch)
        tl.store(result_ptr + TILE_BEFORE, first - own * block_size)
        tl.store(result_ptr + TILE_ORIGIN, first + origin)
        tl.store(result_ptr + TILE_LOW, low)
        tl.store(result_ptr + TILE_HIGH, high)
        tl.store(result_ptr + TILE_FIRST_KEY, k_begin + own * block_size)
        tl.store(result_ptr + TILE_COMPLETE, ((own + 1) * block_size <= k_len).to(tl.int32))
