"""Random causal choices with a given share of pairs, to time attention on random inputs with flat mass."""

from __future__ import annotations

import torch
from torch import Tensor

from moba_hf.op.shared import SharedRule, mask_words, pack_blocks, unpack_blocks


def random_mask(
    length: int, num_heads: int, rule: SharedRule, share: float, device: str, spread: float = 0.0
) -> Tensor:
    """A `block_mask` for one sequence whose rows attend `share` of the causal pairs on average.

    Every tile attends its kept blocks and random others. With `spread`, heads differ: head i takes
    `(1 + spread * (2 i / (H - 1) - 1))` times the mean number of random blocks.
    """
    tiles, blocks = -(-length // rule.tile), -(-length // rule.block_size)
    words = mask_words(length, rule.block_size)
    first = torch.arange(tiles, device=device)[:, None] * rule.tile
    block = torch.arange(blocks, device=device)[None]
    candidate = (block + 1) * rule.block_size <= first
    own = ~candidate & (block * rule.block_size < first + rule.tile)
    forced = candidate & (
        (block < rule.sink_blocks) | (block >= first // rule.block_size - rule.local_blocks)
    )
    pairs = rule.tile * rule.block_size
    causal = length * (length + 1) / 2
    inside = causal - pairs * candidate.sum().item()
    wanted = share * causal - inside - pairs * forced.sum().item()
    rate = wanted / (pairs * (candidate & ~forced).sum().item())
    result = torch.empty(num_heads, tiles, words, dtype=torch.int32, device=device)
    for head in range(num_heads):
        each = rate * (1 + spread * (2 * head / max(1, num_heads - 1) - 1))
        step = 2048  # tiles at a time, to bound the memory
        for at in range(0, tiles, step):
            part = slice(at, at + step)
            rows = candidate[part] & (torch.rand(candidate[part].shape, device=device) < each)
            result[head, part] = pack_blocks(rows | forced[part] | own[part], words)
    return result


def share_of(block_mask: Tensor, length: int, rule: SharedRule) -> float:
    """Share of the causal pairs that a choice attends, averaged over heads."""
    blocks = -(-length // rule.block_size)
    first = torch.arange(block_mask.shape[1], device=block_mask.device)[:, None] * rule.tile
    candidate = (torch.arange(blocks, device=block_mask.device)[None] + 1) * rule.block_size <= first
    taken = sum(int((unpack_blocks(head, blocks) & candidate).sum()) for head in block_mask)
    causal = length * (length + 1) / 2
    pairs = rule.tile * rule.block_size
    inside = causal - pairs * int(candidate.sum())
    return (inside + pairs * taken / len(block_mask)) / causal
