"""Decode steps with a long cache: the stock cache with dense attention against MobaCache, dense and sparse.

    python tests/benchmarks/bench_decode.py                      # one layer on the CPU
    python tests/benchmarks/bench_decode.py --device cuda        # stages and a whole model, CUDA graphs
    python tests/benchmarks/bench_decode.py --model DIR --text FILE   # loss and bytes of a shared choice, CPU
    TRITON_INTERPRET=1 python tests/benchmarks/bench_decode.py --device cuda --tiny  # the GPU code, anywhere

All results are checked before timing: sparse rows against the reference, dense rows against sdpa.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from decode_setup import reference_row
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moba_hf import MobaCache, MobaConfig
from moba_hf.hf.attention import moba_attention_forward


def layer(config: LlamaConfig) -> Any:
    """An object with the attributes of an attention module that the attention functions read."""
    module = nn.Module()
    module.config, module.layer_idx, module.is_causal = config, 0, True
    module.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
    return module


def one_layer_config(args: argparse.Namespace, decode: str) -> LlamaConfig:
    config = LlamaConfig(
        hidden_size=args.heads * args.head_dim,
        num_hidden_layers=1,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
    )
    config._attn_implementation = "moba"
    config.moba = MobaConfig(args.block_size, args.topk, decode=decode).to_dict()
    return config


def median_ms(step: Callable[[], Any], runs: int) -> float:
    """Median milliseconds of `runs` calls, after two warm-up calls."""
    times = []
    for i in range(runs + 2):
        begin = time.perf_counter()
        step()
        if i > 1:
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def bench_layer(args: argparse.Namespace) -> None:
    """One decode step of one layer on the CPU."""
    torch.manual_seed(0)
    shape = (1, args.kv_heads, args.length, args.head_dim)
    keys, values = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(2))
    new = [torch.randn(1, args.kv_heads, 1, args.head_dim, dtype=torch.bfloat16) for _ in range(2)]
    q = torch.randn(1, args.heads, 1, args.head_dim, dtype=torch.bfloat16)
    scale = args.head_dim**-0.5
    variants: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {}
    stock = layer(one_layer_config(args, "full"))
    variants["DynamicCache + sdpa"] = (
        DynamicCache(config=stock.config),
        lambda k, v: sdpa_attention_forward(stock, q, k, v, None, scaling=scale)[0],
    )
    for name, decode in (("MobaCache + dense", "full"), ("MobaCache + sparse", "sparse")):
        module = layer(one_layer_config(args, decode))
        variants[name] = (
            MobaCache(module.config, max_cache_len=args.length + 64),
            lambda k, v, m=module: moba_attention_forward(m, q, k, v, None, scaling=scale)[0],
        )
    outputs, times = {}, {}
    with torch.no_grad():
        for name, (cache, attend) in variants.items():
            cache.update(keys, values, 0)

            def step(cache: Any = cache, attend: Any = attend) -> Tensor:
                return attend(*cache.update(*new, 0))

            outputs[name] = step()[0, 0].float()
            if name.endswith("sparse"):
                check(outputs[name], reference_row(q, cache.layers[0].keys, cache.layers[0].values, args)[0])
            times[name] = median_ms(step, args.runs)
    dense, expected = outputs["MobaCache + dense"], outputs["DynamicCache + sdpa"]
    check(dense, expected)
    base = times["DynamicCache + sdpa"]
    print(
        f"{args.length} cached tokens, {args.heads}/{args.kv_heads} heads, head_dim {args.head_dim}, bf16, "
    )
    print(
        f"block {args.block_size}, topk {args.topk}, {torch.get_num_threads()} threads; ms per step, median"
    )
    for name, ms in times.items():
        print(f"{name:<22} {ms:9.2f} ms   {base / ms:7.1f} x")


def check(got: Tensor, expected: Tensor) -> None:
    """Checks that the error is at most the bf16 rounding of the output and of the softmax weights."""
    error, size = (got - expected).abs().max(), expected.abs().max()
    assert error <= 2**-6 * size, f"wrong by {error:.2e} where values reach {size:.2e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a toy model at 300 tokens")
    parser.add_argument("--length", type=int, default=131072, help="cached tokens of the layer benchmark")
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 524288])
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.05, 0.03],
        help="GPU: share of the cached tokens that a shared choice attends, for each of --lengths",
    )  # fmt: skip
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--topk", type=int, default=16)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--whole", action="store_true", help="GPU: compile the whole model (slow to start)")
    parser.add_argument("--profile", action="store_true", help="GPU: profile a step")
    parser.add_argument(
        "--sdpa", nargs="+", help='GPU: sdpa variants, e.g. "cudnn, enable_gqa"; default: all'
    )
    parser.add_argument(
        "--tiles", type=int, help="GPU: number of tiles of the split-key kernel; default: all"
    )
    parser.add_argument("--no-flex", action="store_true", help="GPU: do not time flex attention")
    parser.add_argument("--out", help="GPU: folder for CSV and Markdown")
    parser.add_argument("--model", help="a checkpoint: measure loss and bytes of sparse steps")
    parser.add_argument(
        "--text", nargs="+", help="with --model: text files, or FILE.npz:NAME of shared_texts.py"
    )
    parser.add_argument(
        "--preset", default="default", help="with --model or on a GPU: a preset with tile > 1"
    )
    parser.add_argument("--threshold", type=float, nargs="+", help="with --model: thresholds of the steps")
    parser.add_argument("--tokens", type=int, default=8192, help="with --model: tokens of each text")
    parser.add_argument(
        "--steps", type=int, default=1024, help="with --model: how many last tokens are steps"
    )
    args = parser.parse_args()
    if args.model:
        if not args.text or args.steps % 64 or not 64 < args.steps < args.tokens:
            parser.error("--model needs --text, and --steps a multiple of 64 from 128 on, below --tokens")
        from decode_loss import bench as bench_loss

        bench_loss(args)
        return
    if args.device == "cpu":
        bench_layer(args)
        return
    if args.tiny:
        args.lengths, args.block_size, args.topk, args.shares = [150, 300], 16, 4, [0.5, 0.5]
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU here; --tiny runs the same code at toy size")
    from decode_gpu import bench

    bench(args)


if __name__ == "__main__":
    main()
