"""Random models and texts in float64 against the oracle: padding, packing, chunks, decode steps.

The same weights run once with MoBA and once with the oracle's attention, which gets each text alone in one
call. Takes seconds by default; --slow runs a thousand draws (pytest -s prints the counts).
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

sys.path.append(str(Path(__file__).parent.parent))
from fuzz import oracle
from model_checks import padded, tiny_model

from moba_hf import MobaCache, MobaConfig, prefill
from moba_hf.config import NAME
from moba_hf.hf.cache_names import cache_kwargs

COUNTS = [8, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
ORACLE = "fuzz_oracle"


class Draw:
    """A random model, its settings, and texts."""

    def __init__(self, seed: int):
        self.seed, self.random = seed, random.Random(seed)
        pick = self.random.choice
        sink, local = pick([0, 0, 1, 2]), pick([0, 0, 1])
        layers = self.random.randint(1, 3)
        self.settings = {
            "block_size": pick([1, 2, 3, 4, 6, 16]),
            "topk": 1 + sink + local + pick([0, 1, 2, 3, 50]),
            "sink_blocks": sink,
            "local_blocks": local,
            "gate": pick(["mean", "mean", "mass"]),
            "full_attention_layers": pick([[], [], [-1], [0]]),
            "decode": pick(["full", "sparse"]),
        }
        heads, group = pick([(2, 1), (4, 2), (4, 4), (8, 2)])
        sizes = {
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // group,
            "head_dim": pick([4, 8]),
        }
        self.family = pick(["llama", "qwen3", "mistral"])
        self.config = MobaConfig.from_dict(self.settings)
        self.model = tiny_model(self.family, self.config, seed=seed, **sizes).double()
        generator = torch.Generator().manual_seed(seed)
        lengths = [self.random.randint(2, 40) for _ in range(self.random.randint(1, 3))]
        self.texts = [torch.randint(2, 96, (n,), generator=generator) for n in lengths]

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.family}, {self.settings}, lengths {[len(x) for x in self.texts]}"

    @torch.no_grad()
    def expected(self, text: Tensor, prompt: int | None = None) -> Tensor:
        """Logits of one text with the oracle's attention; rows from `prompt` on are decode steps."""
        full = self.config.decode == "full" and prompt is not None

        def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, scaling: float, **__: Any) -> Any:
            rule = self.config.for_layer(module.layer_idx, self.model.config.num_hidden_layers)
            out = torch.zeros(1, q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
            for h in range(q.shape[1]):
                kv = h * k.shape[1] // q.shape[1]
                keys, values = k[0, kv].numpy(), v[0, kv].numpy()
                for i in range(q.shape[2]):
                    size = 10**6 if rule is None or (full and i >= (prompt or 0)) else rule.block_size
                    values_of = rule.to_dict() if rule is not None else {"topk": 1}
                    values_of.pop("rotary_pairs", None)  # the oracle knows the pairs of this model only
                    numbers = oracle.Rule(**{**values_of, "block_size": size}, scale=scaling)
                    query = q[0, h, i].numpy()
                    blocks = oracle.blocks_of(query, keys, i, numbers)
                    out[0, i, h] = torch.from_numpy(oracle.attend(query, keys, values, i, blocks, numbers)[0])
            return out, None

        AttentionInterface.register(ORACLE, attend)
        AttentionMaskInterface.register(ORACLE, lambda *_, **__: None)
        self.model.set_attn_implementation(ORACLE)
        result: Tensor = self.model(text[None], use_cache=False).logits[0]
        self.model.set_attn_implementation(NAME)
        return result


def check(draw: Draw, ours: Tensor, exact: Tensor, how: str) -> int:
    error = float((ours - exact).abs().max()) / float(exact.abs().max())
    assert error < 1e-5, f"{how}: {error:.2e}, {draw}"  # rotary angles and norms are computed in fp32
    return len(ours)


@torch.no_grad()
def check_padded(draw: Draw) -> int:
    ids, mask = padded(draw.texts, draw.random.choice(["left", "right"]))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = draw.model(ids, attention_mask=mask, position_ids=positions).logits
    rows = zip(logits, mask.bool(), draw.texts, strict=True)
    return sum(check(draw, row[real], draw.expected(text), "padded") for row, real, text in rows)


@torch.no_grad()
def check_packed(draw: Draw) -> int:
    ids = torch.cat(draw.texts)[None]
    positions = torch.cat([torch.arange(len(x)) for x in draw.texts])[None]
    logits = draw.model(ids, position_ids=positions, use_cache=False).logits[0]
    parts = logits.split([len(x) for x in draw.texts])
    return sum(check(draw, a, draw.expected(x), "packed") for a, x in zip(parts, draw.texts, strict=True))


@torch.no_grad()
def check_steps(draw: Draw) -> int:
    """A prefill in manual chunks, then one token at a time."""
    text = max(draw.texts, key=len)
    prompt = draw.random.randint(2, len(text))
    cut = prompt if prompt < 5 else draw.random.choice([prompt, draw.random.randint(2, prompt - 2)])
    cache = draw.random.choice([lambda: MobaCache(draw.model.config), DynamicCache])()
    ends = [*sorted({cut, prompt}), *range(prompt + 1, len(text) + 1)]
    parts, begin = [], 0
    for end in ends:
        parts.append(draw.model(text[None, begin:end], **cache_kwargs(draw.model, cache)).logits[0])
        begin = end
    return check(draw, torch.cat(parts), draw.expected(text, prompt), f"chunks up to {ends}")


@torch.no_grad()
def check_prefill(draw: Draw) -> int:
    """`prefill`, then the tokens that `generate` would read: the prompt's last one, and more."""
    text = max(draw.texts, key=len)
    prompt = draw.random.randint(2, len(text))
    cache = prefill(
        draw.model, text[None, :prompt], chunk_size=draw.random.randint(3, 20), dense_tail=0, progress=False
    )
    seen = cache.get_seq_length()
    parts = [
        draw.model(text[None, i : i + 1], **cache_kwargs(draw.model, cache)).logits[0]
        for i in range(seen, len(text))
    ]
    return check(draw, torch.cat(parts), draw.expected(text, seen)[seen:], f"prefill of {prompt}")


CHECKS: list[Callable[[Draw], int]] = [check_padded, check_packed, check_steps, check_prefill]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", COUNTS)
def test_models(count: int) -> None:
    rows: Counter[str] = Counter()
    for seed in range(count):
        draw = Draw(seed)
        for each in CHECKS:
            rows[each.__name__] += each(draw)
    print(f"\nmodels: {count} models, {len(CHECKS) * count} cases, rows of logits {dict(rows)}")
