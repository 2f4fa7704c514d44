"""Checks of the kernels for decode steps of a shared choice, for any device, against the portable path.

The choice must equal the portable one, except for blocks whose mass is within 1 % of the threshold. Rows must
equal the portable ones under the kernel's own choice, up to the rounding of the softmax weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moba_hf.kernels import shared_steps, shared_steps_attend
from moba_hf.op import shared_decode
from moba_hf.op.block_means import BlockMeans, block_means_of
from moba_hf.op.gates import KeptMass
from moba_hf.op.portable_decode import attend_blocks, positions
from moba_hf.op.sequences import batched_table
from moba_hf.op.shared import unpack_blocks
from moba_hf.op.shared_rule import SharedRule

ERROR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}


@dataclass
class Steps:
    """The last `count` rows of a padded batch; slots outside of the rows' bounds hold NaN.

    Attributes:
        rule: how blocks are chosen.
        heads: query heads and kv heads.
        dims: head dims of keys and values.
        length: cached slots.
        count: queries per row.
        heard: rows before them; None: every step asks alone.
        starts: first slot of each batch row.
        spread: factor of the keys; the larger, the fewer blocks hold the mass.
    """

    rule: SharedRule
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (32, 32)
    length: int = 300
    count: int = 1
    heard: int | None = None
    starts: tuple[int, ...] = (0, 45)
    dtype: torch.dtype = torch.float32
    spread: float = 5.0
    device: str = "cpu"
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        self.scale = self.dims[0] ** -0.5
        torch.manual_seed(0)
        batch, (heads, kv_heads) = len(self.starts), self.heads
        shape = {"device": self.device}

        def rand(*sizes: int) -> Tensor:
            return torch.randn(*sizes, **shape).to(self.dtype)  # type: ignore[arg-type]

        self.q = rand(batch, heads, self.count, self.dims[0])
        self.before = None if self.heard is None else rand(batch, heads, self.heard, self.dims[0])
        self.k = rand(batch, kv_heads, self.length + 24, self.dims[0]) * self.spread
        # blocks differ in the size of their keys, as in text
        sizes = torch.rand(batch, kv_heads, self.length // 16 + 3, **shape)  # type: ignore[call-overload]
        self.k *= sizes.repeat_interleave(16, 2)[:, :, : self.k.shape[2], None].to(self.dtype)
        self.v = rand(batch, kv_heads, self.length + 24, self.dims[1])
        self.start = torch.tensor(self.starts, device=self.device)
        slot = torch.arange(self.k.shape[2], device=self.device)
        outside = (slot < self.start[:, None]) | (slot >= self.length)
        for x in (self.k, self.v):
            x.masked_fill_(outside[:, None, :, None], torch.nan)
        ends = torch.full_like(self.start, self.length)
        self.table = batched_table(batch, self.count, self.length, self.q.device, self.start, ends)
        what = KeptMass(self.rule.rotary_pairs)
        keys = self.k[:, :, : self.length].nan_to_num(0.0)
        self.kept = block_means_of(keys, self.start, self.rule.block_size, "triton", what)

    def choose(self, **kwargs: Any) -> Tensor:
        """The kernels' choice, `(batch * count, H, words)`."""
        where = (self.table, self.rule, self.scale, self.before)
        return shared_steps.choose(self.q, self.kept, *where, **kwargs)

    def portable(self, rule: SharedRule | None = None) -> Tensor:
        """The portable choice, bool `(batch, H, count, blocks)`."""
        position = positions(self.table, self.count)
        where = (position, rule or self.rule, self.scale, self.before)
        return shared_decode.choose(self.q, self.kept, *where)

    def decode(self) -> tuple[Tensor, Tensor]:
        where = (self.kept, self.table, self.rule, self.scale, self.before)
        return shared_steps.decode(self.q, self.k, self.v, *where)

    def unpacked(self, mask: Tensor) -> Tensor:
        """`mask` as bool `(batch, H, count, blocks)`; checks that no later bit is set."""
        bits = unpack_blocks(mask, mask.shape[2] * 32).unflatten(0, (len(self.starts), -1)).transpose(1, 2)
        columns = self.kept.shape[2] + 1
        assert not bits[..., columns:].any()
        return bits[..., :columns]


