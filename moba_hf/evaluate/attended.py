"""How many (query, key) pairs a model attends, by layer and head, counted exactly.

If every query attends `topk` blocks, the number follows from the rule. How many blocks a shared choice takes
depends on the text, so its pairs are counted while the model runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moba_hf.checkpoints.inspection import LayerRow, inspect_config
from moba_hf.config import MobaConfig
from moba_hf.evaluate.passes import family_of
from moba_hf.op.sequences import Sequences
from moba_hf.op.shared import SharedRule, sequence_tiles, unpack_blocks
from moba_hf.op.shared_ops import CHOICE_WATCHERS


@dataclass
class Attended:
    """The pairs attended in one pass over one text; valid once the pass is over.

    Attributes:
        layers: the decoder layers, as `inspect_config` describes them.
        num_heads: number of query heads in a layer.
        length: number of tokens in the text.
        counted: layer index -> pairs, int64 `(num_heads,)`, for layers that made a shared choice.
    """

    layers: tuple[LayerRow, ...]
    num_heads: int
    length: int
    counted: dict[int, Tensor] = field(default_factory=dict)

    @property
    def dense(self) -> int:
        """Number of pairs of dense causal attention in one head."""
        return self.length * (self.length + 1) // 2

    def heads(self) -> dict[int, list[float]]:
        """Shares of the dense causal pairs: MoBA layer index -> one share per head."""
        return {row.index: self._shares(row) for row in self.layers if row.rule is not None}

    def share(self) -> float:
        """Mean share over the layers that have attention; layers without MoBA count with what they attend."""
        found = [sum(self._shares(row)) / self.num_heads for row in self.layers if row.key_limit != 0]
        return sum(found) / max(1, len(found))

    def _shares(self, row: LayerRow) -> list[float]:
        if isinstance(row.rule, SharedRule):
            if row.index not in self.counted:  # the layer made no choice: its rule attends the whole text
                return [1.0] * self.num_heads
            return [int(pairs) / self.dense for pairs in self.counted[row.index]]
        return [row.pairs(self.length) / self.dense] * self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values: `share`, and `heads` by layer."""
        return {"share": self.share(), "heads": {str(i): shares for i, shares in self.heads().items()}}


@contextmanager
def count_pairs(model: Any, config: MobaConfig, length: int) -> Iterator[Attended]:
    """Counts the pairs that forward passes inside the `with` block attend under `config`.

    Yields the object that holds the counts. The passes must cover one text of `length` tokens; the counts of
    calls that continue from a cache are added up.
    """
    adapter, _ = family_of(model)
    inspection = inspect_config(model.config, config, (length,))
    result = Attended(inspection.layers, inspection.num_heads, length)
    running: list[int] = []

    def enter(layer: int) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            running[:] = [layer]

        return hook

    def watch(mask: Tensor, q: Tensor, sequences: Sequences, rule: SharedRule) -> None:
        pairs = pairs_of(mask, q, sequences, rule)
        result.counted[running[0]] = result.counted.get(running[0], 0) + pairs

    hooks = [
        module.register_forward_pre_hook(enter(layer)) for layer, module in adapter.attention_layers(model)
    ]
    CHOICE_WATCHERS.append(watch)
    try:
        yield result
    finally:
        CHOICE_WATCHERS.remove(watch)
        for hook in hooks:
            hook.remove()


def pairs_of(block_mask: Tensor, q: Tensor, sequences: Sequences, rule: SharedRule) -> Tensor:
    """Number of (query, key) pairs that `q (batch, H, q_len, D)` attends, int64 `(H,)` on the CPU.

    Args:
        block_mask: the choice, int32 `(H, num_tiles, words)`.
        sequences: where each sequence lies in the batch.
        rule: the rule that made the choice.
    """
    total = torch.zeros(q.shape[1], dtype=torch.int64)
    for numbers, rows in sequence_tiles(sequences, q, rule.tile):
        table = torch.tensor(rows)
        begin, count = table[:, 3], table[:, 2] - table[:, 1]
        first = begin // rule.tile * rule.tile // rule.block_size  # first block that the tile overlaps
        last = int((begin + count - 1).max()) // rule.block_size + 1
        earlier = torch.arange(last) < first[:, None]
        own = count * (begin - first * rule.block_size) + count * (count + 1) // 2
        for head in range(q.shape[1]):  # one head at a time: a mask of every block is large at great length
            chosen = unpack_blocks(block_mask[head, numbers].cpu(), last) & earlier
            total[head] += (chosen.sum(1) * rule.block_size * count + own).sum()
    return total
