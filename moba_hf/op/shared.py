"""A choice of blocks that a tile of queries shares: the rule, the tiles, and how a choice is written down.

A second rule beside the paper's MoBA, for models that were not trained with it. It is not MoBA. In words, for
one sequence and one query head, with T = `tile`, B = `block_size`, positions counted from the sequence's
first token:

1. Tiles are the queries at positions `[t T, (t + 1) T)`, blocks the keys at `[b B, (b + 1) B)`. A call that
   holds only some rows of a tile (a chunk of a prefill, a decode step) treats these rows as the tile.
2. The *candidates* of a tile are the blocks that end before its first position `t T`, whatever rows of it a
   call holds. They are complete.
3. The mass of the candidates for one query: softmax, over the candidates, of the scores of
   `moba_hf.op.gates`, whose variances are averaged over rotary pairs so that the scores do not depend on
   where positions begin.
4. The mass of a candidate for a tile: mean of that over the tile's *sampled* rows. Positions are cut in
   groups of `sample` on the same grid, and of each group the last row in the call is sampled.
5. Every row of the tile attends: the blocks that the tile overlaps (up to the row itself), the first
   `sink_blocks` and the last `local_blocks` candidates, and of the others those with at least `threshold`
   times the largest mass of a candidate (forced ones included), or, where `share` is given, the heaviest
   that are needed for the heaviest candidates together to reach that share of the mass (forced ones
   included). Where both are given, a block must pass both. With `topk`, at most so many blocks in all; the
   heaviest are kept. Equal masses: the lower index first. Where a score is not finite (a NaN or inf in a
   sampled query, or in a candidate's keys), no mass of the tile is a number: every candidate is attended,
   the lowest first up to `topk`, so that none is lost without a trace.
6. Tiles that begin before `dense_below` attend every key up to the row.
7. Output and `lse` are those of the softmax over the attended keys. The choice is not differentiated.

A tile's choice therefore hears its later rows: a token changes nothing before its tile.

Written down, a choice is a bit mask `block_mask`, int32 `(num_heads, num_tiles, words)`: bit `b % 32` of word
`b // 32` says whether block `b` of the sequence is attended, the blocks that the tile overlaps included;
`words = ceil(ceil(max_seqlen_k / B) / 32)`. Tiles are numbered as in the *tile table*, int32
`(num_tiles, 6)`: one row `(batch, q_begin, q_end, position, k_begin, k_end)` per tile. Queries
`[q_begin, q_end)` of that batch row are the tile's rows in this call, the first of them at `position` of its
sequence, whose keys are slots `[k_begin, k_end)`. Tiles of a sequence follow one another in order of
position, sequences in the order of the sequence table (`moba_hf.op.sequences`). The number of rows is a bound
that is known without looking at values, `tile_bound`; rows that are not needed stand at the end and are all
zero (`q_begin == q_end`), their masks are zero. A query that no tile covers is padding: zeros, lse -inf.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from moba_hf.op.sequences import Sequences
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
        total_q: queries of all batch rows, padding included.
        tile: queries in a tile.
    """
    longest = 0 if max_seqlen_q == 0 else (max_seqlen_q + tile - 2) // tile + 1
    return min(num_seqs * longest, (total_q + num_seqs * 2 * (tile - 1)) // tile)


def num_tiles(sequences: Sequences, q: Tensor, tile: int) -> int:
    """Rows of the tile table of `q (batch, heads, q_len, dim)`, known without looking at values."""
    return tile_bound(sequences.table.shape[0], sequences.max_seqlen_q, q.shape[0] * q.shape[2], tile)


def sequence_tiles(sequences: Sequences, q: Tensor, tile: int) -> Iterator[tuple[slice, list[list[int]]]]:
    """Per sequence that has queries: the numbers of its tiles, and their rows of the tile table.

    Reading them waits for the device.
    """
    rows = tile_table(sequences.table, tile, num_tiles(sequences, q, tile)).tolist()
    at = 0
    for _, group in groupby(rows, key=lambda row: (row[0], row[4], row[5])):
        tiles = list(group)
        if tiles[0][2] > tiles[0][1]:  # else rows that are not needed
            yield slice(at, at + len(tiles)), tiles
        at += len(tiles)


def tile_table(table: Tensor, tile: int, bound: int) -> Tensor:
    """The tile table int32 `(bound, 6)` of a sequence table; nothing waits for the device.

    Columns: batch, q_begin, q_end, position, k_begin, k_end.

    Args:
        table: int32 `(num_seqs, 5)`, see `moba_hf.op.sequences`.
        tile: queries in a tile.
        bound: rows of the result, at least the number of tiles (`tile_bound`).
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
    """Words of a block mask for sequences of at most `max_seqlen_k` keys."""
    blocks = (max_seqlen_k + block_size - 1) // block_size
    return (blocks + WORD_BITS - 1) // WORD_BITS


def pack_blocks(chosen: Tensor, words: int) -> Tensor:
    """The bit mask int32 `(..., words)` of `chosen`, bool `(..., blocks)`."""
    padded = torch.nn.functional.pad(chosen, (0, words * WORD_BITS - chosen.shape[-1]))
    bits = padded.unflatten(-1, (words, WORD_BITS)).long()
    value = (bits << torch.arange(WORD_BITS, device=chosen.device)).sum(-1)
    return torch.where(value >= 1 << 31, value - (1 << 32), value).to(torch.int32)


def unpack_blocks(block_mask: Tensor, blocks: int) -> Tensor:
    """Bool `(..., blocks)`: which blocks a bit mask `(..., words)` names."""
    bits = block_mask[..., None] >> torch.arange(WORD_BITS, dtype=torch.int32, device=block_mask.device)
    return (bits & 1).bool().flatten(-2)[..., :blocks]
