"""The best value for each layer within a total share, found with a Lagrange multiplier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

# The value of a layer: a topk or a threshold.
V = TypeVar("V", int, float)
# layer -> value -> (attended share, cost)
Choices = Mapping[int, Mapping[V, tuple[float, float]]]


def cheapest(choices: Choices[V], total: float) -> dict[int, V]:
    """The value of each layer that minimises the sum of costs, with a sum of shares of at most `total`.

    If even the smallest shares exceed `total`, the values with the smallest shares.
    """

    def pick(price: float) -> dict[int, V]:
        def order(by: Mapping[V, tuple[float, float]], value: V) -> tuple[float, float]:
            share, cost = by[value]
            return cost + price * share, share

        return {layer: min(by, key=lambda value: order(by, value)) for layer, by in choices.items()}

    def used(picked: dict[int, V]) -> float:
        return sum(choices[layer][value][0] for layer, value in picked.items())

    low, high = 0.0, 1.0
    while used(pick(high)) > total and high < 1e12:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if used(pick(middle)) > total else (low, middle)
    return _spend(pick(high), choices, total)


def _spend(picked: dict[int, V], choices: Choices[V], total: float) -> dict[int, V]:
    """Spends the rest of the total, which the multiplier left, on the best gain per share first."""
    while True:
        left = total - sum(choices[layer][value][0] for layer, value in picked.items())
        steps = []
        for layer, now in picked.items():
            share_now, cost_now = choices[layer][now]
            for value, (share, cost) in choices[layer].items():
                if share_now < share <= share_now + left + 1e-9 and cost < cost_now:
                    steps.append(((cost_now - cost) / (share - share_now), layer, value))
        if not steps:
            return picked
        _, layer, value = max(steps)
        picked = {**picked, layer: value}
