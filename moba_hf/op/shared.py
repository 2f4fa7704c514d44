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
   heaviest are kept. Equal masses: the lower index first.
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

from dataclasses import dataclass

import torch
from torch import Tensor

from moba_hf.config import check_int

# How the two coordinates that a rotary embedding turns together are paired: (d, d + D/2), or (2d, 2d + 1).
ROTARY_PAIRS = ("halves", "neighbours")
TILE_COLUMNS = ("batch", "q_begin", "q_end", "position", "k_begin", "k_end")
WORD_BITS = 32


@dataclass(frozen=True)
class SharedRule:
    """Which blocks a tile of queries attends; see the module.

    Attributes:
        block_size: tokens in a block.
        tile: queries in a tile, a multiple or a divisor of `block_size`.
        threshold: blocks of at least so many times the largest mass are attended; in (0, 1). None: not asked.
        share: the heaviest blocks that reach this share of the mass are attended; in (0, 1). None: not asked.
        topk: the most blocks that a tile attends, forced ones included; None: no cap.
        sink_blocks, local_blocks: first blocks, and blocks just before the tile, that are always attended.
        sample: one row in so many speaks for the tile; a divisor of `tile`.
        dense_below: rows before this position attend every key; a multiple of `tile`.
        rotary_pairs: one of `ROTARY_PAIRS`, as the model's rotary embedding pairs coordinates.

    Raises:
        ValueError: a value out of range. TypeError: a value of the wrong type.
    """

    block_size: int
    tile: int
    threshold: float | None = None
    share: float | None = None
    topk: int | None = None
    sink_blocks: int = 1
    local_blocks: int = 1
    sample: int = 1
    dense_below: int = 0
    rotary_pairs: str = "halves"

    def __post_init__(self) -> None:
        for name, least in (("block_size", 1), ("tile", 1), ("sink_blocks", 0), ("local_blocks", 0)):
            check_int(name, getattr(self, name), minimum=least)
        check_int("sample", self.sample, minimum=1)
        check_int("dense_below", self.dense_below, minimum=0)
        if self.tile % self.block_size and self.block_size % self.tile:
            raise ValueError(
                f"tile={self.tile} must be a multiple or a divisor of block_size={self.block_size}"
            )
        if self.tile % self.sample:
            raise ValueError(f"sample={self.sample} must divide tile={self.tile}")
        if self.dense_below % self.tile:
            raise ValueError(f"dense_below={self.dense_below} must be a multiple of tile={self.tile}")
        for name in ("threshold", "share"):
            _check_fraction(name, getattr(self, name))
        if self.threshold is None and self.share is None and self.topk is None:
            raise ValueError("a shared choice needs threshold, share or topk")
        if self.topk is not None:
            check_int("topk", self.topk, minimum=1)
            if self.topk < self.forced_blocks:
                raise ValueError(
                    f"topk={self.topk} is too small: it counts the {self.own_blocks} blocks that a tile "
                    f"overlaps, {self.sink_blocks} sink_blocks and {self.local_blocks} local_blocks, so it "
                    f"must be at least {self.forced_blocks}"
                )
        if self.rotary_pairs not in ROTARY_PAIRS:
            raise ValueError(
                f"rotary_pairs must be one of {', '.join(map(repr, ROTARY_PAIRS))}, got {self.rotary_pairs!r}"
            )

    @property
    def own_blocks(self) -> int:
        """Blocks that a whole tile overlaps."""
        return max(1, self.tile // self.block_size)

    @property
    def forced_blocks(self) -> int:
        """Blocks that a whole tile always attends."""
        return self.own_blocks + self.sink_blocks + self.local_blocks


def _check_fraction(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number between 0 and 1, got {value!r}")
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, both excluded, got {value}")


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


def tile_table(table: Tensor, tile: int, bound: int) -> Tensor:
    """The tile table int32 `(bound, 6)` of a sequence table; nothing waits for the device.

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
