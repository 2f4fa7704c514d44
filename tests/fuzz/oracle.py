"""MoBA in float64, one query at a time, written from the rule and independent of `moba_hf.op.reference`.

Arrays are numpy, for one sequence and one head: `q (M, D)`, `k (N, D)`, `v (N, DV)`. The last query is at the
position of the last key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Rule:
    """The settings of the rule, and the softmax scale."""

    block_size: int
    topk: int
    sink_blocks: int = 0
    local_blocks: int = 0
    gate: str = "mean"
    scale: float = 1.0


def score(q: Array, block: Array, rule: Rule) -> float:
    """The score of one complete block `(B, D)` for one query `(D,)`."""
    if rule.gate == "mean":
        return float(q @ (block.sum(0) / len(block)))
    size = 16 if len(block) % 16 == 0 else len(block)
    norms = [float(key @ key) for key in block]
    terms = [rule.scale * float(q @ block[norms.index(min(norms))])]
    for start in range(0, len(block), size):
        part = block[start : start + size]
        mean = part.sum(0) / size
        variance = ((part - mean) ** 2).sum(0) / size
        half = len(q) // 2  # the rotary embedding rotates d and d + half together, so both get the mean
        variance = np.tile((variance[:half] + variance[half:]) / 2, 2)
        spread = rule.scale**2 * float((q * q) @ variance)
        reach = 2 * math.log(size)
        gain = spread / 2 if spread <= reach else math.sqrt(spread * reach) - reach / 2
        terms.append(math.log(size) + rule.scale * float(q @ mean) + gain)
    most = max(terms)
    return most + math.log(sum(math.exp(x - most) for x in terms))


def scores_of(q: Array, k: Array, position: int, rule: Rule) -> dict[int, float]:
    """Scores of the candidates of a query at `position`: earlier blocks that are not kept anyway."""
    own, size = position // rule.block_size, rule.block_size
    free = range(rule.sink_blocks, own - rule.local_blocks)
    return {i: score(q, k[i * size : (i + 1) * size], rule) for i in free}


def blocks_of(q: Array, k: Array, position: int, rule: Rule) -> set[int]:
    """The blocks that a query at `position` attends."""
    own = position // rule.block_size
    scores = scores_of(q, k, position, rule)
    chosen = {own} | (set(range(own)) - set(scores))
    best = sorted(scores, key=lambda i: (-scores[i], i))
    return chosen | set(best[: rule.topk - len(chosen)])


def attend(q: Array, k: Array, v: Array, position: int, blocks: set[int], rule: Rule) -> tuple[Array, float]:
    """Output `(DV,)` and log-sum-exp of one query."""
    keys, weights, lse = _softmax(q, k, position, blocks, rule)
    return weights @ v[keys], lse


def gradients(
    q: Array,
    k: Array,
    v: Array,
    position: int,
    blocks: set[int],
    rule: Rule,
    d_out: Array,
    d_lse: float,
    into: tuple[Array, Array],
) -> Array:
    """`dq (D,)` of one query; its contributions to dk and dv are added to `into`."""
    keys, weights, _ = _softmax(q, k, position, blocks, rule)
    d_scores = weights * ((v[keys] - weights @ v[keys]) @ d_out + d_lse) * rule.scale
    into[0][keys] += np.outer(d_scores, q)
    into[1][keys] += np.outer(weights, d_out)
    return d_scores @ k[keys]


def _softmax(
    q: Array, k: Array, position: int, blocks: set[int], rule: Rule
) -> tuple[list[int], Array, float]:
    """The keys that a query attends, their weights, and the log-sum-exp."""
    keys = [i for i in range(position + 1) if i // rule.block_size in blocks]
    scores = rule.scale * (k[keys] @ q)
    exponentials = np.exp(scores - scores.max())
    total = exponentials.sum()
    return keys, exponentials / total, float(scores.max() + np.log(total))
