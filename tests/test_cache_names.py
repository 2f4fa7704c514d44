"""The cache argument under both its names, with every supported release of transformers."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_checks import tiny_model
from transformers import GenerationMixin, cache_utils

import moba_hf
from moba_hf import MobaCache
from moba_hf.hf.cache_names import CACHE_NAMES, cache_kwargs, cache_of

_PREPARE = "_prepare_cache_for_generation"


@pytest.fixture
def model() -> Any:
    return tiny_model()


class TestNames:
    def test_by_the_signature_of_what_is_called(self) -> None:
        """Remote code may use the old name with a new transformers; a wrapper keeps its signature."""

        def old(ids: Any, past_key_values: Any = None) -> None: ...

        def new(ids: Any, cache: Any = None) -> None: ...

        @functools.wraps(old)
        def wrapped(*args: Any, **kwargs: Any) -> None: ...

        marker: Any = object()
        assert cache_kwargs(old, marker) == {"past_key_values": marker}
        assert cache_kwargs(new, marker) == {"cache": marker}
        assert cache_kwargs(wrapped, marker) == {"past_key_values": marker}

    def test_a_signature_that_takes_anything(self, model: Any) -> None:
        """Then the name is that of a stock model's forward."""
        [name] = cache_kwargs(model, None)
        assert cache_kwargs(lambda **kwargs: None, None) == {name: None}
        assert cache_kwargs(model.generate, None) == {name: None}

    def test_calls_and_outputs_do_not_warn(self, model: Any, caplog: pytest.LogCaptureFixture) -> None:
        ids = torch.randint(1, 90, (1, 20))
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            cache = cache_of(model(ids, use_cache=True))
            assert cache is cache_of(model(ids[:, :1], **cache_kwargs(model, cache)))
            assert cache.get_seq_length() == 21
            settings = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
            mine = MobaCache(model.config)
            out = model.generate(ids, **cache_kwargs(model.generate, mine), **settings)
            assert cache_of(out) is mine
        assert "deprecated" not in caplog.text

    def test_of_outputs_of_remote_code(self) -> None:
        marker = object()
        for name in CACHE_NAMES:
            assert cache_of(SimpleNamespace(**{name: marker})) is marker


class TestPrefill:
    def test_takes_both_names(self, model: Any) -> None:
        ids = torch.randint(1, 90, (1, 20))
        for name in CACHE_NAMES:
            cache = MobaCache(model.config)
            assert moba_hf.prefill(model, ids, progress=False, **{name: cache}) is cache
            assert cache.get_seq_length() == 19

    def test_refuses_both_at_once(self, model: Any) -> None:
        both = dict.fromkeys(CACHE_NAMES, MobaCache(model.config))
        with pytest.raises(ValueError, match="two names of the same argument"):
            moba_hf.prefill(model, torch.ones(1, 20, dtype=torch.long), **both)

    @pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK"])
    def test_only_the_first_process_draws_a_bar(
        self, model: Any, variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ids = torch.randint(1, 90, (1, 20))
        for rank, drawn in (("1", False), ("0", True)):
            monkeypatch.setenv(variable, rank)
            moba_hf.prefill(model, ids)
            assert ("19/19" in capsys.readouterr().err) is drawn

    def test_an_initialised_group_says_which_process_is_first(
        self, model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
        moba_hf.prefill(model, torch.randint(1, 90, (1, 20)))
        assert capsys.readouterr().err == ""


class TestUseMobaCache:
    """If the private method that it wraps has changed, it raises and leaves everything as it was."""

    def test_without_the_method(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(GenerationMixin, _PREPARE)
        self._refused("no longer has _prepare_cache_for_generation")

    def test_with_other_arguments(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(GenerationMixin, _PREPARE, lambda self, generation_config, kwargs: None)
        self._refused("no longer takes max_cache_length, model_kwargs")

    @staticmethod
    def _refused(message: str) -> None:
        before = dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING)
        with pytest.raises(RuntimeError, match=rf"{message}; .* transformers 5\.17 to 5\.24"):
            moba_hf.use_moba_cache()
        assert before == cache_utils.DYNAMIC_LAYER_TYPE_MAPPING

    def test_with_a_cache_made_elsewhere(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def prepare(
            self: Any, generation_config: Any, model_kwargs: Any, mode: Any, size: int, max_cache_length: int
        ) -> None: ...

        monkeypatch.setattr(GenerationMixin, _PREPARE, prepare)
        ids = torch.randint(1, 90, (1, 20))
        with moba_hf.use_moba_cache(), pytest.raises(RuntimeError, match="cannot find the cache"):
            model.generate(ids, max_new_tokens=2)
        with moba_hf.use_moba_cache():  # without a cache nothing is checked
            model.generate(ids, max_new_tokens=2, use_cache=False)


def test_what_is_no_cache_and_no_token_is_refused(model: Any) -> None:
    ids = torch.randint(1, 90, (1, 5))
    for name in CACHE_NAMES:
        with pytest.raises(
            TypeError, match=r"cache must be a Cache .*, got 'dynamic': pass moba_hf.MobaCache"
        ):
            moba_hf.prefill(model, ids, **{name: "dynamic"})
    with pytest.raises(TypeError, match=r"dtype int64 or int32, got torch.float32"):
        moba_hf.prefill(model, ids.float())
