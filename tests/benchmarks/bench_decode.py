"""Decode steps at length: stock cache and dense attention against MobaCache, dense and sparse.

    python tests/benchmarks/bench_decode.py                      # one layer on the CPU
    python tests/benchmarks/bench_decode.py --device cuda        # a whole model, CUDA graphs
    python tests/benchmarks/bench_decode.py --device cuda --tiny # the same at toy size, also on the CPU

Nothing is timed before its numbers are right: sparse rows against the reference, dense rows against sdpa.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moba_hf import MobaCache, MobaConfig
from moba_hf.attention import moba_attention_forward
from moba_hf.reference import moba_attention_ref


def layer(config: LlamaConfig) -> Any:
    """What the attention functions read of an attention module."""
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


def reference_row(q: Tensor, k: Tensor, v: Tensor, args: argparse.Namespace) -> Tensor:
    """The sparse row `(heads, dim)` by the reference, one group of heads at a time."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for h in range(k.shape[1]):
        queries = q[0, h * group : (h + 1) * group].transpose(0, 1)
        keys, values = (x[0, h : h + 1].transpose(0, 1) for x in (k, v))
        out, _ = moba_attention_ref(queries, keys, values, block_size=args.block_size, topk=args.topk)
        rows.append(out[0].float())
    return torch.cat(rows)


def median_ms(step: Callable[[], Any], runs: int) -> float:
    """Median milliseconds of `runs` calls after two more that do not count."""
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
                check(outputs[name], reference_row(q, *(cache.layers[0].keys, cache.layers[0].values), args))
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
    """Correctness gate: bf16 rounding of the output and of the softmax weights, no more."""
    error, size = (got - expected).abs().max(), expected.abs().max()
    assert error <= 2**-6 * size, f"wrong by {error:.2e} where values reach {size:.2e}"


