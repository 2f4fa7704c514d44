"""Random calls of the operator against the oracle: choices, outputs, log-sum-exps, gradients.

Takes seconds by default; --slow runs hundreds of draws, which take minutes (pytest -s prints the counts).
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
from moba_cases import batched_moba_attention, cumulative

from moba_hf import moba_attention, select_blocks

COUNTS = [60, pytest.param(800, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]


class Draw:
    """One random call: sequences, heads, rule, values."""

    def __init__(self, seed: int):
        self.seed, self.random = seed, random.Random(seed)
        pick = self.random.choice
        torch.manual_seed(seed)
        self.kv_heads, self.group = pick([1, 1, 2, 3]), pick([1, 2, 4])
        self.heads = self.kv_heads * self.group
        self.dim, self.v_dim = pick([1, 4, 7, 16]), pick([2, 5, 16])
        self.kind = pick(["normal", "normal", "ties", "constant", "large"])
        self.dtype = torch.float64 if self.kind != "ties" else pick([torch.float64, torch.float32])
        sink, local = pick([0, 0, 1, 3]), pick([0, 0, 1, 2])
        # the means of tied blocks are exact in fp32
        size = pick([1, 2, 4, 8, 16, 1024] if self.kind == "ties" else [1, 2, 3, 5, 8, 16, 32, 50, 10**6])
        self.settings = {
            "block_size": size,
            "topk": 1 + sink + local + pick([0, 1, 2, 5, 100]),
            "sink_blocks": sink,
            "local_blocks": local,
            "gate": "mean" if self.kind == "ties" else pick(["mean", "mean", "mass"]),
        }
        if self.settings["gate"] == "mass" and self.dim % 2:
            self.dim += 1  # rotary pairs need an even number
        self.scale = pick([None, 0.3, 1.7])
        scale = self.dim**-0.5 if self.scale is None else self.scale
        self.rule = oracle.Rule(**self.settings, scale=scale)

    def lengths(self, count: int) -> list[tuple[int, int]]:
        """(queries, keys) of each sequence; some are empty or have fewer queries than keys."""
        result = []
        for _ in range(count):
            keys = self.random.choice([0, 1, self.random.randint(1, 12), self.random.randint(1, 40)])
            queries = self.random.choice([keys, keys, self.random.randint(0, keys)])
            result.append((queries, keys))
        return result

    def tensor(self, *shape: int, key: bool = False) -> Tensor:
        if self.kind == "ties":
            return torch.randint(-2, 3, shape).to(self.dtype)
        x = torch.randn(shape, dtype=self.dtype)
        if self.kind == "constant" and key:
            x = x[..., :1, :, :].expand(x.shape).clone() if x.ndim == 3 else x
        return x * 8 if self.kind == "large" else x

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.settings}, {self.kind}, {self.dtype}, {self.heads} heads"


def close(ours: Any, exact: Any, draw: Draw) -> bool:
    """Equal up to the rounding of the draw's dtype; the operator returns log-sum-exps in fp32."""
    single = draw.dtype == torch.float32 or getattr(ours, "dtype", None) == torch.float32
    ours, exact = np.asarray(ours, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    room = 3e-5 if single else 1e-9
    return bool(np.all(np.abs(ours - exact) <= room * max(1.0, float(np.abs(exact).max(initial=0)))))


def check_choice(blocks: set[int], q: Any, k: Any, position: int, draw: Draw) -> None:
    """The oracle's blocks, or others with the same scores if rounding decides."""
    expected = oracle.blocks_of(q, k, position, draw.rule)
    if blocks == expected:
        return
    assert draw.kind != "ties", (str(draw), position, blocks, expected)
    assert len(blocks) == len(expected), str(draw)
    scores = oracle.scores_of(q, k, position, draw.rule)
    swapped = [sorted(scores[i] for i in some) for some in (blocks - expected, expected - blocks)]
    assert np.allclose(*swapped, rtol=1e-9, atol=1e-9), (str(draw), position, blocks, expected)


def check_packed(draw: Draw) -> int:
    """Checks a packed call with its gradients; returns the number of (query, head) pairs compared."""
    lengths = draw.lengths(draw.random.randint(1, 4))
    totals = [sum(x[i] for x in lengths) for i in (0, 1)]
    q = draw.tensor(totals[0], draw.heads, draw.dim).requires_grad_()
    k = draw.tensor(totals[1], draw.kv_heads, draw.dim, key=True).requires_grad_()
    v = draw.tensor(totals[1], draw.kv_heads, draw.v_dim).requires_grad_()
    where = {
        name: cumulative([x[i] for x in lengths]) for i, name in enumerate(("cu_seqlens_q", "cu_seqlens_k"))
    }
    settings = {**draw.settings, **where, "softmax_scale": draw.scale}
    choice = select_blocks(q, k, **settings)
    given = {"block_indices": choice} if draw.random.random() < 0.3 else {}
    out, lse = moba_attention(q, k, v, **settings, **given, return_lse=True)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    ((out * d_out).sum() + (lse * d_lse).sum()).backward()
    grads = [np.zeros(x.shape) for x in (q, k, v)]
    arrays = [x.detach().double().numpy() for x in (q, k, v, d_out)]
    at, pairs = np.zeros(2, dtype=int), 0
    for queries, keys in lengths:
        here, there = slice(at[0], at[0] + queries), slice(at[1], at[1] + keys)
        for h in range(draw.heads):
            kv = h // draw.group
            kk, vv = arrays[1][there, kv], arrays[2][there, kv]
            into = (grads[1][there, kv], grads[2][there, kv])
            for i in range(queries):
                row, position = at[0] + i, keys - queries + i
                one, blocks = arrays[0][here, h][i], {int(x) for x in choice[row, h] if x >= 0}
                assert choice[row, h, 0] == position // draw.rule.block_size, str(draw)
                check_choice(blocks, one, kk, position, draw)
                exact, exact_lse = oracle.attend(one, kk, vv, position, blocks, draw.rule)
                assert close(out[row, h].detach(), exact, draw), str(draw)
                assert close(lse[h, row].detach(), exact_lse, draw), str(draw)
                upstream = (arrays[3][row, h], float(d_lse[h, row]))
                grads[0][row, h] = oracle.gradients(one, kk, vv, position, blocks, draw.rule, *upstream, into)
                pairs += 1
        at += (queries, keys)
    for x, exact in zip((q, k, v), grads, strict=True):
        assert close(x.grad, exact, draw), f"gradient, {draw}"
    return pairs


@torch.no_grad()
def check_rows(draw: Draw) -> int:
    """Checks rows with padding, chunks and decode steps in a cache whose other slots are NaN."""
    rows, slots = draw.random.randint(1, 3), draw.random.randint(1, 40)
    begin = [draw.random.randint(0, slots - 1) for _ in range(rows)]
    end = [draw.random.randint(b, slots) for b in begin]
    queries = draw.random.choice([1, 1, 3, slots])
    queries = min(queries, slots)
    offset = draw.random.randint(0, slots - queries)
    q = draw.tensor(rows, draw.heads, queries, draw.dim)
    k = draw.tensor(rows, draw.kv_heads, slots, draw.dim)
    v = draw.tensor(rows, draw.kv_heads, slots, draw.v_dim)
    end = [max(b, min(e, offset + queries)) for b, e in zip(begin, end, strict=True)]  # the last slot written
    for r in range(rows):
        for x in (k, v):
            x[r, :, : begin[r]] = torch.nan
            x[r, :, end[r] :] = torch.nan
    limits = [torch.tensor(x) for x in (begin, end, [offset])]
    names = dict(zip(("kv_start", "kv_end", "q_offset"), limits, strict=True))
    out, lse = batched_moba_attention(q, k, v, **names, **draw.settings, softmax_scale=draw.scale)
    pairs = 0
    for r in range(rows):
        for h in range(draw.heads):
            kk, vv = (x[r, h // draw.group, begin[r] : end[r]].double().numpy() for x in (k, v))
            for i in range(queries):
                slot = offset + i
                if not begin[r] <= slot < end[r]:
                    assert (out[r, i, h] == 0).all(), f"padding, {draw}"
                    assert lse[r, h, i] == -torch.inf or len(kk) == 0, f"padding, {draw}"
                    continue
                one, position = q[r, h, i].double().numpy(), slot - begin[r]
                blocks = oracle.blocks_of(one, kk, position, draw.rule)
                exact, exact_lse = oracle.attend(one, kk, vv, position, blocks, draw.rule)
                assert close(out[r, i, h], exact, draw), (str(draw), r, h, i)
                assert close(lse[r, h, i], exact_lse, draw), (str(draw), r, h, i)
                pairs += 1
    return pairs


@pytest.mark.parametrize("count", COUNTS)
def test_operator(count: int) -> None:
    pairs: Counter[str] = Counter()
    for seed in range(count):
        pairs["packed"] += check_packed(Draw(seed))
        pairs["rows"] += check_rows(Draw(seed))
    print(f"\noperator: {2 * count} calls, (query, head) pairs {dict(pairs)}")
    assert min(pairs.values()) > 10 * count
