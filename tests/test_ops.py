"""The operator in torch: invalid input, views, autograd, compile, precision settings, memory."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from moba_cases import batched_moba_attention, cumulative, error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moba_hf import moba_attention, select_blocks
from moba_hf.config import LayerConfig
from moba_hf.op import operators, portable, portable_select
from moba_hf.op.backend_table import BACKENDS
from moba_hf.op.operators import attend_op, select_op, update_means_op
from moba_hf.op.ops import attention
from moba_hf.op.reference import block_mean_ref, gate_ref, moba_attention_ref, select_blocks_ref
from moba_hf.op.sequences import Sequences, batched_table, packed_table
from moba_hf.op.shared_rule import SharedRule

pytestmark = pytest.mark.usefixtures("poison")

RULE = {"block_size": 5, "topk": 3}

SECOND_IMPORT = """
import sys
import torch
from moba_hf import moba_attention as first

x = torch.randn(32, 2, 16)
rules = {"block_size": 8, "topk": 2}, {"block_size": 8, "tile": 8, "gate": "mass", "threshold": 0.1}
wanted = [first(x, x, x, **rule) for rule in rules]
for name in [name for name in sys.modules if name.split(".")[0] == "moba_hf"]:
    del sys.modules[name]
from moba_hf import moba_attention as second
from moba_hf.op import backends

assert second is not first
seen, load = [], backends.load_backend
for module in ("operators", "shared_ops"):
    vars(sys.modules["moba_hf.op." + module])["load_backend"] = lambda name: seen.append(name) or load(name)
for again in (second, first):
    for rule, out in zip(rules, wanted):
        seen.clear()
        assert torch.equal(again(x, x, x, **rule), out)
        assert seen, again
        leaf = x.clone().requires_grad_()
        again(leaf, x, x, **rule).sum().backward()
        assert leaf.grad.any()
