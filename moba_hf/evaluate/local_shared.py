"""Layer-local costs of a choice that a tile of queries shares, at several thresholds, from one dense pass.

As in `moba_hf.evaluate.local`, a cost is the error of a layer's output at sampled queries, weighted by how
much the predictions depend on that output. Blocks are chosen for the whole text, so attended pairs are
counted too. Queries and keys are those of the dense pass. They would differ slightly if the layers below were
sparse, so both numbers are estimates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from moba_hf.evaluate.attended import pairs_of
from moba_hf.evaluate.local import TINY
from moba_hf.evaluate.passes import attention_rows, family_of, passes_bar, sample_positions, watch
from moba_hf.op.sequences import Sequences, batched_table
from moba_hf.op.shared import unpack_blocks
from moba_hf.op.shared_ops import select_shared
from moba_hf.op.shared_rule import SharedRule

# layer -> threshold -> (share of the dense causal pairs, cost in nats)
ThresholdCosts = dict[int, dict[float, tuple[float, float]]]


def threshold_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    rule: SharedRule,
    thresholds: Sequence[float],
    scale: float,
    project: Any,
) -> list[tuple[float, float]]:
    """Share of the dense causal pairs, and mean squared error of a layer's output, at each of `thresholds`.

    Args:
        q: `(H, N, D)`.
        k: `(HK, N, D)`.
        v: `(HK, N, Dv)`.
        positions: `(M,)`, positions of the queries whose outputs are compared.
        project: the layer's output projection, `(M, H * Dv)` -> `(M, width)`.
    """
    length, blocks = k.shape[1], -(-k.shape[1] // rule.block_size)
    sequences = Sequences(batched_table(1, length, length, q.device), length, length)
    weights = attention_rows(q[:, positions], k, positions, scale)
    full = _attend(weights, v)
    found = []
    for threshold in thresholds:
        here = replace(rule, threshold=threshold)
        choice = select_shared(q[None], k[None], sequences, here, softmax_scale=scale)
        pairs = int(pairs_of(choice, q[None], sequences, here).sum())
        taken = unpack_blocks(choice[:, positions // rule.tile], blocks)
        kept = weights * taken.repeat_interleave(rule.block_size, 2)[:, :, :length]
        wrong = _attend(kept, v) / kept.sum(2, keepdim=True).clamp(min=TINY) - full
        error = project(wrong.transpose(0, 1).flatten(1).to(v.dtype)).float().square().sum(1).mean()
        found.append((pairs / (q.shape[0] * (length * (length + 1) // 2)), float(error)))
    return found


def _attend(weights: Tensor, v: Tensor) -> Tensor:
    """`weights (H, M, N)` times `v (HK, N, Dv)` in fp32, `(H, M, Dv)`."""
    grouped = weights.unflatten(0, (v.shape[0], -1)).flatten(1, 2)
    return (grouped @ v.float()).unflatten(1, (-1, weights.shape[1])).flatten(0, 1)


def threshold_costs(
    model: Any,
    texts: Sequence[Tensor],
    rules: Mapping[int, SharedRule],
    thresholds: Sequence[float],
    weights: Mapping[int, float],
    *,
    samples: int = 48,
    seed: int = 0,
) -> ThresholdCosts:
    """Shares of pairs and costs of layers at each threshold, averaged over texts; one dense pass per text.

    Args:
        texts: `(1, length)` token ids each, all of the same length.
        rules: rules of the layers to measure; their thresholds are ignored.
        weights: nats per squared error of each layer, from `sensitivities`.
    """
    positions = sample_positions(texts[0].shape[1], samples, seed)
    found: ThresholdCosts = {layer: dict.fromkeys(thresholds, (0.0, 0.0)) for layer in rules}
    adapter, _ = family_of(model)

    def probe(layer: int, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        if layer not in rules:
            return
        project = adapter.output_projection(module)
        errors = threshold_errors(q, k, v, positions.to(q.device), rules[layer], thresholds, scale, project)
        for threshold, (share, error) in zip(thresholds, errors, strict=True):
            so_far, cost = found[layer][threshold]
            at = so_far + share / len(texts), cost + weights[layer] * error / len(texts)
            found[layer][threshold] = at

    with passes_bar(model, "local costs", len(texts)):
        for ids in texts:
            watch(model, ids, probe)
    return found
