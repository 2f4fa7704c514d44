"""Every measure can fail: a model with randomly chosen blocks must score worse."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from test_tasks import Bytes
from tiny import tiny_ids, tiny_model

from moba_hf import MobaConfig
from moba_hf.config import LayerConfig
from moba_hf.evaluate import SampleSize, agreement, local, make_sample, perplexity, recall, run_task, tasks
from moba_hf.evaluate.local import output_errors
from moba_hf.op import portable_select

CONFIG = MobaConfig(8, 8, 1, 1)


@contextmanager
def shuffled() -> Iterator[None]:
    """Replaces the scores of candidate blocks by random numbers; kept and future blocks do not change."""
    real = portable_select._stable_topk

    def choose(scores: torch.Tensor, excluded: torch.Tensor, count: int, free: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
        return real(noise.masked_fill(excluded, -torch.inf), excluded, count, free)

    with mock.patch.object(portable_select, "_stable_topk", choose):
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@torch.no_grad()
def written_by(model, length: int) -> torch.Tensor:
    """`(1, length)` ids sampled from the dense model, so that its own predictions fit best."""
    ids, generator = tiny_ids(8), torch.Generator().manual_seed(0)
    while ids.shape[1] < length:
        chances = model(ids).logits[0, -1].softmax(0)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)[None]], 1)
    return ids


def test_perplexity(model) -> None:
    ids = written_by(model, 256)
    dense, good = perplexity(model, ids), perplexity(model, ids, CONFIG)
    with shuffled():
        bad = perplexity(model, ids, CONFIG)
    assert bad.trailing - dense.trailing > 1.3 * (good.trailing - dense.trailing) > 0
    assert bad.perplexity > good.perplexity > dense.perplexity


def test_agreement(model) -> None:
    ids = tiny_ids(256)
    good = agreement(model, ids, CONFIG)
    with shuffled():
        bad = agreement(model, ids, CONFIG)
    assert bad.kl > 1.3 * good.kl
    assert bad.top1 < good.top1


@pytest.mark.parametrize("gate", ["mean", "mass"])
def test_recall(model, gate: str) -> None:
    ids, config = tiny_ids(256), MobaConfig(8, 8, 1, 1, gate=gate)
    good = recall(model, ids, config)
    with shuffled():
        bad = recall(model, ids, config)
    for name in ("block", "mass"):
        better, worse = (torch.tensor(getattr(found, name)) for found in (good, bad))
        assert (worse < better).all(), name
    assert torch.allclose(torch.tensor(bad.oracle), torch.tensor(good.oracle))


def test_local_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = (2 * torch.randn(h, 128, 16) for h in (4, 2, 2))
    at, rule = torch.arange(40, 128, 3), LayerConfig(8, 3, 1, 1)
    good = output_errors(q[:, at], k, v, at, rule, [4, 8], 0.25, torch.nn.Identity())
    real = local.rank_blocks

    def ranks(q: torch.Tensor, k: torch.Tensor, *rest: object) -> torch.Tensor:
        return real(torch.randn_like(q), k, *rest)

    monkeypatch.setattr(local, "rank_blocks", ranks)
    bad = output_errors(q[:, at], k, v, at, rule, [4, 8], 0.25, torch.nn.Identity())
    assert all(worse > 1.3 * better for worse, better in zip(bad, good, strict=True))


def test_tasks(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model finds no needle, so the dense model's answers serve as the expected ones."""
    tokenizer = Bytes()
    config = MobaConfig(16, 14, 1, 1)

    def made(task: str, *args: object, **kwargs: object) -> tasks.Sample:
        sample = make_sample(task, *args, **kwargs)
        answers = tasks.answer_questions(model, tokenizer, sample, 2, None)
        asked = [(q, (a,), d) for (q, _, d), a in zip(sample.questions, answers, strict=True)]
        return tasks.Sample(sample.context, tuple(asked))

    monkeypatch.setattr(tasks, "make_sample", made)
    monkeypatch.setitem(tasks.TASKS, "multi-needle", (tasks.TASKS["multi-needle"][0], 2))
    size = SampleSize(contexts=6, questions=4)
    assert run_task(model, tokenizer, "multi-needle", 500, None, size).score == 1.0
    good = run_task(model, tokenizer, "multi-needle", 500, config, size).score
    with shuffled():
        bad = run_task(model, tokenizer, "multi-needle", 500, config, size).score
    assert bad < good < 1.0
