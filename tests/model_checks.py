"""Tiny models in memory, the inputs of their attention layers, and the expected outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from moba_hf import MobaConfig
from moba_hf.config import NAME
from moba_hf.hf.attention import moba_attention_forward
from moba_hf.op.reference import moba_attention_ref

SMALL = MobaConfig(block_size=8, topk=2)
COVERING = MobaConfig(block_size=8, topk=100)
LENGTH = 50  # six complete blocks of 8, and an incomplete one


def tiny_config(model_type: str, moba: MobaConfig | None = SMALL, **values: Any) -> Any:
    """A config with three layers and large random weights, so that the choice affects the logits."""
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 96,
    }
    if model_type == "mistral":
        settings["sliding_window"] = None
    config = AutoConfig.for_model(model_type, **(settings | values))
    if moba is not None:
        config.moba = moba.to_dict()
    return config


def tiny_model(
    model_type: str = "llama",
    moba: MobaConfig | None = SMALL,
    attention: str = NAME,
    seed: int = 0,
    **values: Any,
) -> Any:
    """A causal language model with `attn_implementation="moba"`, fp32, in eval mode."""
    config = tiny_config(model_type, moba, **values)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def tokens(*shape: int) -> Tensor:
    """Random ids without special tokens."""
    return torch.randint(2, 96, shape, generator=torch.Generator().manual_seed(1))


def with_rule(model: Any, moba: MobaConfig) -> Any:
    """The same model with other settings."""
    model.config.moba = moba.to_dict()
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(ids, **kwargs).logits


@torch.no_grad()
def sdpa_logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits of the same weights with the stock implementation."""
    model.set_attn_implementation("sdpa")
    result = model(ids, **kwargs).logits
    model.set_attn_implementation(NAME)
    return result


def close(actual: Tensor, expected: Tensor) -> bool:
    """Equal up to fp32 rounding relative to the largest value; never true for NaN."""
    if actual.shape != expected.shape:
        return False
    difference = (actual - expected).abs().max()
    return bool(difference <= 2e-5 * expected.abs().max())


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """A batch `ids, attention_mask` of 1-D rows, padded on one side."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


@dataclass
class Call:
    """One call of the attention function: the layer, its inputs and its output."""

    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    out: Tensor


@contextmanager
def captured() -> Iterator[list[Call]]:
    """Every call of the registered attention function inside the block."""
    calls: list[Call] = []

    def record(module, query, key, value, attention_mask, **kwargs):
        out, weights = moba_attention_forward(module, query, key, value, attention_mask, **kwargs)
        copies = [x.detach().clone() for x in (query, key, value)]
        calls.append(Call(module.layer_idx, *copies, kwargs["scaling"], out.detach().clone()))
        return out, weights

    AttentionInterface.register(NAME, record)
    try:
        yield calls
    finally:
        AttentionInterface.register(NAME, moba_attention_forward)


def by_hand(call: Call, rule: Any, spans: list[tuple[int, int]]) -> Tensor:
    """The reference's output for a call, with zeros for padding rows.

    Args:
        rule: the layer's rule, or None for full attention.
        spans: per batch row, the key slots that hold its tokens; queries are in the last slots.
    """
    offset = call.key.shape[2] - call.query.shape[2]
    result = torch.zeros_like(call.out)
    for row, (start, end) in enumerate(spans):
        first = max(start - offset, 0)
        query = call.query[row, :, first : end - offset].transpose(0, 1)
        key, value = (x[row, :, start:end].transpose(0, 1) for x in (call.key, call.value))
        size, topk = (end - start, 1) if rule is None else (rule.block_size, rule.topk)
        forced = (0, 0) if rule is None else (rule.sink_blocks, rule.local_blocks)
        names = ("block_size", "topk", "sink_blocks", "local_blocks")
        settings = dict(zip(names, (size, topk, *forced), strict=True))
        out, _ = moba_attention_ref(query, key, value, **settings, softmax_scale=call.scaling)
        result[row, first : end - offset] = out
    return result
