"""The GPU half of `bench_decode.py`: stages of a decode step, then a whole model, all in CUDA graphs.

One static cache of the longest length is filled with random keys and values; shorter lengths use its first
slots. Stages run over many layers of it, so that nothing measured lies in the L2 cache already.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from moba_hf import MobaCache, MobaConfig, kernels
from moba_hf.attention import moba_attention_forward
from moba_hf.block_means import block_means_of
from moba_hf.kernels.decode import decode_attention
from moba_hf.kernels.tuning import Tile
from moba_hf.reference import moba_attention_ref
from moba_hf.sequences import batched_table

SPARE = 2048  # slots for the tokens that are decoded
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TILES = [(Tile(64, 64, 4, 3), 2), (Tile(64, 128, 8, 3), 1), (Tile(64, 128, 4, 2), 1), (Tile(64, 64, 4, 4), 1),
         (Tile(64, 32, 4, 4), 3), (Tile(64, 64, 4, 2), 3)]  # fmt: skip
Row = dict[str, Any]


def model_config(args: argparse.Namespace) -> LlamaConfig:
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
        shape = dict.fromkeys(shape, 64) | {"num_hidden_layers": 2, "num_attention_heads": 4}
        shape["num_key_value_heads"] = 2
    config = LlamaConfig(**shape, max_position_embeddings=max(args.lengths) + 2 * SPARE)
    config.moba = MobaConfig(args.block_size, args.topk, decode="sparse").to_dict()
    return config


class Clock:
    """Times work as CUDA graphs; without a GPU it runs the work once, to show that it runs."""

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
    """A static cache whose every slot holds random numbers, and the means of its blocks."""
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
    """Says that `length` slots are written; the means of their complete blocks are there already."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def take_means(cache: MobaCache, config: LlamaConfig, length: int) -> None:
    """Takes the means of `length` slots anew: what was timed at a shorter length wrote over later slots."""
    set_length(cache, length)
    for layer in cache.layers:
        layer.block_means.forget(layer.max_cache_len)
        start = torch.zeros(1, dtype=torch.int64, device=layer.keys.device)
        layer.moba_means(layer.keys, start, config.moba["block_size"])


def check(name: str, got: Tensor, expected: Tensor, share: float = 2**-6) -> None:
    """Correctness gate: bf16 rounding of the output and of the softmax weights, no more."""
    error, size = (got.float() - expected.float()).abs().max(), expected.float().abs().max()
    assert error <= share * size, f"{name}: wrong by {error:.2e} where values reach {size:.2e}"


def reference_row(q: Tensor, k: Tensor, v: Tensor, args: argparse.Namespace) -> Tensor:
    """The sparse rows `(queries, heads, dim)` by the reference, one group of heads at a time."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for h in range(k.shape[1]):
        queries = q[0, h * group : (h + 1) * group].transpose(0, 1)
        keys, values = (x[0, h : h + 1].transpose(0, 1) for x in (k, v))
        out, _ = moba_attention_ref(queries, keys, values, block_size=args.block_size, topk=args.topk)
        rows.append(out.float())
    return torch.cat(rows, dim=1)


def gate(cache: MobaCache, config: LlamaConfig, args: argparse.Namespace) -> None:
    """Decode rows against prefill rows, the reference and torch's dense attention, on cached keys."""
    first = cache.layers[0]
    length = min(8 * args.block_size * args.topk + 77, max(args.lengths))
    keys, values = first.keys[:, :, :length], first.values[:, :, :length]
    heads, device = config.num_attention_heads, keys.device
    queries = torch.randn(1, heads, 200, keys.shape[3], device=device, dtype=keys.dtype)
    rule = (args.block_size, args.topk, 0, 0)
    whole = kernels.select_blocks(queries, keys, batched_table(1, 200, length, device), 200, length, *rule)
    means = block_means_of(keys, None, args.block_size)
    for count in (1, 5, 16):
        some, table = queries[:, :, -count:], batched_table(1, count, length, device)
        choice = kernels.choose_blocks(some, means, table, length, *rule)
        same = choice.sort(3).values == whole[:, -count:].sort(3).values
        assert same.all(), f"{int((~same).sum())} of {same.numel()} chosen blocks differ from prefill's"
        out, _ = decode_attention(
            some, keys, values, choice, table, count, args.block_size, keys.shape[3] ** -0.5, by_row=True
        )
        if count == 1:
            check("sparse", out[0], reference_row(some, keys, values, args))
        group = heads // keys.shape[1]
        mask = torch.ones(count, length, dtype=torch.bool, device=device).tril(length - count)
        exact = nn.functional.scaled_dot_product_attention(
            some.float(), *(x.float().repeat_interleave(group, 1) for x in (keys, values)), attn_mask=mask
        )
        dense, _ = kernels.dense_decode_attention(some, keys, values, table, keys.shape[3] ** -0.5)
        check("dense", dense, exact.transpose(1, 2))


