"""Runs a calibration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from moba_hf.calibrate.ladder import Ladder
from moba_hf.calibrate.options import Options
from moba_hf.calibrate.passes import Passes, check_texts
from moba_hf.calibrate.per_query import topk_ladder
from moba_hf.calibrate.results import Calibration, Comparison, Point
from moba_hf.calibrate.search import within_keys, within_loss
from moba_hf.calibrate.thresholds import threshold_ladders
from moba_hf.config import MobaConfig
from moba_hf.evaluate.passes import family_of, identity_of
from moba_hf.evaluate.results import Store
from moba_hf.hf.layer_plan import moba_config

_CURVE = (0.05, 0.0625, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)


def calibrate(
    model: Any, texts: Sequence[Tensor], options: Options, *, held_out: Sequence[Tensor] = ()
) -> Calibration:
    """Finds the best setting of `model` for texts like `texts`.

    Args:
        texts: `(1, length)` token ids each, all of the length that matters to you.
        options: the goal and the effort.
        held_out: further texts of that length, read only with the chosen setting.

    Raises:
        ValueError: the texts differ in length, the options do not fit the setting or the model, no setting
            has the allowed share of keys or pairs, or the store belongs to another run.
    """
    length = check_texts(texts)
    if held_out:
        check_texts(held_out, length)
    setting = options.setting or starting_setting(model)
    known = Store(options.store, _made_of(model, texts, held_out, setting, options))
    passes = Passes(model, texts, options.trailing, known)
    ladders: Sequence[Ladder]
    if setting.tile == 1:
        ladders = [topk_ladder(passes, setting, options)]
    else:
        ladders = threshold_ladders(passes, setting, options)
    first, *rivals = ladders
    chosen, tried = _find(first, passes, options, first.at(1.0))
    comparison = None
    if rivals and not chosen.dense:
        chosen, comparison, more = _by_layer(rivals[0], passes, options, chosen)
        tried += more
    checked = None
    if held_out:
        apart = Passes(model, held_out, options.trailing, known, "held-out text")
        checked = apart.measured(chosen, first.counts)
    curve, config = _curve(ladders, tried), MobaConfig.from_dict(chosen.config)
    return Calibration(config, length, first.counts, chosen, curve, comparison, checked)


def starting_setting(model: Any, preset: str | None = None, gate: str | None = None) -> MobaConfig:
    """The setting that a calibration of `model` starts from: a preset, else its own, else the default.

    Args:
        preset: name of a preset; None: not given.
        gate: how blocks are scored; None: that of the setting.

    Raises:
        ValueError: the preset or the gate is unknown, or the gate does not fit the setting.
    """
    setting = moba_config(family_of(model)[1]) if preset is None else MobaConfig.from_preset(preset)
    return setting if gate is None else replace(setting, gate=gate)


def _find(ladder: Ladder, passes: Passes, options: Options, best: Point) -> tuple[Point, list[Point]]:
    """The setting of a ladder that meets the goal of `options`, and all settings that were tried."""
    if options.max_loss is not None:
        return within_loss(ladder, passes, options.max_loss, options.confirmations, best)
    assert options.keys is not None
    found, tried = within_keys(ladder, passes, options.keys, options.confirmations)
    if found is None:
        least = min(point.keys for point in tried)
        raise ValueError(
            f"keys={options.keys} was not reached: the smallest share found is {least:.1%} of the causal "
            "pairs, including kept blocks; allow more, or use smaller blocks or longer texts"
        )
    return found, tried


def _by_layer(
    ladder: Ladder, passes: Passes, options: Options, one: Point
) -> tuple[Point, Comparison | None, list[Point]]:
    """Compares `one` value for all layers with a value per layer, and continues with these if that is better.

    Args:
        ladder: the settings with a value per layer.

    Returns:
        The better setting, the comparison (None: all settings of the ladder attend to more), and the settings
        that were tried.
    """
    rival, tried = within_keys(ladder, passes, one.keys, options.confirmations)
    if rival is None:
        return one, None, tried
    comparison = Comparison(one.keys, rival.keys, *passes.difference(rival, one))
    if not comparison.pays:
        return one, comparison, tried
    if options.max_loss is None:
        return rival, comparison, tried
    worst = rival.worst
    assert worst is not None
    start = rival if worst <= options.max_loss else one
    found, more = within_loss(ladder, passes, options.max_loss, options.confirmations, start)
    return found, comparison, tried + more


def _curve(ladders: Sequence[Ladder], tried: Sequence[Point]) -> tuple[Point, ...]:
    """The tried settings and those of the ladders at the shares `_CURVE`, without duplicates, by share."""
    points = [*tried, *(ladder.at(share) for ladder in ladders for share in _CURVE)]
    once: dict[str, Point] = {}
    for point in points:
        once.setdefault(json.dumps(point.config, sort_keys=True), point)
    return tuple(sorted(once.values(), key=lambda p: p.keys))


def _made_of(
    model: Any,
    texts: Sequence[Tensor],
    held_out: Sequence[Tensor],
    setting: MobaConfig,
    options: Options,
) -> dict[str, Any]:
    """What the passes in a store depend on; empty without a store."""
    if options.store is None:
        return {}
    return {
        "model": identity_of(model),
        "texts": [identity_of(ids) for ids in texts],
        "held out": [identity_of(ids) for ids in held_out],
        "setting": setting.to_dict(),
        "block sizes": list(options.block_sizes),
        "samples": options.samples,
        "seed": options.seed,
        "trailing": options.trailing,
    }