def model_config(args: argparse.Namespace, length: int) -> LlamaConfig:
    """Llama-3.1-8B's shape, or a toy of it."""
    shape: dict[str, int] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    if args.tiny:
        shape = dict.fromkeys(shape, 64) | {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    return LlamaConfig(**shape, max_position_embeddings=length + 1024)


def fill(cache: MobaCache, config: LlamaConfig, length: int, device: str, dtype: torch.dtype) -> None:
    """Random keys and values in every layer; a decode step reads as much of them as of real ones."""
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    for index in range(config.num_hidden_layers):
        for begin in range(0, length, 65536):
            count = min(65536, length - begin)
            states = [torch.randn(1, heads, count, dim, device=device, dtype=dtype) for _ in range(2)]
            key, _ = cache.update(*states, index)
        moba = cache.layers[index]
        if moba.block_means.block_size is not None:
            moba.moba_means(
                key, torch.zeros(1, dtype=torch.int64, device=device), moba.block_means.block_size
            )


def bytes_per_token(config: LlamaConfig, rule: MobaConfig | None, length: int, weights: int) -> int:
    """Bytes that a decode step must read: weights, and cached keys and values (sparse: chosen + means)."""
    kv, heads = config.num_key_value_heads, config.num_attention_heads
    dim = config.hidden_size // heads
    if rule is None:
        cached = 2 * kv * length * dim
    else:
        chosen = min(length, rule.block_size * rule.topk)
        cached = 2 * heads * chosen * dim + kv * (length // rule.block_size) * dim
    return weights + 2 * cached * config.num_hidden_layers


def captured_step(model: Any, cache: Any, device: str) -> Callable[[], Tensor]:
    """One decode step of the model, as a CUDA graph on a GPU. Replays write the slots that follow."""
    token = torch.ones(1, 1, dtype=torch.int64, device=device)

    def step() -> Tensor:
        return model(token, past_key_values=cache, use_cache=True).logits

    if device != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        torch.cuda.synchronize()
        return logits

    return replay


class DenseRows:
    """Dense decode over the written part of a preallocated cache, by the sdpa kernel that is chosen.

    Keys beyond the written slots are cut off by a fixed length, so that fused kernels need no mask.
    """

    def __init__(self, length: int):
        self.length = length

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = k[:, :, : self.length], v[:, :, : self.length]
        group = q.shape[1] // k.shape[1]
        rows = q.reshape(q.shape[0], k.shape[1], group, q.shape[3])  # grouped heads as rows: no repeated keys
        out = nn.functional.scaled_dot_product_attention(rows, keys, values, scale=kwargs.get("scaling"))
        return out.reshape(q.shape[0], q.shape[1], 1, -1).transpose(1, 2), None


def bench_model(args: argparse.Namespace) -> None:
    """Tokens per second of a whole model: dense with the best sdpa kernel against sparse."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import AttentionInterface, AttentionMaskInterface

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16
    AttentionMaskInterface.register("dense_bench", lambda **kwargs: None)
    for length in args.lengths:
        config = model_config(args, length)
        rule = MobaConfig(args.block_size, args.topk, decode="sparse")
        config.moba = rule.to_dict()
        torch.manual_seed(0)
        with torch.device(device):
            model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="moba").eval()
        weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed" not in n)
        results: dict[str, float] = {}
        with torch.no_grad():
            cache = MobaCache(config, static=True, max_cache_len=length + 512)
            fill(cache, config, length, device, dtype)
            gate_model(model, cache, config, args)
            results["sparse"] = median_ms(captured_step(model, cache, device), args.runs)
            AttentionInterface.register("dense_bench", DenseRows(length))
            model.set_attn_implementation("dense_bench")
            for backend in (
                SDPBackend.FLASH_ATTENTION,
                SDPBackend.CUDNN_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION,
                SDPBackend.MATH,
            ):
                try:
                    with sdpa_kernel(backend):
                        name = f"dense, {backend.name.lower()}"
                        results[name] = median_ms(captured_step(model, cache, device), args.runs)
                except RuntimeError as error:  # noqa: PERF203
                    print(f"{backend.name}: {str(error).splitlines()[0]}")
        best = min(ms for name, ms in results.items() if name != "sparse")
        print(f"{length} cached tokens, {device}, bf16, block {args.block_size}, topk {args.topk}")
        for name, ms in results.items():
            moved = bytes_per_token(config, rule if name == "sparse" else None, length, weights)
            print(
                f"{name:<24} {ms:8.2f} ms  {1e3 / ms:8.1f} tokens/s  {moved / ms / 1e6:8.1f} GB/s"
                f"  {best / ms:6.2f} x best dense"
            )
        del model, cache


def gate_model(model: Any, cache: Any, config: LlamaConfig, args: argparse.Namespace) -> None:
    """The sparse row of the first layer against the reference on the same cached keys."""
    first = cache.layers[0]
    module = model.model.layers[0].self_attn
    length = int(first.cumulative_length)
    q = torch.randn(
        1,
        config.num_attention_heads,
        1,
        first.keys.shape[3],
        device=first.keys.device,
        dtype=first.keys.dtype,
    )
    written = (torch.arange(first.max_cache_len, device=q.device) < length).to(torch.int8)
    key = first.keys.view(first.keys.shape)
    key.moba_layer = first
    got = moba_attention_forward(module, q, key, first.values, written[None, None, None])[0][0, 0].float()
    keys, values = first.keys[:, :, :length], first.values[:, :, :length]
    check(got, reference_row(q, keys, values, args))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a toy model at 2,048 tokens")
    parser.add_argument("--length", type=int, default=131072, help="cached tokens of the layer benchmark")
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 524288])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--topk", type=int, default=16)
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    if args.device == "cpu":
        bench_layer(args)
        return
    if args.tiny:
        args.lengths, args.block_size, args.topk = [2048], 32, 8
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU here; --tiny runs the same code at toy size")
    bench_model(args)


if __name__ == "__main__":
    main()
