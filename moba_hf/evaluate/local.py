"""Estimates from one dense pass what each layer would lose at each topk, without running the model with MoBA.

For sampled queries of a layer, the blocks are ranked once, by the rule; the outputs at every topk are then
running sums over that ranking. The cost is the mean squared error of the layer's output (after its output
projection), times half the mean squared gradient, at that output, of the log-likelihood of labels drawn from
the model. To second order this is the rise in nats that a random error of the same size would cause (the
Fisher information, taken as isotropic per layer). It ranks layers and settings but does not predict the loss,
so a setting must be confirmed by full passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moba_hf.evaluate.passes import (
    attention,
    attention_rows,
    family_of,
    passes_bar,
    ranked_by_rule,
    sample_positions,
    watch,
)
from moba_hf.hf.output_head import inner_model, logits_limit
from moba_hf.op.gates import GATES
from moba_hf.op.layer_rule import LayerConfig

SENSITIVITY_TOKENS = 2048  # enough for `sensitivities`
# The least mass that an output is divided by: the weights of all chosen keys may be 0 in fp32.
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LocalCosts:
    """Costs of one rule in nats, by layer and topk.

    Attributes:
        rule: block size, kept blocks and gate.
        length: number of tokens in each text.
        costs: layer index -> topk -> cost, averaged over texts.
    """

    rule: LayerConfig
    length: int
    costs: dict[int, dict[int, float]]


def rank_blocks(q: Tensor, k: Tensor, positions: Tensor, rule: LayerConfig, scale: float) -> Tensor:
    """Block indices int64 `(H, M, blocks)` in the order in which `rule` takes them; future blocks come last.

    Args:
        q: `(H, M, D)`, the queries at `positions (M,)`.
        k: `(HK, N, D)`.
    """
    blocks = -(-k.shape[1] // rule.block_size)
    complete = k.shape[1] // rule.block_size
    scores = GATES[rule.gate].summary(k, rule.block_size, scale, None, rule.rotary_pairs).scores(q, complete)
    scores = F.pad(scores, (0, blocks - complete), value=-torch.inf)
    scores = ranked_by_rule(scores, positions, rule)
    return scores.sort(dim=2, descending=True, stable=True).indices


def output_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    rule: LayerConfig,
    topks: Sequence[int],
    scale: float,
    project: Any,
) -> list[float]:
    """Mean squared error of a layer's projected output at each of `topks`.

    Args:
        q: `(H, M, D)`, the queries at `positions (M,)`.
        k: `(HK, N, D)`.
        v: `(HK, N, Dv)`.
        project: the layer's output projection, `(M, H * Dv)` -> `(M, width)`.
    """
    order = rank_blocks(q, k, positions, rule, scale)
    blocks = order.shape[2]
    missing = blocks * rule.block_size - k.shape[1]
    weights = F.pad(attention_rows(q, k, positions, scale), (0, missing)).unflatten(2, (blocks, -1))
    values = F.pad(v.float(), (0, 0, 0, missing)).unflatten(1, (blocks, -1))
    groups = q.shape[0] // k.shape[0]
    masses = weights.sum(3).gather(2, order).cumsum(2)
    parts = torch.einsum("gnqbk,gbkd->gnqbd", weights.unflatten(0, (-1, groups)), values).flatten(0, 1)
    sums = parts.gather(2, order[..., None].expand(-1, -1, -1, v.shape[2])).cumsum(2)
    full = sums[:, :, -1]
    errors = []
    for topk in topks:
        at = min(topk, blocks) - 1
        wrong = sums[:, :, at] / masses[:, :, at, None].clamp(min=TINY) - full
        out = project(wrong.transpose(0, 1).flatten(1).to(v.dtype)).float()
        errors.append(float(out.square().sum(1).mean()))
    return errors


def sensitivities(model: Any, ids: Tensor, *, seed: int = 0) -> dict[int, float]:
    """Layer index -> half the mean squared gradient of the loss at the layer's attention output.

    The labels of the loss are drawn from the model's own predictions. Takes one dense forward and backward
    pass over `ids (1, length)`; use a short text (`SENSITIVITY_TOKENS`).
    """
    adapter, _ = family_of(model)
    outputs: dict[int, Tensor] = {}
    hooks = []

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
            out = out if out.requires_grad else out.detach().requires_grad_()
            out.retain_grad()
            outputs[layer] = out
            return out

        return hook

    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        for layer, module in adapter.attention_layers(model):
            hooks.append(adapter.output_projection(module).register_forward_hook(keep(layer)))
        with passes_bar(model, "sensitivity", 1), attention(model, None), torch.enable_grad():
            last = logits_limit(inner_model(model), 1024)
            scores = model(input_ids=ids.to(model.device), use_cache=False, **last).logits[0, -1024:].float()
        generator = torch.Generator().manual_seed(seed)
        labels = torch.multinomial(scores.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
        F.cross_entropy(scores, labels.to(scores.device), reduction="sum").backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in wanted:
            parameter.requires_grad_(before)
    found = {}
    for layer, out in outputs.items():
        assert out.grad is not None
        found[layer] = 0.5 * float(out.grad[0].float().square().sum(1).mean())
    return found


def topk_grid(rule: LayerConfig, length: int, shares: Sequence[float]) -> list[int]:
    """The topk values that attend about `shares` of `length` keys, at least the minimum of `rule`."""
    least = 1 + rule.sink_blocks + rule.local_blocks
    return sorted({max(least, round(share * length / rule.block_size)) for share in shares})


def local_costs(
    model: Any,
    texts: Sequence[Tensor],
    rules: Sequence[LayerConfig],
    shares: Sequence[float],
    weights: dict[int, float],
    *,
    samples: int = 48,
    seed: int = 0,
) -> list[LocalCosts]:
    """Costs of every eligible layer at every topk, for each rule, from one dense pass per text.

    Args:
        texts: token ids, each `(1, length)`, all of the same length.
        rules: block size, kept blocks and gate; their topk is ignored.
        shares: the topk values to try, as shares of the length.
        weights: layer index -> nats per squared error, from `sensitivities`.
        samples: number of queries sampled per layer.
        seed: seed of the sample.
    """
    length = texts[0].shape[1]
    positions = sample_positions(length, samples, seed)
    found = [LocalCosts(rule, length, {}) for rule in rules]
    adapter, _ = family_of(model)

    def probe(layer: int, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        at, project = positions.to(q.device), adapter.output_projection(module)
        for result in found:
            topks = topk_grid(result.rule, length, shares)
            errors = output_errors(q[:, at], k, v, at, result.rule, topks, scale, project)
            known = result.costs.setdefault(layer, dict.fromkeys(topks, 0.0))
            for topk, error in zip(topks, errors, strict=True):
                known[topk] += weights[layer] * error / len(texts)

    with passes_bar(model, "local costs", len(texts)):
        for ids in texts:
            watch(model, ids, probe)
    return found
