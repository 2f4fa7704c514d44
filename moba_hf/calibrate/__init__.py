"""Finds the number in a MoBA setting that keeps an allowed loss with the fewest keys, or that loses least
within an allowed share of them, on texts like those that a model will read.

What it looks for depends on the setting that `Options` names:

- `per_query`: where every query chooses for itself, each layer gets a topk or full attention;
- `thresholds`: where a tile of queries shares a choice, the model gets one threshold, or each layer gets its
  own if that surely lowers the loss at no more attended pairs.

Both work alike:

1. `sensitivities`: one short forward and backward pass says how much an error of each layer's output matters.
2. Local costs: one dense pass per text says how large that error is at every topk or threshold, and how many
   pairs every threshold attends.
3. A ladder gives the best setting at any share, by a Lagrange multiplier over the layers.
4. Whole passes confirm, and count pairs.

A calibration of SmolLM2-135M takes minutes on two cores. In general it takes, per text of N tokens, one dense
prefill with `samples` rows of attention in every layer, and one output projection for each rule or one choice
of blocks for each threshold; one backward pass over 2,048 tokens, which needs the weights and about 2 GB per
billion parameters of activations in bf16; and a prefill per text for dense attention and for every setting
that is tried. For an 8B model at 32K tokens on one 80 GB GPU that is an estimated few minutes, most of it
loading; it has not been measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from moba_hf.calibrate.ladder import Ladder
from moba_hf.calibrate.options import Options
from moba_hf.calibrate.passes import Passes, check_texts
from moba_hf.calibrate.per_query import SHARES, allocate, config_of, topk_ladders
from moba_hf.calibrate.results import Calibration, Comparison, Point
from moba_hf.calibrate.search import compare, within_keys, within_loss
from moba_hf.calibrate.thresholds import threshold_ladders
from moba_hf.calibrate.writing import replace_text, write_settings
from moba_hf.config import MobaConfig
from moba_hf.evaluate.passes import family_of, identity_of
from moba_hf.evaluate.results import Store
from moba_hf.hf.layer_plan import moba_config

__all__ = [
    "SHARES",
    "Calibration",
    "Comparison",
    "Options",
    "Point",
    "allocate",
    "calibrate",
    "config_of",
    "replace_text",
    "starting_setting",
    "write_settings",
]

_CURVE = (0.05, 0.0625, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)


def calibrate(
    model: Any, texts: Sequence[Tensor], options: Options, *, held_out: Sequence[Tensor] = ()
) -> Calibration:
    """The best setting of `model` for texts like `texts`.

    Args:
        texts: `(1, length)` token ids each, all of the length that matters to you.
        options: what is wanted.
        held_out: further texts of that length, read only under the setting that was chosen.

    Raises:
        ValueError: texts of unequal length, options that do not fit the setting or the model, a share of keys
            or pairs that no setting keeps, or a store of something else.
    """
    length = check_texts(texts)
    if held_out:
        check_texts(held_out, length)
    setting = options.setting or starting_setting(model)
    known = Store(options.store, _made_of(model, texts, held_out, setting, options))
    passes = Passes(model, texts, options.trailing, known)
    ladders: Sequence[Ladder] = (topk_ladders if setting.tile == 1 else threshold_ladders)(
        passes, setting, options
    )
    chosen, tried = _find(ladders[0], passes, options, ladders[0].at(1.0))
    comparison = None
    for ladder in ladders[1:]:
        found = None if chosen.dense else compare(ladder, passes, chosen, options.confirmations)
        if found is None:
            continue
        rival, comparison = found
        tried.append(rival)
        if comparison.pays:
            chosen, more = _better(ladder, passes, options, chosen, rival)
            tried += more
    checked = None
    if held_out:
        checked = Passes(model, held_out, options.trailing, known, "held-out text")
    return Calibration(
        MobaConfig.from_dict(chosen.config),
        length,
        ladders[0].counts,
        chosen,
        _curve(ladders, tried),
        comparison,
        None if checked is None else checked.measured(chosen, ladders[0].counts),
    )


def starting_setting(model: Any, preset: str | None = None, gate: str | None = None) -> MobaConfig:
    """The setting that a calibration of `model` starts from: a preset, else its own, else the default.

    Args:
        preset: name of a preset; None: not given.
        gate: how blocks are scored; None: as the setting says.

    Raises:
        ValueError: an unknown preset or gate, or one that the setting cannot have.
    """
    setting = moba_config(family_of(model)[1]) if preset is None else MobaConfig.from_preset(preset)
    return setting if gate is None else replace(setting, gate=gate)


def _find(ladder: Ladder, passes: Passes, options: Options, best: Point) -> tuple[Point, list[Point]]:
    """What `options` ask for on one ladder, and the settings tried."""
    if options.max_loss is not None:
        return within_loss(ladder, passes, options.max_loss, options.confirmations, best)
    assert options.keys is not None
    found, tried = within_keys(ladder, passes, options.keys, options.confirmations)
    if found is None:
        least = min(point.keys for point in tried)
        raise ValueError(
            f"keys={options.keys} was not kept: the least that was found is {least:.1%} of the causal pairs, "
            "the blocks that are always attended included; allow more, or take smaller blocks or longer texts"
        )
    return found, tried


def _better(
    ladder: Ladder, passes: Passes, options: Options, chosen: Point, rival: Point
) -> tuple[Point, list[Point]]:
    """The setting of a better ladder: `rival`, or what it makes of an allowed loss, with those tried."""
    if options.max_loss is None:
        return rival, []
    worst = rival.worst
    assert worst is not None
    start = rival if worst <= options.max_loss else chosen
    return within_loss(ladder, passes, options.max_loss, options.confirmations, start)


def _curve(ladders: Sequence[Ladder], tried: Sequence[Point]) -> tuple[Point, ...]:
    """The settings tried and those of the ladders at the shares of `_CURVE`, each once, by their share."""
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
    """What the passes in a store depend on; nothing where none is kept."""
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
