"""Attention over chosen blocks under the interpreter: each kernel on its own, and the whole operator."""

from __future__ import annotations

import gc
from weakref import ref

import pytest
import torch
from moba_cases import batched_moba_attention

from moba_hf.config import LayerConfig
from moba_hf.kernels.routing import key_format, pair_keys, route
from moba_hf.kernels.tiling import make_tiling
from moba_hf.op import ops
from moba_hf.op.backends import choose_backend
from moba_hf.op.checks import Case, assert_attention, assert_choice
from moba_hf.op.sequences import Sequences, batched_table, constant_table

pytestmark = pytest.mark.usefixtures("poisoned")

RAGGED = [(50, 70), (0, 5), (33, 33), (0, 0), (1, 77)]


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        Case(RAGGED, num_heads=4, num_kv_heads=2, topk=4),
        Case(
            RAGGED, num_heads=3, head_dim=20, v_dim=24, block_size=17, topk=3, dtype=torch.bfloat16, spare=2
        ),
        Case([(70, 300)], num_heads=8, head_dim=32, block_size=40, topk=2, dtype=torch.float16),
    ],
    ids=["ragged", "odd", "grouped"],
)
def test_routed(case: Case, resident: bool) -> None:
    assert_attention(case, case.expected_choice(), resident=resident, use_decode=False)


def test_blocks_of_many_tiles() -> None:
    case = Case([(40, 700)], block_size=300, topk=2, num_heads=2, num_kv_heads=2)
    assert_attention(case, case.expected_choice())


@pytest.mark.parametrize("case", [Case(RAGGED, topk=1, spare=2), Case(RAGGED, block_size=100, spare=2)])
def test_own_block_only(case: Case) -> None:
    assert_attention(case, case.expected_choice(), use_decode=False)


@pytest.mark.parametrize("slot", [1, 2, 3])
def test_own_block_in_any_slot(slot: int) -> None:
    case = Case([(10, 90)], topk=4)
    choice = case.expected_choice()
    turned = choice[..., [*range(1, slot + 1), 0, *range(slot + 1, 4)]].contiguous()
    for few in (False, True):
        out, _ = case.attend(choice, use_decode=few)
        again, _ = assert_attention(case, turned, use_decode=few)
        assert torch.allclose(out, again, atol=2e-6)


def test_a_tiling_serves_all_layers_and_is_freed_with_its_table() -> None:
    table = constant_table(batched_table(2, 30, 77, torch.device("cpu")))
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        q, k, v = (torch.randn(2, heads, length, 16) for heads, length in ((4, 30), (2, 77), (2, 77)))
        settings = {"softmax_scale": 0.3, "backend": "triton"}
        for where in (table, table.clone()):
            made.append(ops.attention(q, k, v, Sequences(where, 30, 77), LayerConfig(16, 3), **settings)[0])
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[2], made[3])
    tiling, held = make_tiling(q, k, table, 30, 77, block_size=16, tile=8), ref(table)
    assert make_tiling(q, k, table, 30, 77, block_size=16, tile=8) is tiling
    freed = ref(tiling)
    del table, where, tiling
    gc.collect()
    assert held() is None
    assert freed() is None


def test_results_do_not_depend_on_the_chunk() -> None:
    case = Case(RAGGED, num_heads=4, num_kv_heads=2, topk=4, dtype=torch.bfloat16, spare=1)
    choice = case.expected_choice()
    whole = case.attend(choice, use_decode=False)
    for workspace in (30_000,):
        out, lse = case.attend(choice, use_decode=False, workspace=workspace)
        assert torch.equal(out, whole[0])
        assert torch.equal(lse, whole[1])


@pytest.mark.parametrize(
    "case",
    [
        Case([(3, 130), (1, 40), (0, 9), (4, 4)], num_heads=4, num_kv_heads=2, topk=4, spare=2),
        Case([(2, 1500)], num_heads=3, head_dim=20, v_dim=16, block_size=600, topk=3, dtype=torch.bfloat16),
    ],
    ids=["small", "segments"],
)
def test_decode(case: Case) -> None:
    assert_attention(case, case.expected_choice(), use_decode=True)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale: float) -> None:
    case = Case([(20, 60)])
    case.softmax_scale = scale
    choice = case.expected_choice()
    out, lse = case.attend(choice)
    case.backend = "reference"
    truth, truth_lse = case.attend(choice)
    assert torch.allclose(out, truth, atol=1e-5)
    assert torch.allclose(lse, truth_lse, atol=1e-5)