def assert_steps(steps: Steps) -> Tensor:
    """Checks the choice and the rows; returns the choice, unpacked."""
    mask = steps.choose()
    got, expected = steps.unpacked(mask), steps.portable()
    if steps.rule.threshold is not None and steps.rule.share is None and steps.rule.topk is None:
        lower, upper = (
            steps.portable(SharedRule(**{**vars(steps.rule), "threshold": steps.rule.threshold * x}))
            for x in (0.99, 1.01)
        )
        assert not (got & ~lower).any()
        assert not (upper & ~got).any()
    else:
        assert torch.equal(got, expected)
    out, lse = steps.decode()
    chosen = shared_decode._lists(got, got.shape[3])
    tensors = (x.float() for x in (steps.q, steps.k, steps.v))
    position = positions(steps.table, steps.count)
    truth, truth_lse = attend_blocks(
        *tensors, chosen, position, steps.table, steps.rule.block_size, steps.scale
    )
    padding = position < 0
    assert (out[padding] == 0).all()
    assert (lse.transpose(1, 2)[padding] == -torch.inf).all()
    real = ~padding
    error = (out.float() - truth)[real].norm() / truth[real].norm()
    assert error < ERROR[steps.dtype], error
    difference = (lse - truth_lse).transpose(1, 2)[real].abs().max()
    assert difference < 1e-4, difference
    return got


def assert_splits_and_budgets_change_nothing(steps: Steps) -> None:
    """The choice does not depend on splits, memory or slots; other splits of the attention only round."""
    mask = steps.choose()
    assert torch.equal(mask, steps.choose(workspace=1))
    for splits in (1, 3, 7):
        assert torch.equal(mask, steps.choose(splits=splits))
    more = torch.nn.functional.pad(steps.kept, (0, 0, 0, steps.kept.shape[2] + 40), value=1.0)
    wider = shared_steps.choose(steps.q, more, steps.table, steps.rule, steps.scale, steps.before)
    assert torch.equal(mask, wider[:, :, : mask.shape[2]])
    assert not wider[:, :, mask.shape[2] :].any()
    where = (mask, steps.table, steps.rule.block_size, steps.scale)
    first = shared_steps_attend.attend(steps.q, steps.k, steps.v, *where)
    assert all(torch.equal(*x) for x in zip(first, steps.decode(), strict=True))
    for splits in (1, 7):
        again = shared_steps_attend.attend(steps.q, steps.k, steps.v, *where, splits=splits)
        for x, y in zip(first, again, strict=True):
            eps = max(1e-5, torch.finfo(x.dtype).eps)
            torch.testing.assert_close(x, y, rtol=2 * eps, atol=eps)


def assert_kept(dtype: torch.dtype, dim: int, block_size: int, grown: list[int], device: str) -> None:
    """A cache that grows by `grown` keeps the summaries of torch, up to rounding, and of one call exactly."""
    torch.manual_seed(0)
    length, starts = sum(grown), torch.tensor([0, 13], device=device)
    keys = torch.randn(2, 2, length, dim, device=device).to(dtype)
    for pairs in ("halves", "neighbours"):
        what, means, written = KeptMass(pairs), BlockMeans(), 0
        for i, count in enumerate(grown):
            means.appended(count)
            written += count
            at = torch.tensor(written, device=device) if i % 2 else written
            got = means.bring_up(keys, at, length, starts, block_size, "triton", kept=what)
        once = block_means_of(keys, starts, block_size, "triton", what)
        for row, start in enumerate(starts.tolist()):
            expected = what.take(keys[row, :, start:], block_size)
            blocks = expected.shape[1]
            assert torch.equal(got[row, :, :blocks], once[row, :, :blocks])
            parts = zip(
                *(what.split(x, dim, block_size) for x in (got[row, :, :blocks], expected)), strict=True
            )
            for x, y in parts:
                eps = torch.finfo(y.dtype).eps
                torch.testing.assert_close(x.float(), y.float(), rtol=2 * eps, atol=1e-6)
