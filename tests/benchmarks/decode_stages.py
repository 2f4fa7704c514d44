"""The stages of a decode step other than reading weights, and torch's ways to attend every key.

Stages run over many layers of the cache, so that no measured data is already in the L2 cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from decode_setup import Clock, Row, set_length
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig

from moba_hf import MobaCache, kernels
from moba_hf.kernels.sparse_decode import decode_attention
from moba_hf.kernels.tuning import Tile
from moba_hf.op.sequences import Sequences, batched_table

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TILES = [(Tile(64, 64, 4, 3), 2), (Tile(64, 128, 8, 3), 1), (Tile(64, 128, 4, 2), 1), (Tile(64, 64, 4, 4), 1),
         (Tile(64, 32, 4, 4), 3), (Tile(64, 64, 4, 2), 3)]  # fmt: skip


def dense_sdpa(name: str, fold: bool, length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Dense decode over the first `length` slots with one sdpa kernel, without repeating keys.

    Args:
        fold: pass the heads of a group as rows; otherwise use `enable_gqa`.
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
    """Dense decode with compiled flex attention, which splits the keys for short queries."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k[:, :, :length], v[:, :, :length], enable_gqa=True)


class Stages:
    """Microseconds per layer of a decode step's stages, without the weights, at `length` cached tokens."""

    def __init__(
        self, cache: MobaCache, config: LlamaConfig, length: int, args: argparse.Namespace, clock: Clock
    ):
        self.cache, self.layers, self.length, self.args, self.clock = cache, cache.layers, length, args, clock
        self.heads, self.keys = config.num_attention_heads, cache.layers[0].keys
        self.scale = self.keys.shape[3] ** -0.5
        self.dense_bytes = 4 * self.keys.shape[1] * length * self.keys.shape[3]
        self.rows: list[Row] = []

    def note(self, stage: str, work: Callable[[Any], object], moved: int = 0, layers: int = 0) -> float:
        """Times `work(layer)`, which moves `moved` bytes, over the layers."""
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
        """Times cache, means, choice and attention for `count` queries."""
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
            rest = (choices[layer], Sequences(table, count, self.length), size, self.scale)
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
        """Times full attention with the split-key kernel."""
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
        """Times full attention with torch; returns the fastest way of sdpa."""
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
            except Exception as error:  # a backend may refuse these inputs
                reason = (str(error) or repr(error)).splitlines()[0]
                print(f"{self.length:>8}  dense, {name}: {reason[:100]}", flush=True)
        times.pop("flex", None)
        return min(times, key=times.__getitem__, default="")


def bench_stages(
    cache: MobaCache, config: LlamaConfig, length: int, args: argparse.Namespace, clock: Clock
) -> tuple[list[Row], str]:
    """Times all stages; returns the fastest way of sdpa."""
    stages = Stages(cache, config, length, args, clock)
    for count in (1, 16):
        stages.sparse(count)
    stages.dense(1, TILES[: args.tiles])  # type: ignore[arg-type]
    stages.dense(16, [(None, None)])
    flex = not args.no_flex and length == max(args.lengths)
    best = stages.sdpa(flex) if stages.keys.device.type == "cuda" else ""
    return stages.rows, best
