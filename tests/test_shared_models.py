"""The shared choice as a setting: config, layers, caches, `inspect`, the operator's keywords."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moba_hf import MobaCache, MobaConfig, moba_attention, prefill, select_blocks
from moba_hf.checkpoints.inspection import describe, inspect_config
from moba_hf.config import LayerConfig, make_rule
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.hf.prefill import DENSE_TAIL, _chunks, logger, tail_begin
from moba_hf.op.shared import tile_bound, unpack_blocks
from moba_hf.op.shared_reference import select_shared_ref, shared_attention_ref, shared_steps_ref
from moba_hf.op.shared_rule import SharedRule
from tests.moba_cases import cumulative
from tests.model_checks import (
    Call,
    captured,
    close,
    logits,
    padded,
    sdpa_logits,
    tiny_model,
    tokens,
    with_rule,
)

SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "tile": 16,
    "threshold": 0.5,
    "gate": "mass",
    "sink_blocks": 1,
    "local_blocks": 1,
    "sample": 4,
    "dense_below": 32,
}
SHARED = MobaConfig(**SETTINGS)


def _by_hand(call: Call, rule: SharedRule, start: int, end: int, row: int = 0) -> tuple[slice, Tensor]:
    """The real queries of one row, and the reference's output for them."""
    offset = call.key.shape[2] - call.query.shape[2]
    at = slice(max(start - offset, 0), end - offset)
    query = call.query[row, :, at].transpose(0, 1)
    key, value = (x[row, :, start:end].transpose(0, 1) for x in (call.key, call.value))
    return at, shared_attention_ref(query, key, value, rule, call.scaling)[0]


