"""The topk of each layer, or full attention, if every query chooses for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moba_hf.calibrate.allocation import cheapest
from moba_hf.calibrate.options import Options
from moba_hf.calibrate.passes import Passes
from moba_hf.calibrate.results import KEY_BUDGET, Point
from moba_hf.checkpoints.inspection import inspect_config
from moba_hf.config import MobaConfig
from moba_hf.evaluate.local import SENSITIVITY_TOKENS, LocalCosts, local_costs, sensitivities
from moba_hf.evaluate.passes import family_of
from moba_hf.op.layer_rule import LayerConfig

SHARES = (0.016, 0.023, 0.031, 0.047, 0.0625, 0.094, 0.125, 0.1875, 0.25, 0.375, 0.5)


@dataclass(frozen=True)
class _Share:
    """Relates the key budget of a model to that of the layers that may use MoBA.

    Attributes:
        attending: number of layers that attend to keys.
        eligible: number of layers that may use MoBA.
        others: sum of the shares of keys of the other layers, such as sliding windows.
    """

    attending: int
    eligible: int
    others: float

    @classmethod
    def of(cls, model: Any, length: int) -> _Share:
        layers = inspect_config(model.config, MobaConfig(1, 1), (length,)).layers
        limits = [row.key_limit for row in layers if row.kind == "stock" and row.key_limit != 0]
        eligible = sum(row.kind == "moba" for row in layers)
        if not eligible:
            raise ValueError(f"no layer of this {model.config.model_type} model can use MoBA")
        others = sum(min(1.0, (limit or length) / length) for limit in limits)
        return cls(eligible + len(limits), eligible, others)

    def of_eligible(self, keys: float) -> float:
        """The budget of the eligible layers if that of the model is `keys`."""
        return (keys * self.attending - self.others) / self.eligible

    @property
    def dense(self) -> float:
        """The budget of the model with full attention in every eligible layer."""
        return (self.others + self.eligible) / self.attending

    def least(self, rule: LayerConfig, length: int) -> float:
        """The smallest budget of the model with `rule`: every topk covers only own, sink and local blocks."""
        own = min(1.0, (1 + rule.sink_blocks + rule.local_blocks) * rule.block_size / length)
        return (self.others + self.eligible * own) / self.attending

    def lowest(self, rules: Sequence[LayerConfig], length: int, keys: float | None) -> float:
        """The smallest budget of all `rules`. Raises ValueError if `keys` is below it."""
        least = min(self.least(rule, length) for rule in rules)
        if keys is not None and keys < least - 1e-9:
            raise ValueError(
                f"keys={keys} is not possible: with these block sizes at least {least:.1%} of the keys are "
                f"attended at {length} tokens, including kept blocks; use smaller blocks"
            )
        return least


def allocate(costs: LocalCosts, keys: float) -> tuple[dict[int, int], float]:
    """The topk of each layer (all blocks: full attention) with the smallest sum of costs at a key budget.

    Args:
        costs: the local costs of one rule.
        keys: the allowed mean over these layers of `min(1, topk * block_size / length)`.

    Returns:
        topk by layer, and the sum of costs. If even the smallest topk exceeds the budget, the smallest.
    """
    blocks = -(-costs.length // costs.rule.block_size)
    choices = {
        layer: {
            topk: (min(1.0, topk * costs.rule.block_size / costs.length), cost)
            for topk, cost in {**by_topk, blocks: 0.0}.items()
        }
        for layer, by_topk in costs.costs.items()
    }
    picked = cheapest(choices, keys * len(choices))
    return picked, sum(choices[layer][topk][1] for layer, topk in picked.items())


def config_of(costs: LocalCosts, picked: dict[int, int], num_layers: int) -> MobaConfig:
    """The settings with topk by layer; layers that attend to all blocks or are not in `picked` stay full."""
    rule = costs.rule
    blocks = -(-costs.length // rule.block_size)
    full = tuple(i for i in range(num_layers) if picked.get(i, blocks) >= blocks)
    sparse = {i: topk for i, topk in picked.items() if i not in full}
    common = max(sparse.values(), key=list(sparse.values()).count) if sparse else rule.topk
    return MobaConfig(
        block_size=rule.block_size,
        topk=common,
        sink_blocks=rule.sink_blocks,
        local_blocks=rule.local_blocks,
        gate=rule.gate,
        full_attention_layers=full,
        layers={str(i): {"topk": topk} for i, topk in sparse.items()},  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class TopkLadder:
    """Settings by key budget, from all rules with a sufficiently small budget.

    Attributes:
        setting: the setting whose decoding is used.
        num_layers: number of layers of the model.
        tables: local costs, one per rule.
        least: the smallest budget of all rules.
    """

    model_config: Any
    setting: MobaConfig
    num_layers: int
    tables: Sequence[LocalCosts]
    share: _Share
    least: float
    counts = KEY_BUDGET
    most = 1.0

    def at(self, share: float) -> Point:
        """The best setting at a key budget, by local costs."""
        keys, length = max(share, self.least), self.tables[0].length
        able = [table for table in self.tables if self.share.least(table.rule, length) <= keys + 1e-9]
        found = [(*allocate(table, self.share.of_eligible(keys)), table) for table in able]
        picked, cost, table = min(found, key=lambda one: one[1])
        decoding = {"decode": self.setting.decode, "decode_max_len": self.setting.decode_max_len}
        config = replace(config_of(table, picked, self.num_layers), **decoding)  # type: ignore[arg-type]
        reached = inspect_config(self.model_config, config, (length,)).lengths[0].key_budget
        return Point(reached, cost, config.to_dict(), dense=not config.layers)


def topk_ladder(passes: Passes, setting: MobaConfig, options: Options) -> TopkLadder:
    """The ladder for a choice per query; runs the dense passes that it needs.

    Raises:
        ValueError: the key budget is smaller than possible.
    """
    model, length = passes.model, passes.length
    adapter, text_config = family_of(model)
    forced = setting.sink_blocks, setting.local_blocks
    rules = [
        LayerConfig(size, 1 + sum(forced), *forced, setting.gate, adapter.rotary_pairs)
        for size in options.block_sizes or (setting.block_size,)
    ]
    share = _Share.of(model, length)
    options.check_keys(share.dense)
    least = share.lowest(rules, length, options.keys)
    tables = _tables(passes, rules, options)
    return TopkLadder(model.config, setting, adapter.num_layers(text_config), tables, share, least)


def _tables(passes: Passes, rules: Sequence[LayerConfig], options: Options) -> list[LocalCosts]:
    """The layer-local costs of each rule, from dense passes or from the store."""
    model, texts, seed = passes.model, passes.texts, options.seed

    def measure() -> Any:
        weights = sensitivities(model, texts[0][:, -SENSITIVITY_TOKENS:], seed=seed)
        found = local_costs(model, texts, rules, SHARES, weights, samples=options.samples, seed=seed)
        return [{str(i): {str(k): c for k, c in by.items()} for i, by in one.costs.items()} for one in found]

    known = passes.known.get(f"local costs {[asdict(rule) for rule in rules]}", measure)
    return [
        LocalCosts(rule, passes.length, {int(i): {int(k): c for k, c in by.items()} for i, by in one.items()})
        for rule, one in zip(rules, known, strict=True)
    ]
