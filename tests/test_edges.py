"""Edge cases of the operator: non-finite scores and values, huge settings, unusual kinds of tensors."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from costs import cost_of
from moba_cases import batched_moba_attention, cumulative, error
from model_checks import tiny_model
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationMixin,
    cache_utils,
)

from moba_hf import MobaConfig, moba_attention, patch_model, prefill, select_blocks, use_moba_cache
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.hf.dynamic_layer import MobaLayer
from moba_hf.op.numerics import full_precision
from moba_hf.op.ops import attention
from moba_hf.op.reference import attend_ref, select_blocks_ref
from moba_hf.op.sequences import Sequences, batched_table
from moba_hf.op.shared import SharedRule
from moba_hf.op.shared_ops import select_shared

sys.path.append(str(Path(__file__).parent / "patches"))
from families import tiny_config as tiny_family_config

Result = TypeVar("Result")


def assert_same_work(huge: Callable[[], Result], same: Callable[[], Result]) -> tuple[Result, Result]:
    """Runs two calls; the first may take at most thrice the operators and twice the memory of the second."""
    first, second = cost_of(huge), cost_of(same)
    assert first.operators <= 3 * second.operators
    assert first.allocated <= 2 * second.allocated
    return first.result, second.result


RULE = {"block_size": 4, "topk": 3}
BACKENDS = ("portable", "reference")


def qkv(
    length: int = 20, heads: int = 2, kv_heads: int = 1, dim: int = 8, dtype=torch.float32
) -> list[Tensor]:
    return [torch.randn(length, h, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


class TestNotFinite:
    @pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("topk", [2, 3, 9])
    @pytest.mark.parametrize("forced", [{}, {"sink_blocks": 1}])
    def test_no_candidate_is_dropped(self, bad: float, dtype: torch.dtype, topk: int, forced: dict) -> None:
        q, k, v = qkv(dtype=dtype)
        q, rule = q.abs(), {"block_size": 4, "topk": topk, **forced}
        k[1] = k[9] = bad
        expected = select_blocks_ref(q, k, **rule)
        choice = select_blocks(q, k, **rule)
        assert torch.equal(choice.sort(2).values, expected.sort(2).values)
        if topk == 9:
            assert sorted(choice[19, 0].tolist()) == [-1, -1, -1, -1, 0, 1, 2, 3, 4]
        # a decode step follows the same rule
        v = torch.arange(20.0, dtype=dtype)[:, None, None].expand(20, 1, 8).contiguous()
        k = torch.where(k.isfinite(), k, 0.0)  # only the choice is compared, not the output
        step = batched_moba_attention(
            q[None, 19:].transpose(1, 2), k[None].transpose(1, 2), v[None].transpose(1, 2), **rule
        )
        assert error(step[0][0, 0], moba_attention(q, k, v, **rule)[19]) < 1e-5

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_decode_ranks_nan_first_whatever_its_sign(self, sign: float) -> None:
        from moba_hf.op.portable_decode import _ranks

        scores = torch.tensor([1.0, torch.inf, torch.nan, -torch.inf])
        scores[2] = torch.tensor(torch.nan).copysign(torch.tensor(sign))
        for each in (scores, scores.double()):
            assert _ranks(each).argsort(descending=True).tolist() == [2, 1, 0, 3]

    @pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
    @pytest.mark.parametrize("backend", ["portable", "reference"])
    def test_a_later_token_changes_nothing_before_it(self, bad: float, backend: str) -> None:
        clean = qkv()
        for which in range(3):
            inputs = [x.clone() for x in clean]
            inputs[which][18] = bad
            grads = []
            for tensors in (clean, inputs):
                q, k, v = (x.clone().requires_grad_() for x in tensors)
                out, lse = moba_attention(q, k, v, **RULE, backend=backend, return_lse=True)
                (out[:18].square().sum() + lse[:, :18].sum()).backward()
                grads.append([out[:18], lse[:, :18], q.grad[:18]])
            for a, b in zip(*grads, strict=True):
                assert error(a, b) < 1e-6, "qkv"[which]

    def test_an_attended_value_is_seen(self) -> None:
        q, k, v = qkv()
        v[18, 0, 3], v[17, 0, 5], v[17, 0, 6] = torch.inf, -torch.inf, torch.nan
        out = moba_attention(q, k, v, **RULE)
        expected, _ = attend_ref(q, k, v, select_blocks(q, k, **RULE), block_size=4)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
        assert out[18:, :, 3].eq(torch.inf).all()
        assert out[:17].isfinite().all()

    def test_a_block_of_minus_infinite_scores_weighs_nothing(self) -> None:
        q, k, v = qkv()
        q = q.abs()
        k[4:8] = -torch.inf
        out, lse = moba_attention(q, k, v, block_size=4, topk=9, return_lse=True)
        expected, expected_lse = attend_ref(q, k, v, select_blocks(q, k, block_size=4, topk=9), block_size=4)
        assert error(out[8:], expected[8:]) < 1e-6
        assert error(lse[:, 8:], expected_lse[:, 8:]) < 1e-6


def same(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, with NaN and infinities at the same places."""
    return bool(torch.isclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True).all())


