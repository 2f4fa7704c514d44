"""Counts of attended pairs, compared with the reference's choices."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_ids, tiny_model

from moba_hf import MobaCache, MobaConfig
from moba_hf.evaluate import run
from moba_hf.evaluate.attended import count_pairs
from moba_hf.evaluate.passes import attention, hidden_states
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.op.shared_reference import select_shared_ref
from moba_hf.op.shared_rule import SharedRule
from tests.model_checks import captured

SHARED = {"block_size": 8, "tile": 16, "threshold": 0.3, "sample": 2, "sink_blocks": 1, "gate": "mass"}


def brute_force(call, rule: SharedRule) -> list[float]:
    """Share of the causal pairs by head, counted in full masks."""
    q, k = call.query[0].transpose(0, 1), call.key[0].transpose(0, 1)
    chosen = select_shared_ref(q, k, rule, call.scaling)
    n = len(q)
    pairs = chosen[:, torch.arange(n) // rule.tile][:, :, torch.arange(n) // rule.block_size].tril()
    return (pairs.sum((1, 2)) / (n * (n + 1) / 2)).tolist()


def test_pairs_are_those_of_the_choices() -> None:
    model, ids = tiny_model(), tiny_ids(203)
    config = MobaConfig(
        **SHARED,
        full_attention_layers=(1,),
        layers={2: {"tile": 1, "topk": 4}},  # type: ignore[arg-type]
    )
    with attention(model, config), captured() as calls, count_pairs(model, config, 203) as found:
        hidden_states(model, ids)
    rule = config.for_layer(0, 3)
    assert isinstance(rule, SharedRule)
    heads = found.heads()
    assert list(heads) == [0, 2]
    assert heads[0] == pytest.approx(brute_force(calls[0], rule))
    assert len(set(heads[0])) == 4
    own = config.for_layer(2, 3)
    assert own is not None
    assert heads[2] == [own.pairs(203) / (203 * 102)] * 4
    assert found.share() == pytest.approx((sum(heads[0]) / 4 + 1 + heads[2][0]) / 3)


def test_calls_on_a_cache_add_up_and_nothing_is_watched_afterwards() -> None:
    model, ids = tiny_model(), tiny_ids(160)
    config = MobaConfig(**SHARED)
    with attention(model, config):
        with count_pairs(model, config, 160) as whole:
            model(ids)
        with count_pairs(model, config, 160) as parts:
            cache = MobaCache(model.config)
            for part in (ids[:, :64], ids[:, 64:]):
                model(part, **cache_kwargs(model, cache))
        with count_pairs(model, config, 160) as nothing:
            pass
        model(ids)
    assert parts.heads() == whole.heads()
    assert nothing.share() == 1.0


def test_eval_reports_the_share_and_recall_of_shared_choices() -> None:
    model, ids = tiny_model(), tiny_ids(203)
    settings = {"dense": None, "shared": MobaConfig(**SHARED), "own": MobaConfig(8, 4)}
    measures = ("perplexity", "agreement", "recall")
    result = run.evaluate(model, None, {"text": ids}, settings, measures=measures)
    with attention(model, settings["shared"]), count_pairs(model, settings["shared"], 203) as found:
        hidden_states(model, ids)
    assert result["attended"]["text"]["shared"] == found.to_dict()
    assert result["keys"]["text"]["shared"] == [None, found.share()]
    assert result["attended"]["text"]["own"]["share"] == pytest.approx(result["keys"]["text"]["own"][1])
    assert "attended" not in result["perplexity"]["text"]["shared"]
    assert {name: one and MobaConfig.from_dict(one) for name, one in result["settings"].items()} == settings
    shown = run.tables(result)
    assert f"| shared | - | {100 * found.share():.1f} % |" in " ".join(shown.split())
    assert "pairs attended by layers and heads" in shown
    assert set(result["recall"]["text"]) == {"shared", "own"}
