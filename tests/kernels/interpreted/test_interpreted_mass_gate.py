"""The mass gate under the interpreter: block summaries, the rule, ties, the second kernel, the backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forced import fewer_levels

from moba_hf import moba_attention, select_blocks
from moba_hf.kernels import gate
from moba_hf.kernels.gate import Summary
from moba_hf.kernels.mass_summary import mass_summary
from moba_hf.kernels.tiling import make_tiling
from moba_hf.op.checks import Case, assert_choice

pytestmark = pytest.mark.usefixtures("poisoned")

RAGGED = [(40, 70), (0, 5), (33, 33), (0, 0), (1, 77), (16, 48)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("block_size", "parts"), [(16, 1), (32, 2), (17, 1), (96, 6)])
@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_summaries(block_size: int, parts: int, dtype: torch.dtype, pairs: str) -> None:
    mate = (torch.arange(24) + 12) % 24 if pairs == "halves" else torch.arange(24) ^ 1
    lengths = [(40, 70), (0, 5), (33, 33), (1, 230)]
    sizes = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 24}
    case = Case(lengths, **sizes, block_size=block_size, dtype=dtype, spare=3)
    tiling = make_tiling(case.q, case.k, case.table, *case.longest, block_size=block_size, tile=16)
    centers, spreads = mass_summary(case.k, tiling, pairs)
    flat = 0
    for row, _, _, k_begin, k_end in case.table.tolist():
        for block in range(max(0, k_end - k_begin - 1) // block_size):
            first = k_begin + block * block_size
            for head in range(2):
                keys = case.k[row, head, first : first + block_size].float()
                cut = keys.split(block_size // parts)
                wanted = [*(x.mean(0) for x in cut), keys[keys.square().sum(1).argmin()]]
                found = centers[head, :, flat].float()
                assert torch.allclose(found, torch.stack(wanted), rtol=2**-7, atol=1e-6)
                assert torch.equal(found[-1], wanted[-1])
                wanted = torch.stack([x.var(0, unbiased=False) for x in cut])
                wanted = (wanted + wanted[:, mate]) / 2
                assert torch.allclose(spreads[head, :, flat].float(), wanted, rtol=2**-7, atol=1e-6)
            flat += 1
    assert flat == int(tiling.block_offset[-1]) > 0


@pytest.mark.parametrize(
    "case",
    [
        Case(RAGGED, num_heads=4, num_kv_heads=2, topk=4, gate="mass"),
        Case(RAGGED, num_heads=3, head_dim=20, block_size=17, topk=2, spare=3, gate="mass"),
        Case([(20, 500)], num_heads=8, topk=6, block_size=32, sink=1, local=2, gate="mass"),
        Case([(20, 500)], num_heads=2, topk=3, block_size=32, dtype=torch.bfloat16, gate="mass"),
        Case([(20, 500)], num_heads=2, topk=3, block_size=32, dtype=torch.float16, gate="mass"),
        Case([(9, 700)], num_heads=2, topk=3, block_size=96, gate="mass"),
        Case([(90, 90)], num_heads=2, topk=1, gate="mass"),
        Case([(90, 90)], num_heads=2, topk=4, sink=2, local=1, gate="mass"),
        Case([(30, 90)], num_heads=66, block_size=32, topk=2, gate="mass"),
    ],
    ids=["ragged", "odd", "forced", "bf16", "fp16", "six_parts", "topk1", "all_forced", "wide_group"],
)
def test_choice(case: Case) -> None:
    case.q.mul_(4)  # spreads on both branches of the estimate for a part of 16
    try:
        assert_choice(case, case.select())
    finally:
        case.q.div_(4)


def test_it_chooses_differently_from_the_mean_gate() -> None:
    case = Case([(60, 900)], topk=4, block_size=32, gate="mass")
    case.q.mul_(4)
    by_mass = case.select()
    case.gate = "mean"
    assert not torch.equal(by_mass.sort(3).values, case.select().sort(3).values)


def test_ties_go_to_the_lower_block() -> None:
    case = Case([(20, 1100), (7, 400)], topk=7, kind="constant", gate="mass")
    assert_choice(case, case.select())


@pytest.mark.parametrize("blocks", [65, 130])
def test_more_blocks_than_a_tile(blocks: int) -> None:
    case = Case([(5, 16 * blocks)], topk=9, gate="mass")
    assert_choice(case, case.select())


@pytest.mark.parametrize("kind", ["normal", "periodic"])
def test_rows_that_need_the_second_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The summaries take nearly all of the time and do not depend on the levels: both choices share them."""
    made: list[Summary] = []
    summarize = gate.summarize_mass

    def summarize_once(*args: Any) -> Summary:
        made.append(made[0] if made else summarize(*args))
        return made[0]

    monkeypatch.setattr(gate, "summarize_mass", summarize_once)
    case = Case([(9, 32 * 90), (5, 32 * 80)], topk=8, block_size=32, sink=1, local=1, kind=kind, gate="mass")
    with fewer_levels(8):
        first = case.select()
    with fewer_levels(1):
        again = case.select()
    assert torch.equal(again.sort(3).values, first.sort(3).values)
    assert len(made) == 2
    assert_choice(case, again)


def test_the_operator_runs_it() -> None:
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(150, h, 16) for h in (4, 2, 2))
    rule = {"block_size": 32, "topk": 3, "sink_blocks": 1, "gate": "mass"}
    cu = torch.tensor([0, 40, 40, 150], dtype=torch.int32)
    for packing in ({}, {"cu_seqlens_q": cu}):
        chosen = [
            select_blocks(q, k, **rule, **packing, backend=b).sort(2).values for b in ("triton", "reference")
        ]
        assert torch.equal(*chosen)
        out = [moba_attention(q, k, v, **rule, **packing, backend=b) for b in ("triton", "reference")]
        assert torch.allclose(*out, atol=1e-4)