def test_routes_hold_every_pair_once() -> None:
    from moba_hf.kernels.tiling import make_tiling

    case = Case(RAGGED, num_heads=4, num_kv_heads=2, topk=4)
    choice = case.expected_choice()
    tiling = make_tiling(case.q, case.k, case.table, *case.longest, block_size=16, tile=8)
    keys = pair_keys(choice, tiling, 0, 2)
    num_bins = 2 * tiling.num_blocks
    routes = route(keys, tiling, 2, 16)
    bias = key_format(num_bins)[1]
    counts = torch.bincount(keys.flatten().long() - bias, minlength=num_bins + 1)[:num_bins]
    assert torch.equal(routes.bin_begin.diff().long(), counts)
    assert int(counts.sum()) == int((choice[..., 1:] >= 0).sum())
    info = routes.tile_info[routes.tile_info[:, 0] < routes.tile_info[:, 1]]
    assert len(info) == int(routes.tile_begin[-1])
    assert torch.equal(torch.bincount(info[:, 5], minlength=num_bins), (counts + 15) // 16)
    held = torch.zeros(num_bins, dtype=torch.long).index_add_(0, info[:, 5], (info[:, 1] - info[:, 0]).long())
    assert torch.equal(held, counts)
    seq_begin = case.table[:, 3].long()
    number = info[:, 5] % tiling.num_blocks
    seq = torch.searchsorted(tiling.block_offset.long(), number.long(), right=True) - 1
    first_key = seq_begin[seq] + (number - tiling.block_offset[seq]) * 16
    assert torch.equal(info[:, 4].long(), first_key)
    assert torch.equal(info[:, 3], info[:, 5] // tiling.num_blocks)
    taken = routes.pairs[: int(routes.bin_begin[-1])]
    assert len(taken.unique()) == len(taken)


def test_wide_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_format(65535) == (torch.int16, -32768)
    assert key_format(65536) == (torch.int32, 0)
    from moba_hf.kernels import forward, routing

    case = Case([(40, 100)])
    choice = case.expected_choice()
    out, _ = case.attend(choice)
    for module in (forward, routing):
        monkeypatch.setattr(module, "key_format", lambda bins: (torch.int32, 0))
    assert torch.equal(case.attend(choice)[0], out)


def test_padded_batch_of_strided_views() -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 70, heads, 16 + 8)[..., :16].transpose(1, 2) for heads in (4, 2, 2)
    )  # (batch, heads, length, dim) with gaps
    start, end = torch.tensor([0, 21]), torch.tensor([58, 70])
    rule = {"block_size": 16, "topk": 3, "kv_start": start, "kv_end": end, "q_offset": torch.tensor([0])}
    k[0, :, 58:], k[1, :, :21] = torch.nan, torch.nan
    v[0, :, 58:], v[1, :, :21] = torch.nan, torch.nan
    out, lse = batched_moba_attention(q, k, v, backend="triton", **rule)
    for row in range(2):
        part = slice(int(start[row]), int(end[row]))
        alone = ops.moba_attention(
            *(x[row, :, part].transpose(0, 1) for x in (q, k, v)), block_size=16, topk=3, backend="reference"
        )
        assert torch.allclose(out[row, part], alone, atol=2e-6)
        assert (out[row, : part.start] == 0).all()
        assert (out[row, part.stop :] == 0).all()
        assert (lse[row, :, : part.start] == -torch.inf).all()


def test_chunked_prefill_equals_one_shot() -> None:
    case = Case([(100, 100)], num_heads=4, num_kv_heads=2, topk=3)
    q, k, v = (x[0].transpose(0, 1) for x in (case.q, case.k, case.v))
    rule = {"block_size": 16, "topk": 3, "backend": "triton"}
    whole = ops.moba_attention(q, k, v, **rule)
    for begin, end in ((0, 37), (37, 90), (90, 100)):
        part = ops.moba_attention(q[begin:end], k[:end], v[:end], **rule)
        assert torch.allclose(part, whole[begin:end], atol=2e-6)


def test_the_whole_operator_and_its_gradient() -> None:
    case = Case(RAGGED, num_heads=4, num_kv_heads=2, topk=3)
    q, k, v = (x[0].transpose(0, 1).clone().requires_grad_() for x in (case.q, case.k, case.v))
    edges = torch.tensor([(0, 0), *RAGGED]).cumsum(0).to(torch.int32)
    rule = {"block_size": 16, "topk": 3, "cu_seqlens_q": edges[:, 0], "cu_seqlens_k": edges[:, 1]}
    results = []
    for backend in ("triton", "reference"):
        out, lse = ops.moba_attention(q, k, v, **rule, backend=backend, return_lse=True)
        grads = torch.autograd.grad((out * torch.arange(16)).sum() + lse.sum(), (q, k, v))
        results.append((out, lse, *grads))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_tensors_that_cannot_be_strided_are_copied() -> None:
    case = Case([(20, 60)])
    case.q, case.k, case.v = (
        x.transpose(2, 3).contiguous().transpose(2, 3) for x in (case.q, case.k, case.v)
    )
    assert_choice(case, case.select())
    assert_attention(case, case.expected_choice())


def test_empty_inputs() -> None:
    for lengths in ([(0, 40)], [(0, 0)]):
        case = Case(lengths)
        out, lse = case.attend(case.select())
        assert out.shape[1] == 0
        assert lse.shape[2] == 0


def test_unsupported_inputs_are_refused() -> None:
    case, rule = Case([(20, 60)]), LayerConfig(16, 3)
    assert choose_backend("triton", case.q, case.k, case.v, rule) == "triton"
    assert choose_backend("auto", case.q, case.k, case.v, rule) == "portable"
    with pytest.raises(ValueError, match="block_size=15"):
        choose_backend("triton", case.q, case.k, case.v, LayerConfig(15, 3))
    with pytest.raises(ValueError, match="float64"):
        choose_backend("triton", case.q.double(), case.k.double(), case.v.double(), rule)
    wide = case.q.new_zeros(1, 1, 4, 257)
    with pytest.raises(ValueError, match="256"):
        choose_backend("triton", wide, wide, wide, rule)
