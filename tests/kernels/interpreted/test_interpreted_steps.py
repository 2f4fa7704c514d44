"""Decode steps of the shared choice under the interpreter: summaries, choice, rows, memory, a model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from step_checks import Steps, assert_kept, assert_splits_and_budgets_change_nothing, assert_steps
from transformers import LlamaConfig, LlamaForCausalLM

from moba_hf import MobaCache, MobaConfig, use_moba
from moba_hf.hf.cache_names import cache_kwargs
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
    "share and cap": partial(Steps, SharedRule(16, 32, share=0.8, topk=9, sample=2), heard=31, length=290),
    "dense below": partial(
        Steps, SharedRule(16, 32, threshold=0.1, dense_below=256), heard=31, starts=(0, 45, 299)
    ),
    "many heads": partial(
        Steps, SharedRule(64, 16, threshold=0.3), (20, 1), (16, 16), 400, heard=3, starts=(5,)
    ),
}


# First and last token of each call, and how many tokens are removed after it.
STEPS = [(0, 70, 0), *((i, i + 1, 0) for i in range(70, 79))]
CALLS = {"static": STEPS, "dynamic": [*STEPS, (79, 80, 7), (73, 77, 0), (77, 78, 0)]}


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "block_size"), [(16, 16), (24, 64)])
def test_summaries(dtype: torch.dtype, dim: int, block_size: int) -> None:
    assert_kept(dtype, dim, block_size, [100, 1, 27, 72, 1], "cpu")


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_model_decodes_as_with_the_portable_backend(kind: str) -> None:
    """Padded rows, steps that close a tile, a crop: both backends give the same logits."""
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
    for backend in ("triton", "portable"):
        rule = MobaConfig(16, decode="sparse", backend=backend, **settings)
        with use_moba(model, rule), torch.no_grad():
            cache = MobaCache(config, static=kind == "static", max_cache_len=104)
            parts = []
            for begin, end, removed in CALLS[kind]:
                given = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
                parts.append(model(ids[:, begin:end], **cache_kwargs(model, cache), **given).logits[:, -1])
                if removed:
                    cache.crop(-removed)
            rows.append(torch.stack(parts))
    torch.testing.assert_close(*rows, rtol=1e-3, atol=1e-3)
