"""The cost of a mask of ones: prefill and decode steps with and without it, alternating in one process.

Run: python tests/benchmarks/bench_masks.py [--lengths 8192 32768] [--layers 4] [--steps 16] [--rounds 5]
     [--compile] [--full]

The model has random weights and the shape of an 8B Llama on a GPU (a small one on the CPU). With `--full`,
every layer attends all keys, otherwise only the last one. `--compile` compiles the forward without a cache
and measures only that. Prints the median time of a forward in ms, with and without a mask, and their ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from inspect import signature
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from moba_hf import MobaCache, MobaConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(layers: int, full: bool) -> Any:
    """A model with random weights, bf16 on a GPU, fp32 on the CPU."""
    gpu = DEVICE.type == "cuda"
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=4096 if gpu else 256,
        intermediate_size=14_336 if gpu else 512,
        num_hidden_layers=layers,
        num_attention_heads=32 if gpu else 4,
        num_key_value_heads=8 if gpu else 2,
        head_dim=128 if gpu else 64,
        max_position_embeddings=131_072,
    )
    config.moba = MobaConfig(128, 8, full_attention_layers=range(layers) if full else (-1,)).to_dict()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="moba")
    return model.to(DEVICE, torch.bfloat16 if gpu else torch.float32).eval()


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of one call, including the device's work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    begin = perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (perf_counter() - begin) * 1e3


def one_round(model: Any, ids: Tensor, steps: int, order: tuple[bool, bool]) -> dict[str, dict[bool, float]]:
    """Times of a prefill and of a decode step (median of `steps`), with and without a mask of ones.

    The two alternate step by step, so that other load on the machine affects both.
    """
    length, ones = ids.shape[1] - steps, torch.ones_like(ids)
    name = "cache" if "cache" in signature(type(model).forward).parameters else "past_key_values"
    caches = {masked: MobaCache(model.config, max_cache_len=ids.shape[1]) for masked in order}

    def step(masked: bool, begin: int, end: int) -> float:
        given = {"attention_mask": ones[:, :end] if masked else None, name: caches[masked]}
        return timed(lambda: model(ids[:, begin:end], use_cache=True, logits_to_keep=1, **given))

    prefill = {masked: step(masked, 0, length) for masked in order}
    decode: dict[bool, list[float]] = {True: [], False: []}
    for begin in range(length, length + steps):
        for masked in order if begin % 2 else order[::-1]:
            decode[masked].append(step(masked, begin, begin + 1))
    return {"prefill": prefill, "decode step": {masked: median(each) for masked, each in decode.items()}}


def compare(model: Any, length: int, steps: int, rounds: int, compiled: bool) -> None:
    """Prints one line per stage: ms with a mask of ones, ms without, and their ratio."""
    ids = torch.randint(2, 1000, (1, length + steps), device=DEVICE)
    times: dict[str, dict[bool, list[float]]] = {}
    for turn in range(rounds + 1):
        order = (True, False) if turn % 2 else (False, True)
        if compiled:
            masks = {True: torch.ones_like(ids), False: None}
            calls = {m: partial(model, ids, attention_mask=masks[m], use_cache=False) for m in order}
            found = {"compiled prefill": {m: timed(call) for m, call in calls.items()}}
        else:
            found = one_round(model, ids, steps, order)
        for stage, each in found.items():
            for masked, took_ms in each.items():
                if turn:  # the first round is a warm-up
                    times.setdefault(stage, {True: [], False: []})[masked].append(took_ms)
    for stage, both in times.items():
        with_mask, without = median(both[True]), median(both[False])
        print(
            f"{length:7,d} tokens  {stage:16s}  ones {with_mask:9.2f} ms  none {without:9.2f} ms  "
            f"ratio {with_mask / without:.3f}"
        )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32_768])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = build(arguments.layers, arguments.full)
    run = torch.compile(model, dynamic=False) if arguments.compile else model
    print(torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU", torch.__version__)
    for length in arguments.lengths:
        compare(run, length, arguments.steps, arguments.rounds, arguments.compile)


if __name__ == "__main__":
    main()
