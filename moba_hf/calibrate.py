"""Finds, for each layer, full attention or which topk: the cheapest setting within an allowed rise of loss,
or the best within an allowed key budget.

1. `sensitivities`: one short forward and backward pass says how much an error of each layer's output matters.
2. `local_costs`: one dense pass per text says how large that error is at every topk, for several block sizes.
3. `allocate`: the cheapest sum of costs at a key budget, layer by layer, by a Lagrange multiplier.
4. Whole passes confirm: one for a key budget, a few by bisection for an allowed loss.

The settings it finds let every query choose for itself; it does not search the threshold of a shared choice
(`tile` > 1).

A calibration of SmolLM2-135M takes minutes on two cores. In general it takes, per text of N tokens one dense
prefill and, per layer and rule, `samples` rows of attention and one output projection; one backward pass over
2,048 tokens, which needs the weights and about 2 GB per billion parameters of activations in bf16; and
`1 + confirmations` prefills per text. For an 8B model at 32K tokens on one 80 GB GPU that is an estimated few
minutes, most of it loading; it has not been measured.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from moba_hf.checkpoints.inspection import inspect_config
from moba_hf.checkpoints.model_card import config_call, with_settings
from moba_hf.checkpoints.model_config import check_config, read_model_config, with_moba
from moba_hf.config import LayerConfig, MobaConfig
from moba_hf.evaluate.local import LocalCosts, local_costs, sensitivities
from moba_hf.evaluate.passes import family_of, identity_of, passes_bar
from moba_hf.evaluate.perplexity import token_losses
from moba_hf.evaluate.results import Store, format_table

SHARES = (0.016, 0.023, 0.031, 0.047, 0.0625, 0.094, 0.125, 0.1875, 0.25, 0.375, 0.5)
_CURVE = (0.05, 0.0625, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)
_LEAST = 0.03  # key budget that the search for an allowed loss goes down to
_SENSITIVITY_TOKENS = 2048


@dataclass(frozen=True)
class Point:
    """One setting of the trade-off curve.

    Attributes:
        keys: key budget at the calibration length.
        cost: sum of layer-local costs, in nats to second order; ranks settings.
        config: the setting, as `MobaConfig.to_dict`.
        rise: measured rise of the trailing loss per text, in nats; None: not confirmed.
    """

    keys: float
    cost: float
    config: dict[str, Any]
    rise: tuple[float, ...] | None = None

    @property
    def worst(self) -> float | None:
        """The largest rise over the texts."""
        return None if self.rise is None else max(self.rise)


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        config: the chosen setting.
        length: tokens of the calibration texts.
        chosen: its point. curve: local costs from few keys to all, confirmed where a pass was made.
    """

    config: MobaConfig
    length: int
    chosen: Point
    curve: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"config": self.config.to_dict(), **{k: v for k, v in asdict(self).items() if k != "config"}}

    def report(self) -> str:
        """The trade-off curve and the layers' topk as text."""
        rows: list[list[object]] = [["keys", "block_size", "local cost", "measured rise", "full layers"]]
        for point in self.curve:
            rise = "-" if point.rise is None else ", ".join(f"{x:+.4f}" for x in point.rise)
            full = len(point.config["full_attention_layers"])
            rows.append([f"{point.keys:.1%}", point.config["block_size"], point.cost, rise, full])
        layers = ", ".join(f"{i}: {v['topk']}" for i, v in self.chosen.config["layers"].items())
        what = f"topk by layer {layers}" if layers else "every layer keeps full attention"
        return f"{format_table(rows)}\n\nChosen: {self.chosen.keys:.1%} of the keys; {what}"


@dataclass(frozen=True)
class _Share:
    """How the key budget of a model follows from that of the layers that MoBA may run in.

    Attributes:
        attending: layers that attend keys. eligible: those that MoBA may run in.
        others: sum of the shares of keys that the rest of them attend, such as windows.
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
        """The budget of the eligible layers where the model's is `keys`."""
        return (keys * self.attending - self.others) / self.eligible

    def least(self, rule: LayerConfig, length: int) -> float:
        """The least budget of the model under `rule`, every topk as small as its forced blocks allow."""
        own = min(1.0, (1 + rule.sink_blocks + rule.local_blocks) * rule.block_size / length)
        return (self.others + self.eligible * own) / self.attending

    def lowest(self, rules: Sequence[LayerConfig], length: int, keys: float | None) -> float:
        """The least budget of all `rules`. Raises ValueError where `keys` is below it."""
        least = min(self.least(rule, length) for rule in rules)
        if keys is not None and keys < least - 1e-9:
            raise ValueError(
                f"keys={keys} cannot be kept: {least:.1%} of the keys is the least that these block sizes "
                f"attend at {length} tokens, kept blocks included; take smaller blocks"
            )
        return least


