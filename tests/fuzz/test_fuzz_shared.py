"""Random calls with a shared choice against the oracle: choices, outputs, gradients, rows, decode steps.

Takes seconds by default; --slow runs thousands of draws (pytest -s prints the counts).
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent))
from fuzz import oracle
from fuzz.shared_oracle import SharedNumbers, blocks_of, masses_of, rows_of_tiles
from moba_cases import cumulative

from moba_hf.op.block_means import block_means_of
from moba_hf.op.gates import KeptMass
from moba_hf.op.ops import attention, attention_over
from moba_hf.op.sequences import Sequences, batched_table, packed_table
from moba_hf.op.shared import SharedRule, sequence_tiles, unpack_blocks
from moba_hf.op.shared_ops import select_shared

COUNTS = [60, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
Q_BEGIN, Q_END, POSITION, K_BEGIN, K_END = range(1, 6)  # columns of the tile table


class Draw:
    """A random rule with random heads and dims."""

    def __init__(self, seed: int):
        self.seed, self.random = seed, random.Random(seed)
        pick = self.random.choice
        torch.manual_seed(seed)
        self.kv_heads, self.group = pick([1, 1, 2]), pick([1, 2, 3])
        self.heads = self.kv_heads * self.group
        self.dim, self.v_dim = pick([2, 4, 8, 16]), pick([0, 3, 8])
        self.v_dim = self.v_dim or self.dim  # with equal dims, torch's fused CPU kernel runs
        size = pick([1, 2, 3, 4, 5, 8, 16, 32, 10**6])
        tile = size * pick([1, 1, 2, 3, 4]) if size < 10**6 else pick([size, 50, 16])
        if size in (4, 8, 16, 32) and pick([False, True]):
            tile = size // pick([2, 4])
        sink, local = pick([0, 1, 1, 2]), pick([0, 1, 1, 2])
        threshold = pick([None, 0.02, 0.2, 0.5, 0.9])
        share = pick([0.3, 0.6, 0.9, 0.97]) if threshold is None else pick([None, None, 0.8])
        least = max(1, tile // size) + sink + local
        self.rule = SharedRule(
            block_size=size,
            tile=tile,
            threshold=threshold,
            share=share,
            topk=pick([None, None, least, least + 1, least + 3, 10**9]),
            sink_blocks=sink,
            local_blocks=local,
            sample=pick([x for x in range(1, min(tile, 40) + 1) if tile % x == 0]),
            dense_below=tile * pick([0, 0, 0, 1, 3]),
        )
        self.scale = pick([self.dim**-0.5, 0.3, 1.7])
        names = ("block_size", "tile", "threshold", "share", "topk", "sink_blocks", "local_blocks", "sample")
        numbers = {name: getattr(self.rule, name) for name in (*names, "dense_below")}
        self.numbers = SharedNumbers(**numbers, scale=self.scale)
        self.attends = oracle.Rule(size, 1, scale=self.scale)

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64) * 1.5

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.rule}, {self.heads} heads of {self.dim}"


def close(ours: Any, exact: Any) -> bool:
    ours, exact = np.asarray(ours, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    return bool(np.all(np.abs(ours - exact) <= 1e-9 * max(1.0, float(np.abs(exact).max(initial=0)))))


def check_tile(
    chosen: set[int], q: dict[int, Array], k: Array, rows: range, draw: Draw, counts: Counter[str]
) -> None:
    """The tile has the oracle's blocks, unless a mass is within rounding of its limit."""
    expected, room = blocks_of(masses_of(q, k, rows, draw.numbers), rows, draw.numbers)
    counts["tiles"] += 1
    if chosen != expected:
        assert room < 1e-9, (str(draw), rows, chosen, expected, room)
        counts["near ties"] += 1


Array = np.ndarray