def test_every_layer_computes_the_rule() -> None:
    model = tiny_model(moba=SHARED)
    with captured() as calls:
        shared = logits(model, tokens(2, 90))
    assert len(calls) == 3
    for call in calls:
        for row in range(2):
            at, expected = _by_hand(call, SHARED.for_layer(0, 3), 0, 90, row)
            assert close(call.out[row, at], expected)
    assert not close(shared, sdpa_logits(model, tokens(2, 90)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_computes_the_rule_for_each_row(side) -> None:
    model = tiny_model(moba=SHARED)
    rows = [tokens(90), tokens(61), tokens(75)]
    ids, mask = padded(rows, side)
    with captured() as calls:
        logits(model, ids, attention_mask=mask)
    for call in calls:
        for row, one in enumerate(rows):
            start = 90 - len(one) if side == "left" else 0
            at, expected = _by_hand(call, SHARED.for_layer(0, 3), start, start + len(one), row)
            assert close(call.out[row, at], expected)
            assert not call.out[row].index_select(0, _outside(at, 90)).any()


def _outside(at: slice, length: int) -> Tensor:
    return torch.tensor([i for i in range(length) if not at.start <= i < at.stop], dtype=torch.long)


def test_layers_may_differ() -> None:
    moba = MobaConfig(**SETTINGS, layers={0: {"tile": 1, "topk": 5}, -1: {"threshold": 0.9}})
    assert moba.for_layer(0, 3) == LayerConfig(8, 5, 1, 1, "mass")
    assert moba.for_layer(1, 3) == SharedRule(
        8, 16, 0.5, sink_blocks=1, local_blocks=1, sample=4, dense_below=32
    )
    assert moba.for_layer(2, 3) == SharedRule(
        8, 16, 0.9, sink_blocks=1, local_blocks=1, sample=4, dense_below=32
    )
    mixed = MobaConfig(8, 5, layers={1: {**SETTINGS}})
    assert mixed.for_layer(0, 3) == LayerConfig(8, 5)
    assert mixed.for_layer(1, 3) == SharedRule(
        8, 16, 0.5, topk=5, sink_blocks=1, local_blocks=1, sample=4, dense_below=32
    )
    for config in (moba, mixed, SHARED):
        assert MobaConfig.from_dict(config.to_dict()) == config
    assert "tile" not in MobaConfig(8, 5).to_dict()


def test_a_saved_model_reloads_to_the_same_logits(tmp_path) -> None:
    model = tiny_model(moba=SHARED)
    before = logits(model, tokens(1, 90))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba")
    assert torch.equal(logits(again, tokens(1, 90)), before)


def test_a_prompt_below_dense_below_is_the_stock_attention() -> None:
    model = tiny_model(moba=SHARED)
    ids = tokens(1, 32)
    assert torch.equal(logits(model, ids), sdpa_logits(model, ids))
    longer = tokens(1, 90)
    first = logits(model, longer)[:, :32]
    assert close(first, sdpa_logits(model, longer)[:, :32])


def test_chunks_of_whole_tiles_equal_one_call() -> None:
    model = tiny_model(moba=SHARED)
    ids = tokens(1, 96)
    whole = logits(model, ids)
    for static in (False, True):
        cache = MobaCache(model.config, max_cache_len=128, static=static)
        parts = [logits(model, ids[:, a : a + 32], **cache_kwargs(model, cache)) for a in range(0, 96, 32)]
        assert close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("decode", ["full", "sparse"])
@pytest.mark.parametrize("static", [False, True])
def test_decode_steps_follow_their_setting(decode, static) -> None:
    model = with_rule(tiny_model(), MobaConfig(**SETTINGS, decode=decode))
    ids = tokens(2, 90)
    cache = MobaCache(model.config, max_cache_len=128, static=static)
    with captured() as calls:
        prefill(model, ids[:, :71], cache=cache, dense_tail=0, progress=False)
        for at in range(70, 90):
            logits(model, ids[:, at : at + 1], **cache_kwargs(model, cache))
    rule = SHARED.for_layer(0, 3)
    if decode == "full":
        rule = SharedRule(8, 16, 0.5, dense_below=1024)
    for number, call in enumerate(calls[3:]):
        end = 71 + number // 3
        query = torch.cat([x.query for x in calls[number % 3 : number + 4 : 3]], 2)
        for row in range(2):
            parts = [x[row, :, :end].transpose(0, 1) for x in (query, call.key, call.value)]
            expected, _ = shared_steps_ref(*parts, rule, call.scaling, heard=query.shape[2] - 1)
            assert close(call.out[row], expected)


def test_generation_runs_with_every_cache() -> None:
    model = with_rule(tiny_model(), MobaConfig(**SETTINGS, decode="sparse"))
    ids = tokens(1, 70)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    caches: list[Any] = [
        None,
        MobaCache(model.config),
        MobaCache(model.config, max_cache_len=96, static=True),
    ]
    made = [model.generate(ids, **cache_kwargs(model.generate, cache), **settings) for cache in caches]
    assert torch.equal(made[2], made[1])
    assert made[1].shape == made[0].shape  # with a stock cache steps hear no earlier rows


def test_gradients_reach_the_weights_through_the_held_choice() -> None:
    model = tiny_model(moba=SHARED)
    ids = tokens(1, 90)
    model(ids, labels=ids).loss.backward()
    weights = [p for name, p in model.named_parameters() if "q_proj" in name or "k_proj" in name]
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in weights)


def test_operator_keywords_reach_the_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(131, heads, 16, generator=generator).double() for heads in (4, 2, 2))
    lengths = (31, 100)
    offsets = {"cu_seqlens_q": cumulative(lengths)}
    rule = make_rule(**SETTINGS)
    assert isinstance(rule, SharedRule)
    out, lse = moba_attention(q, k, v, **SETTINGS, **offsets, return_lse=True)
    mask = select_blocks(q, k, **SETTINGS, **offsets)
    assert mask.shape == (4, tile_bound(2, 131, 131, 16), 1)
    assert torch.equal(moba_attention(q, k, v, **SETTINGS, **offsets, block_indices=mask), out)
    tile = 0
    for begin, end in ((0, 31), (31, 131)):
        expected = shared_attention_ref(q[begin:end], k[begin:end], v[begin:end], rule)
        torch.testing.assert_close(out[begin:end], expected[0])
        torch.testing.assert_close(lse[:, begin:end], expected[1].float())
        chosen = select_shared_ref(q[begin:end], k[begin:end], rule)
        last = tile + chosen.shape[1]
        assert torch.equal(unpack_blocks(mask[:, tile:last], chosen.shape[2]), chosen)
        tile = last


