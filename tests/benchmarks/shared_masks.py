"""Random causal choices with a given share of pairs, to time attention on random inputs with flat mass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moba_hf.op import shared_ops
from moba_hf.op.sequences import Sequences
from moba_hf.op.shared import SharedRule, mask_words, pack_blocks, tile_bound, unpack_blocks


class _Tiles:
    """The tiles of a call with the last `q_len` of `length` rows of one sequence, and their candidates."""

    def __init__(self, length: int, q_len: int, rule: SharedRule, device: torch.device | str):
        begin, tile, size = length - q_len, rule.tile, rule.block_size
        first = torch.arange(begin // tile, -(-length // tile), device=device) * tile
        self.rows = (first + tile).clamp(max=length) - first.clamp(min=begin)
        first = first[:, None]
        block = torch.arange(-(-length // size), device=device)[None]
        self.candidate = (block + 1) * size <= first
        self.own = ~self.candidate & (block * size < first + tile)
        kept = (block < rule.sink_blocks) | (block >= first // size - rule.local_blocks)
        self.forced = self.candidate & (kept | (first < rule.dense_below))
        self.causal = q_len * begin + q_len * (q_len + 1) / 2
        self.block_size = size

    def pairs(self, blocks: Tensor) -> float:
        """Number of (query, key) pairs in the chosen `blocks`, bool `(tiles, blocks)`."""
        return float((blocks.sum(1) * self.rows).sum()) * self.block_size


def random_mask(
    length: int,
    num_heads: int,
    rule: SharedRule,
    share: float,
    device: torch.device | str,
    spread: float = 0.0,
    q_len: int | None = None,
) -> Tensor:
    """A `block_mask` for one sequence whose rows attend `share` of the causal pairs on average.

    Every tile attends its kept blocks (all blocks before `dense_below`) and random others. If the kept blocks
    alone are more than `share` of the pairs, there are no others.

    Args:
        spread: heads differ: head i takes `(1 + spread * (2 i / (H - 1) - 1))` times the mean number of
            random blocks.
        q_len: the call has only the last `q_len` rows; None: all of them.
    """
    q_len = length if q_len is None else q_len
    tiles = _Tiles(length, q_len, rule, device)
    free = tiles.candidate & ~tiles.forced
    inside = tiles.causal - tiles.pairs(tiles.candidate)
    wanted = share * tiles.causal - inside - tiles.pairs(tiles.forced)
    rate = max(0.0, wanted / max(1.0, tiles.pairs(free)))
    words = mask_words(length, rule.block_size)
    shape = (num_heads, tile_bound(1, q_len, q_len, rule.tile), words)
    result = torch.zeros(shape, dtype=torch.int32, device=device)
    for head in range(num_heads):
        each = rate * (1 + spread * (2 * head / max(1, num_heads - 1) - 1))
        step = 2048  # tiles at a time, to bound the memory
        for at in range(0, len(tiles.rows), step):
            part = slice(at, at + step)
            drawn = free[part] & (torch.rand(free[part].shape, device=device) < each)
            to = slice(at, at + len(drawn))
            result[head, to] = pack_blocks(drawn | tiles.forced[part] | tiles.own[part], words)
    return result


def share_of(block_mask: Tensor, length: int, rule: SharedRule, q_len: int | None = None) -> float:
    """Share of the causal pairs that a choice attends, averaged over heads."""
    tiles = _Tiles(length, length if q_len is None else q_len, rule, block_mask.device)
    blocks, count = tiles.candidate.shape[1], len(tiles.rows)
    taken = [tiles.pairs(unpack_blocks(head[:count], blocks) & tiles.candidate) for head in block_mask]
    inside = tiles.causal - tiles.pairs(tiles.candidate)
    return (inside + sum(taken) / len(taken)) / tiles.causal


class RandomLists:
    """While active, replaces each computed shared choice by a random causal one; the choice still runs.

    Random weights have flat mass, so their own choice would take nearly every block. All layers use the same
    random choice. Calls must hold one unpadded sequence.

    Args:
        share: `(keys, queries) -> ` share of the causal pairs of a call, kept blocks included.
    """

    def __init__(self, share: Callable[[int, int], float]):
        self.share, self.original = share, shared_ops.select_shared
        self.masks: dict[tuple[int, int, int, SharedRule], Tensor] = {}
        self.cut: dict[tuple[tuple[int, int, int, SharedRule], int], Tensor] = {}

    def __enter__(self) -> RandomLists:
        shared_ops.select_shared = self
        return self

    def __exit__(self, *_: object) -> None:
        shared_ops.select_shared = self.original

    def draw(self, length: int, q_len: int, num_heads: int, rule: SharedRule, device: torch.device) -> Tensor:
        """The choice for a call, drawn if it is not known yet; call it before a call is timed."""
        key = (length, q_len, num_heads, rule)
        if key not in self.masks:
            share = self.share(length, q_len)
            self.masks[key] = random_mask(length, num_heads, rule, share, device, q_len=q_len)
        return self.masks[key]

    def __call__(self, q: Tensor, k: Tensor, sequences: Sequences, rule: SharedRule, **kwargs: Any) -> Tensor:
        chosen = self.original(q, k, sequences, rule, **kwargs)
        drawn = (k.shape[2], q.shape[2], q.shape[1], rule)
        mask = self.draw(*drawn, q.device)
        first = mask.shape[1] - chosen.shape[1]
        if sequences.max_seqlen_q < q.shape[2] and first:  # torch computes rows before `dense_below`
            if (drawn, first) not in self.cut:
                self.cut[drawn, first] = mask[:, first:].contiguous()
            mask = self.cut[drawn, first]
        assert mask.shape == chosen.shape, (mask.shape, chosen.shape)
        return mask

    def clear(self) -> None:
        """Forgets what was drawn, to free its memory."""
        self.masks.clear()
        self.cut.clear()
