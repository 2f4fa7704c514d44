"""The shared choice of blocks in float64, one tile at a time; independent of `moba_hf.op.shared_reference`.

Arrays are numpy, for one sequence and one head, as in `fuzz.oracle`. A sequence may be split into several
calls. If a call with positions `[begin, end)` has only some rows of a tile, these rows are the tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from fuzz import oracle

Array = np.ndarray


@dataclass(frozen=True)
class SharedNumbers:
    """The settings of the rule, and the softmax scale."""

    block_size: int
    tile: int
    threshold: float | None
    share: float | None
    topk: int | None
    sink_blocks: int
    local_blocks: int
    sample: int
    dense_below: int
    scale: float

    @property
    def score(self) -> oracle.Rule:
        """The rule of `fuzz.oracle` that scores one block."""
        return oracle.Rule(self.block_size, 1, gate="mass", scale=self.scale)


def rows_of_tiles(begin: int, end: int, tile: int) -> list[range]:
    """The positions of a call, split into tiles."""
    cuts = [begin, *(at for at in range(begin + 1, end) if at % tile == 0), end]
    return [range(a, b) for a, b in pairwise(cuts) if a < b]


def masses_of(q: dict[int, Array], k: Array, rows: range, rule: SharedNumbers) -> list[float]:
    """The mass of each candidate of the tile `rows`; `q` maps positions to queries."""
    first = rows[0] // rule.tile * rule.tile
    candidates = first // rule.block_size
    # the last row in the call of each group of `sample` positions
    speakers = [i for i in rows if i + 1 not in rows or (i + 1) // rule.sample > i // rule.sample]
    total = [0.0] * candidates
    for i in speakers:
        scores = [
            oracle.score(q[i], k[b * rule.block_size : (b + 1) * rule.block_size], rule.score)
            for b in range(candidates)
        ]
        most = max(scores, default=0.0)
        weights = [math.exp(x - most) for x in scores]
        for b, weight in enumerate(weights):
            total[b] += weight / sum(weights) / len(speakers)
    return total


def blocks_of(masses: list[float], rows: range, rule: SharedNumbers) -> tuple[set[int], float]:
    """The blocks that a tile attends to, and the smallest relative distance of a mass from its limit."""
    first, count = rows[0] // rule.tile * rule.tile, len(masses)
    own = set(range(first // rule.block_size, rows[-1] // rule.block_size + 1))
    if first < rule.dense_below:
        return own | set(range(count)), 1.0
    forced = {b for b in range(count) if b < rule.sink_blocks or b >= count - rule.local_blocks}
    heaviest = sorted(range(count), key=lambda b: (-masses[b], b))
    taken, before, room = [], 0.0, 1.0
    for b in heaviest:
        wanted = True
        if rule.threshold is not None:
            least = rule.threshold * masses[heaviest[0]]
            room = min(room, abs(masses[b] - least) / least)
            wanted = masses[b] >= least
        if rule.share is not None:
            room = min(room, abs(before - rule.share) / rule.share)
            wanted = wanted and before < rule.share
        if wanted and b not in forced:
            taken.append(b)
        before += masses[b]
    if rule.topk is not None:
        limit = rule.topk - max(1, rule.tile // rule.block_size) - len(forced)
        if len(taken) > limit > 0:
            last, next_one = masses[taken[limit - 1]], masses[taken[limit]]
            room = min(room, (last - next_one) / last)
        taken = taken[: max(0, limit)]
    return own | forced | set(taken), room
