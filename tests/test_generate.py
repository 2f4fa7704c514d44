"""Generation with MobaCache compared with transformers' own caches, chunked prefill, sparse decode."""

import copy
import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from model_checks import tiny_model
from torch import Tensor
from transformers import DynamicCache, StaticCache

import moba_hf
from moba_hf import MobaCache, MobaConfig
from moba_hf.hf import attention
from moba_hf.hf.cache_names import cache_kwargs, cache_of
from moba_hf.hf.dynamic_layer import MobaLayer
from moba_hf.hf.prefill import _chunk_lengths
from moba_hf.hf.static_layer import MobaStaticLayer
from moba_hf.op.gates import block_mean

# Without a dense tail, a prefill equals one call of the model on the whole prompt.
prefill = partial(moba_hf.prefill, dense_tail=0)

SPARSE = MobaConfig(block_size=4, topk=3, decode="sparse")
RULES = {
    "full": MobaConfig(block_size=8, topk=2),
    "sparse": SPARSE,
    "mixed": MobaConfig(4, 3, sink_blocks=1, full_attention_layers=(-1,), layers={1: {"block_size": 6}}),
}
FAMILIES = ("llama", "mistral", "qwen3")
# every family and every rule, but not all pairs of them
PAIRS = [("llama", "full"), ("llama", "sparse"), ("mistral", "sparse"), ("qwen3", "mixed")]
NEW = 18  # new tokens, more than two blocks


def tiny(model_type: str = "llama", rule: MobaConfig = SPARSE, seed: int = 0, **values: Any) -> Any:
    """A model of two or three layers that never ends a text."""
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 512, "eos_token_id": None}
    return tiny_model(model_type, rule, seed=seed, **(sizes | values))


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, 96, shape, generator=torch.Generator().manual_seed(1))


def left_padded(ids: Tensor, *pads: int) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model: Any, cache: Any, seed: int = 7, **kwargs: Any) -> Tensor:
    """Tokens of `model.generate`, without the padding token, which generate would mask in the next turn."""
    torch.manual_seed(seed)
    settings = {"do_sample": False, "max_new_tokens": NEW, "suppress_tokens": [0]} | kwargs
    return model.generate(**cache_kwargs(model.generate, cache), **settings)


def caches(model: Any, length: int = 96) -> dict[str, Any]:
    """Caches to compare with a stock dynamic cache."""
    return {
        "moba": MobaCache(model.config),
        "reserved": MobaCache(model.config, max_cache_len=length),
        "static": MobaCache(model.config, static=True, max_cache_len=length),
        "stock static": StaticCache(config=model.config, max_cache_len=length),
    }


SITUATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "batch": {"input_ids": tokens(3, 41)},
    "left-padded": left_padded(tokens(3, 41), 17, 0, 3),
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"num_beams": 3},
    "beams, left-padded": {"num_beams": 2, **left_padded(tokens(2, 41), 13, 0)},
    "sampled sequences": {"do_sample": True, "num_return_sequences": 3},
    "beam sequences": {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
    "chunks": {"prefill_chunk_size": 13},
    "chunks, left-padded": {"prefill_chunk_size": 13, **left_padded(tokens(2, 41), 17, 0)},
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("family", "rule"), PAIRS)
def test_token_identical_to_stock_caches(family: str, rule: str, situation: str) -> None:
    model = tiny(family, RULES[rule])
    kwargs = {"input_ids": tokens(1, 41)} | SITUATIONS[situation]
    expected = generate(model, DynamicCache(config=model.config), **kwargs)
    for name, cache in caches(model).items():
        assert torch.equal(generate(model, cache, **kwargs), expected), name
    if situation == "greedy":
        assert len(set(expected[0, -NEW:].tolist())) > 3  # otherwise agreement would mean little


