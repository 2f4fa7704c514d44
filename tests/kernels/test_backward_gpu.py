"""Gradients on a GPU: every dtype and head dim, long and skewed inputs, and faults that only size reveals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from moba_hf.kernels import attend_backward, budgets
from moba_hf.kernels.tuning import Tile
from moba_hf.kernels.tuning_backward import BackwardTiles
from moba_hf.op import ops
from moba_hf.op.checks import Case, assert_gradients
from moba_hf.op.sequences import Attended

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

BF16 = torch.bfloat16
RAGGED = [(500, 700), (0, 5), (333, 333), (0, 0), (1, 777), (64, 2048), (129, 129)]
# blocks of more than 16 keys use the kernels for long blocks
SPLIT = BackwardTiles(*[Tile(32, 16, 4, 2)] * 4)


def case_of(lengths: list[tuple[int, int]], **kwargs: object) -> Case:
    """A bf16 case on the GPU, by default with 4 query heads, 2 kv heads and head_dim 64."""
    rule = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": BF16, "device": "cuda", **kwargs}
    return Case(lengths, **rule)  # type: ignore[arg-type]


def check(case: Case, **kwargs: Any) -> None:
    assert_gradients(case, case.select(), **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 160, 192, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(case_of([(700, 1000)], head_dim=head_dim, block_size=64, topk=4, dtype=dtype))
    check(case_of([(700, 1000)], head_dim=head_dim, block_size=200, topk=3, dtype=dtype))


@pytest.mark.parametrize(("head_dim", "v_dim"), [(192, 128), (128, 64), (64, 256), (96, 80)])
def test_value_dims(head_dim: int, v_dim: int) -> None:
    for block_size in (64, 150):
        check(case_of([(400, 900)], head_dim=head_dim, v_dim=v_dim, block_size=block_size, topk=4))


@pytest.mark.parametrize("block_size", [16, 17, 32, 48, 64, 100, 128, 130, 256, 512, 1000, 1024])
def test_block_sizes(block_size: int) -> None:
    length = max(1500, 4 * block_size + 33)
    check(case_of([(700, length)], block_size=block_size, head_dim=128, topk=3))


@pytest.mark.parametrize("group", [(1, 1), (3, 1), (6, 2), (8, 1), (32, 8), (71, 1)])
@pytest.mark.parametrize("tiles", [None, SPLIT], ids=["tuned", "split"])
def test_groups(group: tuple[int, int], tiles: BackwardTiles | None) -> None:
    case = case_of([(300, 600)], num_heads=group[0], num_kv_heads=group[1], block_size=32, topk=4)
    check(case, tiles=tiles)


@pytest.mark.parametrize("topk", [1, 2, 3, 8, 16, 33, 64])
def test_topk(topk: int) -> None:
    check(case_of([(400, 1600)], topk=topk, block_size=16))


@pytest.mark.parametrize("block_size", [16, 64, 128, 300])
@pytest.mark.parametrize("tiles", [None, SPLIT], ids=["tuned", "split"])
def test_ragged_and_padded(block_size: int, tiles: BackwardTiles | None) -> None:
    check(case_of(RAGGED, block_size=block_size, topk=4, spare=37), tiles=tiles)


@pytest.mark.parametrize("kind", ["constant", "skewed"])
@pytest.mark.parametrize("block_size", [16, 200])
def test_structured_inputs(kind: str, block_size: int) -> None:
    check(case_of([(2000, 3000)], block_size=block_size, topk=3, kind=kind))


@pytest.mark.parametrize("block_size", [64, 128, 512])
def test_all_queries_on_one_block(block_size: int) -> None:
    """Bins of very different lengths, split into segments; the sums stay exact and reproducible."""
    case = case_of([(6000, 6000)], num_heads=8, head_dim=128, block_size=block_size, topk=2, sink=1)
    assert budgets.segment_rows(block_size, 128, 128, 64) < 4 * 5000
    check(case)


@pytest.mark.parametrize("seed", range(10))
def test_fresh_inputs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 900, (6, 2), generator=generator).sort(1).values.tolist()
    block_size = int(torch.randint(16, 200, (), generator=generator))
    check(case_of([tuple(x) for x in lengths], block_size=block_size, topk=4, seed=seed, spare=5))


@pytest.mark.parametrize("scale", [-0.1, 0.0, 0.5])
def test_any_scale(scale: float) -> None:
    check(case_of(RAGGED, softmax_scale=scale, block_size=64))


@pytest.mark.parametrize("block_size", [128, 512])
def test_runs_are_bit_identical(block_size: int) -> None:
    case = case_of([(5000, 6000), (3000, 3000)], num_heads=8, head_dim=128, block_size=block_size, topk=8)
    choice = case.select()
    out, lse = case.attend(choice)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    saved = Attended(case.q, case.k, case.v, out, lse, choice)

    def run(workspace: int | None = None) -> tuple[torch.Tensor, ...]:
        return attend_backward(grad_out, grad_lse, saved, *case.where, workspace=workspace)

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    for workspace in (150 << 20, 40 << 20):
        again = run(workspace)
        assert torch.equal(again[0], first[0])
        assert all(torch.equal(a, b) for a, b in zip(again, run(workspace), strict=True))
        for a, b in zip(again[1:], first[1:], strict=True):
            assert (a - b).abs().max() <= 2**-7 * b.abs().max()


def test_never_waits_for_the_device() -> None:
    case = case_of(RAGGED, topk=4)
    for block_size in (16, 200):
        case.block_size = block_size
        choice = case.select()
        out, lse = case.attend(choice)
        saved = Attended(case.q, case.k, case.v, out, lse, choice)
        grads = attend_backward(out, lse, saved, *case.where)  # compiled
        torch.use_deterministic_algorithms(False)
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = attend_backward(out, lse, saved, *case.where)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def test_captured_in_a_graph() -> None:
    case = case_of([(600, 900), (100, 100)], topk=4)
    choice = case.select()
    out, lse = case.attend(choice)
    args = (out, lse, Attended(case.q, case.k, case.v, out, lse, choice), *case.where)
    expected = attend_backward(*args)
    graph = torch.cuda.CUDAGraph()
    torch.use_deterministic_algorithms(False)
    with torch.cuda.graph(graph):
        grads = attend_backward(*args)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_compiled_training_is_one_graph() -> None:
    case = case_of([(600, 600)], topk=4)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ops.moba_attention(q * 2, k * 2, v * 2, block_size=16, topk=4, backend="triton").sin()

    results = []
    for run in (call, torch.compile(call, fullgraph=True)):
        q, k, v = (x[0].transpose(0, 1).clone().requires_grad_() for x in (case.q, case.k, case.v))
        results.append(torch.autograd.grad(run(q, k, v).float().square().sum(), (q, k, v)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 2**-6 * theirs.abs().max()


def test_memory_at_131k() -> None:
    """Less than 4 GiB in addition to inputs and gradients, at 32 / 8 heads and 128 / 8."""
    torch.use_deterministic_algorithms(False)
    length = 128 << 10
    q, k, v = (torch.randn(length, h, 128, dtype=BF16, device="cuda").requires_grad_() for h in (32, 8, 8))
    out = ops.moba_attention(q, k, v, block_size=128, topk=8)
    grad = torch.randn_like(out)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(out, (q, k, v), grad)
    extra = torch.cuda.max_memory_allocated() - before - sum(x.numel() * 2 for x in grads)
    assert extra < 4 << 30, extra / 2**30


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """With 2.2e9 elements of q, k and gradients, the last sequence's equal those of a separate call."""
    length, part, heads, dim = 540_672, 8192, 32, 128
    q, k, v = (torch.randn(length, heads, dim, dtype=BF16, device="cuda") for _ in range(3))
    torch.use_deterministic_algorithms(False)
    edges = torch.tensor([0, length - part, length], dtype=torch.int32, device="cuda")
    rule: dict[str, Any] = {"block_size": 128, "topk": 3}
    grad = torch.randn(part, heads, dim, dtype=BF16, device="cuda")

    def gradients(start: int, **more: Any) -> tuple[torch.Tensor, ...]:
        tensors = [copy.copy(x[start:]).detach().requires_grad_() for x in (q, k, v)]
        out = ops.moba_attention(*tensors, **rule, **more)
        return torch.autograd.grad(out[-part:], tensors, grad)

    alone = gradients(length - part)
    packed = gradients(0, cu_seqlens_q=edges, cu_seqlens_k=edges)
    for ours, theirs in zip(packed, alone, strict=True):
        assert torch.equal(ours[-part:], theirs)
        assert (ours[: 128 * 1024] == 0).all()