def allocate(costs: LocalCosts, keys: float) -> tuple[dict[int, int], float]:
    """The topk of each layer (`blocks` in all: full) with the least sum of costs at a key budget.

    Args:
        costs: of one rule.
        keys: mean over these layers of `min(1, topk * block_size / length)` that is allowed.

    Returns:
        topk by layer, and the sum of costs. Where even the least topk exceeds the budget, that.
    """
    blocks = -(-costs.length // costs.rule.block_size)
    choices = {layer: {**by_topk, blocks: 0.0} for layer, by_topk in costs.costs.items()}

    def share(topk: int) -> float:
        return min(1.0, topk * costs.rule.block_size / costs.length)

    def pick(price: float) -> dict[int, int]:
        return {layer: min(c, key=lambda k: (c[k] + price * share(k), k)) for layer, c in choices.items()}

    def used(picked: dict[int, int]) -> float:
        return sum(map(share, picked.values())) / len(picked)

    low, high = 0.0, 1.0
    while used(pick(high)) > keys and high < 1e12:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if used(pick(middle)) > keys else (low, middle)
    picked = _spend(pick(high), choices, keys * len(choices), share)
    return picked, sum(choices[layer][topk] for layer, topk in picked.items())


def _spend(picked: dict[int, int], choices: dict[int, dict[int, float]], total: float, share: Any) -> Any:
    """Uses what the Lagrangian left of the budget, by the best gain per key first."""
    while True:
        left = total - sum(map(share, picked.values()))
        steps = [
            ((choices[layer][now] - cost) / (share(topk) - share(now)), layer, topk)
            for layer, now in picked.items()
            for topk, cost in choices[layer].items()
            if share(now) < share(topk) <= share(now) + left + 1e-9 and cost < choices[layer][now]
        ]
        if not steps:
            return picked
        _, layer, topk = max(steps)
        picked = {**picked, layer: topk}


def config_of(costs: LocalCosts, picked: dict[int, int], num_layers: int) -> MobaConfig:
    """The settings with topk by layer; layers that attend every block, or that are not in it, stay full."""
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


def calibrate(
    model: Any,
    texts: Sequence[Tensor],
    *,
    max_loss: float | None = None,
    keys: float | None = None,
    block_sizes: Sequence[int] = (32,),
    gate: str = "mean",
    sink_blocks: int = 1,
    local_blocks: int = 1,
    samples: int = 48,
    confirmations: int = 3,
    trailing: int = 2048,
    seed: int = 0,
    store: str | Path | None = None,
) -> Calibration:
    """The best setting of `model` for texts like `texts`.

    Args:
        texts: `(1, length)` token ids each, all of the length that matters to you.
        max_loss: allowed rise of the loss of the last `trailing` tokens on every text, in nats; or
        keys: allowed key budget, between 0 and 1.
        block_sizes: the ones tried; one is chosen for all layers.
        gate: "mean" is MoBA; "mass" is better at equal keys, where a kernel for it exists.
        sink_blocks, local_blocks: forced blocks.
        samples: queries per text and layer that are looked at.
        confirmations: whole passes per text, at most; 0: trust the local costs (only with `keys`).
        store: a JSON file that keeps the passes made, so that a stopped run goes on.

    Raises:
        ValueError: neither or both of `max_loss` and `keys`, values out of range, texts of unequal length, a
            budget below what the smallest block size attends, or a store of something else.
    """
    _check(texts, max_loss, keys, confirmations)
    for name, value in (("samples", samples), ("trailing", trailing), ("block_sizes", len(block_sizes))):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    adapter, text_config = family_of(model)
    num_layers, length = adapter.num_layers(text_config), texts[0].shape[1]
    rules = [
        LayerConfig(b, 1 + sink_blocks + local_blocks, sink_blocks, local_blocks, gate, adapter.rotary_pairs)
        for b in block_sizes
    ]
    share = _Share.of(model, length)
    lowest = share.lowest(rules, length, keys)
    settings = {"length": length, "rules": [asdict(r) for r in rules], "samples": samples, "seed": seed}
    settings |= {"trailing": trailing, "texts": [identity_of(ids) for ids in texts]}
    known = Store(store, settings | {"model": identity_of(model)})
    tables = _tables(known, model, texts, rules, samples, seed)
    passes = _Passes(model, texts, num_layers, tables, share, lowest, trailing, known)
    if keys is not None:
        chosen = passes.confirmed(keys) if confirmations else passes.point(keys)
        tried = [chosen]
    else:
        assert max_loss is not None
        chosen, tried = _search(passes, max_loss, confirmations)
    curve = {round(p.keys, 9): p for p in (*map(passes.point, _CURVE), *tried)}
    ordered = tuple(sorted(curve.values(), key=lambda p: p.keys))
    return Calibration(MobaConfig.from_dict(chosen.config), length, chosen, ordered)


@dataclass(frozen=True)
class _Passes:
    """Settings at a key budget, and whole passes that say what they cost.

    Attributes:
        texts: `(1, length)` token ids each.
        tables: local costs, one per rule.
        lowest: the least budget of all rules.
        trailing: tokens at the end of a text whose loss counts.
        known: keeps the passes made.
    """

    model: Any
    texts: Sequence[Tensor]
    num_layers: int
    tables: Sequence[LocalCosts]
    share: _Share
    lowest: float
    trailing: int
    known: Store

    def point(self, keys: float) -> Point:
        """The best setting at a key budget by local costs, over all rules that can keep it."""
        keys, length = max(keys, self.lowest), self.tables[0].length
        able = [table for table in self.tables if self.share.least(table.rule, length) <= keys + 1e-9]
        found = [(*allocate(table, self.share.of_eligible(keys)), table) for table in able]
        picked, cost, table = min(found, key=lambda one: one[1])
        config = config_of(table, picked, self.num_layers)
        reached = inspect_config(self.model.config, config, (length,)).lengths[0].key_budget
        return Point(reached, cost, config.to_dict())

    def confirmed(self, keys: float) -> Point:
        """`point`, and one pass per text."""
        found = self.point(keys)
        config = MobaConfig.from_dict(found.config)
        name = json.dumps(found.config, sort_keys=True)
        keys_of = [(f"dense {i}", f"{i} {name}") for i in range(len(self.texts))]
        new = sum(key not in self.known for pair in keys_of for key in pair)
        rises = []
        with passes_bar(self.model, f"confirming {found.keys:.0%} of the keys", new):
            for ids, (dense_key, key) in zip(self.texts, keys_of, strict=True):
                dense = self.known.get(dense_key, partial(_tail, self.model, ids, None, self.trailing))
                tail = self.known.get(key, partial(_tail, self.model, ids, config, self.trailing))
                rises.append(tail - dense)
        return Point(found.keys, found.cost, found.config, tuple(rises))


def _tables(
    known: Store, model: Any, texts: Sequence[Tensor], rules: Sequence[LayerConfig], samples: int, seed: int
) -> list[LocalCosts]:
    """The layer-local costs of each rule, from dense passes or from `known`."""

    def measure() -> Any:
        weights = sensitivities(model, texts[0][:, -_SENSITIVITY_TOKENS:], seed=seed)
        found = local_costs(model, texts, rules, SHARES, weights, samples=samples, seed=seed)
        return [{str(i): {str(k): c for k, c in by.items()} for i, by in one.costs.items()} for one in found]

    length = texts[0].shape[1]
    return [
        LocalCosts(rule, length, {int(i): {int(k): c for k, c in by.items()} for i, by in one.items()})
        for rule, one in zip(rules, known.get("local costs", measure), strict=True)
    ]


def _search(passes: _Passes, max_loss: float, confirmations: int) -> tuple[Point, list[Point]]:
    """Bisects the key budget, on a log scale, for the least that keeps every text within `max_loss`."""
    low, high, best = max(passes.lowest, _LEAST), 1.0, passes.point(1.0)
    tried: list[Point] = []
    for _ in range(confirmations):
        budget = (low * high) ** 0.5
        tried.append(passes.confirmed(budget))
        worst = tried[-1].worst
        assert worst is not None
        if worst <= max_loss:
            best, high = min(best, tried[-1], key=lambda p: p.keys), budget
        else:
            low = budget
    return best, tried


def _tail(model: Any, ids: Tensor, config: MobaConfig | None, trailing: int) -> float:
    """Mean loss of the last `trailing` tokens."""
    return float(token_losses(model, ids, config)[-trailing:].double().mean())


def _check(texts: Sequence[Tensor], max_loss: float | None, keys: float | None, confirmations: int) -> None:
    if (max_loss is None) == (keys is None):
        raise ValueError("give one of max_loss and keys")
    if keys is not None and not 0 < keys <= 1:
        raise ValueError(f"keys must be above 0 and at most 1, got {keys}")
    if confirmations < 0 or (max_loss is not None and confirmations < 1):
        raise ValueError(f"confirmations must be at least {int(max_loss is not None)}, got {confirmations}")
    if max_loss is not None and not max_loss > 0:
        raise ValueError(f"max_loss must be positive, got {max_loss}")
    if not texts or any(t.ndim != 2 or t.shape[0] != 1 or t.shape != texts[0].shape for t in texts):
        raise ValueError("texts must be token ids (1, length), all of one length")


def write_settings(folder: str | Path, config: MobaConfig) -> None:
    """Stores `config` in the config.json of a checkpoint folder, and turns MoBA on in it.

    The model card of a converted checkpoint then names these settings.

    Raises:
        ValueError: the folder holds no checkpoint, or the settings do not fit its model.
    """
    place = Path(folder)
    values, model_config = read_model_config(place)
    adapter = check_config(model_config, config)
    new = with_moba(values, config, adapter.nested_key(model_config))
    texts = {place / "config.json": json.dumps(new, indent=2, ensure_ascii=False) + "\n"}
    texts |= with_settings(place, config, f"write_settings(folder, {config_call(config)})")
    for path, text in texts.items():
        replace_text(path, text)


def replace_text(path: Path, text: str) -> None:
    """Replaces the content of a file in one step; it keeps its mode, and an error leaves it as it was.

    Raises:
        OSError: the file system refused.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, name)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
