"""The mass gate: its scores against brute force, its fast path against the reference, its use in a model."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
from costs import cost_of
from transformers import AutoModelForCausalLM, LlamaConfig

from moba_hf import MobaCache, MobaConfig, moba_attention, select_blocks, use_moba
from moba_hf.config import make_rule
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.op.gates import MassSummary, PairedMassSummary
from moba_hf.op.reference import mass_gate_ref, select_blocks_ref
from moba_hf.op.shared import unpack_blocks
from moba_hf.op.shared_reference import select_shared_ref
from moba_hf.op.shared_rule import SharedRule
from moba_hf.patches.llama import LlamaAdapter


def qkv(length: int, heads: int, kv_heads: int, dim: int = 16, dtype: torch.dtype = torch.float32) -> list:
    torch.manual_seed(0)
    return [2 * torch.randn(length, h, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize(("block_size", "kv_heads"), [(1, 2), (7, 1), (16, 4), (32, 2), (48, 1)])
def test_scores_are_those_counted_key_by_key(block_size: int, kv_heads: int) -> None:
    q, k, _ = qkv(100, 4, kv_heads, dtype=torch.float64)
    scores = MassSummary(k.transpose(0, 1), block_size, 0.3).scores(q.transpose(0, 1), 100 // block_size)
    assert torch.allclose(scores.transpose(0, 1), mass_gate_ref(q, k, block_size, 0.3))
    size = 16 if block_size % 16 == 0 else block_size
    for head, t, block in ((0, 99, 0), (3, 57, 1), (2, 98, 100 // block_size - 1)):
        keys = k[block * block_size : (block + 1) * block_size, head * kv_heads // 4]
        x = q[t, head]
        terms = [math.exp(0.3 * float(x @ min(keys, key=lambda key: float(key @ key))))]
        for part in keys.split(size):
            center = part.mean(0)
            var = ((part - center) ** 2).mean(0)
            var = [(float(var[d]) + float(var[(d + 8) % 16])) / 2 for d in range(16)]
            spread = 0.09 * sum(float(x[d]) ** 2 * var[d] for d in range(16))
            reach = math.log(size)
            gain = spread / 2 if spread <= 2 * reach else math.sqrt(2 * spread * reach) - reach
            terms.append(size * math.exp(0.3 * float(x @ center) + gain))
        assert float(scores[head, t, block]) == pytest.approx(math.log(sum(terms)), rel=1e-9)


def test_a_block_longer_than_the_text_costs_nothing() -> None:
    k, q = torch.randn(2, 40, 16), torch.randn(4, 1, 16)
    costs = [cost_of(partial(MassSummary(k, size, 0.3).scores, q, 0)) for size in (64, 65536)]
    assert costs[0].result.shape == costs[1].result.shape == (4, 1, 0)
    assert costs[0].operators == costs[1].operators


def test_blocks_of_one_key_are_scored_exactly() -> None:
    q, k, _ = qkv(30, 2, 1, dtype=torch.float64)
    scores = MassSummary(k.transpose(0, 1), 1, 0.25).scores(q.transpose(0, 1), 30)
    exact = torch.einsum("qhd,kd->hqk", q, k[:, 0]) * 0.25 + math.log(
        2
    )  # the key counts twice, as the mean and as the smallest key
    assert torch.allclose(scores, exact)


@pytest.mark.parametrize(
    ("block_size", "topk", "sink", "local"), [(7, 3, 0, 0), (16, 4, 1, 1), (32, 3, 0, 1), (1, 6, 2, 1)]
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_portable_is_the_reference(
    block_size: int, topk: int, sink: int, local: int, heads: int, kv_heads: int
) -> None:
    q, k, v = qkv(150, heads, kv_heads, dtype=torch.float64)
    cu = torch.tensor([0, 40, 40, 150], dtype=torch.int32)
    rule = {"block_size": block_size, "topk": topk, "sink_blocks": sink, "local_blocks": local}
    for packing in ({}, {"cu_seqlens_q": cu}):
        given = {**rule, **packing, "gate": "mass"}
        chosen = [select_blocks(q, k, **given, backend=b).sort(2).values for b in ("portable", "reference")]
        assert torch.equal(*chosen)
        out = [moba_attention(q, k, v, **given, backend=b) for b in ("portable", "reference")]
        assert torch.allclose(*out)
    if block_size > 1:  # with block_size 1, both gates rank keys by q . k
        assert not torch.allclose(out[0], moba_attention(q, k, v, **rule, cu_seqlens_q=cu))


def test_what_follows_from_the_rule_holds() -> None:
    q, k, v = qkv(96, 4, 2)
    mass = {"block_size": 16, "gate": "mass"}
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(0, 1)
    assert torch.allclose(moba_attention(q, k, v, topk=6, **mass), dense, atol=1e-5)
    own = moba_attention(q, k, v, topk=1, block_size=16)
    assert torch.allclose(moba_attention(q, k, v, topk=1, **mass), own, atol=1e-6)
    whole = moba_attention(q, k, v, topk=3, **mass)
    assert torch.allclose(moba_attention(q[50:], k, v, topk=3, **mass), whole[50:], atol=1e-5)
    changed = k.clone()
    changed[70] += 5
    assert torch.equal(moba_attention(q, changed, v, topk=3, **mass)[:70], whole[:70])


def test_a_hidden_sink_is_found_where_the_mean_misses_it() -> None:
    """One key near zero wins against keys that all point away, as in layers 3 to 10 of SmolLM2."""
    torch.manual_seed(0)
    q = torch.randn(64, 1, 16) * 0.1 + 3
    k = torch.randn(64, 1, 16) * 0.1 - 3
    k[20] = 0.0
    rule = {"block_size": 8, "topk": 2}
    assert (select_blocks(q, k, **rule, gate="mass")[32:] == 2).any(2).all()
    k[20:22] -= 0.5  # now the block's mean is no better than any other
    k[22] -= 4
    assert (select_blocks(q, k, **rule, gate="mass")[32:] == 2).any(2).all()
    assert not (select_blocks(q, k, **rule)[32:] == 2).any()


def test_a_model_runs_it_by_layer_and_the_config_keeps_it() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 50, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2), dtype=torch.float32
    )
    for name, parameter in model.named_parameters():
        parameter.data *= 20 if "q_proj" in name or "k_proj" in name else 1
    ids = torch.randint(0, 50, (1, 120))
    mass = MobaConfig(8, 3, layers={"1": {"gate": "mass"}})  # type: ignore[arg-type]
    assert MobaConfig.from_dict(mass.to_dict()) == mass
    assert mass.for_layer(0, 2).gate == "mean"
    assert mass.for_layer(1, 2).gate == "mass"
    with torch.no_grad():
        with use_moba(model, mass):
            out = model(ids).logits
            padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], 1)
            mask = (torch.arange(129) >= 9).long()[None]
            left = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits
        with use_moba(model, MobaConfig(8, 3)):
            mean = model(ids).logits
        with use_moba(model, dataclasses.replace(mass, decode="sparse")):
            cache = MobaCache(model.config)
            model(ids[:, :100], **cache_kwargs(model, cache))
            steps = [model(ids[:, i : i + 1], **cache_kwargs(model, cache)).logits for i in range(100, 120)]
    assert torch.allclose(torch.cat(steps, 1), out[:, 100:], atol=1e-4)
    assert torch.allclose(left[:, 9:], out, atol=1e-4)
    assert not torch.allclose(out, mean, atol=1e-4)


def test_low_precision_summaries_are_rounded_alike() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        q, k, _ = qkv(100, 4, 2, dtype=dtype)
        scores = MassSummary(k.transpose(0, 1), 32, 0.25).scores(q.transpose(0, 1), 3).transpose(0, 1)
        assert torch.allclose(scores, mass_gate_ref(q, k, 32, 0.25), atol=1e-5)
        exact = mass_gate_ref(q.float(), k.float(), 32, 0.25)
        assert 0 < (scores - exact).abs().max() < 0.1


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_scores_do_not_depend_on_where_positions_begin(pairs: str) -> None:
    """Rotating queries and keys by a common angle keeps the scores, if pairs match those of the rotation."""
    q, k, _ = qkv(100, 4, 2, dtype=torch.float64)
    angle = torch.rand(8, dtype=torch.float64) * 6

    def turned(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1) if pairs == "halves" else (x[..., ::2], x[..., 1::2])
        parts = [low * angle.cos() - high * angle.sin(), low * angle.sin() + high * angle.cos()]
        return torch.cat(parts, -1) if pairs == "halves" else torch.stack(parts, -1).flatten(-2)

    other = "neighbours" if pairs == "halves" else "halves"
    for cls in (MassSummary, PairedMassSummary):
        for how, same in ((pairs, True), (other, False)):
            before, after = (
                cls(b.transpose(0, 1), 16, 0.3, how).scores(a.transpose(0, 1), 6)
                for a, b in ((q, k), (turned(q), turned(k)))
            )
            assert torch.allclose(before, after, rtol=1e-9) is same
            if cls is MassSummary:
                wanted = mass_gate_ref(q, k, 16, 0.3, how)
                assert torch.allclose(before.transpose(0, 1), wanted)


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_the_operator_scores_by_the_given_rotary_pairs(backend: str) -> None:
    """Against the reference of each rule; the two pairings choose different blocks here."""
    q, k, v = qkv(200, 4, 2)
    q[..., ::4] *= 3  # the coordinates of a pair contribute differently
    k[..., 1::4] *= 3
    own: dict = {"block_size": 16, "topk": 4, "gate": "mass"}
    shared: dict = {"block_size": 8, "tile": 16, "threshold": 0.3, "gate": "mass"}
    for settings in (own, shared):
        found = {}
        for pairs in ("halves", "neighbours"):
            given = {**settings, "rotary_pairs": pairs}
            choice = select_blocks(q, k, **given, backend=backend)
            rule = make_rule(**given)
            assert rule.rotary_pairs == pairs
            assert make_rule(**rule.to_dict()) == rule
            if isinstance(rule, SharedRule):
                blocks = -(-200 // 8)
                wanted = select_shared_ref(q, k, rule)
                assert torch.equal(unpack_blocks(choice, blocks)[:, : wanted.shape[1]], wanted)
            else:
                wanted = select_blocks_ref(q, k, **given)
                assert torch.equal(choice.sort(2).values, wanted.sort(2).values)
            found[pairs] = choice
            out = moba_attention(q, k, v, **given, backend=backend)
            over = moba_attention(q, k, v, **settings, block_indices=choice, backend=backend)
            assert torch.allclose(out, over, atol=1e-5)
        assert not torch.equal(found["halves"].sort(2).values, found["neighbours"].sort(2).values)
        for call in (partial(moba_attention, q, k, v), partial(select_blocks, q, k)):
            with pytest.raises(ValueError, match="rotary_pairs must be one of 'halves', 'neighbours'"):
                call(**settings, rotary_pairs="x")


@pytest.mark.parametrize(
    ("decode", "pairs"), [("full", "halves"), ("sparse", "halves"), ("sparse", "neighbours")]
)
def test_a_model_chooses_alike_wherever_positions_begin(
    decode: str, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holds only if coordinates are paired as in the model."""
    monkeypatch.setattr(LlamaAdapter, "rotary_pairs", pairs)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=90, num_hidden_layers=3, max_position_embeddings=4096, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 6  # makes the choice matter
    ids = torch.randint(1, 90, (1, 150))
    with use_moba(model, MobaConfig(16, 3, gate="mass", decode=decode)), torch.no_grad():
        rows = []
        for first in (0, 1000):
            at = torch.arange(first, first + 150)[None]
            cache = MobaCache(model.config)
            parts = [model(ids[:, :140], position_ids=at[:, :140], **cache_kwargs(model, cache)).logits]
            for i in range(140, 150):
                step = {"position_ids": at[:, i : i + 1], **cache_kwargs(model, cache)}
                parts.append(model(ids[:, i : i + 1], **step).logits)
            rows.append(torch.cat(parts, 1))
    assert torch.allclose(*rows, atol=1e-5) is (pairs == "halves")


def test_an_odd_head_dim_is_refused() -> None:
    q, k, v = qkv(40, 2, 1, dim=15)
    for function, args in ((moba_attention, (q, k, v)), (select_blocks, (q, k))):
        with pytest.raises(ValueError, match="gate='mass' needs an even head_dim, got 15"):
            function(*args, block_size=8, topk=2, gate="mass")
        function(*args, block_size=8, topk=2)


def test_an_unknown_gate_is_refused() -> None:
    q, k, v = qkv(32, 2, 1)
    with pytest.raises(ValueError, match="'mean', 'mass'"):
        moba_attention(q, k, v, block_size=8, topk=2, gate="max")
    with pytest.raises(ValueError, match="'mean', 'mass'"):
        MobaConfig(8, 2, gate="max")
