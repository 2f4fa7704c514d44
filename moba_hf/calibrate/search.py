"""Searches along a ladder of settings: within an allowed loss, or within an allowed share."""

from __future__ import annotations

from moba_hf.calibrate.ladder import Ladder
from moba_hf.calibrate.passes import Passes
from moba_hf.calibrate.results import KEY_BUDGET, Point

_LEAST = 0.03  # share that the search for an allowed loss goes down to
_CLOSE = 0.98  # part of an allowed share that is near enough to it


def within_loss(
    ladder: Ladder, passes: Passes, max_loss: float, confirmations: int, best: Point
) -> tuple[Point, list[Point]]:
    """Bisects the share, on a log scale, for the least that keeps every text within `max_loss`.

    Args:
        confirmations: most settings that are tried.
        best: a setting that keeps it.

    Returns:
        The setting with the least share, `best` where none has less, and those tried.
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
    """The setting that uses most of an allowed share.

    A key budget is kept by construction. What a shared choice attends is counted, and the share that is asked
    of the ladder is corrected by what was found.

    Args:
        confirmations: most settings that are tried; 0: the local costs are trusted.

    Returns:
        The setting, None where none that was tried keeps the share, and those tried.
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
        # after one that attends too much, aim a little lower than needed
        share = min(ladder.most, share * keys / reached * (1.0 if reached <= keys else 0.995))
    kept = [point for point in tried if point.keys <= keys]
    return max(kept, key=lambda p: p.keys, default=None), tried
