"""Searches along a ladder of settings: within an allowed loss, or within an allowed share."""

from __future__ import annotations

from moba_hf.calibrate.ladder import Ladder
from moba_hf.calibrate.passes import Passes
from moba_hf.calibrate.results import KEY_BUDGET, Point

_LEAST = 0.03  # smallest share in the search for an allowed loss
_CLOSE = 0.98  # a share within this factor of the allowed share is close enough


def within_loss(
    ladder: Ladder, passes: Passes, max_loss: float, confirmations: int, best: Point
) -> tuple[Point, list[Point]]:
    """Bisects the share, on a log scale, for the smallest with which every text stays within `max_loss`.

    Args:
        confirmations: the most settings to try.
        best: a setting that stays within `max_loss`.

    Returns:
        The setting with the smallest share (`best` if none is smaller), and the settings that were tried.
    """
    low, high = max(ladder.least, _LEAST), min(ladder.most, best.keys)
    tried: list[Point] = []
    for _ in range(confirmations):
        share = (low * high) ** 0.5
        tried.append(passes.measured(ladder.at(share), ladder.counts))
        worst = tried[-1].worst
        assert worst is not None
        if worst <= max_loss:
            best, high = min(best, tried[-1], key=lambda p: p.keys), share
        else:
            low = share
    return best, tried


def within_keys(
    ladder: Ladder, passes: Passes, keys: float, confirmations: int
) -> tuple[Point | None, list[Point]]:
    """The setting with the largest share within the allowed one.

    A key budget is met by construction. For a shared choice, the attended pairs are counted, and the share
    that is requested from the ladder is corrected accordingly.

    Args:
        confirmations: the most settings to try; 0: trust the local costs.

    Returns:
        The setting (None if every tried one exceeds the share), and the settings that were tried.
    """
    if ladder.counts == KEY_BUDGET:
        found = ladder.at(keys)
        found = passes.measured(found, ladder.counts) if confirmations else found
        return found, [found]
    share, tried = keys, list[Point]()
    while len(tried) < confirmations:
        point = ladder.at(share)
        if tried and point.config == tried[-1].config:
            break
        tried.append(passes.measured(point, ladder.counts))
        reached = tried[-1].keys
        if _CLOSE * keys <= reached <= keys:
            break
        # after a setting that attends to too much, aim slightly lower than necessary
        share = min(ladder.most, share * keys / reached * (1.0 if reached <= keys else 0.995))
    kept = [point for point in tried if point.keys <= keys]
    return max(kept, key=lambda p: p.keys, default=None), tried
