"""Generation on a GPU: compiled steps in CUDA graphs, offloaded caches, long sparse decode."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from test_compile import FULL, SHARED, SPARSE, padded, tiny, tokens
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache

import moba_hf
from moba_hf import MobaCache, MobaConfig
from moba_hf.hf.cache_names import cache_kwargs

pytestmark = pytest.mark.gpu

prefill = partial(moba_hf.prefill, dense_tail=0)

RULES = {"sparse": SPARSE, "full": FULL, "shared": SHARED}
BF16_RULES = {"sparse": MobaConfig(16, 3, decode="sparse"), "full": MobaConfig(16, 3)}
SHARED_STEPS = MobaConfig(16, gate="mass", tile=32, threshold=0.2, sample=2, decode="sparse")


@pytest.fixture(autouse=True)
def clean_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def generate(model: Any, cache: Any, **kwargs: Any) -> torch.Tensor:
    settings = {"do_sample": False, "max_new_tokens": 64, "suppress_tokens": [0]} | kwargs
    return model.generate(**cache_kwargs(model.generate, cache), **settings)


def static(model: Any) -> MobaCache:
    return MobaCache(model.config, static=True, max_cache_len=128)


@pytest.mark.parametrize("rule", RULES)
def test_what_generate_compiles_equals_eager(rule: str) -> None:
    """fp32, transformers' own setting (reduce-overhead, CUDA graphs), tokens of a left-padded batch.

    In the first layer, keys of equal tokens have equal norms, so rounding decides which one is the smallest
    key of a block. A graph rounds differently, so under the shared choice no token occurs twice.
    """
    model, ids = tiny(RULES[rule]).cuda(), tokens(2, 50).cuda()
    kwargs = {"input_ids": ids, "attention_mask": padded(ids)}
    if rule == "shared":
        kwargs |= {"no_repeat_ngram_size": 1, "max_new_tokens": 40}
    expected = generate(model, MobaCache(model.config), **kwargs)
    if rule != "shared":  # with a stock cache its steps hear no earlier rows
        assert torch.equal(generate(model, DynamicCache(config=model.config), **kwargs), expected)
    assert torch.equal(generate(model, static(model), disable_compile=True, **kwargs), expected)
    settings = CompileConfig(fullgraph=True)
    for _ in range(2):
        assert torch.equal(generate(model, static(model), compile_config=settings, **kwargs), expected)
    assert not counters["graph_break"]
    assert not counters["inductor"]["cudagraph_skips"]
    assert len(set(expected[0, 50:].tolist())) > 3


def greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any, graph: bool) -> torch.Tensor:
    """64 greedy tokens with a static cache, each step run eagerly or replayed from a captured graph."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions, **cache_kwargs(model, cache)).logits
    token = logits[:, -1:].argmax(2)
    given = torch.nn.functional.pad(mask, (0, 128 - mask.shape[1]), value=1)
    position = positions[:, -1:] + 1

    def step() -> None:
        out = model(token, attention_mask=given, position_ids=position, **cache_kwargs(model, cache))
        token.copy_(out.logits.argmax(2))
        position.add_(1)

    run: Any = step
    if graph:
        state = [token, position, *(layer.cumulative_length for layer in cache.layers)]
        before = [x.clone() for x in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        for x, value in zip(state, before, strict=True):  # the same tokens are decoded again
            x.copy_(value)
        run = captured.replay
    found = [token.clone()]
    for _ in range(63):
        run()
        found += [token.clone()]
    return torch.cat(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("rule", [*BF16_RULES.values(), SHARED_STEPS], ids=[*BF16_RULES, "shared"])
def test_triton_steps_in_a_graph_equal_eager(rule: MobaConfig) -> None:
    """bf16, 64 tokens of a left-padded batch: replaying one graph gives the same tokens."""
    model, ids = tiny(rule).cuda().bfloat16(), tokens(2, 50).cuda()
    mask = padded(ids)
    runs = [greedy(model, ids, mask, static(model), graph) for graph in (False, True)]
    assert torch.equal(*runs)
    assert len(set(runs[0][0].tolist())) > 3


@torch.no_grad()
def test_a_static_cache_writes_what_a_dynamic_one_does() -> None:
    """bf16, eager steps of one and several tokens with the kernel; layer 0 gets identical inputs."""
    model, ids = tiny(BF16_RULES["sparse"]).cuda().bfloat16(), tokens(2, 90).cuda()
    caches = [MobaCache(model.config), static(model)]
    for begin, end in ((0, 50), *((i, i + 1) for i in range(50, 80)), (80, 84), (84, 90)):
        for cache in caches:
            model(ids[:, begin:end], **cache_kwargs(model, cache))
        written = int(caches[1].layers[0].cumulative_length)
        assert written == end == caches[0].get_seq_length()
    for name in ("keys", "values"):
        dynamic, buffer = (getattr(cache.layers[0], name) for cache in caches)
        assert torch.equal(buffer[:, :, :90], dynamic)
        assert not buffer[:, :, 90:].any()


def test_triton_steps_under_reduce_overhead() -> None:
    """bf16 with fusion: over 40 steps with the same tokens, logits equal eager ones up to rounding."""
    model, ids = tiny(BF16_RULES["sparse"]).cuda().bfloat16(), tokens(1, 90).cuda()
    logits = []
    for mode in (None, "reduce-overhead"):
        cache = static(model)
        run = model if mode is None else torch.compile(model, mode=mode, fullgraph=True)
        with torch.no_grad():
            model(ids[:, :50], **cache_kwargs(model, cache))
            steps = (
                run(ids[:, i : i + 1], **cache_kwargs(model, cache)).logits[:, -1] for i in range(50, 90)
            )
            logits.append(torch.stack([row.float().clone() for row in steps]))
    error = (logits[0] - logits[1]).abs().amax((1, 2)) / logits[0].abs().amax()
    assert error.median() < 2**-6  # different rounding may change a step's choice
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", BF16_RULES)
def test_offloading(rule: str, dtype: torch.dtype) -> None:
    """Offloading layers to the CPU gives the same tokens; only layers in use are on the GPU."""
    model, ids = tiny(BF16_RULES[rule]).cuda().to(dtype), tokens(2, 50).cuda()
    for kwargs in ({"attention_mask": padded(ids)}, {"num_beams": 2}, {"prefill_chunk_size": 20}):
        kept, away = MobaCache(model.config), MobaCache(model.config, offloading=True)
        expected = generate(model, kept, input_ids=ids, **kwargs)
        assert torch.equal(generate(model, away, input_ids=ids, **kwargs), expected)
        assert any(layer.keys.device.type == "cpu" for layer in away.layers)
    cache = prefill(model, ids, 20, cache=MobaCache(model.config, offloading=True), progress=False)
    expected = generate(model, prefill(model, ids, 20, progress=False), input_ids=ids)
    assert torch.equal(generate(model, cache, input_ids=ids), expected)


def test_sparse_decode_rows_equal_prefill_rows() -> None:
    """bf16 on Triton: decode steps and one call use different matmul shapes, so keys and choices may differ.
    Most rows must still agree within bf16 rounding."""
    rule = MobaConfig(16, 4, decode="sparse")
    model, ids = tiny(rule).cuda().bfloat16(), tokens(1, 250).cuda()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[0, 200:].float()
        cache = MobaCache(model.config)
        model(ids[:, :200], **cache_kwargs(model, cache))
        given = cache_kwargs(model, cache)
        steps = [model(ids[:, i : i + 1], **given).logits[0, -1] for i in range(200, 250)]
    error = (torch.stack(steps).float() - expected).abs().amax(1) / expected.abs().amax()
    assert error.median() < 2**-5


@torch.no_grad()
def test_a_long_prompt_with_a_mask_compiles() -> None:
    """Reductions over 8,208 slots are split; all of them must then have the same length."""
    model, ids = tiny(FULL).cuda(), tokens(1, 8208).cuda()
    mask = torch.ones_like(ids)
    got = torch.compile(model, dynamic=False)(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    expected = model(ids, use_cache=False, logits_to_keep=1)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-3, atol=1e-3)