@pytest.mark.parametrize("rule", [{"topk": 2}, {"tile": 16, "threshold": 0.02, "gate": "mass"}])
def test_a_gradient_of_lse_that_is_not_finite_spares_keys_that_its_query_does_not_see(
    rule: dict[str, Any],
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(48, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
    out, lse = moba_attention(q, k, v, block_size=8, backend="portable", return_lse=True, **rule)
    grad_lse = torch.ones_like(lse)
    grad_lse[:, 20] = torch.nan
    torch.autograd.backward([out, lse], [torch.ones_like(out), grad_lse])
    for x in (q, k, v):
        assert x.grad is not None
    assert k.grad[20].isnan().all()
    assert k.grad[21:].isfinite().all()
    assert v.grad.isfinite().all()
    assert q.grad[torch.arange(48) != 20].isfinite().all()


class TestNotFiniteUnderASharedChoice:
    """Hidden keys affect neither the output nor the gradients of a row, only the choice of its tile."""

    RULES = (
        {"block_size": 4, "tile": 8, "threshold": 0.3, "sample": 2},
        {"block_size": 8, "tile": 4, "threshold": 0.3},
        {"block_size": 4, "tile": 8, "threshold": 0.3, "topk": 4, "dense_below": 8},
    )
    BAD = (torch.inf, -torch.inf, torch.nan)

    @staticmethod
    def run(tensors: list[Tensor], rule: dict, backend: str, rows: int, **given: Any) -> list[Tensor]:
        """Output and lse, then gradients of those of the first `rows` rows."""
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        out, lse = moba_attention(q, k, v, **rule, gate="mass", backend=backend, return_lse=True, **given)
        grads = torch.autograd.grad(out[:rows].square().sum() + lse[:, :rows].sum(), (q, k, v))
        return [out.detach(), lse.detach(), *grads]

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("backend", ["portable", "reference"])
    @pytest.mark.parametrize("rule", RULES, ids=range(3))
    @pytest.mark.parametrize("v_dim", [8, 6])  # the fused kernel for CPUs, and without it
    def test_a_later_token_changes_nothing_before_it(
        self, bad: float, backend: str, rule: dict, v_dim: int
    ) -> None:
        clean = qkv(30)
        clean[2] = clean[2][..., :v_dim]
        for which in range(3):
            inputs = [x.clone() for x in clean]
            inputs[which][21] = bad
            end = 21 if which else 21 // rule["tile"] * rule["tile"]  # the list hears a query of its tile
            out, lse, grad, *_ = self.run(inputs, rule, backend, end)
            before = self.run(clean, rule, backend, end)
            assert error(out[:end], before[0][:end]) < 1e-6, "qkv"[which]
            assert error(lse[:, :end], before[1][:, :end]) < 1e-6, "qkv"[which]
            assert error(grad[:end], before[2][:end]) < 1e-5, "qkv"[which]

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("rule", RULES[:2], ids=range(2))
    @pytest.mark.parametrize("v_dim", [8, 6])
    @pytest.mark.parametrize("piece", [4096, 8])
    def test_a_block_left_out_is_not_read(
        self, bad: float, rule: dict, v_dim: int, piece: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("moba_hf.op.shared_problems._PIECE_KEYS", piece)
        q, k, v = qkv(40)
        v = v[..., :v_dim]
        mask = select_blocks(q, k, **rule, gate="mass")
        # lists of several lengths are computed together; the first block is what fills up the short ones
        mask[0] &= ~1
        mask[1] &= ~(1 << torch.arange(mask.shape[1]) % 2)[:, None].to(torch.int32)
        own = select_blocks(q, k, **{**rule, "threshold": 0.999}, gate="mass")
        mask |= own & ~1
        mask[:, : max(1, rule["block_size"] // rule["tile"])] |= 1
        for which in (1, 2):
            inputs = [q, k.clone(), v.clone()]
            inputs[which][2] = bad
            ours, theirs = (
                self.run(inputs, rule, x, 40, block_indices=mask) for x in ("portable", "reference")
            )
            hidden = [q, k.clone(), v.clone()]
            hidden[which][2] = 0.0
            cleaned = self.run(hidden, rule, "reference", 40, block_indices=mask)
            finite = theirs[0].isfinite().all(2)
            assert 0 < int(finite.sum()) < finite.numel()
            assert same(theirs[0][finite], cleaned[0][finite])
            assert same(theirs[2][finite], cleaned[2][finite])
            for name, a, b in zip(("out", "lse", "dq"), ours, theirs, strict=False):
                assert same(a, b), name
            for a, b in zip(ours[3:], theirs[3:], strict=True):
                assert torch.equal(a.isfinite(), b.isfinite())

    def test_an_attended_value_is_seen(self) -> None:
        rule = self.RULES[0]
        q, k, v = qkv(30)
        v[18, 0, 3], v[17, 0, 5], v[17, 0, 6] = torch.inf, -torch.inf, torch.nan
        for v_dim in (8, 7):
            out, *_ = self.run([q, k, v[..., :v_dim]], rule, "portable", 30)
            expected, *_ = self.run([q, k, v[..., :v_dim]], rule, "reference", 30)
            assert same(out, expected)
            assert out[18:24, :, 3].eq(torch.inf).all()
            assert out[17:24, :, 5].eq(-torch.inf).all()
            assert out[17:24, :, 6].isnan().all()
            assert out[:17].isfinite().all()

    def test_a_block_of_minus_infinite_scores_weighs_nothing(self) -> None:
        q, k, v = qkv(30)
        q = q.abs()
        k[4:8] = -torch.inf
        for v_dim in (8, 7):
            ours, theirs = (self.run([q, k, v[..., :v_dim]], self.RULES[0], x, 30) for x in BACKENDS)
            assert ours[0][8:].isfinite().all()
            assert same(ours[0], theirs[0])
            assert same(ours[1], theirs[1])

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("backend", ["portable", "reference"])
    def test_no_candidate_is_dropped(self, bad: float, backend: str) -> None:
        """A tile whose masses are NaN attends to every block, the lowest ones up to `topk`."""
        q, k, _ = qkv(40)
        rule = {"block_size": 4, "tile": 8, "threshold": 0.9, "gate": "mass", "backend": backend}
        before = select_blocks(q, k, **rule)
        for which, at, tiles in ((0, 27, [3]), (1, 9, [2, 3, 4])):
            inputs = [q.clone(), k.clone()]
            inputs[which][at] = bad
            mask = select_blocks(*inputs, **rule)
            capped = select_blocks(*inputs, **rule, topk=4)
            for tile in range(5):
                blocks, own = (1 << 2 * tile + 2) - 1, 3 << 2 * tile
                if tile in tiles:
                    assert mask[:, tile, 0].eq(blocks).all(), tile
                    assert capped[:, tile, 0].eq(own | 3).all(), tile
                else:
                    assert torch.equal(mask[:, tile], before[:, tile]), tile
        share = SharedRule(4, 8, share=0.5, sink_blocks=0, local_blocks=0)
        q[27] = bad
        where = Sequences(batched_table(1, 40, 40, q.device), 40, 40)
        packed = [x.transpose(0, 1)[None] for x in (q, k)]
        mask = select_shared(*packed, where, share, softmax_scale=0.3, backend=backend)
        assert mask[:, 3, 0].eq(255).all()
        assert not mask[:, 4, 0].eq(1023).all()

    def test_decode_steps(self) -> None:
        """Later keys of a call do not affect earlier queries; a NaN key is attended, not dropped."""
        rule = SharedRule(4, 8, threshold=0.9, sink_blocks=0, local_blocks=0)
        clean = [x.transpose(0, 1)[None] for x in qkv(41)]
        where = Sequences(batched_table(1, 3, 41, torch.device("cpu")), 3, 41)

        def steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            settings = {"softmax_scale": 0.3, "steps": True}
            return attention(q[:, :, 38:], k, v, where, rule, **settings)[0][0]

        for which in range(3):
            inputs = [x.clone() for x in clean]
            inputs[which][:, :, 39] = torch.nan
            out = steps(*inputs)
            assert error(out[0], steps(*clean)[0]) < 1e-6
            assert out[1].isnan().all()
        clean[1][:, :, 2] = torch.nan
        assert steps(*clean).isnan().all()


class TestHugeSettings:
    """The cost depends on the sequences, and results equal those of settings that just cover them."""

    @pytest.mark.parametrize(
        ("huge", "same"),
        [
            ({"block_size": 10**9, "topk": 1}, {"block_size": 70, "topk": 1}),
            ({"block_size": 163840, "topk": 3}, {"block_size": 70, "topk": 1}),
            ({"block_size": 4, "topk": 10**9}, {"block_size": 4, "topk": 18}),
            (
                {"block_size": 4, "topk": 10**9 + 9, "sink_blocks": 10**9, "local_blocks": 2},
                {"block_size": 4, "topk": 18},
            ),
            (
                {"block_size": 4, "topk": 10**9 + 9, "sink_blocks": 3, "local_blocks": 10**9},
                {"block_size": 4, "topk": 18},
            ),
        ],
    )
    @pytest.mark.parametrize("gate", ["mean", "mass"])
    def test_results(self, huge: dict, same: dict, gate: str) -> None:
        tensors = [x.requires_grad_() for x in qkv(70)]

        def run(rule: dict) -> tuple[Tensor, ...]:
            out, lse = moba_attention(*tensors, **rule, gate=gate, return_lse=True)
            return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), tensors)

        results = assert_same_work(lambda: run(huge), lambda: run(same))
        for a, b in zip(*results, strict=True):
            assert error(a, b) < 1e-5
        last = [x.detach()[None].transpose(1, 2) for x in (tensors[0][69:], *tensors[1:])]
        (step, *_), _ = assert_same_work(*(partial(batched_moba_attention, *last, **x) for x in (huge, same)))
        assert error(step[0, 0], results[0][0][69].detach()) < 1e-6

    @pytest.mark.parametrize(
        ("huge", "same"),
        [
            ({"block_size": 163840, "tile": 128}, {"block_size": 1024, "tile": 128}),
            ({"block_size": 64, "tile": 64 * 10**6}, {"block_size": 64, "tile": 512}),
            ({"block_size": 2**40, "tile": 2**40}, {"block_size": 512, "tile": 512}),
            ({"block_size": 64, "tile": 128, "dense_below": 128 * 10**9}, {"block_size": 512, "tile": 512}),
            ({"block_size": 64, "tile": 64, "topk": 10**9}, {"block_size": 64, "tile": 64, "topk": 8}),
            (
                {"block_size": 64, "tile": 64, "topk": 10**10, "sink_blocks": 10**9, "local_blocks": 10**9},
                {"block_size": 512, "tile": 512},
            ),
        ],
    )
    @pytest.mark.parametrize("v_dim", [64, 32])
    def test_results_of_a_shared_choice(self, huge: dict, same: dict, v_dim: int) -> None:
        """A block size of 163,840 for 500 tokens used to take seconds."""
        tensors = [x.requires_grad_() for x in (*qkv(500, 4, 2, 64)[:2], torch.randn(500, 2, v_dim))]

        def run(rule: dict) -> tuple[Tensor, ...]:
            settings = {"gate": "mass", "threshold": 0.3, **rule}
            out, lse = moba_attention(*tensors, **settings, return_lse=True)
            return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), tensors)

        results = assert_same_work(lambda: run(huge), lambda: run(same))
        alike = "dense_below" not in huge and "sink_blocks" not in huge  # the same problems, so the same bits
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b) if alike else error(a, b) < 2e-5  # gradients reach 30
        packed = [x.detach().transpose(0, 1)[None] for x in tensors]
        where = Sequences(batched_table(1, 1, 500, torch.device("cpu")), 1, 500)

        def last(rule: dict) -> tuple[Tensor, ...]:
            shared = SharedRule(**{"threshold": 0.3, "sink_blocks": 0, "local_blocks": 0, **rule})
            return attention(
                packed[0][:, :, 499:], *packed[1:], where, shared, softmax_scale=0.125, steps=True
            )

        step, _ = assert_same_work(lambda: last(huge), lambda: last(same))
        assert error(step[0][0, 0], results[0][0][499].detach()) < 1e-5

    def test_short_sequences_beside_a_long_one_under_a_shared_choice(self) -> None:
        lengths = [10] * 30 + [1500]
        inputs, cu = qkv(sum(lengths)), cumulative(lengths)
        costs = []
        for sizes in ({"block_size": 1024, "tile": 1024}, {"block_size": 16, "tile": 16}):
            rule = {**sizes, "threshold": 0.3, "gate": "mass"}
            costs.append(cost_of(partial(moba_attention, *inputs, **rule, cu_seqlens_q=cu)))
            first = moba_attention(*(x[:10] for x in inputs), **rule)
            assert error(costs[-1].result[:10], first) < 1e-6
        assert costs[0].operators <= 2 * costs[1].operators
        assert costs[0].allocated <= 5 * costs[1].allocated

    def test_a_choice_is_filled_up_or_refused(self) -> None:
        q, k, _ = qkv(70)
        choice = select_blocks(q, k, block_size=4, topk=1000)
        assert choice.shape == (70, 2, 1000)
        expected = select_blocks_ref(q, k, block_size=4, topk=1000)
        assert torch.equal(choice.sort(2).values, expected.sort(2).values)
        with pytest.raises(
            ValueError, match=r"with topk=1000000000 the choice takes 522 GiB for 70 queries and 2 "
        ):
            select_blocks(q, k, block_size=4, topk=10**9)

    def test_short_sequences_beside_a_long_one(self) -> None:
        """A document of ten tokens must not cost as much as a block of 1,024."""
        lengths = [10] * 60 + [150]
        inputs, cu = qkv(sum(lengths), heads=8, kv_heads=8, dim=64), cumulative(lengths)
        costs = []
        for block_size in (1024, 10):
            rule = {"block_size": block_size, "topk": 2}
            costs.append(cost_of(partial(moba_attention, *inputs, **rule, cu_seqlens_q=cu)))
            first = moba_attention(*(x[:10] for x in inputs), **rule)
            assert error(costs[-1].result[:10], first) < 1e-6
        assert costs[0].operators <= 2 * costs[1].operators
        assert costs[0].allocated <= 2 * costs[1].allocated


