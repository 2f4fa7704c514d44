"""The results of a calibration: the settings of a trade-off curve, and the chosen one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moba_hf.config import MobaConfig
from moba_hf.evaluate.results import format_table, percent

# What `Point.keys` may count.
KEY_BUDGET, CAUSAL_PAIRS = "key budget", "causal pairs"


@dataclass(frozen=True)
class Point:
    """One setting of the trade-off curve.

    Attributes:
        keys: the share that the goal `keys` limits: the key budget at the calibration length, or the share of
            the dense causal pairs, which is counted if a pass was made and estimated otherwise.
        cost: sum of the layer-local costs, in nats to second order; only for ranking settings.
        config: the setting, as from `MobaConfig.to_dict`.
        rise: measured increase of the trailing loss per text, in nats, as run; None: no pass was made.
        error: half the width of the paired 95% interval of each increase; an entry is None if there are too
            few tokens.
        pairs: counted share of the dense causal pairs over the texts; None: no pass was made.
        dense: whether all layers have full attention.
    """

    keys: float
    cost: float
    config: dict[str, Any]
    rise: tuple[float, ...] | None = None
    error: tuple[float | None, ...] | None = None
    pairs: float | None = None
    dense: bool = False

    @property
    def worst(self) -> float | None:
        """The largest increase over the texts."""
        return None if self.rise is None else max(self.rise)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The distinct thresholds of the layers, ascending; empty: every query chooses for itself."""
        settings = [self.config, *self.config["layers"].values()]
        return tuple(sorted({one["threshold"] for one in settings if "threshold" in one}))

    def rises(self) -> str:
        """The measured increases in words."""
        if self.rise is None or self.error is None:
            return "-"
        return ", ".join(shown_rise(*one) for one in zip(self.rise, self.error, strict=True))


@dataclass(frozen=True)
class Comparison:
    """A threshold per layer, compared with a single threshold with at least as many pairs.

    Attributes:
        one: counted share of the dense causal pairs with a single threshold.
        by_layer: counted share of the dense causal pairs with a threshold per layer.
        difference: mean loss of the trailing tokens of all texts with a threshold per layer, minus that with
            a single threshold, in nats.
        error: half the width of its paired 95% interval; None: too few tokens.
    """

    one: float
    by_layer: float
    difference: float
    error: float | None

    @property
    def pays(self) -> bool:
        """Whether the loss is lower without more pairs, and the interval excludes zero."""
        less = self.error is not None and self.difference + self.error < 0
        return less and self.by_layer <= self.one


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`.

    Attributes:
        config: the chosen setting.
        length: number of tokens of each calibration text.
        counts: what `keys` of every point counts: "key budget" or "causal pairs".
        chosen: the point of the chosen setting.
        curve: points from few keys to all keys; some are confirmed by a pass.
        comparison: whether a threshold per layer is worthwhile; None: not compared.
        held_out: the chosen setting on the held-out texts; None: there are none.
    """

    config: MobaConfig
    length: int
    counts: str
    chosen: Point
    curve: tuple[Point, ...]
    comparison: Comparison | None = None
    held_out: Point | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = {**asdict(self), "config": self.config.to_dict()}
        if self.comparison is not None:
            values["comparison"]["pays"] = self.comparison.pays
        return values

    def report(self) -> str:
        """The trade-off curve, the chosen setting, and its result on held-out texts."""
        shared = self.counts == CAUSAL_PAIRS
        table = format_table((_threshold_rows if shared else _topk_rows)(self.curve))
        parts = [table, self._chosen()]
        if self.comparison is not None:
            parts.append(_compared(self.comparison))
        if self.held_out is not None:
            assert self.held_out.pairs is not None
            parts.append(
                f"Held-out text ({self.length} tokens not used for tuning): rise "
                f"{self.held_out.rises()} at {percent(self.held_out.pairs)} of the causal pairs"
            )
        if shared:
            parts.append("Losses are as run: the choice of a tile depends on all of its queries.")
        return "\n\n".join(parts)

    def _chosen(self) -> str:
        point, config = self.chosen, self.chosen.config
        if self.counts == KEY_BUDGET:
            layers = ", ".join(f"{i}: {v['topk']}" for i, v in config["layers"].items())
            what = "every layer keeps full attention" if point.dense else f"topk by layer {layers}"
            return f"Chosen: {point.keys:.1%} of the keys; {what}"
        if point.dense:
            return "Chosen: every layer keeps full attention"
        assert point.pairs is not None
        layers = ", ".join(
            f"{i}: {v['threshold']:g}" for i, v in config["layers"].items() if "threshold" in v
        )
        what = f"threshold {config['threshold']:g}" + (f", by layer {layers}" if layers else "")
        return f"Chosen: {what}; rise {point.rises()} at {percent(point.pairs)} of the causal pairs"


def shown_rise(rise: float, error: float | None) -> str:
    """An increase with its interval, e.g. `+0.0021 ± 0.0010`."""
    return f"{rise:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _topk_rows(curve: Sequence[Point]) -> list[list[object]]:
    rows: list[list[object]] = [
        ["keys", "of dense pairs", "block_size", "local cost", "measured rise", "full layers"]
    ]
    for point in curve:
        full, pairs = len(point.config["full_attention_layers"]), point.pairs
        shares = [f"{point.keys:.1%}", "-" if pairs is None else f"{pairs:.1%}"]
        rows.append([*shares, point.config["block_size"], point.cost, point.rises(), full])
    return rows


def _threshold_rows(curve: Sequence[Point]) -> list[list[object]]:
    rows: list[list[object]] = [["causal pairs", "threshold", "local cost", "measured rise"]]
    for point in curve:
        thresholds = point.thresholds
        ends = " to ".join(f"{t:g}" for t in dict.fromkeys((thresholds[0], thresholds[-1])))
        ends = "full attention" if point.dense else ends
        shown = percent(point.keys) + ("" if point.pairs is not None else ", estimated")
        rows.append([shown, ends, point.cost, point.rises()])
    return rows


def _compared(found: Comparison) -> str:
    verdict = "so each layer gets its own" if found.pays else "no significant gain, so all layers share one"
    return (
        f"A threshold per layer ({percent(found.by_layer)} of the causal pairs) compared with a single one "
        f"({percent(found.one)}): loss {shown_rise(found.difference, found.error)}, {verdict}"
    )