def test_a_given_mask_is_checked() -> None:
    q, k, v = (torch.randn(64, heads, 16) for heads in (4, 2, 2))
    mask = select_blocks(q, k, **SETTINGS)
    for bad, message in (
        (mask[None], r"must be \(num_heads, num_tiles, words\), got"),
        (mask[:, :2], r"must be int32 \(num_heads, num_tiles, words\) = \(4, 5, 1\)"),
        (mask | 1 << 9, "has a later block for the tile at row 0"),
        (mask & ~1, "lacks a block that the tile at row 0 overlaps"),
    ):
        with pytest.raises(ValueError, match=message):
            moba_attention(q, k, v, **SETTINGS, block_indices=bad)


def test_compiled_attention_is_the_eager_one() -> None:
    q, k, v = (torch.randn(131, heads, 16) for heads in (4, 2, 2))
    compiled = torch.compile(moba_attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, **SETTINGS), moba_attention(q, k, v, **SETTINGS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "mean"}, "tile=16 needs gate='mass', got gate='mean'"),
        ({"threshold": None}, "threshold is missing: with tile=16"),
        ({"threshold": 1.5}, "threshold must lie between 0 and 1, both excluded, got 1.5"),
        ({"tile": 12}, "tile=12 must be a multiple or a divisor of block_size=8"),
        ({"tile": 1, "topk": 4}, "threshold=0.5 needs tile > 1"),
        ({"tile": 1, "topk": 4, "threshold": None}, "sample=4 needs tile > 1"),
        ({"tile": 1, "topk": 4, "threshold": None, "sample": 1}, "dense_below=32 needs tile > 1"),
        ({"tile": 1, "threshold": None, "sample": 1, "dense_below": 0}, "topk is missing: with tile=1"),
        ({"sample": 5}, "sample=5 must divide tile=16"),
        ({"topk": 3}, "topk=3 is too small: it counts the 2 blocks that a tile overlaps"),
        ({"dense_below": 40}, "dense_below=40 must be a multiple of tile=16"),
        ({"decode_max_len": 33}, "decode_max_len=33 exceeds dense_below and tile = 32"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        MobaConfig(**{**SETTINGS, **changes})


def test_a_stored_config_without_a_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="a MoBA config needs threshold"):
        MobaConfig.from_dict({"block_size": 64, "tile": 64})
    with pytest.raises(TypeError, match="tile must be an int, got '16'"):
        MobaConfig(8, 4, tile="16")


