"""Lookups in codebases: the questions, where their answers lie, and which answers count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Letters
from tiny import tiny_model

from moba_hf import MobaCache, MobaConfig
from moba_hf.evaluate import SampleSize, code_lookup
from moba_hf.evaluate.code_lookup import answers_right, make_context, run_code_lookup, sliding_window
from moba_hf.evaluate.lookups import Definition, Definitions, newline_tokens, snap, weave
from moba_hf.evaluate.passes import attention
from moba_hf.evaluate.perplexity import by_position
from moba_hf.evaluate.repositories import Repository
from moba_hf.evaluate.results import Store
from moba_hf.hf.cache_names import cache_kwargs


def source(name: str = "r", line: bytes = b"value = 1\n") -> Repository:
    return Repository(name, np.frombuffer(line * 300, np.uint8).astype(np.int32), np.array([0, 1000]))


def text_of(ids: Any) -> str:
    return bytes(np.asarray(ids).tolist()).decode()


def test_definitions_differ_and_are_of_other_words() -> None:
    rng = np.random.default_rng(0)
    train, held_out = Definitions(Letters()), Definitions(Letters(), held_out=True)
    assert not {*train.words} & {*held_out.words}
    made = train.draw(rng, 200)
    assert len({one.question for one in made}) == 200
    assert {one.kind for one in made} == {"string", "number", "signature"}
    for one in made:
        line = text_of(one.ids)
        assert line.startswith("\n")
        compile(f"{line} pass" if one.kind == "signature" else line, "line", "exec")
    assert [x.kind for x in train.draw(rng, 3, ("number", "string"))] == ["number", "string", "number"]


def test_weave_puts_lines_where_they_belong() -> None:
    text, begins = weave(np.arange(6), [(10, 11), (12,), (13, 14, 15)], np.array([0, 2, 2]))
    assert text.tolist() == [10, 11, 0, 1, 12, 13, 14, 15, 2, 3, 4, 5]
    assert begins.tolist() == [0, 4, 5]
    assert weave(np.arange(3), [], np.array([], int))[0].tolist() == [0, 1, 2]
    assert snap(np.array([0, 3, 9]), np.array([2, 3, 7])).tolist() == [2, 3, 7]
    assert newline_tokens(Letters()).nonzero()[0].tolist() == [10]


def test_a_context_has_its_definitions_at_even_depths() -> None:
    repositories = [source("a"), source("b", b"other = 22\n")]
    ids, asked = make_context(Letters(), repositories, 2048, questions=8, seed=3)
    longest = max(len(one.ids) for one, _ in asked)
    assert len(ids) == 2048 - longest
    text = text_of(ids)
    for number, (one, depth) in enumerate(asked):
        assert depth == (number + 0.5) / 8
        assert text.count(text_of(one.ids)) == 1
        assert abs(text.index(text_of(one.ids)) / len(ids) - depth) < 0.1
    again, _ = make_context(Letters(), repositories, 2048, questions=8, seed=3)
    assert np.array_equal(ids, again)
    with pytest.raises(ValueError, match="too few for a context of 655"):
        make_context(Letters(), repositories, 65536)


@pytest.mark.parametrize("rule", [None, MobaConfig(16, 3, decode="sparse")], ids=["dense", "sparse"])
def test_an_answer_counts_when_the_model_gives_it(rule: MobaConfig | None) -> None:
    model = tiny_model()
    rng = np.random.default_rng(0)
    context = rng.integers(0, 97, 200)

    def greedy(question: tuple[int, ...], count: int) -> tuple[int, ...]:
        """Token by token, without a cache."""
        ids = [*context.tolist(), *question]
        with attention(model, rule), torch.no_grad():
            for _ in range(count):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return tuple(ids[len(context) + len(question) :])

    questions = [tuple(rng.integers(0, 97, n).tolist()) for n in (4, 6, 4)]
    answers = [greedy(question, 3) for question in questions]
    given = [Definition("string", q, a) for q, a in zip(questions, answers, strict=True)]
    given.append(Definition("string", questions[0], (*answers[0][:2], (answers[0][2] + 1) % 97)))
    given.append(
        Definition("string", questions[1], answers[1][:2])
    )  # only part of the answer, but that part is right
    assert answers_right(model, context, given, rule, dense_question=False) == [True, True, True, False, True]


def test_sparse_steps_of_a_shared_choice_answer_as_generation_does() -> None:
    """They hear earlier queries, which only a MobaCache keeps."""
    model, rng = tiny_model(), np.random.default_rng(0)
    rule = MobaConfig(8, tile=16, threshold=0.3, gate="mass", decode="sparse")
    context = rng.integers(0, 97, 200)
    questions = [tuple(rng.integers(0, 97, 5).tolist()) for _ in range(4)]
    given = []
    with attention(model, rule):
        for question in questions:
            ids = torch.tensor([[*context.tolist(), *question]])
            cache = MobaCache(model.config)
            settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
            with torch.no_grad():
                model(ids[:, :200], **cache_kwargs(model, cache))
                made = model.generate(ids, **cache_kwargs(model.generate, cache), **settings)
            given.append(Definition("string", question, tuple(made[0, 205:].tolist())))
    assert answers_right(model, context, given, rule, dense_question=False) == [True] * 4


def test_a_dense_question_attends_every_key() -> None:
    """If a query attends one block, only a dense question sees what comes before it."""
    model, rng = tiny_model(), np.random.default_rng(0)
    context = rng.integers(0, 97, 208)
    question = tuple(rng.integers(0, 97, 4).tolist())
    rule = MobaConfig(16, 1)  # the question's queries see only the question
    ids = torch.tensor([[*context.tolist(), *question]])

    def first(dense: bool) -> int:
        found = (
            i
            for i in range(97)
            if answers_right(model, context, [Definition("", question, (i,))], rule, dense)[0]
        )
        return next(found)

    with attention(model, rule), torch.no_grad():
        assert first(False) == int(model(ids).logits[0, -1].argmax())
        changed = ids.clone()
        changed[0, :208] = (changed[0, :208] + 1) % 97
        assert first(False) == int(model(changed).logits[0, -1].argmax())
    assert first(True) != first(False)


def test_the_task_is_scored_by_kind_and_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def right(model: Any, ids: Any, asked: Any, config: Any, dense: bool) -> list[bool]:
        return [one.kind != "number" for one in asked]

    monkeypatch.setattr(code_lookup, "answers_right", right)
    store = Store(tmp_path / "store.json", {})
    found = run_code_lookup(None, Letters(), [source()], 1500, None, SampleSize(3, 8), store=store)
    assert (found.samples, found.score) == (24, 0.75)
    assert found.by_kind == {"signature": 1.0, "string": 1.0, "number": 0.0}
    assert found.by_context == (0.75, 0.75, 0.75)
    assert found.low < 0.75 < found.high
    monkeypatch.setattr(code_lookup, "answers_right", None)  # the store has the answers
    assert run_code_lookup(None, Letters(), [source()], 1500, size=SampleSize(3, 8), store=store) == found
    with pytest.raises(TypeError):  # not those of other sources
        run_code_lookup(None, Letters(), [source("s", b"v = 2\n")], 1500, size=SampleSize(3, 8), store=store)
    # differences between contexts widen the interval more than differences between questions
    alike = code_lookup._score(64, [[["string", 0.5, 1.0], ["string", 0.5, 0.0]]] * 8)
    apart = code_lookup._score(64, [[["string", 0.5, float(i % 2)]] * 2 for i in range(8)])
    assert alike.score == apart.score == 0.5
    assert apart.high - apart.low > 1.2 * (alike.high - alike.low)
    with pytest.raises(ValueError, match="needs source files: pass --sources FOLDER"):
        run_code_lookup(None, Letters(), [], 1500)


def test_a_window_attends_as_many_blocks() -> None:
    window = sliding_window(MobaConfig(16, 4, sink_blocks=1, gate="mass", decode="sparse"))
    assert (window.topk, window.local_blocks, window.sink_blocks, window.gate) == (4, 3, 0, "mean")
    assert window.decode == "sparse"


def test_losses_by_position() -> None:
    losses = torch.arange(1.0, 40.0)  # entry i belongs to token i + 1
    found = by_position(losses, first=8)
    assert [(begin, end) for begin, end, _ in found.ranges] == [(1, 8), (8, 16), (16, 32), (32, 40)]
    assert [loss for *_, loss in found.ranges] == [4.0, 11.5, 23.5, 35.5]
    assert by_position(losses[:3], first=8).ranges == ((1, 4, 2.0),)