"""


def qkv(
    length: int = 40, heads: int = 4, kv_heads: int = 2, dim: int = 8, dtype=torch.float64
) -> list[Tensor]:
    return [torch.randn(length, h, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


class TestBadInput:
    """Each error names what is wrong, and no fault is found only deep in a kernel."""

    @pytest.mark.parametrize(
        ("rule", "kind", "message"),
        [
            ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
            ({"topk": 0}, ValueError, "topk must be at least 1, got 0"),
            ({"sink_blocks": -1}, ValueError, "sink_blocks must be at least 0, got -1"),
            ({"local_blocks": -1}, ValueError, "local_blocks must be at least 0, got -1"),
            ({"sink_blocks": 2, "local_blocks": 1}, ValueError, "topk=3 is too small.* at least 4"),
            ({"block_size": 5.0}, TypeError, "block_size must be an int, got 5.0"),
            ({"topk": "3"}, TypeError, "topk must be an int, got '3'"),
        ],
    )
    def test_rule(self, rule: dict[str, int], kind: type[Exception], message: str) -> None:
        q, k, v = qkv()
        with pytest.raises(kind, match=message):
            moba_attention(q, k, v, **(RULE | rule))
        with pytest.raises(kind, match=message):
            select_blocks(q, k, **(RULE | rule))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda q, k, v: (q[0], k, v), "q must be (tokens, heads, dim), got (4, 8)"),
            (lambda q, k, v: (q, k, v[None]), "v must be (tokens, heads, dim), got (1, 40, 2, 8)"),
            (lambda q, k, v: (q[:, :3], k, v), "num_heads=3 must be a multiple of num_kv_heads=2"),
            (lambda q, k, v: (q[:, :0], k, v), "num_heads=0 must be a multiple of num_kv_heads=2"),
            (lambda q, k, v: (q, k[:, :0], v[:, :0]), "num_heads=4 must be a multiple of num_kv_heads=0"),
            (lambda q, k, v: (q[..., :4], k, v), "q and k must have the same head_dim, got 4 and 8"),
            (lambda q, k, v: (q, k, v[:39]), "k and v the same length and heads"),
            (lambda q, k, v: (q, k, v[:, :1]), "k and v the same length and heads"),
            (lambda q, k, v: (q, k[:30], v[:30]), "more queries (40) than keys (30)"),
            (
                lambda q, k, v: (q, k.float(), v),
                "q, k, v must have the same dtype, got torch.float64, torch.float32",
            ),
            (
                lambda q, k, v: (q.long(), k.long(), v.long()),
                "q must be fp64, fp32, bf16 or fp16, got torch.int64",
            ),
            (
                lambda q, k, v: (q, k.to("meta"), v.to("meta")),
                "q, k, v must be on the same device, got cpu, meta, meta",
            ),
        ],
    )
    def test_tensors(self, change, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            moba_attention(*change(*qkv()), **RULE)

    @pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
    def test_scale(self, scale: float) -> None:
        q, k, v = qkv()
        with pytest.raises(ValueError, match="softmax_scale must be finite"):
            moba_attention(q, k, v, **RULE, softmax_scale=scale)
        with pytest.raises(ValueError, match="softmax_scale must be finite"):
            select_blocks(q, k, **RULE, softmax_scale=scale)

    @pytest.mark.parametrize(
        ("cu_q", "cu_k", "message"),
        [
            (None, [0, 40], "cu_seqlens_k needs cu_seqlens_q"),
            ([0, 39], None, "cu_seqlens_q must rise from 0 to the number of tokens 40, got [0, 39]"),
            ([1, 40], None, "cu_seqlens_q must rise from 0"),
            ([0, 30, 20, 40], None, "cu_seqlens_q must rise from 0"),
            ([0, 40], [0, 41], "cu_seqlens_k must rise from 0 to the number of tokens 40, got [0, 41]"),
            ([0, 40], [0, 20, 40], "must have equally many sequences, got 1 and 2"),
            ([0, 20, 40], [0, 10, 40], "sequence 0 has more queries (20) than keys (10)"),
            ([], None, "cu_seqlens_q must be int32 (num_seqs + 1,)"),
            ([[0, 40]], None, "cu_seqlens_q must be int32 (num_seqs + 1,)"),
        ],
    )
    def test_offsets(self, cu_q: list[int] | None, cu_k: list[int] | None, message: str) -> None:
        cu_q, cu_k = (None if x is None else torch.tensor(x, dtype=torch.int32) for x in (cu_q, cu_k))
        with pytest.raises(ValueError, match=re.escape(message)):
            moba_attention(*qkv(), **RULE, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)

    @pytest.mark.parametrize(
        ("bound", "kind", "message"),
        [
            ({"max_seqlen_q": 24}, ValueError, "max_seqlen_q=24 is below the longest sequence, 25 tokens"),
            ({"max_seqlen_k": 24}, ValueError, "max_seqlen_k=24 is below the longest sequence, 25 tokens"),
            ({"max_seqlen_q": -3}, ValueError, "max_seqlen_q=-3 is below"),
            ({"max_seqlen_k": 25.0}, TypeError, "max_seqlen_k must be an int, got 25.0"),
        ],
    )
    def test_bounds_on_lengths(self, bound: dict, kind: type[Exception], message: str) -> None:
        """With a bound that is too small, kernels would skip rows."""
        q, k, v = qkv()
        rule = RULE | {"cu_seqlens_q": cumulative((15, 25))}
        with pytest.raises(kind, match=message):
            moba_attention(q, k, v, **rule, **bound)
        with pytest.raises(kind, match=message):
            select_blocks(q, k, **rule, **bound)
        expected = moba_attention(q, k, v, **rule)
        for enough in (25, 90):
            got = moba_attention(q, k, v, **rule, max_seqlen_q=enough, max_seqlen_k=enough)
            assert torch.equal(got, expected)

    def test_offsets_of_a_wrong_dtype_or_device(self) -> None:
        with pytest.raises(ValueError, match="cu_seqlens_q must be int32"):
            moba_attention(*qkv(), **RULE, cu_seqlens_q=torch.tensor([0.0, 40.0]))
        with pytest.raises(ValueError, match="cu_seqlens_q is on meta, q on cpu"):
            moba_attention(*qkv(), **RULE, cu_seqlens_q=torch.zeros(2, dtype=torch.int32, device="meta"))

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ([7, 8, 0], "a later block"),
            ([7, 0, -2], "an index below -1"),
            ([6, 1, 0], "no own block"),
            ([7, 0, 0], "a block twice"),
            ([7, -1, 0], "-1 before a block"),
        ],
    )
    def test_an_invalid_choice(self, row: list[int], message: str) -> None:
        q, k, v = qkv()
        choice = select_blocks(q, k, **RULE)
        choice[36, 1] = torch.tensor(row)
        with pytest.raises(ValueError, match=f"block_indices has {message}"):
            moba_attention(q, k, v, **RULE, block_indices=choice)

    def test_a_choice_of_a_wrong_shape(self) -> None:
        q, k, v = qkv()
        choice = select_blocks(q, k, **RULE)
        for wrong in (choice[:, :, :2], choice[:39], choice.long(), choice[:, :1], choice.to("meta")):
            with pytest.raises(ValueError, match="block_indices"):
                moba_attention(q, k, v, **RULE, block_indices=wrong)
        with pytest.raises(ValueError, match="block_indices must be"):
            moba_attention(q, k, v, **RULE, block_indices=choice[0])

    def test_an_unknown_backend_lists_the_known_ones(self) -> None:
        known = ", ".join(BACKENDS)
        with pytest.raises(ValueError, match=f"unknown backend 'cuda'; known are auto, {known}"):
            moba_attention(*qkv(), **RULE, backend="cuda")


class TestViews:
    def test_strided_inputs(self) -> None:
        """The caller need not copy slices of a fused projection, transposed caches or expanded heads."""
        fused = torch.randn(40, 8, 3, 8, dtype=torch.float64)
        q, k, v = fused[:, :4, 0], fused[:, 4:6, 1], fused[:, 6:, 2]
        expected = moba_attention(*(x.contiguous() for x in (q, k, v)), **RULE)
        assert torch.equal(moba_attention(q, k, v, **RULE), expected)
        one = k[:, :1].expand(-1, 2, -1)
        expected = moba_attention(q.contiguous(), one.contiguous(), v.contiguous(), **RULE)
        assert torch.equal(moba_attention(q, one, v, **RULE), expected)

    def test_strided_batch_and_gradients(self) -> None:
        base = [torch.randn(2, 40, h, 8, dtype=torch.float64) for h in (4, 2, 2)]
        strided = leaves(base)
        dense = leaves([x.transpose(1, 2) for x in base])
        for inputs, turn in ((strided, True), (dense, False)):
            q, k, v = (x.transpose(1, 2) if turn else x.contiguous() for x in inputs)
            out, lse = batched_moba_attention(q, k, v, **RULE, kv_start=torch.tensor([0, 7]))
            (out.square().sum() + lse[lse.isfinite()].sum()).backward()
        for a, b in zip(strided, dense, strict=True):
            assert error(a.grad.transpose(1, 2), b.grad) < 1e-12

    def test_inputs_are_left_alone(self) -> None:
        q, k, v = qkv()
        copies = [x.clone() for x in (q, k, v)]
        moba_attention(q, k, v, **RULE)
        assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True))


class TestGradients:
    @pytest.mark.parametrize("rule", [(3, 1, 0, 0), (3, 2, 0, 0), (2, 4, 1, 1)])
    def test_gradcheck(self, rule: tuple[int, int, int, int]) -> None:
        """Output and lse under a fixed choice, which finite differences would otherwise change."""
        names = ("block_size", "topk", "sink_blocks", "local_blocks")
        settings = dict(zip(names, rule, strict=True))
        q, k, v = leaves(qkv(11, 2, 1, 3))
        choice = select_blocks(q, k, **settings)

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            table = batched_table(1, len(q), len(k), q.device)
            rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
            return attend_op(*rows, choice[None], table, len(q), len(k), rule[0], 0.7, "portable")

        assert torch.autograd.gradcheck(run, (q, k, v), atol=1e-7)

    @pytest.mark.parametrize("rule", [(3, 1, 0, 0), (3, 2, 0, 0), (2, 4, 1, 1)])
    def test_gradcheck_of_packed_sequences(self, rule: tuple[int, int, int, int]) -> None:
        """Sequences of 5, 0, 1 and 11 tokens, grouped heads, values with another width than keys."""
        cu = torch.tensor([0, 5, 5, 6, 17], dtype=torch.int32)
        names = ("block_size", "topk", "sink_blocks", "local_blocks")
        torch.manual_seed(0)
        shapes = ((4, 2), (2, 2), (2, 3))
        q, k, v = (torch.randn(17, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
        choice = select_blocks(q, k, **dict(zip(names, rule, strict=True)), cu_seqlens_q=cu)

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
            return attend_op(*rows, choice[None], packed_table(cu, cu), 11, 11, rule[0], 0.7, "portable")

        assert torch.autograd.gradcheck(run, (q, k, v), atol=1e-7)

    @pytest.mark.parametrize("backend", ["portable", "reference"])
    @pytest.mark.parametrize("topk", [1, 2, 4])
    def test_equal_autograd_through_the_reference(self, topk: int, backend: str) -> None:
        ours, theirs = (leaves(qkv()) for _ in range(2))
        for a, b in zip(ours, theirs, strict=True):
            b.data.copy_(a.data)
        rule = {"block_size": 5, "topk": topk}
        out, lse = moba_attention(*ours, **rule, backend=backend, return_lse=True)
        expected, expected_lse = moba_attention_ref(*theirs, **rule)
        weight, lse_weight = torch.randn_like(out), torch.randn_like(lse)
        ((out * weight).sum() + (lse * lse_weight).sum()).backward()
        ((expected * weight).sum() + (expected_lse * lse_weight.double()).sum()).backward()
        for a, b in zip(ours, theirs, strict=True):
            assert error(a.grad, b.grad) < 1e-5  # lse is returned in fp32
            assert (b.grad != 0).any()

    def test_the_choice_has_no_gradient(self) -> None:
        q, k, _ = leaves(qkv())
        assert not select_blocks(q, k, **RULE).requires_grad

    @pytest.mark.parametrize("at", [0, 17, 25, 38])
    def test_the_future_has_no_influence_and_no_gradient(self, at: int) -> None:
        q, k, v = leaves(qkv())
        out = moba_attention(q, k, v, **RULE)
        grads = torch.autograd.grad(out[: at + 1].square().sum(), (q, k, v))
        for grad in grads:
            assert (grad[at + 1 :] == 0).all()
            assert (grad[: at + 1] != 0).any()
        changed = [x.detach().clone() for x in (q, k, v)]
        for x in changed:
            x[at + 1 :] = torch.randn_like(x[at + 1 :]) * 100
        again = moba_attention(*changed, **RULE)
        assert torch.equal(again[: at + 1], out[: at + 1])
        assert not torch.equal(again[at + 1 :], out[at + 1 :])

    def test_backward_is_deterministic(self) -> None:
        runs = []
        inputs = qkv(200, dtype=torch.bfloat16)
        for _ in range(3):
            q, k, v = leaves(inputs)
            moba_attention(q, k, v, **RULE).square().sum().backward()
            runs.append((q.grad, k.grad, v.grad))
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))

    def test_inference_mode(self) -> None:
        q, k, v = qkv()
        expected = moba_attention(q, k, v, **RULE)
        with torch.inference_mode():
            assert torch.equal(moba_attention(*(x.clone() for x in (q, k, v)), **RULE), expected)


class TestPrecision:
    """Precision settings meant for matmuls do not affect the scores that decide a choice."""

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Inputs with scores so close that bf16 products would change the choice."""
        q = torch.randn(256, 4, 64)
        k = torch.randn(1, 2, 64) + 1e-3 * torch.randn(256, 2, 64)
        return q, k

    def test_the_inputs_are_sensitive(self) -> None:
        q, k = self.inputs()
        exact = select_blocks(q, k, block_size=8, topk=4)
        assert not torch.equal(select_blocks(q.bfloat16(), k.bfloat16(), block_size=8, topk=4), exact)

    @pytest.mark.parametrize("backend", ["portable", "reference"])
    def test_autocast(self, backend: str) -> None:
        q, k = self.inputs()
        expected = select_blocks(q, k, block_size=8, topk=4, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(select_blocks(q, k, block_size=8, topk=4, backend=backend), expected)
            out = moba_attention(q, k, k, block_size=8, topk=4, backend=backend)
        assert out.dtype == torch.float32
        assert error(out, moba_attention(q, k, k, block_size=8, topk=4, backend=backend)) < 1e-6

    def assert_exact(self, q: Tensor, k: Tensor, expected: Tensor) -> None:
        """The choice of `select_blocks` equals `expected`, except for ties within fp32."""
        choice = select_blocks(q, k, block_size=8, topk=4)
        scores = gate_ref(q.double(), block_mean_ref(k, 8).double())
        ours, theirs = (
            scores.gather(2, x.clamp(0, scores.shape[2] - 1).long()).sort(2).values
            for x in (choice, expected)
        )
        assert torch.equal(choice[..., 0], expected[..., 0])
        assert (ours - theirs).abs().max() < 2**-18 * scores.abs().max()

    @pytest.mark.parametrize("setting", ["high", "medium"])
    def test_matmul_precision(self, setting: str) -> None:
        q, k = self.inputs()
        expected = select_blocks(q, k, block_size=8, topk=4)
        torch.set_float32_matmul_precision(setting)
        try:
            self.assert_exact(q, k, expected)
            assert torch.get_float32_matmul_precision() == setting
        finally:
            torch.set_float32_matmul_precision("highest")

    def test_matmul_precision_set_by_the_newer_switch(self) -> None:
        """torch refuses to read the older, global switch once the newer one has been set."""
        q, k = self.inputs()
        expected = select_blocks(q, k, block_size=8, topk=4)
        before = torch.backends.mkldnn.matmul.fp32_precision
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        try:
            self.assert_exact(q, k, expected)
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before


class TestMemory:
    @pytest.mark.parametrize("budget", [1, 300, 5000])
    def test_results_do_not_depend_on_the_size_of_chunks(
        self, budget: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs = qkv(120)
        results = []
        for size in (None, budget):
            if size is not None:
                monkeypatch.setattr(portable_select, "_SCORE_BUDGET", size)
                for name in ("_PARTIAL_BUDGET", "_TILE_BUDGET"):
                    monkeypatch.setattr(portable, name, size)
            q, k, v = leaves(inputs)
            choice = select_blocks(q, k, **RULE)
            out, lse = moba_attention(q, k, v, **RULE, cu_seqlens_q=cumulative((33, 0, 87)), return_lse=True)
            results.append((choice, out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        assert torch.equal(results[0][0], results[1][0])
        for a, b in zip(*results, strict=True):
            assert error(a, b) < 1e-6 if a.dtype == torch.float32 else error(a, b) < 1e-12

    def test_no_tensor_is_quadratic_in_length(self) -> None:
        """Doubling the length may double the largest tensor, not quadruple it."""
        largest = []
        for length in (4096, 8192):
            q, k, v = leaves(qkv(length, 2, 1, 8, torch.float32))
            with _LargestTensor() as seen:
                moba_attention(q, k, v, block_size=64, topk=2).sum().backward()
            largest.append(seen.elements)
            assert seen.elements < length * length / 4
        assert largest[1] <= 2.1 * largest[0]


class _LargestTensor(TorchDispatchMode):
    """Number of elements of the largest storage that any operation inside returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, math.ceil(x.untyped_storage().nbytes() / x.itemsize))
        return result


class TestTorchLibrary:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_opcheck(self, dtype: torch.dtype) -> None:
        q, k, v = (x.transpose(0, 1)[None].requires_grad_() for x in qkv(24, dtype=dtype))
        table = batched_table(1, 24, 24, q.device)
        rule = (24, 24, 5, 3, 1, 0, "mean", "halves", 0.3, "portable")
        torch.library.opcheck(select_op, (q.detach(), k.detach(), table, *rule))
        choice = select_op(q.detach(), k.detach(), table, *rule)
        args = (q, k, v, choice, table, 24, 24, 5, 0.3, "portable")
        torch.library.opcheck(torch.ops.moba_hf.attend.default, args)
        out, lse = attend_op(*args)
        grads = (torch.randn_like(out), torch.randn_like(lse))
        saved = [x.detach() for x in (q, k, v, out, lse)]
        torch.library.opcheck(torch.ops.moba_hf.attend_backward.default, (*grads, *saved, *args[3:]))

    @pytest.mark.parametrize("rule", [{"topk": 3}, {"tile": 10, "gate": "mass", "threshold": 0.1}])
    def test_gradients_have_no_gradient(self, rule: dict[str, Any]) -> None:
        inputs = leaves(qkv())
        out = moba_attention(*inputs, block_size=5, **rule)
        grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            grads[0].sum().backward()

    def test_a_second_import(self) -> None:
        """The operators of both imports work; those of the first call the functions of the second."""
        subprocess.run([sys.executable, "-c", SECOND_IMPORT], check=True)

    def test_an_update_of_means(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It passes torch's checks, and autograd notices that a tensor was written to."""

        class Kernels:
            def update_means(self, means: Tensor, keys: Tensor, *rest: Any) -> None:
                means.numpy()[:, :, :2] = keys.unflatten(2, (2, 8)).mean(3)  # unseen by torch, as in kernels

        monkeypatch.setattr(operators, "_cache_kernels", lambda backend: Kernels())
        means, keys, factor = (
            torch.zeros(1, 2, 3, 4),
            torch.randn(1, 2, 16, 4),
            torch.ones(4).requires_grad_(),
        )
        rest = (None, None, 16, 16, 8, "any")
        torch.library.opcheck(update_means_op, (means.clone(), keys, *rest))

        @torch.compile(backend="aot_eager", fullgraph=True)
        def compiled(means: Tensor) -> Tensor:
            update_means_op(means, keys, *rest)
            return means * 2

        twice, seen = compiled(means), (means * factor).sum()
        assert torch.equal(means[:, :, 1], keys[:, :, 8:].mean(2))
        assert torch.equal(twice, means * 2)
        update_means_op(means, keys, *rest)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            seen.backward()

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile_is_one_graph_and_equal(self, dynamic: bool) -> None:
        def run(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
            return moba_attention(q, k, v, **RULE, cu_seqlens_q=cu) * 2

        compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for length in (40, 55):
            inputs, cu = qkv(length), cumulative((13, length - 13))
            ours, theirs = leaves(inputs), leaves(inputs)
            out, expected = compiled(*ours, cu), run(*theirs, cu)
            assert torch.equal(out, expected)
            out.square().sum().backward()
            expected.square().sum().backward()
            assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))
            alone = select_blocks_ref(inputs[0][13:], inputs[1][13:], **RULE)
            choice = select_blocks(inputs[0], inputs[1], **RULE, cu_seqlens_q=cu)
            assert torch.equal(choice[13:].sort(2).values, alone.sort(2).values)


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("rule", [LayerConfig(8, 2), SharedRule(8, 16, 0.2)], ids=["per query", "shared"])
def test_backends_that_read_the_table_refuse_more_queries_than_keys(
    backend: str, rule: LayerConfig | SharedRule
) -> None:
    """Compiled graphs and GPUs pass tables on unchecked; positions below 0 gave wrong results."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 70, 16), torch.randn(1, 1, 57, 16)
    table = torch.tensor([[0, 0, 30, 0, 30], [0, 30, 70, 30, 57]], dtype=torch.int32)
    sequences = Sequences(table, 40, 30, by_row=False)
    with pytest.raises(ValueError, match=r"sequence 1 has more queries \(40\) than keys \(27\)"):
        attention(q, k, k, sequences, rule, softmax_scale=0.25, backend=backend)
