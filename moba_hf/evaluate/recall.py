"""How good a choice of blocks is, layer by layer and head by head, against the best choice of as many blocks.

The oracle attends the same number of blocks and the same forced ones, but takes the others by their true
attention mass. Measured in one dense pass, so that a layer is not blamed for the layers below it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moba_hf.config import LayerConfig, MobaConfig
from moba_hf.evaluate.passes import attention_rows, family_of, ranked_by_rule, sample_positions, watch
from moba_hf.op.ops import select_blocks
from moba_hf.op.shared_rule import SharedRule


@dataclass(frozen=True)
class Recall:
    """Means over sampled queries, indexed `[row][head]`; a row is a layer of `layers`.

    Attributes:
        layers: the layers that run MoBA.
        block: share of the oracle's blocks that were chosen.
        mass: attention mass of the chosen blocks. oracle: that of the oracle's.
    """

    layers: tuple[int, ...]
    block: tuple[tuple[float, ...], ...]
    mass: tuple[tuple[float, ...], ...]
    oracle: tuple[tuple[float, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def block_masses(weights: Tensor, block_size: int) -> Tensor:
    """Attention mass of every block, `(H, M, blocks)`, from `weights (H, M, N)`."""
    missing = -weights.shape[2] % block_size
    return nn.functional.pad(weights, (0, missing)).unflatten(2, (-1, block_size)).sum(3)


def chosen_mask(choice: Tensor, blocks: int) -> Tensor:
    """Bool `(H, M, blocks)` of a choice `(M, H, topk)`, -1 being none."""
    mask = torch.zeros(*choice.shape[:2], blocks + 1, dtype=torch.bool, device=choice.device)
    mask.scatter_(2, choice.long().masked_fill(choice < 0, blocks), True)
    return mask[:, :, :blocks].transpose(0, 1)


def oracle_mask(masses: Tensor, own: Tensor, rule: LayerConfig) -> Tensor:
    """Bool `(H, M, blocks)`: own and forced blocks, then those of the greatest mass, `topk` in all."""
    ranked = ranked_by_rule(masses, own, rule)
    best = ranked.topk(min(rule.topk, masses.shape[2]), dim=2).indices
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(2, best, True)
    return chosen & (ranked > -torch.inf)


def layer_recall(
    q: Tensor, k: Tensor, positions: Tensor, rule: LayerConfig, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Block recall, mass and oracle mass of one layer, `(H,)` each, averaged over `positions`.

    Args:
        q: `(H, N, D)`. k: `(HK, N, D)`. positions: `(M,)` of the queries looked at.
    """
    choice = select_blocks(
        q.transpose(0, 1),
        k.transpose(0, 1),
        **rule.to_dict(),
        softmax_scale=scale,
    )
    masses = block_masses(attention_rows(q[:, positions], k, positions, scale), rule.block_size)
    chosen = chosen_mask(choice[positions], masses.shape[2])
    oracle = oracle_mask(masses, positions // rule.block_size, rule)
    block = (chosen & oracle).sum(2) / oracle.sum(2)
    return block.mean(1), (masses * chosen).sum(2).mean(1), (masses * oracle).sum(2).mean(1)


def recall(model: Any, ids: Tensor, config: MobaConfig, *, samples: int = 128, seed: int = 0) -> Recall:
    """Recall of every MoBA layer on `ids (1, length)`, at `samples` queries of its last three quarters."""
    adapter, text_config = family_of(model)
    num_layers = adapter.num_layers(text_config)
    positions = sample_positions(ids.shape[1], samples, seed)
    rows: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def probe(layer: int, _: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        rule = config.for_layer(layer, num_layers)
        if isinstance(rule, SharedRule):
            raise ValueError("recall is defined for queries that choose for themselves: tile must be 1")
        if rule is not None:
            rows[layer] = layer_recall(q, k, positions.to(q.device), rule, scale)

    watch(model, ids, probe)
    layers = tuple(sorted(rows))
    block, mass, oracle = (tuple(tuple(rows[i][n].tolist()) for i in layers) for n in range(3))
    return Recall(layers, block, mass, oracle)