def test_shares_are_upper_limits_for_any_text() -> None:
    assert SHARED.key_budget(1000, 3) == SHARED.pair_share(1000, 3) == 1.0
    capped = MobaConfig(**SETTINGS, topk=6)
    rule = capped.for_layer(0, 3)
    assert rule is not None
    most = MobaConfig(**{**SETTINGS, "threshold": 1e-30}, topk=6).for_layer(0, 3)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(203, heads, 16, generator=generator) for heads in (2, 1))
    chosen = select_shared_ref(q, k, most)[0]  # the cap binds everywhere
    attended = chosen[torch.arange(203) // 16][:, torch.arange(203) // 8].tril()
    assert rule.pairs(203) == int(attended.sum())
    assert capped.key_budget(203, 3) == pytest.approx(48 / 203)
    assert capped.scaled(203, 406).topk == 12
    assert SHARED.scaled(203, 406) == SHARED


def test_inspect_says_what_it_can_without_a_text() -> None:
    text = describe(inspect_config(tiny_model(moba=SHARED).config))
    assert (
        "blocks of 8 shared by 16 queries, threshold 0.5, one query in 4 scored, 1 sink, 1 local, "
        "dense below 32" in text
    )
    assert "How many blocks a shared choice takes depends on the text" in text
    assert text.count("up to") == 12
    plain = describe(inspect_config(tiny_model().config))
    assert "depends on the text" not in plain
    assert "up to" not in plain


def test_chunks_of_a_prefill_end_between_tiles(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(moba=SHARED)
    for seen in (0, 16, 21):
        for end in range(seen + 1, 150):
            for size in (16, 32, 40):
                lengths = _chunks(model, seen, end, size, padded=False)
                assert sum(lengths) == end - seen or (end - seen < 2 and seen)
                assert all(2 <= length <= size for length in lengths) or end - seen < 2
                cuts = [seen + sum(lengths[: i + 1]) for i in range(len(lengths) - 1)]
                tight = size == 16  # a remainder of one token would count as decoding, so a tile is split
                assert all(cut % 16 == 0 for cut in cuts) or tight
    type(logger).warning_once.cache_clear()
    caplog.clear()
    with caplog.at_level("WARNING"):
        _chunks(model, 0, 90, 32, padded=False)
        assert not caplog.records
        _chunks(model, 0, 90, 32, padded=True)
        _chunks(model, 0, 90, 32, padded=True)
    assert [r.message.split(" (")[1].split(")")[0] for r in caplog.records] == [
        "padded rows may begin inside a tile"
    ]


def test_a_prefill_in_chunks_equals_one_call() -> None:
    model = tiny_model(moba=SHARED)
    ids = tokens(1, 91)
    whole = prefill(model, ids, chunk_size=96, dense_tail=0, progress=False)
    for size in (32, 40):
        parts = prefill(model, ids, chunk_size=size, dense_tail=0, progress=False)
        for one, other in zip(parts.layers, whole.layers, strict=True):
            assert close(one.keys[:, :, :90], other.keys[:, :, :90])
            assert close(one.values[:, :, :90], other.values[:, :, :90])


@pytest.mark.parametrize("moba", [SHARED, MobaConfig(8, 2)], ids=["shared", "per query"])
def test_the_end_of_a_prompt_may_be_read_dense(moba) -> None:
    model = tiny_model(moba=moba)
    ids = tokens(1, 91)
    tail = 60 // 16 * 16 if moba is SHARED else 61  # the tail has 30 tokens, rounded to whole tiles
    with captured() as calls:
        prefill(model, ids, chunk_size=40, dense_tail=30, progress=False)
    for call in calls:
        end = call.key.shape[2]
        begin = end - call.query.shape[2]
        assert (begin < tail) == (end <= tail)
        if begin >= tail:
            everything = SharedRule(8, 16, 0.5, dense_below=1024)
            assert close(call.out[0], _by_hand(call, everything, 0, end)[1])
        elif moba is SHARED and begin >= 32:
            assert close(call.out[0], _by_hand(call, SHARED.for_layer(0, 3), 0, end)[1])
    assert calls[-1].key.shape[2] == 90
    assert not any(vars(layer.self_attn).get("moba_suspended") for layer in model.model.layers)
    with pytest.raises(ValueError, match="dense_tail must be at least 0, got -1"):
        prefill(model, ids, dense_tail=-1, progress=False)


@pytest.mark.parametrize(("moba", "begin"), [(SHARED, 160), (MobaConfig(8, 2), 172)])
def test_by_default_the_last_128_tokens_attend_every_key(moba, begin) -> None:
    model = tiny_model(moba=moba)
    ids = tokens(1, 300)
    expected = prefill(model, ids, dense_tail=128, progress=False)
    assert tail_begin(model, 300, DENSE_TAIL) == begin
    assert [tail_begin(model, n, 0) for n in (1, 128, 130)] == [0, 127, 129]
    with captured() as calls:
        cache = prefill(model, ids, progress=False)
    assert [call.query.shape[2] for call in calls[::3]] == [begin, 299 - begin]
    for one, other in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(one.keys[:, :, :299], other.keys[:, :, :299])
    plain = prefill(model, ids, dense_tail=0, progress=False)
    first, last = slice(0, begin), slice(begin, 299)
    assert close(cache.layers[-1].keys[:, :, first], plain.layers[-1].keys[:, :, first])
    assert not close(cache.layers[-1].keys[:, :, last], plain.layers[-1].keys[:, :, last])
    model.set_attn_implementation("sdpa")
    assert tail_begin(model, 300, DENSE_TAIL) == 299
    short = tokens(1, 90)
    dense = prefill(model, short, progress=False)
    model.set_attn_implementation("moba")
    for one, other in zip(prefill(model, short, progress=False).layers, dense.layers, strict=True):
        assert close(one.keys[:, :, :89], other.keys[:, :, :89])
