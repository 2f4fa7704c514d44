"""Decode steps of the shared choice under the interpreter: summaries, choice, rows, memory, a model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from step_checks import Steps, assert_kept, assert_splits_and_budgets_change_nothing, assert_steps
from transformers import LlamaConfig, LlamaForCausalLM

from moba_hf import MobaCache, MobaConfig, use_moba
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.kernels import shared_steps_attend, shared_tuning
from moba_hf.kernels.shared_steps_attend import union_lists
from moba_hf.op.block_means import block_means_of
from moba_hf.op.gates import KeptMass
from moba_hf.op.shared import pack_blocks
from moba_hf.op.shared_reference import select_shared_ref
from moba_hf.op.shared_rule import SharedRule

pytestmark = pytest.mark.usefixtures("poisoned")

RULE = SharedRule(16, 32, threshold=0.1, sample=4)
CASES = {
    "alone": partial(Steps, RULE, length=297),
    "hears": partial(Steps, RULE, length=297, heard=31),
    "hears few rows": partial(Steps, RULE, length=300, heard=5, starts=(0, 296)),
    "several rows": partial(Steps, RULE, length=299, count=5, heard=9, starts=(0, 297), dtype=torch.float16),
    "no rows before": partial(Steps, RULE, length=300, count=4, heard=0),
    "every row, short": partial(
        Steps, SharedRule(32, 16, threshold=0.2), length=200, heard=15, starts=(0, 190), dtype=torch.bfloat16
    ),
    "odd group, narrow pairs": partial(
        Steps,
        SharedRule(16, 64, threshold=0.1, sample=8, rotary_pairs="neighbours"),
        (3, 1),
        (24, 40),
        260,
        heard=63,
    ),
    "a tile of 128": partial(
        Steps, SharedRule(16, 128, threshold=0.1, sample=2), (2, 1), (16, 16), 420, heard=127
    ),
    "share and cap": partial(Steps, SharedRule(16, 32, share=0.8, topk=9, sample=2), heard=31, length=290),
    "dense below": partial(
        Steps, SharedRule(16, 32, threshold=0.1, dense_below=256), heard=31, starts=(0, 45, 299)
    ),
    "many heads": partial(
        Steps, SharedRule(64, 16, threshold=0.3), (20, 1), (16, 16), 400, heard=3, starts=(5,)
    ),
}
MANY_BLOCKS = partial(
    Steps, SharedRule(16, 32, threshold=0.05, sample=16), (2, 1), (16, 16), 2600, heard=31, starts=(0, 1300)
)


# First and last token of each call, and how many tokens are removed after it.
STEPS = [(0, 70, 0), *((i, i + 1, 0) for i in range(70, 79))]
CALLS = [*STEPS, (79, 80, 7), (73, 77, 0), (77, 78, 0)]


@pytest.mark.parametrize("name", list(CASES))
def test_choice_and_rows(name: str) -> None:
    chosen = assert_steps(CASES[name]())
    if name != "dense below":
        assert chosen.float().mean() < 0.9


def test_earlier_rows_change_the_choice() -> None:
    alone, hears = (x.unpacked(x.choose()) for x in (CASES[name]() for name in ("alone", "hears")))
    assert not torch.equal(alone, hears)


@pytest.mark.parametrize("name", ["several rows", "odd group, narrow pairs"])
def test_splits_and_budgets_change_nothing(name: str) -> None:
    assert_splits_and_budgets_change_nothing(CASES[name]())


@pytest.mark.parametrize("words", [1, 31, 32, 33, 300])
def test_lists_hold_the_blocks_of_any_head(words: int) -> None:
    torch.manual_seed(0)
    bits = torch.rand(2, 6, words * 32) < torch.rand(2, 6, 1) * 0.4
    bits[0, 3:] = False
    bits[1, :3, -1] = True
    blocks = torch.full((2, 2, words * 32), -1, dtype=torch.int32)
    counts = torch.full((2, 2), -1, dtype=torch.int32)
    union_lists(pack_blocks(bits, words), blocks, counts)
    union = bits.unflatten(1, (2, 3)).any(2)
    assert torch.equal(counts, union.sum(2, dtype=torch.int32))
    for got, count, chosen in zip(blocks.flatten(0, 1), counts.flatten(), union.flatten(0, 1), strict=True):
        assert torch.equal(got[:count], chosen.nonzero().flatten().int())


def test_sections_of_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With limits that 162 blocks exceed, as 1,100 blocks exceed the real ones."""
    monkeypatch.setattr(shared_tuning, "STEP_SECTIONS", 8)
    monkeypatch.setattr(shared_tuning, "STEP_COLUMNS", 32)
    monkeypatch.setattr(shared_tuning, "STEP_CHOICE_COLUMNS", 128)
    case = MANY_BLOCKS()
    assert_steps(case)
    assert_splits_and_budgets_change_nothing(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "block_size"), [(16, 16), (24, 64)])
