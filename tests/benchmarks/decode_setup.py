"""Shared by the decode benchmarks: reference rows, the model's shape, one long static cache, the clock."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from moba_hf import MobaCache, MobaConfig
from moba_hf.op.reference import moba_attention_ref

SPARE = 2048  # slots for decoded tokens
Row = dict[str, Any]


def reference_row(q: Tensor, k: Tensor, v: Tensor, args: argparse.Namespace) -> Tensor:
    """The sparse rows `(queries, heads, dim)` from the reference, one group of heads at a time."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for h in range(k.shape[1]):
        queries = q[0, h * group : (h + 1) * group].transpose(0, 1)
        keys, values = (x[0, h : h + 1].transpose(0, 1) for x in (k, v))
        out, _ = moba_attention_ref(queries, keys, values, block_size=args.block_size, topk=args.topk)
        rows.append(out.float())
    return torch.cat(rows, dim=1)


def model_config(args: argparse.Namespace) -> LlamaConfig:
    """Llama-3.1-8B's shape, or a toy version of it."""
    shape: dict[str, int] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    if args.tiny:
        shape = dict.fromkeys(shape, 64) | {"num_hidden_layers": 2, "num_attention_heads": 4}
        shape["num_key_value_heads"] = 2
    config = LlamaConfig(**shape, max_position_embeddings=max(args.lengths) + 2 * SPARE)
    config.moba = MobaConfig(args.block_size, args.topk, decode="sparse").to_dict()
    return config


class Clock:
    """Times work as CUDA graphs; without a GPU, only runs it once."""

    def __init__(self, device: str, replays: int):
        self.device, self.replays = device, replays

    def us(self, work: Callable[[], object], parts: int = 1) -> float:
        """Microseconds of `work` divided by `parts`: the median of three runs of `replays` replays."""
        if self.device != "cuda":
            work()
            return 1.0
        graph = self.capture(work)
        times = []
        for _ in range(4):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(self.replays):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / self.replays / parts)
        return sorted(times[1:])[1]

    @staticmethod
    def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph


def filled_cache(config: LlamaConfig, length: int, device: str) -> MobaCache:
    """A static cache with random numbers in every slot, and the means of its blocks."""
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cache = MobaCache(config, static=True, max_cache_len=length + SPARE)
    for index, layer in enumerate(cache.layers):
        states = [torch.zeros(1, heads, 1, dim, device=device, dtype=torch.bfloat16) for _ in range(2)]
        cache.update(*states, index)
        layer.keys.normal_()
        layer.values.normal_()
    take_means(cache, config, length)
    return cache


def set_length(cache: MobaCache, length: int) -> None:
    """Marks `length` slots as filled; the means of their complete blocks already exist."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def take_means(cache: MobaCache, config: LlamaConfig, length: int) -> None:
    """Recomputes the means of `length` slots, since timing a shorter length overwrote later slots."""
    set_length(cache, length)
    for layer in cache.layers:
        layer.backend = "triton"
        layer.block_means.forget(layer.max_cache_len)
        start = torch.zeros(1, dtype=torch.int64, device=layer.keys.device)
        layer.moba_means(layer.keys, start, config.moba["block_size"])
