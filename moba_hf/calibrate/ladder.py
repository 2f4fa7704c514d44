"""Settings in the order of what they attend: what the two strategies of a calibration have in common."""

from __future__ import annotations

from typing import Protocol

from moba_hf.calibrate.results import Point


class Ladder(Protocol):
    """A family of settings, one for every share of the keys or pairs."""

    @property
    def counts(self) -> str:
        """What the share is: `results.KEY_BUDGET`, known in advance, or `CAUSAL_PAIRS`, told by a pass."""

    @property
    def least(self) -> float:
        """The least share."""

    @property
    def most(self) -> float:
        """The largest share of a setting that is not full attention in all layers."""

    def at(self, share: float) -> Point:
        """The best setting within `share` by local costs: the one at `least` below that, dense at 1."""