def test_summaries(dtype: torch.dtype, dim: int, block_size: int) -> None:
    assert_kept(dtype, dim, block_size, [100, 1, 27, 72, 1], "cpu")


def test_a_model_decodes_as_with_the_portable_backend() -> None:
    """Padded rows, steps that close a tile, a crop: both backends give the logits of a dynamic cache."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 50, "num_hidden_layers": 1}
    config = LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=16, initializer_range=0.3
    )
    model = LlamaForCausalLM(config).eval()
    ids, mask = torch.randint(0, 50, (2, 100)), torch.ones(2, 100, dtype=torch.long)
    mask[0, :11] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    settings = {"gate": "mass", "tile": 16, "threshold": 0.5, "sample": 2, "local_blocks": 0}
    rows = []
    for backend, static in (("portable", False), ("triton", False), ("triton", True), ("portable", True)):
        rule = MobaConfig(16, decode="sparse", backend=backend, **settings)
        with use_moba(model, rule), torch.no_grad():
            cache = MobaCache(config, static=static, max_cache_len=104)
            parts = []
            for begin, end, removed in CALLS:
                given = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
                parts.append(model(ids[:, begin:end], **cache_kwargs(model, cache), **given).logits[:, -1])
                if removed:
                    cache.crop(-removed)
            rows.append(torch.stack(parts))
    for other in rows[1:]:
        torch.testing.assert_close(rows[0], other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("which", "bad", "limit"),
    [
        ("q", torch.nan, {"threshold": 0.9}),
        ("before", torch.inf, {"share": 0.3}),
        ("k", torch.nan, {"threshold": 0.9, "topk": 6}),
    ],
)
def test_masses_that_are_no_numbers_drop_no_block(which: str, bad: float, limit: dict[str, float]) -> None:
    """One bad value makes all masses NaN, so a step takes the same blocks as its tile in a prefill."""
    rule = SharedRule(16, 16, sample=2, sink_blocks=0, local_blocks=0, **limit)
    case = Steps(rule, (2, 1), (16, 16), length=173, heard=12, starts=(0,))
    getattr(case, which)[0, 0, {"q": 0, "before": 3, "k": 20}[which], 3] = bad
    keys = case.k[:, :, : case.length]
    case.kept = block_means_of(keys, case.start, 16, "triton", KeptMass(rule.rotary_pairs))
    rows = torch.cat([case.before, case.q], 2)
    expected = select_shared_ref(rows[0].transpose(0, 1), keys[0].transpose(0, 1), rule, case.scale)[:, -1]
    assert torch.equal(case.unpacked(case.choose())[0, :, 0], expected)
    assert expected[0].sum() == rule.topk or expected[0].all()


@pytest.mark.parametrize("splits", [1, 3])
def test_attention_to_nan_is_nan(splits: int) -> None:
    """A split whose keys are NaN must not be dropped; heads that do not attend to them stay as they are."""
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 48, 16)
    k[:, 1, 20] = torch.nan
    table = torch.tensor([[0, 0, 1, 0, 48]], dtype=torch.int32)
    mask = torch.full((1, 2, 1), 0b111, dtype=torch.int32)
    out, lse = shared_steps_attend.attend(q, k, k, mask, table, 16, 0.25, splits=splits)
    assert torch.isfinite(out[0, 0, 0]).all()
    assert torch.isfinite(lse[0, 0]).all()
    assert out[0, 0, 1].isnan().all()
    assert lse[0, 1].isnan().all()
