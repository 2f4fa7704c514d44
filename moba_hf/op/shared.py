"""A choice of blocks that a tile of queries shares: the rule, the tiles, and the format of a choice.

This is a second rule, for models that were not trained with MoBA; it is not the paper's MoBA. For one
sequence and one query head, with T = `tile`, B = `block_size`, and positions counted from the sequence's
first token:

1. A tile is the queries at positions `[t T, (t + 1) T)`; a block is the keys at `[b B, (b + 1) B)`. If a
   call has only some rows of a tile (a chunk of a prefill), these rows are the tile.
2. The *candidates* of a tile are the blocks that end before its first position `t T`, no matter which of its
   rows are in the call. So all candidates are complete.
3. The masses of the candidates for one query are the softmax over the candidates of their mass gate scores
   (`moba_hf.op.gates`). The variances in the scores are averaged over rotary pairs, so that scores do not
   depend on the position of the first token.
4. The mass of a candidate for a tile is its mean mass over the tile's *sampled* rows: positions are divided
   into groups of `sample`, counted from 0, and the last row of each group that is in the call is sampled.
5. Every row of the tile attends to the blocks that the tile overlaps (up to the row itself), to the first
   `sink_blocks` and the last `local_blocks` candidates, and to other candidates as follows. With `threshold`,
   their mass must be at least `threshold` times the largest mass of any candidate. With `share`, candidates
   (including sink and local blocks) are taken in order of mass until they reach that share. With both, a
   block must pass both. With `topk`, there are at most that many blocks in total, and the heaviest are taken.
   If masses are equal, the lower index comes first. If a score is not finite (a NaN or inf in a sampled
   query or in the keys of a candidate), the masses of the tile are NaN, and every candidate is taken, the
   lowest first up to `topk`: none is dropped silently.
6. Tiles that begin before `dense_below` attend to every key up to the row.
7. Output and `lse` are those of the softmax over the attended keys. The choice is not differentiated.
8. A decode step with a sparse choice has a list of its own: the one that its tile would have if it ended
   with the step. So masses are averaged over the tile's sampled rows before the step, and the step itself.
   Earlier rows take part as far as the cache has kept their queries (the *heard* queries). They may be of
   earlier calls or of the prompt, and it does not matter what they attended to. Later rows never take part.
   The candidates stay the same until the tile is complete, so the masses of all rows are over the same
   blocks. If the cache keeps no queries, each step chooses by its own query alone, even if a call has several
   steps.

So a tile's choice depends on all of its rows: a row can be influenced by later tokens of its tile, but never
by later tiles.

A choice is stored as a bit mask `block_mask`, int32 `(num_heads, num_tiles, words)`, where
`words = ceil(ceil(max_seqlen_k / B) / 32)`. Bit `b % 32` of word `b // 32` says whether the tile attends to
block `b` of the sequence, including the blocks that the tile overlaps. Tiles are numbered as in the
*tile table*, int32 `(num_tiles, 6)`, with one row `(batch, q_begin, q_end, position, k_begin, k_end)` per
tile. Queries `[q_begin, q_end)` of that batch row are the tile's rows in this call; the first is at
`position` of its sequence, and the keys of the sequence are slots `[k_begin, k_end)`. Tiles are ordered by
sequence, as in the sequence table (`moba_hf.op.sequences`), then by position. The number of rows is
`tile_bound`, which is known without reading values; unused rows at the end are all zero
(`q_begin == q_end`), and so are their masks. A query that belongs to no tile is padding: its output is zero
and its lse is -inf.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from moba_hf.op.sequences import Sequences, rows_of
from moba_hf.op.shared_rule import SharedRule

__all__ = [
    "SharedRule",
    "mask_words",
    "num_tiles",
    "pack_blocks",
    "sequence_tiles",
    "tile_table",
    "unpack_blocks",
]

WORD_BITS = 32


def tile_bound(num_seqs: int, max_seqlen_q: int, total_q: int, tile: int) -> int:
    """The most tiles that a call can have, from sizes alone.

    Args:
        num_seqs: sequences of the table.
        max_seqlen_q: a bound on the queries of one sequence.
        total_q: number of queries in all batch rows, including padding.
        tile: queries per tile.
    """
    longest = 0 if max_seqlen_q == 0 else (max_seqlen_q + tile - 2) // tile + 1
    return min(num_seqs * longest, (total_q + num_seqs * 2 * (tile - 1)) // tile)


def num_tiles(sequences: Sequences, q: Tensor, tile: int) -> int:
    """Number of rows of the tile table for `q (batch, heads, q_len, dim)`, known without reading values."""
    return tile_bound(sequences.table.shape[0], sequences.max_seqlen_q, q.shape[0] * q.shape[2], tile)


def sequence_tiles(sequences: Sequences, q: Tensor, tile: int) -> Iterator[tuple[slice, list[list[int]]]]:
    """Yields for each sequence with queries the numbers of its tiles and their rows of the tile table.

    It waits for the device.

    Raises:
        ValueError: a sequence has more queries than keys.
    """
    rows_of(sequences.table)
    rows = tile_table(sequences.table, tile, num_tiles(sequences, q, tile)).tolist()
    at = 0
    for _, group in groupby(rows, key=lambda row: (row[0], row[4], row[5])):
        tiles = list(group)
        if tiles[0][2] > tiles[0][1]:  # otherwise unused rows
            yield slice(at, at + len(tiles)), tiles
        at += len(tiles)


def tile_table(table: Tensor, tile: int, bound: int) -> Tensor:
    """The tile table int32 `(bound, 6)` of a sequence table; does not wait for the device.

    Columns: batch, q_begin, q_end, position, k_begin, k_end.

    Args:
        table: int32 `(num_seqs, 5)`, see `moba_hf.op.sequences`.
        tile: queries per tile.
        bound: number of rows of the result, at least the number of tiles (`tile_bound`).
    """
    batch, q_begin, q_end, k_begin, k_end = table.long().unbind(1)
    first = (k_end - k_begin) - (q_end - q_begin)  # position of a sequence's first query
    last = k_end - k_begin
    counts = torch.where(q_end > q_begin, (last - 1) // tile - first // tile + 1, 0)
    ends = counts.cumsum(0)
    number = torch.arange(bound, device=table.device)
    of = torch.searchsorted(ends, number, right=True)
    used = of < table.shape[0]
    of = of.clamp(max=max(0, table.shape[0] - 1))
    grid = first[of] // tile + number - (ends - counts)[of]
    begin = torch.maximum(grid * tile, first[of])
    end = torch.minimum((grid + 1) * tile, last[of])
    shift = q_begin[of] - first[of]
    columns = [batch[of], begin + shift, end + shift, begin, k_begin[of], k_end[of]]
    return (torch.stack(columns, 1) * used[:, None]).to(torch.int32)


def mask_words(max_seqlen_k: int, block_size: int) -> int:
    """Number of words of a block mask for sequences of at most `max_seqlen_k` keys."""
    blocks = (max_seqlen_k + block_size - 1) // block_size
    return (blocks + WORD_BITS - 1) // WORD_BITS


def pack_blocks(chosen: Tensor, words: int) -> Tensor:
    """The bit mask int32 `(..., words)` of `chosen`, bool `(..., blocks)`."""
    padded = torch.nn.functional.pad(chosen, (0, words * WORD_BITS - chosen.shape[-1]))
    bits = padded.unflatten(-1, (words, WORD_BITS)).long()
    value = (bits << torch.arange(WORD_BITS, device=chosen.device)).sum(-1)
    return torch.where(value >= 1 << 31, value - (1 << 32), value).to(torch.int32)


def unpack_blocks(block_mask: Tensor, blocks: int) -> Tensor:
    """The blocks of a bit mask `(..., words)`, bool `(..., blocks)`."""
    bits = block_mask[..., None] >> torch.arange(WORD_BITS, dtype=torch.int32, device=block_mask.device)
    return (bits & 1).bool().flatten(-2)[..., :blocks]
