"""How good the choice of blocks is, by layer and head, compared with an oracle that takes as many blocks.

The oracle attends the same number of blocks and the same kept blocks, but ranks the others by their true
attention mass. Everything is measured in one dense pass, so that a layer does not suffer from errors of the
layers below it. If a tile of queries shares a choice, the oracle still chooses for each query, with as many
blocks as the tile attends. It is then an upper bound of the mass, and the block recall shows how much the
queries of a tile differ.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moba_hf.config import MobaConfig
from moba_hf.evaluate.passes import (
    attention_rows,
    check_ids,
    family_of,
    ranked_by_rule,
    sample_positions,
    watch,
)
from moba_hf.op.layer_rule import Rule
from moba_hf.op.ops import select_by_rule
from moba_hf.op.shared import unpack_blocks
from moba_hf.op.shared_rule import SharedRule


@dataclass(frozen=True)
class Recall:
    """Means over sampled queries, indexed `[row][head]`; row i belongs to layer `layers[i]`.

    Attributes:
        layers: indices of the layers that run MoBA.
        block: share of the oracle's blocks that were chosen.
        mass: attention mass of the chosen blocks.
        oracle: attention mass of the oracle's blocks.
    """

    layers: tuple[int, ...]
    block: tuple[tuple[float, ...], ...]
    mass: tuple[tuple[float, ...], ...]
    oracle: tuple[tuple[float, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def block_masses(weights: Tensor, block_size: int) -> Tensor:
    """Attention mass `(H, M, blocks)` of every block, from attention weights `(H, M, N)`."""
    missing = -weights.shape[2] % block_size
    return nn.functional.pad(weights, (0, missing)).unflatten(2, (-1, block_size)).sum(3)


def chosen_mask(choice: Tensor, blocks: int) -> Tensor:
    """A choice `(M, H, topk)`, padded with -1, as a bool mask `(H, M, blocks)`."""
    mask = torch.zeros(*choice.shape[:2], blocks + 1, dtype=torch.bool, device=choice.device)
    mask.scatter_(2, choice.long().masked_fill(choice < 0, blocks), True)
    return mask[:, :, :blocks].transpose(0, 1)


def oracle_mask(masses: Tensor, positions: Tensor, rule: Rule, counts: Tensor) -> Tensor:
    """Bool `(H, M, blocks)`: own and kept blocks, then those with most mass, `counts (H, M)` in all."""
    ranked = ranked_by_rule(masses, positions, rule)
    order = ranked.sort(dim=2, descending=True, stable=True).indices
    taken = torch.arange(masses.shape[2], device=masses.device) < counts[..., None]
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(2, order, taken)
    return chosen & (ranked > -torch.inf)


def layer_recall(
    q: Tensor, k: Tensor, positions: Tensor, rule: Rule, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Block recall, mass and oracle mass of one layer, `(H,)` each, averaged over `positions`.

    Args:
        q: `(H, N, D)`.
        k: `(HK, N, D)`.
        positions: positions of the sampled queries, `(M,)`.
    """
    choice = select_by_rule(q.transpose(0, 1), k.transpose(0, 1), rule, softmax_scale=scale)
    masses = block_masses(attention_rows(q[:, positions], k, positions, scale), rule.block_size)
    blocks = masses.shape[2]
    if isinstance(rule, SharedRule):
        own = torch.arange(blocks, device=q.device) <= (positions // rule.block_size)[:, None]
        chosen = unpack_blocks(choice, blocks)[:, positions // rule.tile] & own
    else:
        chosen = chosen_mask(choice[positions], blocks)
    oracle = oracle_mask(masses, positions, rule, chosen.sum(2))
    block = (chosen & oracle).sum(2) / oracle.sum(2)
    return block.mean(1), (masses * chosen).sum(2).mean(1), (masses * oracle).sum(2).mean(1)


def recall(model: Any, ids: Tensor, config: MobaConfig, *, samples: int = 128, seed: int = 0) -> Recall:
    """Recall of every MoBA layer, at `samples` queries in the last three quarters of `ids (1, length)`."""
    check_ids(ids)
    adapter, text_config = family_of(model)
    positions = sample_positions(ids.shape[1], samples, seed)
    rows: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def probe(layer: int, _: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        rule = adapter.rule(text_config, config, layer)
        if rule is not None:
            rows[layer] = layer_recall(q, k, positions.to(q.device), rule, scale)

    watch(model, ids, probe)
    layers = tuple(sorted(rows))
    block, mass, oracle = (tuple(tuple(rows[i][n].tolist()) for i in layers) for n in range(3))
    return Recall(layers, block, mass, oracle)
