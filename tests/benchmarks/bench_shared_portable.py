"""One layer's attention on a CPU with a shared choice of blocks, next to torch's own dense attention.

    python tests/benchmarks/bench_shared_portable.py --lengths 2048 8192 32768 --share 0.25 0.1

9 query and 3 kv heads of 64, fp32, random q, k, v; the best of `--runs`. All stages run. Since random keys
have flat mass, attention is then timed over random causal lists with the stated share of candidates, kept
blocks included. `pairs` is the share of the causal (query, key) pairs in these lists.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_hf.op import shared_portable as portable
from moba_hf.op.sequences import Sequences, batched_table
from moba_hf.op.shared import SharedRule, mask_words, num_tiles, pack_blocks, tile_table

HEADS, KV_HEADS, DIM = 9, 3, 64


def best(run: Callable[[], Any], runs: int) -> float:
    """Seconds of the fastest of `runs` runs, after a warm-up."""
    run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def random_lists(where: Sequences, q: Tensor, tile: int, block: int, share: float) -> tuple[Tensor, float]:
    """A block mask with `share` of the candidates, and its share of the causal pairs."""
    length = q.shape[2]
    rows = tile_table(where.table, tile, num_tiles(where, q, tile))
    position, used = rows[:, 3, None], (rows[:, 2] > rows[:, 1])[:, None]
    number = torch.arange(-(-length // block))
    first = position // tile * tile // block
    own = (number >= first) & (number * block < position + tile)
    chosen = (own | ((number < first) & (torch.rand(HEADS, len(rows), len(number)) < share))) & used
    tiles = torch.arange(length) // tile
    later = HEADS * (length * (max(tile, block) - 1) // 2)  # keys in own blocks that come after their row
    kept = chosen[:, tiles].sum() * block - later
    return pack_blocks(chosen, mask_words(length, block)), float(kept) / (HEADS * length * (length + 1) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--share", type=float, nargs="+", default=[0.25, 0.1])
    parser.add_argument("--sample", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tile", type=int, default=64)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, tile {args.tile}, blocks of {args.block}; seconds")
    for length in args.lengths:
        q, k, v = (torch.randn(1, heads, length, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        where = Sequences(batched_table(1, length, length, q.device), length, length)

        def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        whole = best(dense, args.runs)
        select = {}
        for sample in args.sample:
            rule = SharedRule(args.block, args.tile, threshold=0.01, sample=sample)
            select[sample] = best(lambda r=rule: portable.select(q, k, where, r, DIM**-0.5), args.runs)  # noqa: B023
        for share in args.share:
            mask, pairs = random_lists(where, q, args.tile, args.block, share)
            settings = {"block_size": args.block, "tile": args.tile, "softmax_scale": DIM**-0.5}
            attend = best(lambda m=mask, s=settings: portable.attend(q, k, v, m, where, **s), args.runs)  # noqa: B023
            for sample, chosen in select.items():
                print(
                    f"{length:>7,} tokens: dense {whole:.3f}, pairs {pairs:.3f}: select {chosen:.3f} (every "
                    f"{sample} rows) + attend {attend:.3f}, {whole / (chosen + attend):.2f} times as fast",
                    flush=True,
                )


if __name__ == "__main__":
    main()
