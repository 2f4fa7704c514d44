"""The shared choice in the decode benchmark: a check, its stages, and the choice of random blocks.

Random keys have flat mass. So a step computes its choice, but then attends to random blocks, as many as the
stated share of the cached tokens, kept blocks included. The earlier rows of its tile are random too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from decode_setup import Clock, Row, set_length
from torch import Tensor
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from step_checks import Steps, assert_steps

from moba_hf import MobaCache, MobaConfig
from moba_hf.kernels import shared_steps, shared_steps_attend
from moba_hf.op.gates import KeptMass
from moba_hf.op.sequences import batched_table
from moba_hf.op.shared import pack_blocks, unpack_blocks
from moba_hf.op.shared_rule import SharedRule


def settings_of(args: argparse.Namespace) -> MobaConfig:
    """The preset's settings, with sparse decode steps."""
    moba = MobaConfig.from_preset(args.preset)
    if args.tiny:
        moba = MobaConfig(16, gate="mass", tile=16, threshold=0.1, sample=2)
    return MobaConfig.from_dict({**moba.to_dict(), "decode": "sparse"})


def rule_of(args: argparse.Namespace) -> SharedRule:
    """The rule of every layer."""
    rule = settings_of(args).for_layer(0, 1)
    assert isinstance(rule, SharedRule)
    return rule


def gate_shared(config: LlamaConfig, args: argparse.Namespace, device: str) -> None:
    """Steps equal the portable path, whether they hear the rows before them or not."""
    heads = (config.num_attention_heads, config.num_key_value_heads)
    dim, rule = config.hidden_size // config.num_attention_heads, rule_of(args)
    for heard in (None, rule.tile - 1):
        shape: dict[str, Any] = {"length": 150 if args.tiny else 20011, "dtype": torch.bfloat16}
        assert_steps(Steps(rule, heads, (dim, dim), heard=heard, device=device, **shape))


def take_summaries(cache: MobaCache, rule: SharedRule, length: int) -> None:
    """Computes the summaries of `length` slots of every layer."""
    set_length(cache, length)
    for layer in cache.layers:
        layer.backend = "triton"
        layer.block_means.forget(layer.max_cache_len)
        start = torch.zeros(1, dtype=torch.int64, device=layer.keys.device)
        layer.moba_means(layer.keys, start, rule.block_size, None, KeptMass(rule.rotary_pairs))


def random_choice(rule: SharedRule, length: int, words: int, heads: int, share: float, device: Any) -> Tensor:
    """A choice `(1, H, words)` of the step after `length` tokens that attends `share` of them."""
    block = torch.arange(words * 32, device=device)
    first = length // rule.tile * rule.tile // rule.block_size
    forced = (block < rule.sink_blocks) | (block >= first - rule.local_blocks)
    forced &= block <= length // rule.block_size
    free = (block < first) & ~forced
    rate = (share * length / rule.block_size - int(forced.sum())) / max(1, int(free.sum()))
    chosen = forced | (free & (torch.rand(heads, 1, words * 32, device=device) < rate))
    return pack_blocks(chosen, words).transpose(0, 1).contiguous()


def bytes_of(choice: Tensor, rule: SharedRule, kv_heads: int, dim: int, length: int) -> int:
    """Bytes per layer that a step reads: summaries, and blocks that any head of a group chose."""
    chosen = unpack_blocks(choice, choice.shape[2] * 32)[0].unflatten(0, (kv_heads, -1)).any(1)
    summaries = kv_heads * (length // rule.block_size) * KeptMass().width(dim, rule.block_size)
    return 2 * (int(chosen.sum()) * rule.block_size * 2 * dim + summaries)


@contextmanager
def replaced_choice(choice: Tensor, heard: Tensor | None) -> Iterator[None]:
    """Steps hear `heard` and attend `choice`, after computing their own."""
    choose = shared_steps.choose

    def replaced(
        q: Tensor, kept: Tensor, table: Tensor, rule: SharedRule, scale: float, _heard: Any
    ) -> Tensor:
        choose(q, kept, table, rule, scale, heard)
        return choice

    with mock.patch.object(shared_steps, "choose", replaced):
        yield


class SharedStages:
    """The stages of a shared step at `length` cached tokens."""

    def __init__(
        self, cache: MobaCache, config: LlamaConfig, length: int, share: float, args: argparse.Namespace
    ):
        self.layers, self.length, self.share, self.rule = cache.layers, length, share, rule_of(args)
        keys = cache.layers[0].keys
        self.kv_heads, self.dim, heads = keys.shape[1], keys.shape[3], config.num_attention_heads
        words = keys.shape[2] // self.rule.block_size // 32 + 1
        self.choice = random_choice(self.rule, length, words, heads, share, keys.device)
        shape = {"device": keys.device, "dtype": keys.dtype}
        self.q = torch.randn(1, heads, 1, self.dim, **shape)
        self.heard = torch.randn(1, heads, self.rule.tile - 1, self.dim, **shape)
        self.moved = bytes_of(self.choice, self.rule, self.kv_heads, self.dim, length)

    def measure(self, clock: Clock) -> list[Row]:
        """Microseconds per layer."""
        rule, rows = self.rule, []
        start = torch.zeros(1, dtype=torch.int64, device=self.q.device)
        # the last row of a tile, which hears the most rows
        at = self.length // rule.tile * rule.tile
        table, scale = batched_table(1, 1, at, self.q.device), self.dim**-0.5

        def summaries(layer: Any) -> None:
            layer.block_means.behind = 1
            layer.moba_means(layer.keys, start, rule.block_size, None, KeptMass(rule.rotary_pairs))

        def choose(layer: Any, heard: Tensor | None) -> Tensor:
            kept = layer.block_means.means[:, :, :-1]
            return shared_steps.choose(self.q, kept, table, rule, scale, heard)

        def attend(layer: Any) -> object:
            where = (self.choice, table, rule.block_size, scale)
            return shared_steps_attend.attend(self.q, layer.keys, layer.values, *where)

        stages = {
            "summaries, a block completed": summaries,
            "choose, alone": partial(choose, heard=None),
            f"choose, hears {rule.tile - 1} rows": partial(choose, heard=self.heard),
            f"attend {100 * self.share:g} % of the tokens": attend,
        }
        for stage, work in stages.items():
            us = clock.us(lambda work=work: [work(layer) for layer in self.layers], len(self.layers))
            rows.append({"length": self.length, "stage": f"shared, {stage}", "us": round(us, 1), "GB/s": ""})
            print(f"{self.length:>8}  shared, {stage:<40} {us:9.1f} us", flush=True)
        return rows
