"""Losses compared with values computed by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model

from moba_hf import MobaConfig, use_moba
from moba_hf.calibrate.passes import check_texts
from moba_hf.evaluate import agreement, perplexity, recall, summarize, token_losses
from moba_hf.evaluate.perplexity import by_position
from moba_hf.evaluate.run import evaluate


def test_losses_are_those_counted_by_hand() -> None:
    model, ids = tiny_model(), tiny_ids(50)
    logits = model(ids).logits[0].detach().double()
    by_hand = [
        math.log(sum(math.exp(x) for x in logits[i].tolist())) - float(logits[i, ids[0, i + 1]])
        for i in range(49)
    ]
    assert torch.allclose(
        token_losses(model, ids).double(), torch.tensor(by_hand, dtype=torch.float64), atol=1e-4
    )
    result = perplexity(model, ids, buckets=4, trailing=10)
    assert result.loss == pytest.approx(sum(by_hand) / 49, abs=1e-4)
    assert result.trailing == pytest.approx(sum(by_hand[-10:]) / 10, abs=1e-4)
    assert result.perplexity == pytest.approx(math.exp(sum(by_hand) / 49), rel=1e-3)


def test_buckets_cover_every_predicted_token_once() -> None:
    result = summarize(torch.arange(11.0), buckets=3, trailing=100)
    assert [(b, e) for b, e, _ in result.buckets] == [(1, 4), (4, 8), (8, 12)]
    assert [m for *_, m in result.buckets] == [1.0, 4.5, 8.5]
    assert result.trailing_tokens == 11


def test_moba_losses_are_those_of_the_patched_model_and_the_model_is_left_alone() -> None:
    model, ids = tiny_model(), tiny_ids(100)
    config = MobaConfig(8, 2)
    before = model(ids).logits
    with use_moba(model, config):
        logits = model(ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    losses = token_losses(model, ids, config)
    assert torch.allclose(losses, expected, atol=1e-4)
    assert not torch.allclose(losses, token_losses(model, ids), atol=1e-2)
    assert torch.equal(model(ids).logits, before)


def test_agreement_is_perfect_where_the_rule_is_dense_and_worse_for_fewer_blocks() -> None:
    model, ids = tiny_model(), tiny_ids(128)
    full = agreement(model, ids, MobaConfig(16, 8))
    assert full.kl == pytest.approx(0, abs=1e-6)
    assert full.top1 == 1.0
    some, few = (agreement(model, ids, MobaConfig(16, topk), trailing=64) for topk in (6, 1))
    assert 0 < some.kl < few.kl
    assert few.top1 < some.top1 < 1


def test_kl_is_the_one_counted_by_hand() -> None:
    model, ids = tiny_model(), tiny_ids(64)
    config = MobaConfig(8, 2)
    p = model(ids).logits[0, -20:].detach().double().softmax(1)
    with use_moba(model, config):
        q = model(ids).logits[0, -20:].detach().double().softmax(1)
    by_hand = sum(float((a * (a / b).log()).sum()) for a, b in zip(p, q, strict=True)) / 20
    assert agreement(model, ids, config, trailing=20).kl == pytest.approx(by_hand, rel=1e-3)


def test_what_is_not_one_row_of_ids_is_refused() -> None:
    model, ids, config = tiny_model(), tiny_ids(50), MobaConfig(8, 2)
    measures: list[Callable[[Any], Any]] = [
        lambda x: token_losses(model, x),
        lambda x: perplexity(model, x, config),
        lambda x: agreement(model, x, config),
        lambda x: recall(model, x, config),
        lambda x: evaluate(model, None, {"text": x}, {"moba": config}),
    ]
    for measure in measures:
        with pytest.raises(TypeError, match=r"ids must be a torch tensor, got list: pass torch.as_tensor"):
            measure(ids.tolist())
        for wrong in (ids[0], ids[:, :1], ids.repeat(2, 1)):
            with pytest.raises(ValueError, match=r"ids must be .1, length. with at least two tokens"):
                measure(wrong)
    for means in (summarize, by_position):
        with pytest.raises(TypeError, match="losses must be a torch tensor, got list"):
            means([1.0, 2.0])
    with pytest.raises(TypeError, match="texts must be a torch tensor, got list"):
        check_texts([ids, ids.tolist()])
