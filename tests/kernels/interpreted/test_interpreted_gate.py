"""Gate and top-k under the interpreter: the rule, ties, many blocks, the second kernel."""

from __future__ import annotations

import pytest
import torch
from forced import fewer_levels

from moba_hf.kernels.block_mean import block_mean
from moba_hf.kernels.tiling import make_tiling
from moba_hf.op.checks import Case, assert_choice
from moba_hf.op.reference import block_mean_ref
from moba_hf.op.sequences import packed_table

pytestmark = pytest.mark.usefixtures("poisoned")

RAGGED = [(40, 70), (0, 5), (33, 33), (0, 0), (1, 77), (16, 48)]


@pytest.mark.parametrize("block_size", [16, 17, 48])
def test_block_mean(block_size: int) -> None:
    case = Case(RAGGED, num_heads=2, num_kv_heads=2, head_dim=24, block_size=block_size, dtype=torch.bfloat16)
    tiling = make_tiling(case.q, case.k, case.table, *case.longest, block_size=block_size, tile=16)
    means = block_mean(case.k, tiling)
    expected = []
    for row, _, _, k_begin, k_end in case.table.tolist():
        keys = case.k[row, :, k_begin:k_end].transpose(0, 1)
        expected.append(block_mean_ref(keys, block_size)[: max(0, k_end - k_begin - 1) // block_size])
    expected = torch.cat(expected).transpose(0, 1)
    assert int(tiling.block_offset[-1]) == expected.shape[1] <= tiling.num_blocks
    # a different order of summation may round differently
    assert torch.allclose(means[:, : expected.shape[1]].float(), expected.float(), rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize(
    "case",
    [
        Case(RAGGED, num_heads=4, num_kv_heads=2, topk=4),
        Case(RAGGED, num_heads=3, head_dim=20, block_size=17, topk=2, dtype=torch.bfloat16, spare=3),
        Case([(20, 500)], num_heads=8, topk=6, sink=1, local=2, dtype=torch.float16),
        Case([(90, 90)], num_heads=2, topk=1),
        Case([(90, 90)], num_heads=2, topk=4, sink=2, local=1),
        Case([(30, 90)], num_heads=66, block_size=32, topk=2),
    ],
    ids=["ragged", "odd", "forced", "topk1", "all_forced", "wide_group"],
)
def test_choice(case: Case) -> None:
    assert_choice(case, case.select())


@pytest.mark.parametrize("kind", ["integer", "constant"])
def test_ties_go_to_the_lower_block(kind: str) -> None:
    assert_choice(*_with_choice(Case([(20, 1100), (7, 400)], topk=7, kind=kind)))


def test_ties_of_negative_scores() -> None:
    case = Case([(4, 1100)], num_heads=1, topk=4, kind="integer")
    case.q.fill_(-1.0)
    case.k.abs_()
    assert_choice(case, case.select())


@pytest.mark.parametrize("blocks", [33, 65, 130])
def test_more_blocks_than_a_tile(blocks: int) -> None:
    assert_choice(*_with_choice(Case([(5, 16 * blocks)], topk=9)))


def test_a_thousand_blocks() -> None:
    case = Case([(4, 16 * 1025)], num_heads=1, topk=5, kind="integer")
    assert_choice(case, case.select())


@pytest.mark.parametrize("kind", ["normal", "integer", "periodic"])
def test_rows_that_need_the_second_kernel(kind: str) -> None:
    case = Case([(9, 16 * 90), (5, 16 * 80)], topk=8, sink=1, local=1, kind=kind)
    with fewer_levels(8):
        first = case.select()
    with fewer_levels(1):
        again = case.select()
    assert torch.equal(again.sort(3).values, first.sort(3).values)
    assert_choice(case, again)


def test_bounds_known_on_the_host_hold() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        count, block_size, tile = (int(torch.randint(1, x, (), generator=generator)) for x in (6, 90, 40))
        lengths = torch.randint(0, 300, (count, 2), generator=generator).sort(1).values.tolist()
        q, k = (torch.empty(1, 1, max(1, sum(x[i] for x in lengths)), 16) for i in (0, 1))
        edges = torch.tensor([(0, 0), *lengths]).cumsum(0).to(torch.int32)
        longest = [max(x[i] for x in lengths) for i in (0, 1)]
        table = packed_table(edges[:, 0], edges[:, 1])
        for chunk_rows in (None, 50):
            sizes = {"block_size": block_size, "tile": tile, "chunk_rows": chunk_rows}
            tiling = make_tiling(q, k, table, *longest, **sizes)
            assert int(tiling.tile_offset[:, -1].max()) <= tiling.max_tiles
            assert int(tiling.block_offset[-1]) <= tiling.num_blocks
            assert int(tiling.block_offset.diff().max()) <= tiling.max_blocks


def _with_choice(case: Case) -> tuple[Case, torch.Tensor]:
    return case, case.select()
