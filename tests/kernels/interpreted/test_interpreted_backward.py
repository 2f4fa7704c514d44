"""Gradients under the interpreter, against fp64 autograd: every class of shapes, each kernel on its own."""

from __future__ import annotations

import pytest
import torch
from moba_cases import batched_moba_attention

from moba_hf.kernels import attend, attend_backward, budgets
from moba_hf.kernels.tuning import Tile
from moba_hf.kernels.tuning_backward import BackwardTiles
from moba_hf.op import ops
from moba_hf.op.checks import Case, assert_gradients
from moba_hf.op.sequences import Attended

pytestmark = pytest.mark.usefixtures("poisoned")

RAGGED = [(50, 70), (0, 5), (33, 33), (0, 0), (1, 77)]
# a block of 16 in one tile, and in two, which makes the kernels for longer blocks compute dq
WHOLE = BackwardTiles(*[Tile(16, 16, 4, 1)] * 4)
SPLIT = BackwardTiles(*[Tile(16, 8, 4, 1)] * 4)


@pytest.mark.parametrize("tiles", [None, WHOLE, SPLIT], ids=["tuned", "whole", "split"])
@pytest.mark.parametrize(
    "case",
    [
        Case(RAGGED, num_heads=4, num_kv_heads=2, topk=3, spare=2),
        Case(RAGGED, num_heads=3, head_dim=20, v_dim=24, block_size=17, topk=3, dtype=torch.bfloat16),
        Case([(30, 150)], num_heads=8, head_dim=32, block_size=40, topk=2, dtype=torch.float16),
        Case([(40, 130)], num_heads=2, num_kv_heads=2, block_size=16, topk=20),
    ],
    ids=["ragged", "odd", "grouped", "all"],
)
def test_gradients(case: Case, tiles: BackwardTiles | None) -> None:
    assert_gradients(case, case.expected_choice(), tiles=tiles)


@pytest.mark.parametrize("tiles", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("case", [Case(RAGGED, topk=1, spare=2), Case(RAGGED, block_size=100, spare=2)])
def test_own_block_only(case: Case, tiles: BackwardTiles) -> None:
    assert_gradients(case, case.expected_choice(), tiles=tiles)


@pytest.mark.parametrize("slot", [1, 3])
def test_own_block_in_any_slot(slot: int) -> None:
    case = Case([(10, 90)], topk=4)
    choice = case.expected_choice()
    turned = choice[..., [*range(1, slot + 1), 0, *range(slot + 1, 4)]].contiguous()
    assert_gradients(case, turned)


def test_missing_slots_may_be_anywhere() -> None:
    case = Case([(40, 90)], topk=5)
    choice = case.expected_choice()
    choice[:, ::2, :, 2] = -1
    assert_gradients(case, choice)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale: float) -> None:
    case = Case([(20, 60)], softmax_scale=scale)
    assert_gradients(case, case.expected_choice())


def test_a_block_that_everyone_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pairs are split into segments, the last of which is not full."""
    monkeypatch.setattr(budgets, "segment_rows", lambda *_: 16)
    case = Case([(49, 90), (20, 20)], topk=2, sink=1, block_size=16, num_heads=3)
    choice = case.expected_choice()
    assert int((choice[..., 1] == 0).sum()) > 9 * 16
    for workspace in (None, 30_000):
        assert_gradients(case, choice, workspace=workspace)


@pytest.mark.parametrize("tiles", [WHOLE, SPLIT], ids=["whole", "split"])
def test_groups_of_heads_and_chunks_of_queries(tiles: BackwardTiles, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([(20, 50), (17, 17)], num_heads=3, num_kv_heads=3, topk=3, spare=1)
    choice = case.expected_choice()
    splits = {}
    original = budgets.backward_split

    def split(*args: object) -> tuple[int, int]:
        splits[args[-1]] = original(*args)  # type: ignore[arg-type]
        return splits[args[-1]]

    monkeypatch.setattr(budgets, "backward_split", split)
    torch.manual_seed(0)
    whole = assert_gradients(case, choice, tiles=tiles)
    for workspace in (50_000, 25_000, 12_000):
        torch.manual_seed(0)
        grads = assert_gradients(case, choice, tiles=tiles, workspace=workspace)
        assert torch.equal(grads[0], whole[0])
        if splits[workspace][1] == case.q.shape[2]:  # sums over chunks have a different order
            assert torch.equal(grads[1], whole[1])
            assert torch.equal(grads[2], whole[2])
    assert [heads for heads, _ in splits.values()] == [3, 2, 1, 1]
    assert splits[12_000][1] < case.q.shape[2]


def test_two_runs_are_bit_identical() -> None:
    case = Case([(20, 50), (17, 17)], num_heads=4, num_kv_heads=2, topk=3, dtype=torch.bfloat16)
    choice = case.expected_choice()
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(assert_gradients(case, choice))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_future_tokens_get_no_gradient() -> None:
    """Only queries before token 40 contribute to the loss, so keys from 40 on get exact zeros."""
    case = Case([(90, 90)], num_heads=4, num_kv_heads=2, topk=3)
    choice = case.expected_choice()
    out, lse = attend(case.q, case.k, case.v, choice, *case.where)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grad_out[:, 40:], grad_lse[:, :, 40:] = 0, 0
    saved = Attended(case.q, case.k, case.v, out, lse, choice)
    dq, dk, dv = attend_backward(grad_out, grad_lse, saved, *case.where)
    for grad in (dq, dk, dv):
        assert (grad[:, :, 40:] == 0).all()
        assert (grad[:, :, :40] != 0).any(3).all()


def test_padded_batch_of_strided_views() -> None:
    """Every row that is not a token is NaN; gradients come as expanded and as strided views."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 70, heads, 24)[..., :16].transpose(1, 2) for heads in (4, 2, 2))
    start, end = torch.tensor([0, 21]), torch.tensor([58, 70])
    for x in (q, k, v):
        x[0, :, 58:], x[1, :, :21] = torch.nan, torch.nan
    rule = {"block_size": 16, "topk": 3, "kv_start": start, "kv_end": end, "q_offset": torch.tensor([0])}
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    weight = torch.randn(4, 70, 2, 16).permute(2, 1, 0, 3)
    for loss in (lambda out: out.sum(), lambda out: (out * weight).sum()):
        out, _ = batched_moba_attention(*inputs, backend="triton", **rule)
        grads = torch.autograd.grad(loss(out), inputs)
        for row in range(2):
            part = slice(int(start[row]), int(end[row]))
            alone = [x[row, :, part].transpose(0, 1).detach().requires_grad_() for x in (q, k, v)]
            its_out = ops.moba_attention(*alone, block_size=16, topk=3, backend="reference")
            padded = torch.zeros_like(out).index_put((torch.tensor(row), torch.arange(70)[part]), its_out)
            expected = torch.autograd.grad(loss(padded), alone)
            for grad, truth in zip(grads, expected, strict=True):
                assert torch.allclose(grad[row, :, part].transpose(0, 1), truth, atol=1e-5)
                assert (grad[row, :, : part.start] == 0).all()
                assert (grad[row, :, part.stop :] == 0).all()


def test_empty_inputs() -> None:
    for lengths in ([(0, 40)], [(0, 0)]):
        case = Case(lengths)
        q, k, v = (x.detach().requires_grad_() for x in (case.q, case.k, case.v))
        choice = case.select()
        out, lse = case.attend(choice)
        grads = attend_backward(out, lse, Attended(q, k, v, out, lse, choice), *case.where)
        for x, grad in zip((q, k, v), grads, strict=True):
            assert torch.equal(grad, torch.zeros_like(x))
