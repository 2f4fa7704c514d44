"""Recall compared with brute force over all blocks and heads."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_ids, tiny_model

from moba_hf import MobaConfig
from moba_hf.config import LayerConfig
from moba_hf.evaluate import recall
from moba_hf.evaluate.passes import sample_positions, watch
from moba_hf.evaluate.recall import layer_recall
from moba_hf.hf.adapter import find_adapter, trying
from moba_hf.op.reference import select_blocks_ref
from moba_hf.op.shared_reference import select_shared_ref
from moba_hf.op.shared_rule import SharedRule


@pytest.mark.parametrize("gate", ["mean", "mass"])
@pytest.mark.parametrize(("block_size", "topk", "sink", "local"), [(8, 3, 0, 0), (7, 4, 1, 1), (16, 2, 0, 1)])
def test_layer_recall_is_that_of_brute_force(
    gate: str, block_size: int, topk: int, sink: int, local: int
) -> None:
    torch.manual_seed(0)
    q, k = 2 * torch.randn(4, 60, 16), 2 * torch.randn(2, 60, 16)
    rule = LayerConfig(block_size, topk, sink, local, gate)
    positions = torch.tensor([5, 20, 33, 59])
    block, mass, oracle = layer_recall(q, k, positions, rule, 0.25)
    choice = select_blocks_ref(
        q.transpose(0, 1),
        k.transpose(0, 1),
        block_size=block_size,
        topk=topk,
        sink_blocks=sink,
        local_blocks=local,
        gate=gate,
        softmax_scale=0.25,
    )
    for head in range(4):
        found = []
        for t in positions.tolist():
            weights = (k[head // 2, : t + 1] @ q[head, t] * 0.25).softmax(0)
            own = t // block_size
            share = {b: float(weights[b * block_size : (b + 1) * block_size].sum()) for b in range(own + 1)}
            forced = {own} | {b for b in share if b < sink or b >= own - local}
            rest = sorted(set(share) - forced, key=lambda b: -share[b])
            best = forced | set(rest[: topk - len(forced)])
            chosen = {b for b in choice[t, head].tolist() if b >= 0}
            found.append(
                (len(chosen & best) / len(best), *(sum(share[b] for b in s) for s in (chosen, best)))
            )
        expected = [sum(x) / len(x) for x in zip(*found, strict=True)]
        assert [float(x[head]) for x in (block, mass, oracle)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("sample", "pairs"), [(1, "halves"), (4, "halves"), (4, "neighbours")])
def test_recall_of_a_shared_choice_is_that_of_brute_force(sample: int, pairs: str) -> None:
    torch.manual_seed(0)
    q, k = 2 * torch.randn(4, 90, 16), 2 * torch.randn(2, 90, 16)
    rule = SharedRule(8, 16, 0.3, sample=sample, rotary_pairs=pairs)
    positions = torch.tensor([5, 20, 33, 59, 89])
    block, mass, oracle = layer_recall(q, k, positions, rule, 0.25)
    choice = select_shared_ref(q.transpose(0, 1), k.transpose(0, 1), rule, 0.25)
    for head in range(4):
        found = []
        for t in positions.tolist():
            weights = (k[head // 2, : t + 1] @ q[head, t] * 0.25).softmax(0)
            share = {b: float(weights[b * 8 : (b + 1) * 8].sum()) for b in range(t // 8 + 1)}
            first = t // 16 * 2
            forced = {b for b in share if b < 1 or b >= first - 1}
            chosen = {b for b in share if choice[head, t // 16, b]}
            rest = sorted(set(share) - forced, key=lambda b: -share[b])
            best = forced | set(rest[: len(chosen) - len(forced)])
            shares = (sum(share[b] for b in s) for s in (chosen, best))
            found.append((len(chosen & best) / len(best), *shares))
        expected = [sum(x) / len(x) for x in zip(*found, strict=True)]
        assert [float(x[head]) for x in (block, mass, oracle)] == pytest.approx(expected, abs=1e-5)


def test_recall_of_a_model_covers_its_sparse_layers_and_never_beats_the_oracle() -> None:
    model, ids = tiny_model(), tiny_ids(128)
    config = MobaConfig(8, 4, full_attention_layers=(1,))
    result = recall(model, ids, config, samples=16)
    assert result.layers == (0, 2)
    assert all(len(row) == 4 for row in result.mass)
    for mass, oracle in zip(result.mass, result.oracle, strict=True):
        assert all(0 < m <= o + 1e-6 <= 1.0001 for m, o in zip(mass, oracle, strict=True))
    full = recall(model, ids, MobaConfig(8, 16), samples=8)
    assert min(min(row) for row in full.block) == 1.0
    assert min(min(row) for row in full.mass) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [MobaConfig(8, 3, gate="mass"), MobaConfig(8, tile=16, threshold=0.1, gate="mass")],
)
def test_recall_is_of_the_rotary_pairs_of_the_family(config: MobaConfig) -> None:
    """The mass that is measured is that of the blocks which the model itself attends to."""

    class Neighbours(find_adapter("llama").__class__):  # type: ignore[misc]
        rotary_pairs = "neighbours"

    model, ids = tiny_model(), tiny_ids(128)
    seen = {}
    watch(model, ids, lambda layer, _, q, k, v, scale: seen.update({layer: (q, k, scale)}))
    positions = sample_positions(128, 16, 0)
    with trying(Neighbours(), ["llama"]):
        found = recall(model, ids, config, samples=16)
    for pairs, equal in (("neighbours", True), ("halves", False)):
        rules = {layer: replace(config.for_layer(layer, 3), rotary_pairs=pairs) for layer in found.layers}
        masses = [layer_recall(q, k, positions, rules[i], scale)[1] for i, (q, k, scale) in seen.items()]
        assert torch.allclose(torch.stack(masses), torch.tensor(found.mass), atol=1e-6) == equal


def test_watching_changes_nothing_and_sees_what_the_layers_attend() -> None:
    model, ids = tiny_model(), tiny_ids(32)
    before, seen = model(ids).logits, {}

    def probe(
        layer: int, _module: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> None:
        seen[layer] = (q.shape, k.shape, v.shape, scale)

    watch(model, ids, probe)
    assert seen == dict.fromkeys(range(3), ((4, 32, 16), (2, 32, 16), (2, 32, 16), 0.25))
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "sdpa"
