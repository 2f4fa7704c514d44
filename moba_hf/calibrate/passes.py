"""Whole passes over texts: the loss of settings, with intervals, and how many pairs they attend to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moba_hf.calibrate.results import CAUSAL_PAIRS, Point
from moba_hf.config import MobaConfig
from moba_hf.evaluate.attended import count_pairs
from moba_hf.evaluate.passes import passes_bar
from moba_hf.evaluate.perplexity import token_losses
from moba_hf.evaluate.results import Store
from moba_hf.op.inputs import require_tensor

# Losses are averaged over stretches of this many tokens, because neighbouring tokens are not independent.
_STRETCH = 64


def check_texts(texts: Sequence[Tensor], length: int | None = None) -> int:
    """The length of all texts.

    Raises:
        ValueError: they are not `(1, length)`, or their lengths differ.
        TypeError: a text is not a tensor.
    """
    for ids in texts:
        require_tensor("texts", ids)
    length = length or (texts[0].shape[-1] if texts else 0)
    if not texts or any(text.ndim != 2 or text.shape != (1, length) for text in texts):
        raise ValueError("texts must be token ids (1, length), all of the same length")
    return length


@dataclass(frozen=True)
class Passes:
    """Passes over some texts; each pass runs only once.

    Attributes:
        texts: `(1, length)` token ids each.
        trailing: number of tokens at the end of a text whose loss counts.
        known: the store of finished passes.
        name: name of these texts in `known`.
    """

    model: Any
    texts: Sequence[Tensor]
    trailing: int
    known: Store
    name: str = "text"

    @property
    def length(self) -> int:
        """Number of tokens of each text."""
        return self.texts[0].shape[1]

    def measured(self, point: Point, counts: str) -> Point:
        """`point` with the results of one pass per text.

        Args:
            counts: what `Point.keys` counts; counted pairs replace estimated ones.
        """
        dense, found = self._all(None), self._all(point)
        rises = tuple(one["loss"] - before["loss"] for one, before in zip(found, dense, strict=True))
        errors = tuple(
            half_interval(_apart([one], [before])) for one, before in zip(found, dense, strict=True)
        )
        pairs = sum(one["pairs"] for one in found) / len(found)
        keys = pairs if counts == CAUSAL_PAIRS else point.keys
        return replace(point, keys=keys, rise=rises, error=errors, pairs=pairs)

    def difference(self, one: Point, other: Point) -> tuple[float, float | None]:
        """Mean loss over all texts of `one` minus that of `other`, and half the width of its 95% interval."""
        found, before = self._all(one), self._all(other)
        mean = sum(a["loss"] - b["loss"] for a, b in zip(found, before, strict=True)) / len(found)
        return mean, half_interval(_apart(found, before))

    def _all(self, point: Point | None) -> list[dict[str, Any]]:
        """One pass over every text with a setting; None: dense."""
        name = "dense" if point is None else json.dumps(point.config, sort_keys=True)
        moba = None if point is None else MobaConfig.from_dict(point.config)
        keys = [f"{self.name} {i} {name}" for i in range(len(self.texts))]
        new = sum(key not in self.known for key in keys)
        what = "dense" if point is None else f"{point.keys:.0%} of the keys"
        with passes_bar(self.model, f"{self.name}, {what}", new):
            return [
                self.known.get(key, partial(one_pass, self.model, ids, moba, self.trailing))
                for key, ids in zip(keys, self.texts, strict=True)
            ]


def one_pass(model: Any, ids: Tensor, config: MobaConfig | None, trailing: int) -> dict[str, Any]:
    """One pass over `ids (1, length)`: mean losses of the trailing tokens and of stretches, pairs."""
    counted = nullcontext() if config is None else count_pairs(model, config, ids.shape[1])
    with counted as attended:
        losses = token_losses(model, ids, config)[-trailing:].double()
    size = max(1, min(_STRETCH, len(losses) // 8))
    stretches = losses[len(losses) % size :].unflatten(0, (-1, size)).mean(1)
    pairs = 1.0 if attended is None else attended.share()
    return {"loss": float(losses.mean()), "stretches": stretches.tolist(), "pairs": pairs}


def half_interval(values: Tensor) -> float | None:
    """Half the width of the 95% interval of the mean of `values (n,)`; None for fewer than two values."""
    return None if len(values) < 2 else 1.96 * float(values.std()) / len(values) ** 0.5


def _apart(found: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> Tensor:
    """Differences of the losses of stretches, over all texts."""
    a, b = (torch.tensor([x for one in each for x in one["stretches"]]).double() for each in (found, before))
    return a - b
