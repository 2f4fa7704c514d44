"""The interface of the two searches of a calibration: settings ordered by the share that they attend to."""

from __future__ import annotations

from typing import Protocol

from moba_hf.calibrate.results import Point


class Ladder(Protocol):
    """A family of settings, one for every share of the keys or pairs."""

    @property
    def counts(self) -> str:
        """What the share counts: `results.KEY_BUDGET`, or `CAUSAL_PAIRS`, which needs a pass."""

    @property
    def least(self) -> float:
        """The smallest share."""

    @property
    def most(self) -> float:
        """The largest share of a setting that is not full attention in all layers."""

    def at(self, share: float) -> Point:
        """The best setting within `share` by local costs; the sparsest below `least`, dense at 1."""
