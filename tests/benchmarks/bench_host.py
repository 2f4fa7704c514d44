"""Microseconds that the host takes for the attention of one layer, measured without a GPU.

    python tests/benchmarks/bench_host.py
    python tests/benchmarks/bench_host.py --cases prefill "sparse step"

The attention function runs as on a Hopper GPU, on small tensors on the CPU: Triton's launches stop before the
driver, and torch's own attention returns at once. So the driver and CUDA's allocator come on top. The best of
many short runs counts, because whatever else the machine does only adds time. `python` is the time without
Triton's part of the launches.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
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
CASES = {  # rule, tokens and queries
    "prefill": (SHARED, TOKENS, TOKENS),
    "prefill, part of a block": (SHARED, TOKENS + 1, TOKENS + 1),
    "training": (SHARED, TOKENS, TOKENS),
    "per query": (MobaConfig(block_size=64, topk=2), TOKENS, TOKENS),
    "full step": (SHARED, TOKENS, 1),
    "sparse step": (replace(SHARED, decode="sparse"), TOKENS, 1),
    "sparse step per query": (MobaConfig(block_size=64, topk=2, decode="sparse"), TOKENS, 1),
}


def pretend_hopper() -> None:
    """From now on, launches compile for Hopper and stop before the driver; CPU tensors count as CUDA's."""
    binary = (0, 0, 32, 0, 1024)  # module, function, registers, spills, threads
    memory = {"max_shared_mem": 227 << 10}
    no_gpu: Any = SimpleNamespace(
        utils=SimpleNamespace(get_device_properties=lambda _: memory, load_binary=lambda *_: binary),
        launcher_cls=lambda *_: lambda *_: None,
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    driver.set_active(no_gpu)
    kernels.unsupported_device = lambda _: None
    dispatch.compiles = lambda _: True
    backends._AUTO["cpu"] = ("triton",)
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, **_: q


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


def microseconds(call: Callable[[], object], seconds: float = 3.0) -> float:
    """The least time of a call, over runs of three."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        call(), call(), call()
        best = min(best, time.perf_counter() - begin)
    return best / 3 * 1e6


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    args = parser.parse_args()
    pretend_hopper()
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    print("| case | launches | whole | python |\n| --- | --- | --- | --- |")
    run = triton.JITFunction.run
    for name in args.cases:
        with torch.set_grad_enabled(name == "training"):
            call = layer_of(*CASES[name], torch.is_grad_enabled())
            call()  # compiles, and makes what all layers share
            with mock.patch.object(triton.JITFunction, "run", autospec=True, side_effect=run) as launches:
                call()
            whole = microseconds(call)
            with mock.patch.object(triton.JITFunction, "run", new=nothing):
                python = microseconds(call)
        print(f"| {name} | {launches.call_count} | {whole:.0f} | {python:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