def check_packed(draw: Draw, counts: Counter[str]) -> None:
    """A packed call with its gradients, sometimes with a given choice."""
    pick = draw.random.choice
    keys = [
        pick([0, 1, draw.random.randint(1, 20), draw.random.randint(1, 70)]) for _ in range(pick([1, 2, 3]))
    ]
    queries = [pick([n, n, draw.random.randint(0, n)]) for n in keys]
    q = draw.tensor(1, draw.heads, sum(queries), draw.dim).requires_grad_()
    k = draw.tensor(1, draw.kv_heads, sum(keys), draw.dim).requires_grad_()
    v = draw.tensor(1, draw.kv_heads, sum(keys), draw.v_dim).requires_grad_()
    table = packed_table(cumulative(queries), cumulative(keys))
    where = Sequences(table, max(queries, default=0), max(keys, default=0), by_row=False)
    settings: dict[str, Any] = {"softmax_scale": draw.scale}
    mask = select_shared(q, k, where, draw.rule, **settings)
    if draw.random.random() < 0.3:
        out, lse = attention_over(q, k, v, mask, where, draw.rule, **settings)
    else:
        out, lse = attention(q, k, v, where, draw.rule, **settings)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    ((out * d_out).sum() + (lse * d_lse).sum()).backward()
    grads = [np.zeros(x.shape) for x in (q, k, v)]
    qa, ka, va = (x.detach()[0].numpy() for x in (q, k, v))
    covered = 0
    for numbers, tiles in sequence_tiles(where, q, draw.rule.tile):
        begin, end = tiles[0][POSITION], tiles[0][K_END] - tiles[0][K_BEGIN]
        expected_rows = rows_of_tiles(begin, end, draw.rule.tile)
        assert [range(t[POSITION], t[POSITION] + t[Q_END] - t[Q_BEGIN]) for t in tiles] == expected_rows
        there, shift = slice(tiles[0][K_BEGIN], tiles[0][K_END]), tiles[0][Q_BEGIN] - begin
        blocks = unpack_blocks(mask[:, numbers], -(-end // draw.rule.block_size))
        for h in range(draw.heads):
            kv = h // draw.group
            kk, vv = ka[kv, there], va[kv, there]
            by_position = {i: qa[h, i + shift] for i in range(begin, end)}
            into = (grads[1][0, kv, there], grads[2][0, kv, there])
            for t, rows in enumerate(expected_rows):
                chosen = set(blocks[h, t].nonzero().flatten().tolist())
                check_tile(chosen, by_position, kk, rows, draw, counts)
                for i in rows:
                    one = by_position[i]
                    exact, exact_lse = oracle.attend(one, kk, vv, i, chosen, draw.attends)
                    at = i + shift
                    assert close(out[0, at, h].detach(), exact), str(draw)
                    assert close(lse[0, h, at].detach(), exact_lse), str(draw)
                    upstream = (d_out[0, at, h].numpy(), float(d_lse[0, h, at]))
                    grads[0][0, h, at] = oracle.gradients(
                        one, kk, vv, i, chosen, draw.attends, *upstream, into
                    )
                    counts["packed"] += 1
                    covered += 1
    assert covered == sum(queries) * draw.heads
    for x, exact in zip((q, k, v), grads, strict=True):
        assert close(x.grad, exact), f"gradient, {draw}"


@torch.no_grad()
def check_rows(draw: Draw, counts: Counter[str]) -> None:
    """Padded rows and chunks over the slots of a cache, or decode steps; unused slots are NaN."""
    pick = draw.random.choice
    batch, slots = pick([1, 2, 3]), draw.random.randint(1, 60)
    steps = pick([False, True])
    length = min(slots, pick([1, 1, 3, 5]) if steps else pick([1, 7, slots, slots]))
    offset = draw.random.randint(0, slots - length)
    begin = [draw.random.randint(0, slots - 1) for _ in range(batch)]
    end = [max(b, min(draw.random.randint(b, slots), offset + length)) for b in begin]
    q = draw.tensor(batch, draw.heads, length, draw.dim)
    k = draw.tensor(batch, draw.kv_heads, slots, draw.dim)
    v = draw.tensor(batch, draw.kv_heads, slots, draw.v_dim)
    for r in range(batch):
        for x in (k, v):
            x[r, :, : begin[r]] = torch.nan
            x[r, :, end[r] :] = torch.nan
    start, stop, at_slot = (torch.tensor(x) for x in (begin, end, [offset]))
    table = batched_table(batch, length, slots, q.device, start, stop, at_slot)
    where = Sequences(table, length, slots, kv_start=start)
    kept = None
    if steps and pick([False, True]):  # as a cache holds it
        kept = block_means_of(k, start, draw.rule.block_size, "portable", KeptMass())
    settings: dict[str, Any] = {"softmax_scale": draw.scale, "steps": steps, "block_means": kept}
    out, lse = attention(q, k, v, where, draw.rule, **settings)
    kind = "steps" if steps else "rows"
    for r in range(batch):
        real = range(max(begin[r], offset), min(end[r], offset + length))
        for slot in set(range(offset, offset + length)) - set(real):
            assert (out[r, slot - offset] == 0).all(), f"padding, {draw}"
            assert (lse[r, :, slot - offset] == -torch.inf).all(), f"padding, {draw}"
        positions = range(real.start - begin[r], real.stop - begin[r])
        if not positions:
            continue
        tiles = rows_of_tiles(positions.start, positions.stop, draw.rule.tile)
        if steps:
            tiles = [range(i, i + 1) for i in positions]
        for h in range(draw.heads):
            kk, vv = (x[r, h // draw.group, begin[r] : end[r]].numpy() for x in (k, v))
            by_position = {i: q[r, h, i + begin[r] - offset].numpy() for i in positions}
            for rows in tiles:
                chosen, room = blocks_of(masses_of(by_position, kk, rows, draw.numbers), rows, draw.numbers)
                if room < 1e-9:
                    counts["near ties"] += 1
                    continue
                for i in rows:
                    exact, exact_lse = oracle.attend(by_position[i], kk, vv, i, chosen, draw.attends)
                    at = i + begin[r] - offset
                    assert close(out[r, at, h], exact), (str(draw), r, h, i)
                    assert close(lse[r, h, at], exact_lse), (str(draw), r, h, i)
                    counts[kind] += 1


@pytest.mark.parametrize("count", COUNTS)
def test_shared_choice(count: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(count):
        check_packed(Draw(seed), counts)
        check_rows(Draw(seed), counts)
    print(f"\nshared choice: {2 * count} calls, (query, head) pairs and tiles {dict(counts)}")
    assert min(counts[x] for x in ("packed", "rows", "tiles")) > 4 * count
    assert counts["steps"] > count
    assert counts["near ties"] < count / 10
