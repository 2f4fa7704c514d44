"""Decode steps with a shared choice: cached summaries, rows against the reference, which keys are read."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from moba_hf import MobaCache, MobaConfig
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.hf.dynamic_layer import MobaLayer
from moba_hf.hf.static_layer import MobaStaticLayer
from moba_hf.op.gates import KeptMass, MassSummary, mass_vectors
from moba_hf.op.ops import attention
from moba_hf.op.sequences import Sequences, batched_table
from moba_hf.op.shared_reference import select_shared_ref, shared_steps_ref
from moba_hf.op.shared_rule import SharedRule
from tests.model_checks import tiny_model, tokens

HEADS, DIM, LENGTH = 2, 8, 90
RULES = {
    "threshold": SharedRule(8, 16, 0.3),
    "capped": SharedRule(8, 16, 0.1, topk=5, sink_blocks=2),
    "share": SharedRule(8, 4, share=0.8, sink_blocks=0, local_blocks=0),
    "dense below": SharedRule(8, 16, 0.3, dense_below=80, rotary_pairs="neighbours"),
    "parts": SharedRule(32, 8, 0.3),
}


def states(batch: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple((2 * torch.randn(batch, HEADS, length, DIM)).to(dtype) for _ in range(2))


def steps(q: Tensor, k: Tensor, v: Tensor, rule: SharedRule, kept: Tensor | None, **kwargs: Any) -> Any:
    """`attention` of decode steps at the end of rows that begin at `kv_start`."""
    start = kwargs.pop("kv_start", None)
    table = batched_table(q.shape[0], q.shape[2], k.shape[2], q.device, start)
    sequences = Sequences(table, q.shape[2], k.shape[2], kv_start=start)
    settings = {"softmax_scale": 0.3, "block_means": kept, "steps": True} | kwargs
    return attention(q, k, v, sequences, rule, **settings)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("q_len", "heard"), [(1, None), (1, 21), (5, None), (5, 6), (20, 0), (20, 30)])
@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_rows_equal_the_reference(
    rule: str, dtype: torch.dtype, q_len: int, heard: int | None, backend: str
) -> None:
    """With `heard` rows before the steps, also in the padding of the last row; None: all ask alone."""
    torch.manual_seed(0)
    shared, starts = RULES[rule], torch.tensor([0, 13, 83])
    layer = MobaLayer()
    k, v = layer.update(*states(3, LENGTH, dtype))
    count = heard or 0
    rows = torch.randn(3, 2 * HEADS, count + q_len, DIM).to(dtype)
    before, q = rows.split([count, q_len], 2)
    before = None if heard is None else before
    kept = layer.moba_means(k, starts, shared.block_size, None, KeptMass(shared.rotary_pairs))
    for given in (kept, None):
        out, lse = steps(q, k, v, shared, given, kv_start=starts, backend=backend, heard=before)
        for row, start in enumerate(starts.tolist()):
            padding = max(0, start - (LENGTH - count - q_len))
            first = max(0, padding - count)
            parts = [x[row].transpose(0, 1) for x in (rows[:, :, padding:], k[:, :, start:], v[:, :, start:])]
            expected = shared_steps_ref(
                *parts, shared, 0.3, None if heard is None else max(0, count - padding)
            )
            assert not out[row, :first].any()
            torch.testing.assert_close(out[row, first:], expected[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[row, :, first:], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["threshold", "capped", "share"])
def test_only_chosen_blocks_are_read(rule: str) -> None:
    """The keys and values of all other blocks may be arbitrary once the summaries are computed."""
    torch.manual_seed(0)
    shared, layer = RULES[rule], MobaLayer()
    k, v = layer.update(*states(1, LENGTH))
    q = 2 * torch.randn(1, 2 * HEADS, 1, DIM)
    kept = layer.moba_means(k, None, shared.block_size, None, KeptMass(shared.rotary_pairs))
    expected = steps(q, k, v, shared, kept)
    other = 0
    for head in range(HEADS):
        queries = q[0, 2 * head : 2 * head + 2].transpose(0, 1)
        chosen = select_shared_ref(queries, k[0, head, :, None], shared, 0.3)[:, 0].any(0)
        for block in (~chosen).nonzero().flatten().tolist():
            at = slice(block * shared.block_size, (block + 1) * shared.block_size)
            k[0, head, at] = v[0, head, at] = torch.nan
            other += 1
    assert other > 0
    for got, want in zip(steps(q, k, v, shared, kept), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_the_cache_keeps_the_gate_s_vectors(dtype: torch.dtype, pairs: str) -> None:
    k = states(1, LENGTH, dtype)[0][0]
    kept = KeptMass(pairs)
    numbers = kept.take(k, 32)
    assert numbers.dtype == dtype
    assert numbers.shape == (HEADS, 2, kept.width(DIM, 32))
    for got, expected in zip(kept.split(numbers, DIM, 32), mass_vectors(k, 32, pairs), strict=True):
        assert torch.equal(got, expected)
    q = torch.randn(HEADS, 3, DIM).to(dtype)
    expected = MassSummary(k, 32, 0.3, pairs).scores(q, 2)
    assert torch.equal(MassSummary.of_kept(numbers, DIM, 32, 0.3, pairs).scores(q, 2), expected)


@pytest.mark.parametrize("kept", [KeptMass("neighbours"), KeptMass("halves")])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_kept_vectors_follow_all_operations_of_a_layer(kept: KeptMass, padded: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer, starts = MobaLayer(), torch.tensor([3, 0]) if padded else None
    layer.update(*states(2, 20))
    for _ in range(14):
        what = int(torch.randint(0, 6, (1,), generator=generator))
        rows = torch.randperm(layer.keys.shape[0], generator=generator)
        if what == 0:
            layer.crop(-min(5, layer.get_seq_length() - 4))
        elif what == 1:
            layer.reorder_cache(rows)
            starts = None if starts is None else starts[rows]
        elif what == 2 and len(rows) < 6:
            layer.batch_repeat_interleave(2)
            starts = None if starts is None else starts.repeat_interleave(2)
        else:
            layer.update(*states(len(rows), 1 + 6 * (what == 3)))
        if what != 4:  # sometimes several steps are caught up at once
            _assert_kept(layer.moba_means(layer.keys, starts, 4, None, kept), layer.keys, starts, kept)


def _assert_kept(got: Tensor, keys: Tensor, starts: Tensor | None, kept: KeptMass) -> None:
    for row in range(len(keys)):
        expected = kept.take(keys[row, :, 0 if starts is None else int(starts[row]) :], 4)
        torch.testing.assert_close(got[row, :, : expected.shape[1]], expected, rtol=1e-5, atol=1e-6)


def test_a_static_layer_keeps_the_same_in_one_place() -> None:
    layer, kept = MobaStaticLayer(64), KeptMass("halves")
    layer.update(*states(2, 21))
    first = layer.moba_means(layer.keys, None, 4, None, kept)
    for _ in range(9):
        layer.update(*states(2, 1))
        got = layer.moba_means(layer.keys, None, 4, None, kept)
    assert got.data_ptr() == first.data_ptr()
    _assert_kept(got, layer.keys[:, :, :30], None, kept)


@pytest.mark.parametrize(
    "moba", [MobaConfig(4, 3, gate="mass"), MobaConfig(8, gate="mass", tile=16, threshold=0.5)]
)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_stock_caches(moba: MobaConfig, beams: int) -> None:
    """With left-padded rows and beams; with a stock cache, every key is read to score blocks.

    Steps of a shared choice ask alone there, but not with a `MobaCache`.
    """
    model = tiny_model(moba=dataclasses.replace(moba, decode="sparse"), seed=1)
    model.generation_config.eos_token_id = None
    ids, mask = tokens(2, 41), torch.ones(2, 41, dtype=torch.long)
    mask[0, :13] = 0
    settings = {"max_new_tokens": 18, "do_sample": False, "num_beams": beams, "suppress_tokens": [0]}
    results = []
    for cache in (
        DynamicCache(config=model.config),
        MobaCache(model.config),
        MobaCache(model.config, static=True, max_cache_len=64),
    ):
        named = cache_kwargs(model.generate, cache)
        results.append(model.generate(ids * mask, attention_mask=mask, **named, **settings))
    assert moba.tile > 1 or torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[1])
