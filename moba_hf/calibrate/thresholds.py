"""The threshold of a choice that a tile of queries shares: one for the model, or one per layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from moba_hf.calibrate.allocation import Choices, cheapest
from moba_hf.calibrate.options import Options
from moba_hf.calibrate.passes import Passes
from moba_hf.calibrate.results import CAUSAL_PAIRS, Point
from moba_hf.checkpoints.inspection import inspect_config
from moba_hf.config import MobaConfig
from moba_hf.evaluate.local import SENSITIVITY_TOKENS, sensitivities
from moba_hf.evaluate.local_shared import threshold_costs
from moba_hf.evaluate.passes import family_of
from moba_hf.op.shared_rule import SharedRule

# From few pairs to many.
THRESHOLDS = (0.5, 0.3, 0.2, 0.12, 0.07, 0.04, 0.025, 0.015, 0.01, 0.006, 0.003, 0.001, 0.0003)
_PARTS = 12  # a setting may also use this many steps between two neighbours, on a log scale


def with_thresholds(setting: MobaConfig, thresholds: Mapping[int, float], num_layers: int) -> MobaConfig:
    """`setting` with the `thresholds` of layers; other settings of single layers stay."""
    common = Counter(thresholds.values()).most_common(1)[0][0]
    layers = _other_overrides(setting, num_layers)
    for layer, threshold in thresholds.items():
        if threshold != common:
            layers[layer] = {**layers.get(layer, {}), "threshold": threshold}
    return replace(setting, threshold=common, layers=layers)  # type: ignore[arg-type]


def _other_overrides(setting: MobaConfig, num_layers: int) -> dict[int, dict[str, Any]]:
    """The settings of single layers other than the threshold, by index from 0."""
    kept = {
        index % num_layers: {name: value for name, value in pairs if name != "threshold"}
        for index, pairs in setting.layers
    }
    return {index: pairs for index, pairs in kept.items() if pairs}


def shared_rules(model: Any, setting: MobaConfig) -> dict[int, SharedRule]:
    """The rules of the layers with a shared choice.

    Raises:
        ValueError: no layer shares a choice, or in some layer every query chooses for itself.
    """
    adapter, text_config = family_of(model)
    setting.check_layers(adapter.num_layers(text_config))
    found: dict[int, SharedRule] = {}
    for layer in adapter.eligible_layers(text_config):
        rule = adapter.rule(text_config, setting, layer)
        if rule is None:
            continue
        if not isinstance(rule, SharedRule):
            raise ValueError(
                f"layer {layer} has tile=1, but other layers share a choice: calibrate can find either topk "
                "or thresholds; pass a setting with only one kind of choice"
            )
        found[layer] = rule
    if not found:
        raise ValueError(f"no layer of this {model.config.model_type} model would use MoBA with this setting")
    return found


@dataclass(frozen=True)
class _Table:
    """Local costs of every layer and threshold, and the settings built from them.

    Attributes:
        setting: the setting whose threshold is tuned.
        num_layers: number of layers of the model.
        choices: layer -> threshold -> (share of the dense causal pairs, cost); from few pairs to many.
        attending: number of layers that attend to keys.
        others: sum of the shares of layers without a shared choice.
    """

    setting: MobaConfig
    num_layers: int
    choices: Choices[float]
    attending: int
    others: float
    counts = CAUSAL_PAIRS

    def point(self, thresholds: Mapping[int, float], shares: float, cost: float) -> Point:
        """A setting whose layers in the table have shares with the sum `shares`."""
        config = with_thresholds(self.setting, thresholds, self.num_layers)
        return Point((shares + self.others) / self.attending, cost, config.to_dict())

    def dense(self) -> Point:
        """Full attention in all layers."""
        layers = tuple(range(self.num_layers))
        config = replace(self.setting, full_attention_layers=layers, layers=())
        others = self.others + len(self.choices)
        return Point(others / self.attending, 0.0, config.to_dict(), dense=True)

    @cached_property
    def even(self) -> list[Point]:
        """The settings with one threshold for all layers, from few pairs to many."""
        found = []
        for threshold in next(iter(self.choices.values())):
            shares, costs = zip(*(by[threshold] for by in self.choices.values()), strict=True)
            found.append(self.point(dict.fromkeys(self.choices, threshold), sum(shares), sum(costs)))
        return found

    @property
    def least(self) -> float:
        """The estimated share of pairs at the largest threshold."""
        return self.even[0].keys

    @property
    def most(self) -> float:
        """The estimated share of pairs at the smallest threshold."""
        return self.even[-1].keys


class OneThreshold(_Table):
    """Settings with one threshold, by their share of pairs."""

    def at(self, share: float) -> Point:
        """The setting that attends to the most pairs within `share`."""
        if share >= 1:
            return self.dense()
        return next((point for point in reversed(self.even) if point.keys <= share), self.even[0])


class ThresholdByLayer(_Table):
    """Settings with a threshold per layer, by their share of pairs."""

    def at(self, share: float) -> Point:
        """The thresholds with the smallest sum of costs within `share`."""
        if share >= 1:
            return self.dense()
        picked = cheapest(self.choices, max(share, self.least) * self.attending - self.others)
        shares, costs = zip(*(self.choices[i][t] for i, t in picked.items()), strict=True)
        return self.point(picked, sum(shares), sum(costs))


def threshold_ladders(
    passes: Passes, setting: MobaConfig, options: Options
) -> tuple[OneThreshold, ThresholdByLayer]:
    """The ladders for a shared choice; runs the dense passes that they need.

    Raises:
        ValueError: the options or the setting do not fit a shared choice, or the texts are so short that the
            setting gives full attention.
    """
    if options.block_sizes:
        raise ValueError(
            "block sizes are tried only if every query chooses for itself, but this setting has "
            f"tile={setting.tile}: omit them, or use a setting with tile=1 such as the preset "
            "default-per-query"
        )
    if options.confirmations < 1:
        raise ValueError("confirmations=0: the pairs of a shared choice can only be counted in whole passes")
    rules = shared_rules(passes.model, setting)
    longest = max(rule.dense_len for rule in rules.values())
    if passes.length <= longest:
        raise ValueError(
            f"this setting gives full attention up to {longest} tokens, but these texts have "
            f"{passes.length}: use longer texts"
        )
    adapter, text_config = family_of(passes.model)
    rows = inspect_config(passes.model.config, setting, (passes.length,)).layers
    dense = passes.length * (passes.length + 1) // 2
    attending = [row for row in rows if row.key_limit != 0]
    others = sum(row.pairs(passes.length) / dense for row in attending if row.index not in rules)
    options.check_keys((others + len(rules)) / len(attending))
    table = (
        setting,
        adapter.num_layers(text_config),
        _choices(passes, rules, options),
        len(attending),
        others,
    )
    return OneThreshold(*table), ThresholdByLayer(*table)


def _choices(passes: Passes, rules: Mapping[int, SharedRule], options: Options) -> Choices[float]:
    """Shares and layer-local costs of each threshold, from dense passes or from the store."""
    model, texts, seed = passes.model, passes.texts, options.seed

    def measure() -> Any:
        weights = sensitivities(model, texts[0][:, -SENSITIVITY_TOKENS:], seed=seed)
        found = threshold_costs(model, texts, rules, THRESHOLDS, weights, samples=options.samples, seed=seed)
        return {str(i): [list(by[t]) for t in THRESHOLDS] for i, by in found.items()}

    known = passes.known.get(f"thresholds {list(THRESHOLDS)}", measure)
    return {int(i): _between([(one[0], one[1]) for one in by]) for i, by in known.items()}


def _between(measured: Sequence[tuple[float, float]]) -> dict[float, tuple[float, float]]:
    """Shares and costs at `THRESHOLDS` and at `_PARTS` steps between neighbours, linearly interpolated."""
    found: dict[float, tuple[float, float]] = {}
    for (high, one), (low, other) in pairwise(zip(THRESHOLDS, measured, strict=True)):
        for step in range(_PARTS + 1):
            part = step / _PARTS
            threshold = float(f"{high * (low / high) ** part:.3g}")
            share, cost = (a + part * (b - a) for a, b in zip(one, other, strict=True))
            found[threshold] = share, cost
    return found
