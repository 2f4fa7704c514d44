"""Correctness checks of a backend on any device, used by the kernel tests and before benchmarks.

The gate is checked by the scores of the chosen blocks. Attention is checked for a given choice: its error
against fp32 may be at most twice that of plain attention in the same low precision, plus rounding. A failed
check raises AssertionError, also under `python -O`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moba_hf.op import portable_select
from moba_hf.op.backends import load_backend
from moba_hf.op.layer_rule import LayerConfig
from moba_hf.op.numerics import part_size
from moba_hf.op.operators import flat_rule, select_op
from moba_hf.op.reference import block_mean_ref, gate_ref, mass_gate_ref
from moba_hf.op.sequences import Attended, Sequences, packed_table


@dataclass
class Case:
    """Random packed inputs.

    Attributes:
        lengths: (queries, keys) of each sequence.
        spare: number of rows of padding before and after the sequences.
        kind: "normal", "integer" (exact, many ties), "periodic", "constant" or "skewed" (one block wins).
        backend: the backend of `select` and `attend`.
    """

    lengths: list[tuple[int, int]]
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 16
    v_dim: int | None = None
    block_size: int = 16
    topk: int = 3
    sink: int = 0
    local: int = 0
    dtype: torch.dtype = torch.float32
    kind: str = "normal"
    spare: int = 0
    device: str = "cpu"
    seed: int = 0
    backend: str = "triton"
    softmax_scale: float | None = None
    gate: str = "mean"
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)
    table: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if any(queries > keys for queries, keys in self.lengths):
            raise ValueError(f"lengths {self.lengths}: a sequence must not have more queries than keys")
        torch.manual_seed(self.seed)
        total_q, total_k = (sum(x[i] for x in self.lengths) + 2 * self.spare for i in (0, 1))
        q = torch.randn(total_q, self.num_heads, self.head_dim)
        k = torch.randn(total_k, self.num_kv_heads, self.head_dim)
        v = torch.randn(total_k, self.num_kv_heads, self.v_dim or self.head_dim)
        if self.kind == "integer":
            q = torch.randint(-2, 3, q.shape).float()
            # whole blocks of small integers: means and scores are exact
            k = torch.randint(-1, 2, (-(-total_k // self.block_size), *k.shape[1:])).float()
            k = k.repeat_interleave(self.block_size, 0)[:total_k]
        elif self.kind == "periodic":
            k = k[torch.arange(total_k) % (64 * self.block_size)]
        elif self.kind == "constant":
            k = k[:1].expand(k.shape).clone()
        elif self.kind == "skewed":
            q = q.abs()
            k[: self.block_size] = k[: self.block_size].abs() + 3

        def batch(x: Tensor) -> Tensor:
            return x.to(self.device, self.dtype).transpose(0, 1)[None]

        self.q, self.k, self.v = batch(q), batch(k), batch(v)
        edges = torch.tensor([(0, 0), *self.lengths]).cumsum(0).to(torch.int32) + self.spare
        self.table = packed_table(edges[:, 0], edges[:, 1]).to(self.device)

    @property
    def longest(self) -> tuple[int, int]:
        """Most queries and most keys of a sequence."""
        return max(a for a, _ in self.lengths), max(b for _, b in self.lengths)

    @property
    def rule(self) -> tuple[int, int, int, int]:
        return self.block_size, self.topk, self.sink, self.local

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    def select(self) -> Tensor:
        """The backend's choice."""
        flat = (self.table, *self.longest, *flat_rule(LayerConfig(*self.rule, self.gate)), self.scale)
        return select_op(self.q.detach(), self.k.detach(), *flat, self.backend)

    def expected_choice(self) -> Tensor:
        rule = LayerConfig(*self.rule, self.gate)
        return portable_select.select(self.q, self.k, self.table, rule, self.scale)

    def scores(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Reference scores `(q_len, H, blocks)` of one sequence, and their tolerance."""
        if self.gate == "mass":
            scores = mass_gate_ref(q, k, self.block_size, self.scale)
            # a part's score is a difference of sums of this size
            size = mass_gate_ref(q.abs(), k.abs(), self.block_size, self.scale).abs()
            room = 2**-15 * scores.abs() + 2**-18 * size + 2**-16
            return scores, room + _variance_step(q, k, self.block_size, self.scale)
        means = block_mean_ref(k, self.block_size)
        scores = gate_ref(q, means)
        return scores, 2**-15 * scores.abs() + 2**-18 * gate_ref(q.abs(), means.abs())

    def attend(self, choice: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The backend's `(out, lse)` for `choice`; keywords are those of `kernels.forward.Forced`."""
        if kwargs:
            from moba_hf.kernels.forward import Forced, attend

            return attend(self.q, self.k, self.v, choice, *self.where, forced=Forced(**kwargs))
        return load_backend(self.backend).forward(self.q, self.k, self.v, choice, *self.where)

    @property
    def where(self) -> tuple[Sequences, int, float]:
        """The arguments of `Backend.forward` after the choice: sequences, block size, scale."""
        return Sequences(self.table, *self.longest, by_row=False), self.block_size, self.scale


def _variance_step(q: Tensor, k: Tensor, block_size: int, scale: float) -> Tensor | float:
    """How much mass scores change if the bf16 variances of 16-bit keys are rounded the other way."""
    if k.dtype.itemsize > 2:
        return 0.0
    size, half = part_size(block_size), k.shape[2] // 2
    parts = k[: len(k) // block_size * block_size].double().unflatten(0, (-1, block_size // size, size))
    variance = parts.var(2, unbiased=False).repeat_interleave(q.shape[1] // k.shape[1], dim=2)
    paired = (variance + variance.roll(half, dims=3)) / 2
    spread = torch.einsum("qhd,bphd->qhbp", q.double().square(), paired).amax(3) * scale**2
    return (spread * 2**-9).to(torch.float32)  # half the spread, times a bf16 step of 2**-8


def assert_choice(case: Case, choice: Tensor) -> None:
    """Checks that `choice` obeys the rule and that its scores are those of the best blocks."""
    expected = case.expected_choice()
    if case.kind in ("integer", "constant"):
        _require(torch.equal(choice.sort(3).values, expected.sort(3).values), "ties go to the lower block")
    _require(torch.equal(choice[..., 0], expected[..., 0]), "own block first")
    _require(torch.equal((choice >= 0).sum(3), (expected >= 0).sum(3)), "as many blocks as there are")
    _require(not ((choice[..., 1:] >= 0) & (choice[..., :-1] < 0)).any(), "-1 last")
    ordered = choice.sort(3).values
    _require(not ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(), "no block twice")
    covered = torch.zeros(choice.shape[:2], dtype=torch.bool, device=choice.device)
    for row, q_begin, q_end, k_begin, k_end in case.table.tolist():
        covered[row, q_begin:q_end] = True
        q = case.q[row, :, q_begin:q_end].transpose(0, 1)
        k = case.k[row, :, k_begin:k_end].transpose(0, 1)
        if q_end == q_begin or len(k) < case.block_size:
            continue
        scores, room = case.scores(q, k)
        own = expected[row, q_begin:q_end, :, :1]
        ours, theirs = (_gathered(scores, x[row, q_begin:q_end], own) for x in (choice, expected))
        slack = _gathered(room, expected[row, q_begin:q_end], own).clamp(min=0).amax(2, keepdim=True)
        worst = float((ours - theirs).abs().max())
        _require(
            ((ours - theirs).abs() <= slack).all(), f"scores of the chosen blocks are off by {worst:.3g}"
        )
        forced = {*range(case.sink), *(-1 - i for i in range(case.local))}
        for block in forced:
            wanted = own[..., 0] + block if block < 0 else torch.full_like(own[..., 0], block)
            there = (choice[row, q_begin:q_end] == wanted[..., None]).any(2)
            _require((there | (wanted < 0) | (wanted > own[..., 0])).all(), f"forced block {block}")
    _require((choice[~covered] == -1).all(), "padding is -1")


def _gathered(scores: Tensor, choice: Tensor, own: Tensor) -> Tensor:
    """Scores of the chosen earlier blocks, sorted; -1e30 elsewhere."""
    taken = scores.gather(2, choice.clamp(0, scores.shape[2] - 1).long())
    return taken.masked_fill((choice < 0) | (choice == own), -1e30).sort(2).values


def plain_attention(case: Case, choice: Tensor) -> Tensor:
    """Masked attention in the precision of the inputs, as in eager PyTorch code."""
    return plain_attention_and_lse(case, choice)[0]


def plain_attention_and_lse(case: Case, choice: Tensor) -> tuple[Tensor, Tensor]:
    """`plain_attention`, and its fp32 log-sum-exp `(batch, H, q_len)`, 0 for padding."""
    lse = case.q.new_zeros(case.q.shape[:3], dtype=torch.float32)
    out = case.q.new_zeros(case.q.shape[0], case.q.shape[2], case.q.shape[1], case.v.shape[3])
    group = case.num_heads // case.num_kv_heads
    for row, q_begin, q_end, k_begin, k_end in case.table.tolist():
        q = case.q[row, :, q_begin:q_end]
        k, v = (x[row, :, k_begin:k_end].repeat_interleave(group, 0) for x in (case.k, case.v))
        key = torch.arange(k_end - k_begin, device=q.device)
        position = torch.arange(q_end - q_begin, device=q.device) + (k_end - k_begin) - (q_end - q_begin)
        part = choice[row, q_begin:q_end].transpose(0, 1)
        mask = torch.zeros(*part.shape[:2], len(key), dtype=torch.bool, device=q.device)
        for slot in range(part.shape[2]):
            mask |= part[:, :, slot, None] == key // case.block_size
        mask &= key <= position[:, None]
        scores = (q @ k.transpose(1, 2)) * case.scale
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.float().softmax(2).to(q.dtype)
        out[row, q_begin:q_end] = (weights @ v).transpose(0, 1)
        lse[row, :, q_begin:q_end] = scores.float().logsumexp(2)
    return out, lse


def assert_attention(case: Case, choice: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Checks the error of attention for `choice`, and padding (zeros and -inf). Returns `(out, lse)`."""
    out, lse = case.attend(choice, **kwargs)
    q, k, v = (x.float() for x in (case.q, case.k, case.v))
    truth, truth_lse = load_backend("reference").forward(q, k, v, choice, *case.where)
    _require(
        (out.shape, out.dtype, lse.dtype) == (truth.shape, case.dtype, torch.float32), "shape and dtypes"
    )
    _require(torch.isfinite(out).all(), "output is finite")
    low = (plain_attention(case, choice).float() - truth).abs().max()
    # one rounding of the output; in fp32 only the order of summation differs, not the precision
    eps = torch.finfo(case.dtype).eps * (8 if case.dtype == torch.float32 else 0.5)
    error = (out.float() - truth).abs().max()
    limit = 2 * low + eps * truth.abs().max()
    _require(
        error <= limit, f"error {float(error):.3g} above {float(limit):.3g}, plain attention {float(low):.3g}"
    )
    covered = truth_lse > -torch.inf
    _require(torch.equal(lse > -torch.inf, covered), "lse of padding")
    _require(torch.allclose(lse[covered], truth_lse[covered], rtol=1e-5, atol=2e-5), "lse")
    _require((out.transpose(1, 2)[~covered] == 0).all(), "padding is zero")
    return out, lse


def _require(holds: Tensor | bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def assert_gradients(case: Case, choice: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the error of the gradients for `choice`, including that of lse. Returns dq, dk, dv.

    The expected gradients are those of the reference in fp64. Padding must have zero gradients.
    """
    from moba_hf.kernels import attend_backward

    out, lse = load_backend("triton").forward(case.q, case.k, case.v, choice, *case.where)
    covered = lse > -torch.inf
    grad_out = torch.randn(out.shape, device=out.device).to(case.dtype)
    grad_lse = torch.randn(lse.shape, device=lse.device)

    def by_autograd(
        dtype: torch.dtype, attend: Callable[[Case], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, ...]:
        twin = copy.copy(case)
        twin.q, twin.k, twin.v = (x.detach().to(dtype).requires_grad_() for x in (case.q, case.k, case.v))
        its_out, its_lse = attend(twin)
        loss = (its_out * grad_out.to(dtype)).sum() + (its_lse.masked_fill(~covered, 0) * grad_lse).sum()
        return torch.autograd.grad(loss, (twin.q, twin.k, twin.v))

    def exact(twin: Case) -> tuple[Tensor, Tensor]:
        return load_backend("reference").forward(twin.q, twin.k, twin.v, choice, *case.where)

    def plain(twin: Case) -> tuple[Tensor, Tensor]:
        return plain_attention_and_lse(twin, choice)

    saved = Attended(case.q, case.k, case.v, out, lse, choice)
    grads = attend_backward(grad_out, grad_lse, saved, *case.where, **kwargs)
    truths, lows = by_autograd(torch.float64, exact), by_autograd(case.dtype, plain)
    for name, x, grad, truth, low in zip("qkv", (case.q, case.k, case.v), grads, truths, lows, strict=True):
        _require(
            (grad.shape, grad.dtype, grad.is_contiguous()) == (x.shape, case.dtype, True),
            f"d{name}: shape, dtype",
        )
        _require(torch.isfinite(grad).all(), f"d{name} is not finite")
        error, theirs = ((y.double() - truth).abs().max() for y in (grad, low))
        # one rounding of the result; in fp32 only the order of summation differs, not the precision;
        # probabilities computed from lse are only as exact as lse
        eps = torch.finfo(case.dtype).eps * (8 if case.dtype == torch.float32 else 0.5)
        eps += torch.finfo(torch.float32).eps * float(lse[covered].abs().max() if covered.any() else 0)
        bound = 2 * theirs + eps * truth.abs().max()
        _require(
            error <= bound, f"d{name}: error {float(error):.3g}, that of plain attention {float(theirs):.3g}"
        )
        _require((grad[truth == 0] == 0).all(), f"d{name} is not zero for padding")
    return grads