@pytest.mark.parametrize(("family", "rule"), PAIRS)
class TestAgainstStock:
    def test_prompt_lookup(self, family: str, rule: str) -> None:
        model, ids = tiny(family, RULES[rule], eos_token_id=96), tokens(1, 8).repeat(1, 5)
        kwargs = {"input_ids": ids, "prompt_lookup_num_tokens": 3}
        expected = generate(model, DynamicCache(config=model.config), **kwargs)
        assert torch.equal(generate(model, MobaCache(model.config), **kwargs), expected)

    def test_assistant_model(self, family: str, rule: str) -> None:
        model, helper = tiny(family, RULES[rule]), tiny(family, RULES[rule])
        with torch.no_grad():
            helper.lm_head.weight.add_(0.05 * torch.randn_like(helper.lm_head.weight))
        for one in (model, helper):
            one.generation_config.eos_token_id = 96
        kwargs = {"input_ids": tokens(1, 33), "assistant_model": helper}
        expected = generate(model, DynamicCache(config=model.config), **kwargs)
        with moba_hf.use_moba_cache():
            assert torch.equal(generate(model, None, **kwargs), expected)
        assert torch.equal(generate(model, MobaCache(model.config), **kwargs), expected)

    def test_turns_and_reset(self, family: str, rule: str) -> None:
        """A second turn on the first turn's cache, then another conversation after `reset`."""
        model = tiny(family, RULES[rule])
        stock, ours = DynamicCache(config=model.config), MobaCache(model.config)
        for ids in (tokens(2, 30), None):
            if ids is None:
                ids = torch.cat([expected, tokens(2, 11)], dim=1)  # noqa: F821
            expected = generate(model, stock, input_ids=ids)
            assert torch.equal(generate(model, ours, input_ids=ids), expected)
        ours.reset()
        kwargs = left_padded(tokens(3, 26), 9, 0, 1)
        expected = generate(model, DynamicCache(config=model.config), **kwargs)
        assert torch.equal(generate(model, ours, **kwargs), expected)

    def test_prefix_reuse(self, family: str, rule: str) -> None:
        """A document is read once and its cache copied for each question."""
        model, document = tiny(family, RULES[rule]), tokens(1, 37)
        ours = prefill(model, document, chunk_size=16, progress=False)
        stock = prefill(
            model, document, chunk_size=16, cache=DynamicCache(config=model.config), progress=False
        )
        for i in range(2):
            ids = torch.cat([document, tokens(1, 9 + i)], dim=1)
            copies = copy.deepcopy(stock), copy.deepcopy(ours)
            for cache in copies:  # the cache is closed; prefill of the question reopens it
                moba_hf.prefill(model, ids, cache=cache, progress=False, dense_tail=0)
            expected = generate(model, copies[0], input_ids=ids)
            assert torch.equal(generate(model, copies[1], input_ids=ids), expected)

    def test_by_default_after_opting_in(self, family: str, rule: str) -> None:
        model, ids = tiny(family, RULES[rule]), tokens(2, 41)
        for kwargs in ({}, {"cache_implementation": "static"}):
            expected = generate(model, None, input_ids=ids, **kwargs)
            with moba_hf.use_moba_cache():
                out = generate(model, None, input_ids=ids, return_dict_in_generate=True, **kwargs)
            assert torch.equal(out.sequences, expected)
            kind = MobaStaticLayer if kwargs else MobaLayer
            assert all(type(layer) is kind for layer in cache_of(out).layers)
            if not kwargs:
                assert cache_of(out).layers[0]._buffers[0].shape[2] in (41 + NEW - 1, 41 + NEW)


