"""Microseconds that the host takes for the attention of one layer, measured without a GPU.

    python tests/benchmarks/bench_host.py
    python tests/benchmarks/bench_host.py --cases prefill --profile

The attention function runs as on a Hopper GPU, on small tensors on the CPU: Triton's launches stop before the
driver, and torch's own attention returns at once. So the driver and CUDA's allocator come on top. The best of
many short runs counts, because whatever else the machine does only adds time. `python` is the time without
Triton's part of the launches.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from moba_hf import MobaCache, MobaConfig, kernels
from moba_hf.hf.attention import moba_attention_forward
from moba_hf.hf.rows import Rows
from moba_hf.kernels.hopper import dispatch
from moba_hf.op import backends

HEADS, KV_HEADS, DIM, TOKENS = 4, 1, 128, 192
SHARED = replace(MobaConfig.from_preset("default"), dense_below=128)
CASES: dict[str, tuple[MobaConfig, int, int, bool]] = {  # rule, tokens, queries, with gradients
    "prefill": (SHARED, TOKENS, TOKENS, False),
    "prefill, part of a block": (SHARED, TOKENS + 1, TOKENS + 1, False),
    "training": (SHARED, TOKENS, TOKENS, True),
    "per query": (MobaConfig(block_size=64, topk=2), TOKENS, TOKENS, False),
    "full step": (SHARED, TOKENS, 1, False),
    "sparse step": (replace(SHARED, decode="sparse"), TOKENS, 1, False),
    "sparse step per query": (MobaConfig(block_size=64, topk=2, decode="sparse"), TOKENS, 1, False),
}


def as_on_hopper() -> AbstractContextManager[Any]:
    """Launches of Triton compile for Hopper and stop before the driver; CPU tensors count as CUDA's."""
    loaded = (0, 0, 32, 0, 1024)  # module, function, registers, spills, threads
    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": 227 << 10}, load_binary=lambda *_: loaded
    )
    without_gpu: Any = SimpleNamespace(
        utils=utils,
        launcher_cls=lambda *_: lambda *_: None,
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    driver.set_active(without_gpu)
    stack = ExitStack()
    for place, name, value in (
        (kernels, "unsupported_device", lambda _: None),
        (dispatch, "compiles", lambda _: True),
        (backends, "_AUTO", {"cpu": ("triton",)}),
        (torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: q),
    ):
        stack.enter_context(mock.patch.object(place, name, value))
    return stack


def layer_of(rule: MobaConfig, tokens: int, queries: int, training: bool) -> Callable[[], object]:
    """A call of the attention function of one layer; steps use a cache that has been filled before."""
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM
    )
    config.moba, config._attn_implementation = rule.to_dict(), "moba"
    module = LlamaAttention(config, 1).train(training)

    def states(heads: int, length: int) -> Tensor:
        made = torch.zeros(1, length, heads, DIM, dtype=torch.bfloat16, requires_grad=training)
        return made.transpose(1, 2)

    q, k, v = states(HEADS, queries), states(KV_HEADS, tokens), states(KV_HEADS, tokens)
    if queries < tokens:
        k, v = MobaCache(config).update(k, v, 1)
    rows = Rows(1, queries, tokens, tokens - queries, "cpu")
    return lambda: moba_attention_forward(module, q, k, v, rows, scaling=DIM**-0.5)


def nothing(*_: Any, **__: Any) -> None:
    """Takes the place of a launch."""


def microseconds(call: Callable[[], object], seconds: float) -> float:
    """The least time of a call, over runs of three."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        call(), call(), call()
        best = min(best, time.perf_counter() - begin)
    return best / 3 * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each number")
    parser.add_argument("--profile", action="store_true", help="also print a profile of each case")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    print("| case | launches | whole | python |\n| --- | --- | --- | --- |")
    with as_on_hopper():
        for name in args.cases:
            *settings, training = CASES[name]
            with torch.set_grad_enabled(training):
                call, run = layer_of(*settings, training), triton.JITFunction.run
                call()  # compiles, and makes what all layers share
                with mock.patch.object(triton.JITFunction, "run", autospec=True, side_effect=run) as launches:
                    call()
                whole = microseconds(call, args.seconds)
                with mock.patch.object(triton.JITFunction, "run", new=nothing):
                    python = microseconds(call, args.seconds)
                print(f"| {name} | {launches.call_count} | {whole:.0f} | {python:.0f} |", flush=True)
                if args.profile:
                    profile = cProfile.Profile()
                    for _ in range(300):
                        profile.runcall(call)
                    pstats.Stats(profile).sort_stats("tottime").print_stats(40)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
