"""Tasks are reproducible, contain the answers to their questions, and are scored like RULER's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from moba_hf import MobaConfig, prefill, use_moba
from moba_hf.evaluate import TASKS, SampleSize, Store, make_sample, run_task, score_answer, tasks
from moba_hf.evaluate.tasks import answer_questions, wilson
from moba_hf.hf.cache_names import cache_kwargs


class Bytes:
    """A byte tokenizer with ids taken modulo 97."""

    eos_token_id = None

    def __call__(self, text: str, return_tensors: str | None = None, **_: Any) -> Any:
        ids = [b % 97 for b in text.encode()]
        return type("Ids", (), {"input_ids": torch.tensor([ids]) if return_tensors else ids})

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(i + 32) for i in ids)


@pytest.mark.parametrize("task", TASKS)
def test_samples_fit_their_length_and_hold_their_answers(task: str) -> None:
    sample = make_sample(task, Bytes(), 4000, questions=4, seed=3)
    assert 3800 < len(sample.context.encode()) <= 4000
    assert len(sample.questions) == (1 if task == "needle" else 4)
    for _, expected, depth in sample.questions:
        assert all(sample.context.count(text) >= 1 for text in expected)
        if task != "variables":
            assert sample.context.find(expected[0]) / len(sample.context) == pytest.approx(depth, abs=0.1)
    assert sample == make_sample(task, Bytes(), 4000, questions=4, seed=3)
    assert sample != make_sample(task, Bytes(), 4000, questions=4, seed=4)


def test_a_needle_stands_where_it_is_put() -> None:
    for depth in (0.0, 0.5, 1.0):
        sample = make_sample("needle", Bytes(), 3000, depths=[depth])
        place = sample.context.index(sample.questions[0][1][0]) / len(sample.context)
        assert place == pytest.approx(depth, abs=0.08)


def test_scores_and_intervals() -> None:
    assert score_answer("they are ABC and def.", ("abc", "DEF")) == 1.0
    assert score_answer("abc", ("abc", "def")) == 0.5
    low, high = wilson(0.8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert wilson(0.0, 5)[0] == 0.0


def test_answers_are_those_of_reading_context_and_question_at_once() -> None:
    model, tokenizer = tiny_model(), Bytes()
    sample = make_sample("multi-needle", tokenizer, 700, questions=2)
    answers = answer_questions(model, tokenizer, sample, 3, None)
    for (question, _, _), answer in zip(sample.questions, answers, strict=True):
        ids = tokenizer(sample.context + question, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)  # id 0 is an ordinary byte, not padding
        new = model.generate(
            ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert answer == tokenizer.decode(new[0, -3:].tolist())


@pytest.mark.parametrize("config", [None, MobaConfig(16, 3, 1, 1), MobaConfig(16, 3, gate="mass")])
def test_batched_questions_get_the_same_answers_as_single_ones(
    config: MobaConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_model(), Bytes()
    sample = make_sample("multi-needle", tokenizer, 900, questions=5)
    assert len({len(question) for question, _, _ in sample.questions}) > 1  # rows need padding
    together = answer_questions(model, tokenizer, sample, 4, config)
    monkeypatch.setattr(tasks, "_ROW_TOKENS", (1, 1))
    assert answer_questions(model, tokenizer, sample, 4, config) == together
    assert len(set(together)) > 1


def test_the_end_of_context_and_question_attends_every_key() -> None:
    """As in `prefill`, and only with a tail; for per-query and shared rules."""
    model, tokenizer = tiny_model(), Bytes()
    sample = make_sample("needle", tokenizer, 600, questions=1)
    ids = tokenizer(sample.context + sample.questions[0][0], return_tensors="pt").input_ids
    shared = MobaConfig(16, tile=32, threshold=0.9, gate="mass")
    for config in (MobaConfig(16, 2), shared):
        answers = [answer_questions(model, tokenizer, sample, 8, config, tail) for tail in (0, 128, 10**6)]
        with use_moba(model, config):
            cache = prefill(model, ids, dense_tail=128, progress=False)
            settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            mask = torch.ones_like(ids)
            new = model.generate(ids, attention_mask=mask, **cache_kwargs(model.generate, cache), **settings)
        assert answers[1] == [tokenizer.decode(new[0, -8:].tolist())]
        assert answers[2] == answer_questions(model, tokenizer, sample, 8, None)
        assert len({str(answer) for answer in answers}) > 1


def test_tasks_run_moba_and_resume_from_the_store(tmp_path: Path) -> None:
    model, tokenizer, config = tiny_model(), Bytes(), MobaConfig(16, 2)
    sample = make_sample("needle", tokenizer, 600)
    answer = answer_questions(model, tokenizer, sample, 4, config)
    assert answer != answer_questions(model, tokenizer, sample, 4, None)
    with use_moba(model, config):
        ids = tokenizer(sample.context, return_tensors="pt").input_ids
        assert model(ids).logits.shape[1] == ids.shape[1]
    store = Store(tmp_path / "tasks.json", {"model": "tiny"})
    first = run_task(model, tokenizer, "needle", 600, config, SampleSize(2), store=store)
    kept = Store(tmp_path / "tasks.json", {"model": "tiny"})
    assert run_task(None, tokenizer, "needle", 600, config, SampleSize(2), store=kept) == first
    assert first.samples == 2


def test_unknown_tasks_and_too_short_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="needle, multi-needle"):
        make_sample("poem", Bytes(), 100)
    with pytest.raises(ValueError, match="too few"):
        make_sample("multi-needle", Bytes(), 100)


@pytest.mark.parametrize("task", TASKS)
def test_long_contexts_are_as_long_as_asked(task: str) -> None:
    """Also with more names than two words give: 60,000 bytes hold about 1,600 lines of key and value."""
    sample = make_sample(task, Bytes(), 60_000, questions=4)
    assert 59_000 < len(sample.context.encode()) <= 60_000
    if task == "key-value":
        keys = [line.split('"')[1] for line in sample.context.splitlines() if line.startswith('"')]
        assert len(set(keys)) == len(keys) > 1500
        assert [depth for *_, depth in sample.questions] == sorted(depth for *_, depth in sample.questions)
        assert sample.context.find(sample.questions[3][1][0]) > 45_000


def test_answers_lie_at_the_requested_depths() -> None:
    """In a whole run: every context has a question at each depth, and the score lists the depths."""
    model, tokenizer = tiny_model(), Bytes()
    found = run_task(model, tokenizer, "needle", 600, None, SampleSize(2, depths=(0.0, 0.5, 1.0)))
    assert [depth for depth, _ in found.by_depth] == [0.0, 0.5, 1.0] * 2
    many = run_task(model, tokenizer, "multi-needle", 900, None, SampleSize(1, depths=(0.2, 0.8)))
    assert [depth for depth, _ in many.by_depth] == [0.2, 0.8]
    sample = make_sample("multi-needle", tokenizer, 3000, depths=(0.2, 0.8))
    for _, expected, depth in sample.questions:
        place = sample.context.index(expected[0]) / len(sample.context)
        assert place == pytest.approx(depth, abs=0.08)
    for depths in ((), (1.5,), (-0.1, 0.5)):
        with pytest.raises(ValueError, match="depths must be"):
            make_sample("multi-needle", tokenizer, 900, depths=depths)
    with pytest.raises(ValueError, match="contexts must be"):
        run_task(model, tokenizer, "needle", 600, size=SampleSize(0))
    with pytest.raises(ValueError, match="questions must be"):
        make_sample("multi-needle", tokenizer, 900, questions=0)