def gate_model(model: Any, cache: MobaCache, config: LlamaConfig, args: argparse.Namespace) -> None:
    """The attention function on the longest cache, through the layer, against the reference."""
    first, module = cache.layers[0], model.model.layers[0].self_attn
    length = int(first.cumulative_length)
    dtype, device = first.keys.dtype, first.keys.device
    q = torch.randn(1, config.num_attention_heads, 1, first.keys.shape[3], device=device, dtype=dtype)
    written = (torch.arange(first.max_cache_len, device=device) < length).to(torch.int8)
    key = first.keys.view(first.keys.shape)
    key.moba_layer = first
    got = moba_attention_forward(module, q, key, first.values, written[None, None, None])[0]
    keys, values = first.keys[:, :, :length], first.values[:, :, :length]
    check("model", got[0], reference_row(q, keys, values, args))


def dense_sdpa(name: str, fold: bool, length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Dense decode of the first `length` slots by one sdpa kernel, keys never repeated.

    Args:
        fold: pass the heads of a group as rows; else `enable_gqa`.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = k[:, :, :length], v[:, :, :length]
        with sdpa_kernel(BACKENDS[name]):
            if not fold:
                return nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
            rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
            return nn.functional.scaled_dot_product_attention(rows, keys, values).view(q.shape)

    return attend


def dense_flex(length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Dense decode by flex attention, compiled, which splits the keys of short queries."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k[:, :, :length], v[:, :, :length], enable_gqa=True)


class Stages:
    """Microseconds per layer of what a decode step does beside the weights, at `length` cached tokens."""

    def __init__(
        self, cache: MobaCache, config: LlamaConfig, length: int, args: argparse.Namespace, clock: Clock
    ):
        self.cache, self.layers, self.length, self.args, self.clock = cache, cache.layers, length, args, clock
        self.heads, self.keys = config.num_attention_heads, cache.layers[0].keys
        self.scale = self.keys.shape[3] ** -0.5
        self.dense_bytes = 4 * self.keys.shape[1] * length * self.keys.shape[3]
        self.rows: list[Row] = []

    def note(self, stage: str, work: Callable[[Any], object], moved: int = 0, layers: int = 0) -> float:
        """Times `work(layer)` over the layers; `moved` bytes each."""
        some = self.layers[: layers or len(self.layers)]
        us = self.clock.us(lambda: [work(layer) for layer in some], len(some))
        rate = moved / us / 1e3
        self.rows.append({"length": self.length, "stage": stage, "us": round(us, 1), "GB/s": round(rate)})
        print(f"{self.length:>8}  {stage:<48} {us:9.1f} us {rate:8.0f} GB/s", flush=True)
        return us

    def random(self, heads: int, count: int) -> Tensor:
        return torch.randn(
            1, heads, count, self.keys.shape[3], device=self.keys.device, dtype=self.keys.dtype
        )

    def sparse(self, count: int) -> None:
        """Cache, means, choice and attention of `count` queries."""
        size, topk, dim, kv_heads = (
            self.args.block_size,
            self.args.topk,
            self.keys.shape[3],
            self.keys.shape[1],
        )
        q, new = self.random(self.heads, count), self.random(kv_heads, count)
        start = torch.zeros(1, dtype=torch.int64, device=q.device)
        table = batched_table(1, count, self.length, q.device)

        def means(layer: Any) -> None:
            layer.block_means.behind = count
            layer.moba_means(layer.keys, start, size)

        def choose(layer: Any) -> Tensor:
            kept = layer.block_means.means[:, :, :-1]
            return kernels.choose_blocks(q, kept, table, layer.max_cache_len, size, topk, 0, 0)

        def attend(layer: Any, segments: int | None = None) -> object:
            rest = (choices[layer], table, count, size, self.scale)
            return decode_attention(q, layer.keys, layer.values, *rest, by_row=True, segments=segments)

        choices = {layer: choose(layer) for layer in self.layers}
        set_length(self.cache, self.length)
        self.note(f"append, {count} token(s)", lambda layer: layer.update(new, new))
        set_length(self.cache, self.length)
        self.note(f"means, {count} token(s)", means)
        self.note(f"choose, {count} token(s)", choose, 2 * kv_heads * (self.length // size) * dim)
        moved = 4 * self.heads * count * size * topk * dim
        self.note(f"attend chosen, {count} token(s)", attend, moved)
        for segments in (1, 2, 4) if count == 1 else ():
            name = f"attend chosen, {count} token(s), blocks in {segments}"
            self.note(name, partial(attend, segments=segments), moved)

    def dense(self, count: int, tiles: list[tuple[Tile | None, int | None]]) -> None:
        """Full attention by the split-key kernel."""
        q = self.random(self.heads, count)
        table = batched_table(1, count, self.length, q.device)
        for tile, programs in tiles:

            def attend(layer: Any, tile: Tile | None = tile, programs: int | None = programs) -> object:
                return kernels.dense_decode_attention(
                    q, layer.keys, layer.values, table, self.scale, tile, programs
                )

            name = f"dense, split keys, {count} token(s)"
            if tile is not None:
                name += f", n={tile.n} w={tile.warps} s={tile.stages} p={programs}"
            self.note(name, attend, self.dense_bytes, layers=8)

    def sdpa(self, flex: bool) -> str:
        """Full attention by torch; the fastest way of sdpa."""
        ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            f"{name}{', folded' if fold else ', enable_gqa'}": dense_sdpa(name, fold, self.length)
            for name in BACKENDS
            for fold in (True, False)
        }
        if self.args.sdpa:
            ways = {name: ways[name] for name in self.args.sdpa}
        if flex:
            ways["flex"] = dense_flex(self.length)
        q, times = self.random(self.heads, 1), {}
        for name, way in ways.items():

            def attend(layer: Any, way: Callable[..., Tensor] = way) -> Tensor:
                return way(q, layer.keys, layer.values)

            try:
                times[name] = self.note(f"dense, {name}", attend, self.dense_bytes, layers=4)
            except Exception as error:  # a back end that refuses these inputs is no failure of ours
                reason = (str(error) or repr(error)).splitlines()[0]
                print(f"{self.length:>8}  dense, {name}: {reason[:100]}", flush=True)
        times.pop("flex", None)
        return min(times, key=times.__getitem__, default="")


def bench_stages(
    cache: MobaCache, config: LlamaConfig, length: int, args: argparse.Namespace, clock: Clock
) -> tuple[list[Row], str]:
    """All stages; the fastest way of sdpa."""
    stages = Stages(cache, config, length, args, clock)
    for count in (1, 16):
        stages.sparse(count)
    stages.dense(1, TILES[: args.tiles])  # type: ignore[arg-type]
    stages.dense(16, [(None, None)])
    flex = not args.no_flex and length == max(args.lengths)
    best = stages.sdpa(flex) if stages.keys.device.type == "cuda" else ""
    return stages.rows, best


@contextmanager
def fused_elementwise(enabled: bool) -> Iterator[None]:
    """Norms, rotary embedding and MLP of Llama compiled, alike for every variant."""
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
    length: int,
    best_sdpa: str,
    args: argparse.Namespace,
    clock: Clock,
) -> list[Row]:
    """Tokens per second of the whole model: sparse, dense by our kernel, dense by the best of sdpa."""
    device = cache.layers[0].keys.device
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed" not in n)
    token = torch.ones(1, 1, dtype=torch.int64, device=device)
    run = torch.compile(model, fullgraph=True, dynamic=False) if args.whole else model
    rows: list[Row] = []
    logits: dict[str, Tensor] = {}

    def step() -> Tensor:
        return run(token, past_key_values=cache, use_cache=True).logits

    def measure(name: str, sparse: bool) -> None:
        set_length(cache, length)
        logits[name] = step().float()
        if not sparse and len(logits) > 2:
            check(name, logits[name], logits["dense, split keys"], 2**-4)
        set_length(cache, length)
        ms = clock.us(step) / 1e3
        moved = weights + bytes_per_token(config, args, sparse, length)
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
    for row in rows:
        row["x best dense"] = round(best / row["ms"], 2)
    return rows


def profile(model: Any, cache: MobaCache) -> None:
    """Prints where the device's time goes in one replayed sparse step, by kernel."""
    token = torch.ones(1, 1, dtype=torch.int64, device=cache.layers[0].keys.device)

    def step() -> Tensor:
        return model(token, past_key_values=cache, use_cache=True).logits

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


def write(out: str | None, name: str, rows: list[Row]) -> None:
    """Rows as CSV and as a Markdown table."""
    if out is None or not rows:
        return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| " + " | ".join(rows[0]) + " |", "| " + " | ".join("---" for _ in rows[0]) + " |"]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


@torch.no_grad()
def bench(args: argparse.Namespace) -> None:
    """Gate, stages, model; see the module."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        print(torch.cuda.get_device_name(), f"torch {torch.__version__}")
    torch.manual_seed(0)
    clock, config = Clock(device, args.runs), model_config(args)
    cache = filled_cache(config, max(args.lengths), device)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="moba").eval()
    gate(cache, config, args)
    gate_model(model, cache, config, args)
    print("gate: green (choices equal prefill's; rows equal the reference and dense attention)", flush=True)
    stages, best = [], {}
    for length in args.lengths:
        rows, best[length] = bench_stages(cache, config, length, args, clock)
        stages += rows
        write(args.out, "decode_stages", stages)
    results = []
    with fused_elementwise(not args.whole and device == "cuda"):
        for length in args.lengths:
            take_means(cache, config, length)
            results += bench_model(model, cache, config, length, best[length], args, clock)
            write(args.out, "decode_model", results)
        if args.profile and device == "cuda":
            profile(model, cache)
    take_means(cache, config, max(args.lengths))
    gate_model(model, cache, config, args)  # still right after everything was written over and over
    shape = f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, block {args.block_size}"
    print(f"{shape}, topk {args.topk}, bf16, batch 1, CUDA graphs")
    for row in results:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
