"""Inputs, expected values and comparisons shared by the operator tests.

Choices are compared by the gate scores of the chosen blocks, attention and gradients under the same choice,
and errors with those of plain torch attention in the same precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_hf.config import LayerConfig
from moba_hf.op.inputs import check_tensors
from moba_hf.op.numerics import accumulate_dtype, default_scale
from moba_hf.op.ops import attention
from moba_hf.op.reference import attend_ref, block_mean_ref, gate_ref, select_blocks_ref
from moba_hf.op.sequences import Sequences, batched_table

# Scores that differ by less than this, relative to the largest, may come in either order.
SCORE_TIE = 2.0**-15


@dataclass(frozen=True, eq=False)
class Case:
    """One packed input: sequence lengths, heads, dims, dtype, and the rule.

    Attributes:
        q_lens, kv_lens: tokens of each sequence; queries are at the end of their keys.
        rule: `block_size`, `topk`, `sink_blocks`, `local_blocks`.
    """

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    group_size: int
    num_kv_heads: int
    head_dim: int
    v_dim: int
    dtype: torch.dtype
    rule: dict[str, int]

    def tensors(self, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Packed q, k, v from a standard normal distribution, the same in every call."""
        generator = torch.Generator().manual_seed(0)
        total_q, total_k = sum(self.q_lens), sum(self.kv_lens)
        num_heads = self.group_size * self.num_kv_heads
        shapes = (
            (total_q, num_heads, self.head_dim),
            (total_k, self.num_kv_heads, self.head_dim),
            (total_k, self.num_kv_heads, self.v_dim),
        )
        drawn = [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype) for shape in shapes
        ]
        return tuple(x.requires_grad_(requires_grad) for x in drawn)

    def offsets(self) -> dict[str, Tensor]:
        """`cu_seqlens_q` and `cu_seqlens_k`."""
        return {"cu_seqlens_q": cumulative(self.q_lens), "cu_seqlens_k": cumulative(self.kv_lens)}

    @cached_property
    def choice(self) -> Tensor:
        """The reference's choice `(total_q, num_heads, topk)`, each sequence on its own."""
        q, k, _ = self.tensors()
        result = torch.full((q.shape[0], q.shape[1], self.rule["topk"]), -1, dtype=torch.int32)
        for at, (queries, keys) in self.sequences(q, k):
            result[at] = select_blocks_ref(queries, keys, **self.rule)
        return result

    def sequences(self, q: Tensor, *kv: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """For each non-empty sequence, the slice of its queries and its parts of the tensors."""
        q_at = k_at = 0
        for q_len, kv_len in zip(self.q_lens, self.kv_lens, strict=True):
            if q_len:
                yield (
                    slice(q_at, q_at + q_len),
                    [q[q_at : q_at + q_len], *(x[k_at : k_at + kv_len] for x in kv)],
                )
            q_at, k_at = q_at + q_len, k_at + kv_len

    def __str__(self) -> str:
        rule = "-".join(str(value) for value in self.rule.values())
        lens = "+".join(map(str, self.kv_lens))
        return f"{rule}-n{lens}-g{self.group_size}-d{self.head_dim}.{self.v_dim}-{str(self.dtype)[6:]}"


def cumulative(lengths: Sequence[int]) -> Tensor:
    """int32 running totals of `lengths`, from 0."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def pairwise(**factors: Sequence[Any]) -> list[dict[str, Any]]:
    """A short list of combinations that contains every pair of values of two factors; deterministic."""
    names = list(factors)
    open_pairs = {
        ((a, i), (b, j))
        for a, b in combinations(names, 2)
        for i, j in product(range(len(factors[a])), range(len(factors[b])))
    }
    rows = []
    everything = list(product(*(range(len(factors[name])) for name in names)))
    while open_pairs:
        best = max(everything, key=lambda row: len(_pairs(names, row) & open_pairs))
        open_pairs -= _pairs(names, best)
        rows.append({name: factors[name][i] for name, i in zip(names, best, strict=True)})
    return rows


def _pairs(names: list[str], row: tuple[int, ...]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
    return set(combinations(zip(names, row, strict=True), 2))


# Lengths with several blocks of each size, an incomplete last one, and a fast reference.
_TOKENS = {1: 61, 7: 101, 64: 251, 100: 333, 512: 1031}


def grid() -> list[Case]:
    """All pairs of block sizes, topk, grouping, lengths, kept blocks, dims and dtypes."""
    rows = pairwise(
        block_size=(1, 7, 64, 100, 512),
        topk=(1, 2, 3, 8, "all"),
        group_size=(1, 3, 4, 8),
        lengths=("one", "ragged", "short_queries", "multiple"),
        forced=((0, 0), (1, 0), (0, 1), (1, 2)),
        dims=((16, 16), (24, 40), (33, 8)),
        dtype=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    )
    return [_case(**row) for row in rows]


def _case(block_size, topk, group_size, lengths, forced, dims, dtype) -> Case:
    tokens = _TOKENS[block_size]
    q_lens, kv_lens = {
        "one": ((tokens,), (tokens,)),
        "ragged": ((tokens // 9, 0, 1, tokens), (tokens // 9, 0, 1, tokens)),
        "short_queries": ((tokens // 4, 0, 1, 5), (tokens, 3, tokens // 2, 5)),
        "multiple": ((2 * block_size, 3), (2 * block_size, 3)),
    }[lengths]
    blocks = -(-max(kv_lens) // block_size)
    sink, local = forced
    count = blocks if topk == "all" else topk
    rule = {
        "block_size": block_size,
        "topk": max(count, 1 + sink + local) if topk != 1 else 1,
        "sink_blocks": sink if topk != 1 else 0,
        "local_blocks": local if topk != 1 else 0,
    }
    num_kv_heads = 2 if group_size <= 3 else 1
    return Case(q_lens, kv_lens, group_size, num_kv_heads, *dims, dtype, rule)


def batched_moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    q_offset: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    block_means: Tensor | None = None,
    **rule: Any,
) -> tuple[Tensor, Tensor]:
    """`attention` over one sequence per batch row, given the limits of each row and the rule as keywords."""
    check_tensors(q, k, v)
    limits = (kv_start, kv_end, q_offset)
    table = batched_table(q.shape[0], q.shape[2], k.shape[2], q.device, *limits)
    return attention(
        q,
        k,
        v,
        Sequences(table, q.shape[2], k.shape[2], kv_start=kv_start),
        LayerConfig(**rule),
        softmax_scale=default_scale(q) if softmax_scale is None else softmax_scale,
        backend=backend,
        block_means=block_means,
    )


def packed_attend_ref(
    case: Case, q: Tensor, k: Tensor, v: Tensor, choice: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The reference's output and lse under a given choice, each sequence on its own."""
    outs, lses = [], []
    for at, parts in case.sequences(q, k, v):
        block_size = case.rule["block_size"]
        out, lse = attend_ref(*parts, choice[at], block_size=block_size, softmax_scale=scale)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


def plain_attention(case: Case, q: Tensor, k: Tensor, v: Tensor, choice: Tensor) -> Tensor:
    """Torch's own attention over the same choice, computed in the dtype of the tensors."""
    outs = []
    for at, (queries, keys, values) in case.sequences(q, k, v):
        mask = chosen_keys(choice[at], len(queries), len(keys), case.rule["block_size"])
        keys, values = (x.repeat_interleave(case.group_size, dim=1).transpose(0, 1) for x in (keys, values))
        out = F.scaled_dot_product_attention(queries.transpose(0, 1), keys, values, attn_mask=mask)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


def chosen_keys(choice: Tensor, q_len: int, kv_len: int, block_size: int) -> Tensor:
    """Bool `(num_heads, q_len, kv_len)`: the keys that a choice lets each query attend."""
    key = torch.arange(kv_len)
    causal = key <= (torch.arange(q_len) + kv_len - q_len)[:, None]
    chosen = (choice[..., None] == key // block_size).any(dim=2)
    return chosen.transpose(0, 1) & causal


def assert_choice(case: Case, choice: Tensor) -> None:
    """`choice` is valid and equals that of the reference, up to ties.

    Every query has its own block first, then distinct earlier blocks, the kept ones included (`topk` in all,
    or as many as exist), then -1. The scores of the chosen blocks equal those of the reference's blocks.
    """
    q, k, _ = case.tensors()
    block_size, topk = case.rule["block_size"], case.rule["topk"]
    assert choice.dtype == torch.int32
    assert choice.shape == (q.shape[0], q.shape[1], topk)
    for at, (queries, keys) in case.sequences(q, k):
        own = (torch.arange(len(queries)) + len(keys) - len(queries)) // block_size
        got, want = choice[at].long(), case.choice[at].long()
        assert (got[:, :, 0] == own[:, None]).all(), "the own block is not first"
        assert (got <= own[:, None, None]).all(), "a later block was chosen"
        assert ((got >= 0).sum(2) == (own + 1).clamp(max=topk)[:, None]).all(), "too few or too many blocks"
        ordered = got.sort(2).values
        twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)
        assert not twice.any(), "a block was chosen twice"
        assert ((got >= 0).int().diff(dim=2) <= 0).all(), "-1 before a block"
        for j in range(case.rule["sink_blocks"]):
            assert ((got == j).any(2) | (own <= j)[:, None]).all(), "a sink block is missing"
        for j in range(1, case.rule["local_blocks"] + 1):
            near = (own - j)[:, None, None]
            assert ((got == near).any(2) | (own < j)[:, None]).all(), "a local block is missing"
        scores = gate_ref(queries, block_mean_ref(keys, block_size))
        if scores.shape[2] == 0:
            continue
        taken, best = (_scores_at(scores, x, own) for x in (got, want))
        room = SCORE_TIE * scores.abs().amax() if q.dtype != torch.float64 else 0.0
        assert ((taken - best).abs() <= room).all(), "a better block was left out"


def _scores_at(scores: Tensor, choice: Tensor, own: Tensor) -> Tensor:
    """Sorted scores of the chosen earlier blocks; 0 for the own block and for empty slots."""
    earlier = (choice >= 0) & (choice < own[:, None, None])
    gathered = scores.gather(2, choice.clamp(0, scores.shape[2] - 1))
    return gathered.masked_fill(~earlier, 0.0).sort(2).values


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, in fp64; NaN counts as infinite."""
    if exact.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - exact.detach().double()).abs()
    return float(difference.nan_to_num(torch.inf).max())


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor, what: str = "output") -> None:
    """The error is at most twice that of plain attention in the same dtype, plus rounding.

    Rounding is one step of the dtype at the largest value, plus a few steps of the accumulation dtype. It is
    needed because plain attention may be exact by luck, for example if a query attends a single key.
    """
    assert actual.shape == exact.shape, what
    assert actual.dtype == plain.dtype, what
    if exact.numel() == 0:
        return
    largest = float(exact.detach().abs().max())
    held = torch.finfo(accumulate_dtype(actual.dtype)).eps
    rounding = torch.finfo(actual.dtype).eps * largest + 8 * held * max(1.0, largest)
    limit = 2 * error(plain, exact) + rounding
    assert error(actual, exact) <= limit, f"{what}: error {error(actual, exact):.3g} above {limit:.3g}"
