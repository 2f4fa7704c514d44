"""Sparse decode steps of a shared choice hear the earlier rows of their tile, through all that caches do."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from moba_hf import MobaCache, MobaConfig, prefill
from moba_hf.hf import recent_queries
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.hf.recent_queries import MOST_REMOVED, FixedQueries, RecentQueries
from moba_hf.hf.saved_cache import read_with_saved_cache
from moba_hf.op.shared_reference import shared_steps_ref
from tests.model_checks import Call, captured, close, logits, tiny_model, tokens, with_rule

SHARED = MobaConfig(8, gate="mass", tile=16, threshold=0.2, sample=2, decode="sparse")
SLOTS = 160  # of static caches

kinds = pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])


class Text:
    """A cache beside the queries of all of its rows, from which each step is computed by the reference.

    Attributes:
        known: slot of the first row that steps may hear.
        alone: rows that would have attended to other keys without earlier rows.
    """

    def __init__(self, model: Any, starts: list[int], length: int, static: bool = False):
        self.model, self.starts, self.layers = model, starts, model.config.num_hidden_layers
        self.cache: Any = MobaCache(model.config, static=static, max_cache_len=SLOTS if static else None)
        self.ids = tokens(len(starts), length)
        self.mask = torch.ones(len(starts), length, dtype=torch.long)
        for row, start in enumerate(starts):
            self.mask[row, :start] = 0
        self.queries: list[Tensor] = []
        self.known = self.alone = 0

    def read(self, count: int, dense_tail: int = 0) -> None:
        """Reads the prompt, the first `count` tokens, by `prefill`."""
        with captured() as calls:
            ids, mask = self.ids[:, : count + 1], self.mask[:, : count + 1]
            prefill(self.model, ids, 32, mask, self.cache, progress=False, dense_tail=dense_tail)
        self._record(calls)

    def step(self, count: int = 1) -> None:
        """Reads `count` tokens in one call and compares every layer with the reference."""
        begin = int(self.cache.get_seq_length())
        with captured() as calls:
            ids, mask = self.ids[:, begin : begin + count], self.mask[:, : begin + count]
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, begin:]
            settings = {"attention_mask": mask, "position_ids": positions}
            logits(self.model, ids, **settings, **cache_kwargs(self.model, self.cache))
        self._record(calls)
        for call in calls:
            self._compare(call, count)

    def _record(self, calls: list[Call]) -> None:
        rows = [torch.cat([c.query for c in calls if c.layer_idx == i], 2) for i in range(self.layers)]
        held = self.queries or [x[:, :, :0] for x in rows]
        self.queries = [torch.cat(pair, 2) for pair in zip(held, rows, strict=True)]

    def _compare(self, call: Call, count: int) -> None:
        rule, query = SHARED.for_layer(call.layer_idx, self.layers), self.queries[call.layer_idx]
        for row, start in enumerate(self.starts):
            first = max(start, self.known)
            parts = [
                x[row, :, at : query.shape[2]].transpose(0, 1)
                for x, at in ((query, first), (call.key, start), (call.value, start))
            ]
            heard = query.shape[2] - first - count
            assert close(call.out[row], shared_steps_ref(*parts, rule, call.scaling, heard)[0])
            last = (parts[0][-1:], *parts[1:])
            self.alone += not close(call.out[row, -1:], shared_steps_ref(*last, rule, call.scaling)[0])

    def crop(self, count: int) -> None:
        self.cache.crop(-count)
        self.queries = [x[:, :, :-count] for x in self.queries]

    def select(self, rows: list[int]) -> None:
        """Keeps these rows; the cache must have been changed already."""
        self.queries = [x[rows] for x in self.queries]
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        self.starts = [self.starts[row] for row in rows]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(moba=SHARED, num_hidden_layers=2)


@kinds
@pytest.mark.parametrize("prompt", [64, 69, 79])
@pytest.mark.parametrize("tail", [0, 20])
def test_steps_equal_the_causal_reading_over_several_tiles(
    model: Any, prompt: int, tail: int, static: bool
) -> None:
    text = Text(model, [0, 0], 110, static)
    text.read(prompt, tail)
    for _ in range(110 - prompt):
        text.step()
    assert text.alone > 50


@kinds
def test_calls_of_several_rows_and_padded_rows(model: Any, static: bool) -> None:
    text = Text(model, [0, 5, 27], 130, static)
    text.read(71)
    for count in (1, 5, 1, 1, 20, 3, 17, 1, 9):
        text.step(count)
    assert text.alone > 20


@kinds
def test_cropped_rows_are_not_heard_and_others_are(model: Any, static: bool) -> None:
    text = Text(model, [0, 3], 130, static)
    text.read(70)
    for _ in range(10):
        text.step()
    text.crop(9)
    text.step()
    for read, removed in ((6, 4), (5, 5), (20, 19), (1, 1), (12, 3), (9, 2)):
        text.step(read)
        text.crop(removed)
        text.ids = text.ids.roll(1, 1)  # other tokens follow
        text.step()
    assert text.alone > 5


def test_rows_follow_the_batch(model: Any) -> None:
    text = Text(model, [0, 5], 110)
    text.read(69)
    text.step(3)
    text.cache.batch_repeat_interleave(2)
    text.select([0, 0, 1, 1])
    text.ids = text.ids + torch.arange(4)[:, None] % 2  # the copies go on differently
    text.step()
    text.step(2)
    text.cache.reorder_cache(torch.tensor([3, 1, 1, 0]))
    text.select([3, 1, 1, 0])
    text.step(2)
    text.cache.batch_select_indices(torch.tensor([2, 0]))
    text.select([2, 0])
    text.step()
    text.cache, other = copy.deepcopy(text.cache), text.cache
    other.reset()
    text.step(20)
    assert text.alone > 5


def test_rows_of_a_static_cache_follow_beams_and_copies(model: Any) -> None:
    text = Text(model, [0, 5, 7], 110, static=True)
    text.read(69)
    text.step(3)
    text.cache.reorder_cache(torch.tensor([2, 0, 0]))
    text.select([2, 0, 0])
    text.ids = text.ids + torch.arange(3)[:, None] % 2  # the copies go on differently
    text.step()
    text.cache.batch_repeat_interleave(2)
    text.select([0, 0, 1, 1, 2, 2])
    text.ids = text.ids + torch.arange(6)[:, None] % 2
    text.step()
    text.cache.batch_select_indices(torch.tensor([5, 0, 3]))
    text.select([5, 0, 3])
    text.step()
    text.cache, other = copy.deepcopy(text.cache), text.cache
    other.reset()
    text.step(4)
    assert text.alone > 5


@kinds
def test_a_cache_that_was_reset_hears_nothing_of_the_last_text(model: Any, static: bool) -> None:
    text = Text(model, [0, 5], 110, static)
    for prompt in (85, 69):
        text.read(prompt)
        text.step(3)
        text.step()
        text.cache.reset()
        text.queries = []
    text.read(6)  # fewer rows than a tile has
    for _ in range(20):
        text.step()


@kinds
def test_rows_between_that_were_not_recorded_end_what_is_known(model: Any, static: bool) -> None:
    text = Text(model, [0], 110, static)
    text.read(67)
    with_rule(model, dataclasses.replace(SHARED, decode="full"))
    at = text.ids[:, 67:70]
    with captured() as calls:
        logits(model, at, **cache_kwargs(model, text.cache))
    text._record(calls)
    with_rule(model, SHARED)
    text.known = 70
    text.step()
    text.step(2)
    text.crop(6)  # only queries from slot 70 on were left
    text.known = 67
    text.step(4)
    text.step(14)


@kinds
def test_rows_that_a_long_crop_removed_are_not_known(model: Any, static: bool) -> None:
    text = Text(model, [0, 3], 150, static)
    text.read(60)
    text.step(78)
    text.crop(70)  # to 68
    text.known = 138 - (15 + MOST_REMOVED)
    for _ in range(3):
        text.step()
    text.crop(2)
    text.step(15)
    assert text.alone > 5


def test_compiled_steps_that_hear_nothing_say_so_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    type(recent_queries.logger).warning_once.cache_clear()
    monkeypatch.setattr(recent_queries.logger, "warning", said.append)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    text = Text(model, [0], 150, static=True)
    text.read(140)
    caches = [text.cache, copy.deepcopy(text.cache)]

    def steps(count: int, *runs: Any) -> list[Tensor]:
        begin = int(caches[0].get_seq_length())
        ids = [text.ids[:, at : at + 1] for at in range(begin, begin + count)]
        return [
            torch.cat([logits(run, one, **cache_kwargs(model, cache)) for one in ids])
            for run, cache in zip(runs, caches, strict=False)
        ]

    assert close(*steps(3, compiled, model))
    assert not said
    for cache in caches:
        cache.crop(-70)  # an eager step still knows the rows that are left, a graph none
    alone = steps(4, compiled, model)
    assert not close(*alone)
    assert len(said) == 1
    assert "run `tile` - 1 steps without torch.compile" in said[0]
    steps(SHARED.tile - 1, model)
    caches[1] = copy.deepcopy(caches[0])  # the keys of the steps above differ
    assert close(*steps(4, compiled, model))
    assert len(said) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "moba", [dataclasses.replace(SHARED, decode="full"), MobaConfig(4, 3, decode="sparse")]
)
def test_other_rules_keep_no_queries(moba: MobaConfig) -> None:
    other, ids = tiny_model(moba=moba), tokens(1, 70)
    cache = prefill(other, ids, progress=False)
    logits(other, ids[:, -1:], **cache_kwargs(other, cache))
    static = MobaCache(other.config, static=True, max_cache_len=80)
    for at in (slice(0, 69), slice(69, 70), slice(0, 1)):
        logits(other, ids[:, at], **cache_kwargs(other, static))
    assert all(layer.recent.queries is None for layer in (*cache.layers, *static.layers))


def test_a_stock_cache_knows_no_earlier_rows(model: Any) -> None:
    text = Text(model, [0], 90)
    text.cache = DynamicCache(config=model.config)
    text.read(70)
    for _ in range(12):
        text.known = text.cache.get_seq_length()
        text.step()


def test_few_queries_are_kept() -> None:
    recent, like = RecentQueries(), torch.randn(1, 2, 1000, 4)
    recent.record(like, 0, tile=16)
    assert recent.queries.shape[2] == 15 + MOST_REMOVED
    assert recent.queries.untyped_storage().nbytes() < like.untyped_storage().nbytes()
    recent.record(like[:, :, :1], 1000, tile=16)
    assert recent.queries.shape[2] == 15 + MOST_REMOVED
    assert torch.equal(recent.before(1001, like, 16), torch.cat([like[:, :, 986:], like[:, :, :1]], 2))
    known = 1001 - 15 - MOST_REMOVED
    recent.cropped(known + 5)
    assert torch.equal(recent.before(known + 5, like, 16), like[:, :, known : known + 5])
    assert recent.before(known + 6, like, 16) is None
    assert recent.before(known + 5, like.double(), 16) is None
    recent.cropped(known)
    assert recent.before(known, like, 16) is None


@kinds
def test_a_positive_crop_is_refused(model: Any, static: bool) -> None:
    text = Text(model, [0], 40, static)
    text.read(20)
    with pytest.raises(ValueError, match="as a negative number, got 3"):
        text.cache.crop(3)
    text.cache.crop(-25)
    assert text.cache.get_seq_length() == 0


def test_a_static_layer_keeps_its_queries_in_one_place() -> None:
    recent, like, slot = FixedQueries(), torch.randn(1, 2, 1000, 4), torch.tensor(0)
    assert recent.follow(like[:, :, :900], slot, tile=16) is None
    place = recent.queries.data_ptr()
    slot += 900
    while slot < 1000:
        at = int(slot)
        for _ in range(2):  # a call may be repeated
            before = recent.follow(like[:, :, at : at + 3], slot, tile=16)
            assert torch.equal(before, like[:, :, at - 15 : at])
        slot += 3
        if at % 7 == 0:
            recent.cropped(2)
            slot -= 2
    recent.reset()
    assert not recent.follow(like, slot * 0, tile=16).any()
    assert recent.queries.data_ptr() == place
    assert recent.follow(like.double(), slot, tile=16) is None


def test_a_saved_cache_goes_on_like_the_one_that_was_saved(model: Any, tmp_path: Path) -> None:
    ids = tokens(1, 90)
    made = []
    for _ in range(2):
        cache, reused = read_with_saved_cache(
            model, ids[:, :70], tmp_path / "text", chunk_size=32, progress=False
        )
        made.append(
            [logits(model, ids[:, at : at + 1], **cache_kwargs(model, cache)) for at in range(70, 90)]
        )
    assert reused == 70
    assert close(torch.cat(made[0]), torch.cat(made[1]))