class TestKindsOfTensors:
    def test_numpy_integers(self) -> None:
        q, k, v = qkv()
        rule = {"block_size": np.int64(4), "topk": np.int32(3), "max_seqlen_k": np.int64(20)}
        assert torch.equal(moba_attention(q, k, v, **rule), moba_attention(q, k, v, **RULE))
        config = MobaConfig(
            np.int64(4), np.int32(3), full_attention_layers=np.array([-1]), layers={0: {"topk": np.int8(2)}}
        )
        assert config == MobaConfig(4, 3, full_attention_layers=(-1,), layers={0: {"topk": 2}})
        assert type(config.block_size) is int
        with pytest.raises(TypeError, match=r"topk must be an int, got True"):
            moba_attention(q, k, v, block_size=4, topk=True)

    @pytest.mark.parametrize("name", ["q", "cu_seqlens_q", "block_indices"])
    @pytest.mark.parametrize("make", [list, np.asarray])
    def test_what_is_no_tensor(self, name: str, make) -> None:
        q, k, v = qkv()
        given = {"q": q, "k": k, "v": v, name: make([0, 20])}
        with pytest.raises(TypeError, match=rf"{name} must be a torch tensor, got (list|ndarray): pass"):
            moba_attention(**given, **RULE)

    @pytest.mark.parametrize(("dim", "v_dim"), [(0, 8), (8, 0)])
    def test_no_dimensions(self, dim: int, v_dim: int) -> None:
        q, k, v = qkv()
        with pytest.raises(ValueError, match=f"head_dim and v_dim must be at least 1, got {dim} and {v_dim}"):
            moba_attention(q[..., :dim], k[..., :dim], v[..., :v_dim], **RULE)

    @pytest.mark.filterwarnings(
        "ignore:.torch.jit:DeprecationWarning"
    )  # a warning of torch at its first dual number
    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_forward_mode(self, which: int) -> None:
        inputs = qkv(dtype=torch.float64)

        def run(x: Tensor, backend: str) -> Tensor:
            return moba_attention(*inputs[:which], x, *inputs[which + 1 :], **RULE, backend=backend)

        tangent = torch.randn_like(inputs[which])
        with pytest.raises(NotImplementedError, match=r"no forward-mode derivative.*use reverse mode"):
            torch.func.jvp(lambda x: run(x, "auto"), (inputs[which],), (tangent,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            run(forward_ad.make_dual(inputs[which], tangent), "auto")
        _, ahead = torch.func.jvp(lambda x: run(x, "reference"), (inputs[which],), (tangent,))
        x = inputs[which].clone().requires_grad_()
        grad_out = torch.randn_like(inputs[0])
        (grad,) = torch.autograd.grad((run(x, "auto") * grad_out).sum(), x)
        assert abs(float((grad * tangent).sum() - (ahead * grad_out).sum())) < 1e-9

    def test_fake_and_meta_tensors_in_packing(self) -> None:
        inputs, cu = qkv(), cumulative((12, 8))
        assert moba_attention(*(x.to("meta") for x in inputs), **RULE, cu_seqlens_q=cu.to("meta")).shape == (
            20,
            2,
            8,
        )
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(x) for x in (*inputs, cu)]
            assert moba_attention(*fake[:3], **RULE, cu_seqlens_q=fake[3]).shape == (20, 2, 8)


class TestModels:
    @pytest.mark.parametrize("topk", [2, 100])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    def test_fake_tensors(self, topk: int, packed: bool, masked: bool) -> None:
        model = tiny_model("llama", MobaConfig(4, topk))
        ids = torch.randint(0, 50, (1, 24))
        given = {"position_ids": torch.arange(24)[None]}
        if packed:
            given["cu_seq_lens_q"] = torch.tensor([0, 10, 24], dtype=torch.int32)
        elif masked:
            given["attention_mask"] = torch.ones_like(ids)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = {name: mode.from_tensor(x) for name, x in given.items()}
            assert model(mode.from_tensor(ids), use_cache=False, **fake).logits.shape[:2] == (1, 24)

    @pytest.mark.parametrize("topk", [2, 100])
    @pytest.mark.parametrize("packed", [False, True])
    def test_meta_tensors(self, topk: int, packed: bool) -> None:
        model = tiny_model("llama", MobaConfig(4, topk)).to("meta")
        given = (
            {"cu_seq_lens_q": torch.tensor([0, 10, 24], dtype=torch.int32, device="meta")} if packed else {}
        )
        ids = torch.zeros(1, 24, dtype=torch.long, device="meta")
        # without a cache, transformers itself inspects position ids
        assert model(ids, **given).logits.shape[:2] == (1, 24)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("topk", [2, 100])
    def test_jit_trace(self, topk: int) -> None:
        model = tiny_model("llama", MobaConfig(4, topk))
        ids, other = torch.randint(0, 50, (2, 2, 24))

        class Logits(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, x: Tensor) -> Tensor:
                return self.model(x, use_cache=False).logits

        with torch.no_grad():
            traced = torch.jit.trace(Logits(), (ids,), check_trace=False)
            assert error(traced(other), Logits()(other)) < 1e-5

    @pytest.mark.parametrize("padded", [False, True])
    def test_a_module_that_is_not_causal(self, padded: bool) -> None:
        """It gets the result of transformers' own implementation."""
        model = tiny_model("llama", MobaConfig(4, 2))
        ids = torch.randint(0, 50, (2, 24))
        mask = torch.ones_like(ids)
        mask[0, : 5 * padded] = 0
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        ours = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("sdpa")
        assert error(ours[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()]) < 1e-6


class TestPrecisionOfOneThread:
    """Scores are exact under any setting, and no process-wide setting is changed."""

    def test_nothing_is_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        written = []
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            kind = type(backend)
            old = getattr(kind, "__setattr__", object.__setattr__)
            monkeypatch.setattr(
                kind, "__setattr__", lambda self, *x, old=old: (written.append(x), old(self, *x))
            )
        q, k, v = (x.requires_grad_() for x in qkv())
        moba_attention(q, k, v, **RULE).sum().backward()
        moba_attention(q, k, v, **RULE, backend="reference")
        assert written == []

    def test_an_inherited_setting_stays_inherited(self) -> None:
        q, k, v = qkv()
        switches = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
        before = [x.fp32_precision for x in switches]
        try:
            for switch in switches:
                switch.fp32_precision = "none"
            torch.backends.fp32_precision = "tf32"
            moba_attention(q, k, v, **RULE)
            torch.backends.fp32_precision = "ieee"
            assert [x.fp32_precision for x in switches] == ["ieee", "ieee"]
        finally:
            torch.backends.fp32_precision = "none"
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value

    def test_products_are_exact_in_this_thread_alone(self) -> None:
        a, b = torch.randn(40, 64), torch.randn(64, 40)
        exact = (a.double() @ b.double()).float()
        before = torch.backends.mkldnn.matmul.fp32_precision
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        inside, other = threading.Event(), threading.Event()
        seen = {}

        def ours() -> None:
            written, added, row = torch.empty(1, 40, 40), torch.zeros(1, 40, 40), torch.zeros(40, 40)
            with full_precision(a.device):
                torch.bmm(a[None], b[None], out=written)
                added.baddbmm_(a[None], b[None])
                row.addmm_(a, b)
                seen["written"] = [written[0], added[0], row]
                inside.set()
                other.wait(20)
                seen["ours"] = [
                    a @ b,
                    torch.einsum("ij,jk", a, b),
                    torch.mm(a, b),
                    torch.bmm(a[None], b[None])[0],
                ]

        try:
            thread = threading.Thread(target=ours)
            thread.start()
            assert inside.wait(20)
            low = a @ b
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
            other.set()
            thread.join()
            assert torch.equal(low, a @ b)
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before
        assert all(torch.equal(x, exact) for x in [*seen["ours"], *seen["written"]])

    def test_nothing_changes_where_nothing_is_lowered(self) -> None:
        a, b = torch.randn(40, 64), torch.randn(64, 40)
        expected = a @ b
        with full_precision(a.device):
            assert torch.equal(a @ b, expected)


ROPE = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


class TestPrefillOfRotaryEmbeddings:
    """Length-dependent frequencies are those of the whole prompt in every chunk."""

    def model(self, kind: str) -> Any:
        sizes = {"max_position_embeddings": 32 if kind == "dynamic" else 128}
        return tiny_model("llama", MobaConfig(4, 3), rope_parameters=dict(ROPE[kind]), **sizes)

    @pytest.mark.parametrize("kind", ["dynamic", "longrope"])
    @pytest.mark.parametrize("padded", [False, True])
    def test_chunks_equal_one_call(self, kind: str, padded: bool) -> None:
        ids = torch.randint(1, 90, (2, 60))
        mask = torch.ones_like(ids)
        mask[0, : 9 * padded] = 0
        expected = DynamicCache()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        one = self.model(kind)
        one(ids, attention_mask=mask, position_ids=positions, **cache_kwargs(one, expected))
        model = self.model(kind)
        cache = prefill(model, ids, chunk_size=16, attention_mask=mask, dense_tail=0, progress=False)
        for ours, theirs in zip(cache.layers, expected.layers, strict=True):
            real = mask[:, None, :59, None].bool().expand_as(ours.keys)
            assert error(ours.keys[real], theirs.keys[:, :, :59][real]) < 1e-5
            assert error(ours.values[real], theirs.values[:, :, :59][real]) < 1e-5
        rotary = model.model.rotary_emb
        assert not rotary._forward_hooks
        assert not rotary._forward_pre_hooks

    @pytest.mark.parametrize("kind", ["dynamic", "longrope"])
    def test_a_cache_of_other_frequencies_is_refused(self, kind: str) -> None:
        model, ids = self.model(kind), torch.randint(1, 90, (1, 60))
        cache = prefill(model, ids[:, :21], dense_tail=0, progress=False)
        prefill(model, ids[:, :30], cache=cache, dense_tail=0, progress=False)
        with pytest.raises(
            ValueError, match=rf'type "{kind}" change beyond 32 tokens: the 29 tokens in the cache'
        ):
            prefill(model, ids, cache=cache, dense_tail=0, progress=False)


class TestDefaultCache:
    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
    def test_uses_end_in_any_order(self, order: tuple[int, ...]) -> None:
        tables = (cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING)
        before = [dict(x) for x in tables], GenerationMixin._prepare_cache_for_generation
        uses = [use_moba_cache() for _ in range(3)]
        for i in order:
            assert tables[0]["full_attention"] is MobaLayer
            uses[i].undo()
            uses[i].undo()  # undoing twice has no effect
        assert ([dict(x) for x in tables], GenerationMixin._prepare_cache_for_generation) == before

    def test_what_others_replaced_since_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        use = use_moba_cache()
        ours = GenerationMixin._prepare_cache_for_generation

        def theirs(*args: Any, **kwargs: Any) -> Any:
            return ours(*args, **kwargs)

        monkeypatch.setattr(GenerationMixin, "_prepare_cache_for_generation", theirs)
        use.undo()
        assert GenerationMixin._prepare_cache_for_generation is theirs
        model = tiny_model("llama", MobaConfig(4, 3))
        result = model.generate(
            torch.ones(1, 5, dtype=torch.long), max_new_tokens=2, return_dict_in_generate=True
        )
        assert not any(isinstance(x, MobaLayer) for x in result.past_key_values.layers)
        monkeypatch.setattr(GenerationMixin, "_prepare_cache_for_generation", ours.__wrapped__)


class TestSettingsBesideANestedTextConfig:
    """A flat config, as older releases wrote it, has MoBA settings outside its text config."""

    MOBA: ClassVar = {"block_size": 4, "topk": 2}

    def config(self) -> Any:
        values = tiny_family_config("qwen2_5_vl").to_dict()
        text = {k: v for k, v in values.pop("text_config").items() if k != "model_type"}
        values.pop("model_type")
        return AutoConfig.for_model("qwen2_5_vl", **{**text, **values, "moba": self.MOBA})

    @pytest.mark.parametrize("late", [False, True])
    def test_models_built_from_it_follow_them(self, late: bool, tmp_path: Path) -> None:
        config = self.config()
        if late:  # as an attribute, after the text config was made
            config = tiny_family_config("qwen2_5_vl")
            config.moba = dict(self.MOBA)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="moba")
        assert model.config.text_config.moba == self.MOBA
        assert getattr(model.config, "moba", None) is None
        patch_model(model, MobaConfig(8, 3))
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert "moba" not in saved
        assert saved["text_config"]["moba"] == MobaConfig(8, 3).to_dict()

    def test_two_that_differ_are_refused(self) -> None:
        config = self.config()
        config.text_config.moba = {"block_size": 8, "topk": 2}
        with pytest.raises(
            ValueError, match=r"two different MoBA settings: .*'block_size': 4.* outside its text_config"
        ):
            AutoModelForImageTextToText.from_config(config)
