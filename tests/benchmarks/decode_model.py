"""Tokens per second of a whole model, one CUDA graph per step, and how a step spends its time."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from decode_gates import check
from decode_setup import Clock, Row, set_length
from decode_shared import SharedStages, replaced_choice, settings_of, take_summaries
from decode_stages import dense_sdpa
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig
from transformers.models.llama import modeling_llama

from moba_hf import MobaCache
from moba_hf.hf.cache_names import cache_kwargs


@contextmanager
def fused_elementwise(enabled: bool) -> Iterator[None]:
    """Compiles Llama's norms, rotary embedding and MLP, in the same way for every variant."""
    norm, mlp = modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP
    before = (norm.forward, mlp.forward, modeling_llama.apply_rotary_pos_emb)
    if enabled:
        settings = {"fullgraph": True, "dynamic": False}
        norm.forward = torch.compile(norm.forward, **settings)
        mlp.forward = torch.compile(mlp.forward, **settings)
        modeling_llama.apply_rotary_pos_emb = torch.compile(before[2], **settings)
    try:
        yield
    finally:
        norm.forward, mlp.forward, modeling_llama.apply_rotary_pos_emb = before


def bytes_per_token(config: LlamaConfig, args: argparse.Namespace, sparse: bool, length: int) -> int:
    """Bytes of cached keys, values and means that a decode step must read."""
    kv, heads = config.num_key_value_heads, config.num_attention_heads
    dim = config.hidden_size // heads
    cached = 2 * kv * length * dim
    if sparse:
        chosen = min(length, args.block_size * args.topk)
        cached = 2 * heads * chosen * dim + kv * (length // args.block_size) * dim
    return 2 * cached * config.num_hidden_layers


def bench_model(
    model: Any,
    cache: MobaCache,
    config: LlamaConfig,
    shared: SharedStages,
    best_sdpa: str,
    args: argparse.Namespace,
    clock: Clock,
) -> list[Row]:
    """Tokens per second of the whole model: sparse, dense by our kernel and the best of sdpa, shared."""
    length = shared.length
    device = cache.layers[0].keys.device
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed" not in n)
    token = torch.ones(1, 1, dtype=torch.int64, device=device)
    run = torch.compile(model, fullgraph=True, dynamic=False) if args.whole else model
    rows: list[Row] = []
    logits: dict[str, Tensor] = {}

    def step() -> Tensor:
        return run(token, **cache_kwargs(model, cache), use_cache=True).logits

    def measure(name: str, sparse: bool, moved: int | None = None) -> None:
        set_length(cache, length)
        logits[name] = step().float()
        if not sparse and len(logits) > 2:
            check(name, logits[name], logits["dense, split keys"], 2**-4)
        set_length(cache, length)
        ms = clock.us(step) / 1e3
        moved = weights + (bytes_per_token(config, args, sparse, length) if moved is None else moved)
        rows.append(
            {
                "length": length,
                "attention": name,
                "ms": round(ms, 3),
                "tokens/s": round(1e3 / ms, 1),
                "GB/s": round(moved / ms / 1e6),
            }
        )
        print(f"{length:>8}  {name:<30} {ms:8.2f} ms {1e3 / ms:8.1f} tokens/s {moved / ms / 1e6:7.0f} GB/s")

    model.set_attn_implementation("moba")
    for name, decode in (("sparse", "sparse"), ("dense, split keys", "full")):
        model.config.moba["decode"] = decode
        measure(name, decode == "sparse")
    if best_sdpa:
        backend, way = best_sdpa.split(", ")
        attend = dense_sdpa(backend, way == "folded", length)
        AttentionMaskInterface.register("dense_bench", lambda **kwargs: None)
        AttentionInterface.register(
            "dense_bench", lambda module, q, k, v, *a, **kw: (attend(q, k, v).transpose(1, 2), None)
        )
        model.set_attn_implementation("dense_bench")
        measure(f"dense, sdpa {best_sdpa}", False)
        model.set_attn_implementation("moba")
    model.config.moba["decode"] = "sparse"
    best = min(row["ms"] for row in rows if row["attention"] != "sparse")
    per_query, model.config.moba = model.config.moba, settings_of(args).to_dict()
    take_summaries(cache, shared.rule, length)
    for hears, heard in (("alone", None), (f"hears {shared.rule.tile - 1}", shared.heard)):
        with replaced_choice(shared.choice, heard):
            name = f"shared {100 * shared.share:g} %, {hears}"
            measure(name, True, shared.moved * config.num_hidden_layers)
    if args.profile and device.type == "cuda":
        with replaced_choice(shared.choice, shared.heard):
            set_length(cache, length)
            profile(model, cache)
    model.config.moba = per_query
    for row in rows:
        row["x best dense"] = round(best / row["ms"], 2)
    return rows


def profile(model: Any, cache: MobaCache) -> None:
    """Prints the device time of one replayed sparse step, by kernel."""
    token = torch.ones(1, 1, dtype=torch.int64, device=cache.layers[0].keys.device)

    def step() -> Tensor:
        return model(token, **cache_kwargs(model, cache), use_cache=True).logits

    graph = Clock.capture(step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / 3
    print(f"          kernels: {sum(e.count for e in events) // 3} in {total:.0f} us")
    for e in events[:16]:
        each = e.self_device_time_total / e.count
        print(
            f"          {e.self_device_time_total / 3:8.0f} us  {e.count // 3:4} x {each:6.2f}  {e.key[:90]}"
        )