def test_hybrid_layers() -> None:
    """Window layers keep transformers' own cache next to ours, in chunks and beyond the window too."""
    model = tiny("qwen3", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    for kwargs in ({}, {"prefill_chunk_size": 12}, {"num_beams": 2}):
        expected = generate(model, DynamicCache(config=model.config), input_ids=tokens(2, 41), **kwargs)
        assert torch.equal(
            generate(model, MobaCache(model.config), input_ids=tokens(2, 41), **kwargs), expected
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pads", [(0, 0), (11, 0)])
@pytest.mark.parametrize("kind", ["moba", "static", "stock", "stock static"])
def test_sparse_decode_rows_equal_prefill_rows(family: str, pads: tuple[int, int], kind: str) -> None:
    """Feeding tokens one at a time gives the same logits as one call with all of them."""
    model, inputs = (
        tiny(family, SPARSE, num_attention_heads=6, hidden_size=48),
        left_padded(tokens(2, 60), *pads),
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = {"stock": DynamicCache(config=model.config), **caches(model)}[kind]
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        rows = []
        for begin, end in [(0, 20), *((i, i + 1) for i in range(20, 60))]:
            out = model(
                ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                **cache_kwargs(model, cache),
                use_cache=True,
            )
            rows.append(out.logits)
    error = (torch.cat(rows, dim=1) - expected)[mask.bool()].abs().max()
    assert error < 2e-4 * expected.abs().max()


def test_sparse_decode_without_our_cache_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    type(attention.logger).warning_once.cache_clear()
    monkeypatch.setattr(attention.logger, "warning", said.append)
    model = tiny()
    generate(model, MobaCache(model.config), input_ids=tokens(1, 30))
    assert said == []
    for length in (30, 31):
        generate(model, DynamicCache(config=model.config), input_ids=tokens(1, length))
    assert len(said) == 1
    assert "MobaCache(model.config)" in said[0]


def test_sparse_decode_of_a_shared_choice_without_our_cache_says_that_tokens_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    type(attention.logger).warning_once.cache_clear()
    monkeypatch.setattr(attention.logger, "warning", said.append)
    model = tiny(rule=MobaConfig(4, tile=8, threshold=0.3, gate="mass", decode="sparse"))
    generate(model, MobaCache(model.config), input_ids=tokens(1, 30))
    assert said == []
    generate(model, DynamicCache(config=model.config), input_ids=tokens(1, 30))
    assert len(said) == 1
    assert "tokens differ from those with a MobaCache" in said[0]


class TestPrefill:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("pads", [(0, 0), (14, 2)])
    @pytest.mark.parametrize("chunk_size", [5, 16, 100])
    def test_equals_one_call(self, family: str, pads: tuple[int, int], chunk_size: int) -> None:
        """The same keys, values and means in every layer, then the same tokens."""
        model, inputs = tiny(family), left_padded(tokens(2, 50), *pads)
        sizes = (chunk_size, 100)
        caches = [prefill(model, **inputs, chunk_size=size, progress=False) for size in sizes]
        real = inputs["attention_mask"].bool()[:, :-1]
        for ours, one in zip(caches[0].layers, caches[1].layers, strict=True):
            assert ours.get_seq_length() == 49
            for name in ("keys", "values"):
                got, expected = (getattr(x, name).transpose(1, 2)[real] for x in (ours, one))
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            if chunk_size < 49:  # the last chunk used the means of the others
                assert ours.block_means.behind == 0
                for row, start in enumerate(pads):
                    expected = block_mean(ours.keys[row, :, start:], 4)
                    got = ours.block_means.means[row, :, : expected.shape[1]]
                    torch.testing.assert_close(got, expected)
        expected = generate(model, None, **inputs)
        assert torch.equal(generate(model, caches[0], **inputs), expected)

    def test_goes_on_where_a_cache_ends(self) -> None:
        model, ids = tiny(), tokens(1, 60)
        cache = prefill(model, ids[:, :25], chunk_size=10, progress=False)
        prefill(model, ids, chunk_size=10, cache=cache, progress=False)
        assert cache.get_seq_length() == 59
        expected = generate(model, None, input_ids=ids)
        assert torch.equal(generate(model, cache, input_ids=ids), expected)

    @pytest.mark.parametrize("static", [False, True])
    def test_a_repeated_cache_serves_beams(self, static: bool) -> None:
        """The prompt is read once and the cache repeated, as the error about other shapes advises."""
        model, ids = tiny(), tokens(1, 40)
        cache = MobaCache(model.config, static=static, max_cache_len=80)
        prefill(model, ids, chunk_size=16, cache=cache, progress=False)
        with pytest.raises(ValueError, match="batch_repeat_interleave"):
            generate(model, copy.deepcopy(cache), input_ids=ids, num_beams=3)
        cache.batch_repeat_interleave(3)
        expected = generate(model, None, input_ids=ids, num_beams=3)
        assert torch.equal(generate(model, cache, input_ids=ids, num_beams=3), expected)

    @pytest.mark.parametrize("kind", ["moba", "stock"])
    def test_a_static_cache_with_too_few_slots_is_refused(self, kind: str) -> None:
        model, ids = tiny(), tokens(1, 50)
        for slots in (49, 50):
            cache = StaticCache(config=model.config, max_cache_len=slots)
            if kind == "moba":
                cache = MobaCache(model.config, static=True, max_cache_len=slots)
            if slots == 49:
                with pytest.raises(ValueError, match="has 49 slots, but the prompt has 50 tokens"):
                    prefill(model, ids, 16, cache=cache, progress=False)
            else:
                prefill(model, ids, 16, cache=cache, progress=False)
            assert int(cache.get_seq_length()) == (0 if slots == 49 else 49)

    def test_what_the_model_is_given_lies_on_its_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A tokenizer returns CPU tensors, whatever the model's device."""
        model, seen = tiny(), []
        monkeypatch.setattr(type(model), "device", torch.device("meta"))

        def record(self: Any, logits_to_keep: int = 0, use_cache: bool = True, **given: Any) -> None:
            given.pop("cache" if "cache" in given else "past_key_values")
            seen.append({name: x.device.type for name, x in given.items()})

        monkeypatch.setattr(type(model), "forward", record)
        prefill(model, **left_padded(tokens(2, 50), 14, 2), chunk_size=30, progress=False)
        on_it = dict.fromkeys(("input_ids", "attention_mask", "position_ids"), "meta")
        assert seen == [on_it, on_it]

    def test_static_cache(self) -> None:
        model, ids = tiny(), tokens(1, 50)
        cache = MobaCache(model.config, static=True, max_cache_len=96)
        prefill(model, ids, chunk_size=16, cache=cache, progress=False)
        expected = generate(model, None, input_ids=ids)
        assert torch.equal(generate(model, cache, input_ids=ids), expected)

    @pytest.mark.parametrize("shortest", [2, 5])
    def test_chunks(self, shortest: int) -> None:
        """Chunks cover all tokens, never exceed the chunk size, and never count as decoding."""
        for total in range(90):
            for size in range(2 * shortest - 1, 30):
                for empty in (True, False):
                    chunks = _chunk_lengths(total, size, shortest, empty=empty)
                    if total < shortest:
                        assert chunks == ([total] if empty and total else [])
                    else:
                        assert sum(chunks) == total
                        assert all(shortest <= count <= size for count in chunks)

    def test_shows_its_progress(self, capsys: pytest.CaptureFixture[str]) -> None:
        model, ids = tiny(), tokens(1, 30)
        prefill(model, ids, chunk_size=10)
        assert "29/29" in capsys.readouterr().err
        prefill(model, ids, chunk_size=10, progress=False)
        assert capsys.readouterr().err == ""

    def test_memory_of_logits_is_one_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, seen = tiny(), []
        monkeypatch.setattr(
            model.lm_head, "forward", lambda x: seen.append(x.shape[1]) or x[..., :1], raising=True
        )
        prefill(model, tokens(1, 30), chunk_size=10, progress=False)
        assert seen == [1, 1, 1]

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"input_ids": tokens(5)}, "must be \\(batch, length\\)"),
            ({"attention_mask": torch.ones(1, 7)}, "attention_mask must be"),
            ({"chunk_size": 2}, "chunk_size=2 is too small"),
        ],
    )
    def test_bad_input(self, kwargs: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            prefill(tiny(), **({"input_ids": tokens(1, 30), "progress": False} | kwargs))

    @pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
    def test_a_list_is_refused(self, name: str) -> None:
        given: dict = {"input_ids": tokens(1, 30), "attention_mask": torch.ones(1, 30)}
        with pytest.raises(
            TypeError, match=rf"{name} must be a torch tensor, got list: pass torch.as_tensor"
        ):
            prefill(tiny(), **{**given, name: given[name].tolist()}, progress=False)

    def test_a_full_cache_is_refused(self) -> None:
        model, ids = tiny(), tokens(1, 30)
        cache = MobaCache(model.config)
        with torch.no_grad():
            model(ids, **cache_kwargs(model, cache))
        with pytest.raises(ValueError, match="already contains 30 tokens and the prompt has 30"):
            prefill(model, ids, cache=cache, progress=False)


@pytest.mark.parametrize("kwargs", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny(seed=1)}])
def test_assistance_on_a_filled_cache_raises(kwargs: dict) -> None:
    """Filled by something other than `prefill`, or by more than one `prefill`."""
    model, ids = tiny(eos_token_id=96), tokens(1, 40)
    for twice in (False, True):
        cache = MobaCache(model.config)
        with torch.no_grad():
            model(ids[:, :39] if not twice else ids[:, :20], **cache_kwargs(model, cache))
        if twice:
            prefill(model, ids, cache=cache, progress=False)
        # older releases of transformers give the call a mask that is too short, which is seen first
        told = "the whole prompt to the 39 tokens already in this cache|the cache has 39 tokens and the call"
        with pytest.raises(ValueError, match=told):
            generate(model, cache, input_ids=ids, **kwargs)
    cache.reset()
    expected = generate(model, DynamicCache(config=model.config), input_ids=ids, **kwargs)
    assert torch.equal(generate(model, cache, input_ids=ids, **kwargs), expected)


@pytest.mark.parametrize("kwargs", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny(seed=1)}])
def test_assistance_on_a_static_cache_raises(kwargs: dict) -> None:
    model, ids = tiny(eos_token_id=96), tokens(1, 40)
    with pytest.raises(ValueError, match="need a dynamic cache, but this one is static"):
        generate(model, MobaCache(model.config, static=True, max_cache_len=96), input_ids=ids, **kwargs)


def test_sparse_steps_that_read_every_key_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    type(attention.logger).warning_once.cache_clear()
    monkeypatch.setattr(attention.logger, "warning", said.append)
    by_mass = MobaConfig(4, 3, decode="sparse", gate="mass")
    model = tiny(rule=by_mass)
    generate(model, MobaCache(model.config), input_ids=tokens(1, 30))
    assert said == []
    moba_hf.patch_model(model, dataclasses.replace(by_mass, backend="reference"))
    generate(model, MobaCache(model.config), input_ids=tokens(1, 30))
    assert len(said) == 1
    assert 'reads all cached keys at every step to score their blocks, because backend "reference"' in said[0]
    generate(tiny(rule=MobaConfig(4, 3, gate="mass")), None, input_ids=tokens(1, 31))  # dense steps
    assert len(said) == 1
