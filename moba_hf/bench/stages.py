"""Times of the Triton forward's stages, each alone on what the stage before it gives."""

from __future__ import annotations

import torch
from torch import Tensor

from moba_hf.bench.rows import HEAD_DIM, Row
from moba_hf.bench.timing import median_ms
from moba_hf.kernels import tuning
from moba_hf.kernels.block_mean import block_mean
from moba_hf.kernels.gate import gate, head_split
from moba_hf.kernels.launch import padded
from moba_hf.kernels.merge import merge
from moba_hf.kernels.own import own_attention
from moba_hf.kernels.plan import make_plan
from moba_hf.kernels.routed import routed_attention
from moba_hf.kernels.routing import key_format, pair_keys, route
from moba_hf.sequences import batched_table


def stage_times(row: Row, q: Tensor, k: Tensor, v: Tensor, repeats: int) -> dict[str, float]:
    """Milliseconds of each stage; stages that run per chunk are timed on the last, fullest, and scaled up.

    Args:
        q, k, v: packed, `(length, heads, HEAD_DIM)`.
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    table = batched_table(1, row.length, row.length, q.device)
    scale, group = HEAD_DIM**-0.5, row.num_heads // row.num_kv_heads
    dims = (padded(HEAD_DIM), padded(HEAD_DIM))
    own_tile = tuning.own_tile(dims, 2, tuning.capability(q.device))
    tile, resident = tuning.routed_tile(dims, 2, row.block_size, tuning.capability(q.device))
    chunk_rows = tuning.chunk_rows(row.length, row.num_heads, row.topk - 1, HEAD_DIM, 2, tuning.WORKSPACE)
    _, tokens = head_split(group, own_tile.m)
    rule = {"block_size": row.block_size, "tile": tokens}
    plan = make_plan(q, k, table, row.length, row.length, **rule)
    chunked = make_plan(q, k, table, row.length, row.length, **rule, chunk_rows=chunk_rows)
    last = chunked.num_chunks - 1
    means = block_mean(k, plan)
    choice = torch.full((1, row.length, row.num_heads, row.topk), -1, dtype=torch.int32, device=q.device)
    gate(q, means, plan, choice, 0, 0)
    keys = pair_keys(choice, chunked, last, row.num_kv_heads)
    num_bins = row.num_kv_heads * chunked.num_blocks
    rows = tile.m * (tuning.RESIDENT_TILES if resident else 1)
    routes = route(keys, num_bins, rows)
    first = last * chunked.chunk_rows
    partial = torch.empty(*keys.shape, HEAD_DIM, dtype=q.dtype, device=q.device)
    partial_lse = torch.empty(keys.shape, device=q.device)
    out = torch.empty(1, row.length, row.num_heads, HEAD_DIM, dtype=q.dtype, device=q.device)
    lse = torch.empty(1, row.num_heads, row.length, device=q.device)
    no_bin = num_bins + key_format(num_bins)[1]

    def routed() -> None:
        routed_attention(q, k, v, chunked, routes, partial, partial_lse, first, scale, tile, resident)

    once = {
        "plan": lambda: make_plan(q, k, table, row.length, row.length, **rule),
        "means": lambda: block_mean(k, plan),
        "gate": lambda: gate(q, means, plan, choice, 0, 0),
    }
    per_chunk = {
        "own": lambda: own_attention(q, k, v, out, lse, chunked, last, scale, own_tile, False),
        "keys": lambda: pair_keys(choice, chunked, last, row.num_kv_heads),
        "route": lambda: route(keys, num_bins, rows),
        "routed": routed,
        "merge": lambda: merge(out, lse, partial, partial_lse, keys, no_bin, first),
    }
    share = row.length / keys.shape[0]
    times = {name: median_ms(call, repeats) for name, call in once.items()}
    return times | {name: median_ms(call, repeats) * share for name, call in per_chunk.items()}
