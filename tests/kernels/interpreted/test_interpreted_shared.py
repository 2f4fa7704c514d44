"""The shared choice under the interpreter: tiles, choice, attention, gradients, bounded memory."""

from __future__ import annotations

import gc
from dataclasses import replace
from weakref import ref

import pytest
import torch
from shared_checks import assert_attention, assert_gradients, assert_plan, checked_choice, sequences_of

from moba_hf.kernels import shared
from moba_hf.kernels.inputs import SharedInputs
from moba_hf.kernels.shared_attend import attend_lists, fill_outside
from moba_hf.kernels.shared_choose import choose
from moba_hf.kernels.shared_lists import Lists, block_lists
from moba_hf.kernels.shared_mass import Masses, row_masses
from moba_hf.kernels.shared_plan import make_shared_plan
from moba_hf.kernels.shared_summary import shared_summary
from moba_hf.kernels.shared_tuning import MassTile
from moba_hf.kernels.tuning import Tile
from moba_hf.op.checks import Case
from moba_hf.op.ops import attention
from moba_hf.op.sequences import Attended, Sequences, batched_table, constant_table
from moba_hf.op.shared import SharedRule, unpack_blocks
from moba_hf.op.shared_ops import shared_attention
from moba_hf.op.shared_prompt import prompt_attention
from moba_hf.op.shared_reference import select_shared_ref

pytestmark = pytest.mark.usefixtures("poisoned")

RAGGED = [(40, 70), (0, 5), (33, 33), (0, 0), (1, 77), (16, 48)]
CASES = {
    "tile of two blocks": (
        Case(RAGGED, num_heads=4, num_kv_heads=2, head_dim=32),
        SharedRule(16, 32, threshold=0.3),
    ),
    "block of two tiles": (
        Case(RAGGED, num_heads=2, head_dim=32, spare=3, dtype=torch.bfloat16),
        SharedRule(32, 16, threshold=0.6, sample=4, local_blocks=2),
    ),
    "share, odd group, narrow pairs": (
        Case([(70, 200), (9, 33)], num_heads=3, head_dim=24, v_dim=40),
        SharedRule(16, 64, share=0.6, sample=8, rotary_pairs="neighbours"),
    ),
    "all limits, dense below": (
        Case([(90, 260)], num_kv_heads=2, head_dim=32, dtype=torch.float16),
        SharedRule(16, 32, share=0.9, threshold=0.1, topk=7, sample=32, dense_below=192),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_choice_and_attention(name: str) -> None:
    case, rule = CASES[name]
    assert_plan(case, rule)
    mask = checked_choice(case, rule)
    assert_attention(case, rule, mask)


def test_scales_that_are_not_positive() -> None:
    case, rule = Case([(40, 70)], num_heads=2, head_dim=16), SharedRule(16, 32, threshold=0.3)
    case.softmax_scale = -0.3
    mask = checked_choice(case, rule)
    assert_attention(case, rule, mask)
    assert_gradients(case, rule, mask)
    case.softmax_scale = 0.0
    mask = checked_choice(case, rule)
    assert unpack_blocks(mask, 5)[:, -1].all()  # all blocks have the same mass
    assert_attention(case, rule, mask)


@pytest.mark.parametrize(
    ("limit", "taken"),
    [({"topk": 5}, [3] * 4), ({"share": 0.45}, [3, 4, 4, 5]), ({"threshold": 0.5, "topk": 4}, [2] * 4)],
)
def test_ties_go_to_the_lower_block(limit: dict[str, float], taken: list[int]) -> None:
    case = Case([(64, 160)], head_dim=16)
    case.q.zero_()  # all candidates score the same; only the rounding of the reference's mean differs
    rule = SharedRule(16, 16, sample=2, sink_blocks=0, **limit)
    mask = shared.select(case.q, case.k, sequences_of(case), rule, case.scale)
    for tile, (candidates, count) in enumerate(zip(range(6, 10), taken, strict=True)):
        expected = [block < count or block >= candidates - 1 for block in range(candidates + 1)]
        for head in range(2):
            assert unpack_blocks(mask[head, tile], candidates + 1).tolist() == expected


@pytest.mark.parametrize("heard", [None, 0, 9, 40])
def test_a_decode_step_hears_earlier_rows(heard: int | None) -> None:
    """Without cached summaries, kernels of a prefill choose for the open tile, whose last row is the step."""
    torch.manual_seed(0)
    rule, start = SharedRule(16, 32, threshold=0.5, sample=4), torch.tensor([0, 13, 83])
    q = torch.randn(3, 4, 1, 32)
    before = None if heard is None else torch.randn(3, 4, heard, 32)
    k, v = (2 * torch.randn(3, 2, 126, 32) for _ in range(2))
    sequences = Sequences(batched_table(3, 1, 126, q.device, start), 1, 126, kv_start=start)
    got, expected = (
        attention(q, k, v, sequences, rule, softmax_scale=0.3, backend=name, steps=True, heard=before)
        for name in ("triton", "reference")
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    alone = attention(q, k, v, sequences, rule, softmax_scale=0.3, backend="reference", steps=True)
    assert torch.allclose(expected[0], alone[0]) == (not heard)


@pytest.mark.parametrize("name", ["tile of two blocks", "block of two tiles"])
def test_gradients(name: str) -> None:
    case, rule = CASES[name]
    assert_gradients(case, rule, checked_choice(case, rule))


def test_memory_budgets_change_nothing() -> None:
    case, rule = CASES["tile of two blocks"]
    mask = checked_choice(case, rule)
    assert torch.equal(mask, checked_choice(case, rule, workspace=1))
    whole, parts = assert_attention(case, rule, mask), assert_attention(case, rule, mask, workspace=1)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_the_operator_runs_the_kernels() -> None:
    case, rule = Case([(20, 70), (33, 33)], head_dim=32), SharedRule(16, 32, threshold=0.3)
    grads = []
    for backend in ("triton", "reference"):
        tensors = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        settings = {"softmax_scale": case.scale, "backend": backend}
        out, lse = shared_attention(*tensors, sequences_of(case), rule, **settings)
        (out.square().sum() + lse[lse > -torch.inf].sum()).backward()
        grads.append([out.detach(), *(x.grad for x in tensors)])
    for got, expected in zip(*grads, strict=True):
        assert torch.allclose(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["tile of two blocks", "block of two tiles"])
@pytest.mark.parametrize("length", [33, 64, 97])
def test_torch_computes_rows_below_dense_below_of_a_prompt(name: str, length: int) -> None:
    rule = replace(CASES[name][1], dense_below=32)
    q, k, v = (2 * torch.randn(2, heads, length, 32) for heads in (4, 2, 2))
    table = constant_table(batched_table(2, length, length, q.device), covers=True)
    sequences = Sequences(table, length, length)
    settings = {"softmax_scale": 0.3, "backend": "triton"}
    out = prompt_attention(q, k, v, sequences, rule, **settings)
    expected = shared_attention(q, k, v, sequences, rule, **settings)[0]
    assert torch.equal(out[:, 32:], expected[:, 32:])
    assert torch.allclose(out[:, :32], expected[:, :32], atol=1e-5, rtol=1e-4)


def test_a_plan_is_freed_with_its_table() -> None:
    q = torch.randn(1, 2, 97, 32)
    table = constant_table(batched_table(1, 97, 97, q.device))
    rule = replace(CASES["tile of two blocks"][1], dense_below=32)
    prompt_attention(q, q, q, Sequences(table, 97, 97), rule, softmax_scale=0.3, backend="triton")
    plan, held = shared._plan(q, q, Sequences(table, 97, 97), 16, 32), ref(table)
    freed = ref(plan)
    del table, plan
    gc.collect()
    assert held() is None
    assert freed() is None


@pytest.mark.parametrize(
    ("limit", "free"), [({"threshold": 0.9}, 9), ({"share": 0.3}, 9), ({"threshold": 0.9, "topk": 5}, 4)]
)
@pytest.mark.parametrize(
    ("which", "bad"),
    [
        ("q", torch.inf),
        ("k", torch.nan),
        pytest.param("q", torch.nan, marks=pytest.mark.slow),
        pytest.param("k", torch.inf, marks=pytest.mark.slow),
    ],
)
def test_masses_that_are_no_numbers_drop_no_block(
    limit: dict[str, float], free: int, which: str, bad: float
) -> None:
    case = Case([(160, 160)], head_dim=16)
    rule = SharedRule(16, 16, sample=2, sink_blocks=0, local_blocks=0, **limit)
    getattr(case, which)[0, 0, 149 if which == "q" else 20, 3] = bad
    mask = shared.select(case.q, case.k, sequences_of(case), rule, case.scale)
    chosen = unpack_blocks(mask[0, 9], 10).tolist()
    assert chosen == [block < free or block == 9 for block in range(10)]
    expected = select_shared_ref(*(x[0].transpose(0, 1) for x in (case.q, case.k)), rule, case.scale)
    assert torch.equal(unpack_blocks(mask[0], 10)[9], expected[0, 9])


@pytest.mark.parametrize(("wide", "factor"), [(True, 1), (True, 6), (False, 6)])
def test_programs_of_the_mass_kernel_span_sequences(wide: bool, factor: int) -> None:
    """Their tiles have unlike lengths; large queries need the square root of variances."""
    rule = SharedRule(32, 32, threshold=0.3, sample=8)
    case = Case([(40, 170), (0, 5), (33, 33), (1, 77), (16, 48)], num_heads=4, num_kv_heads=2, head_dim=32)
    case.q.mul_(factor)
    tile = MassTile(32, 16, 4, 2, wide)
    mask = checked_choice(case, rule, mass_tile=tile)
    assert torch.equal(mask, checked_choice(case, rule, mass_tile=tile, workspace=1))


def test_masses_in_slots() -> None:
    """The order in which the Gluon kernel stores the masses of a step makes no difference to the choice."""
    rule, step = SharedRule(16, 32, threshold=0.3, sample=8), 64
    case = Case([(40, 70), (130, 1100)], num_heads=4, num_kv_heads=2, head_dim=32)
    q, k = case.q, case.k
    sequences = sequences_of(case)
    limits = (sequences.max_seqlen_q, sequences.max_seqlen_k)
    plan = make_shared_plan(q, k, sequences.table, *limits, block_size=16, tile=32)
    masses = Masses.empty(plan.num_tiles, 4, 4, plan.max_blocks, step, q)
    for x in (masses.mass, masses.high, masses.total):
        x.zero_()
    summary = shared_summary(k, plan, rule.rotary_pairs)
    row_masses(q, summary, plan, rule, case.scale, masses, 0, MassTile(32, step, 4, 1))
    # block 8 i + 2 t + j of 32 is held by thread t of four, as its number 2 i + j
    slots = masses.mass.unflatten(3, (-1, 4, 4, 2)).transpose(4, 5).flatten(3)
    choices = []
    for found in (masses, replace(masses, mass=slots.contiguous(), slots=True)):
        scratch = torch.empty(plan.num_tiles, 4, masses.mass.shape[3])
        choices.append(torch.empty(4, plan.num_tiles, plan.words, dtype=torch.int32))
        choose(found, scratch, plan, rule, 0, choices[-1])
    assert torch.equal(*choices)
    assert not torch.equal(masses.mass, slots)


@pytest.mark.parametrize("chunk", [1, 100])
def test_tiles_left_to_triton(chunk: int) -> None:
    """Only tiles that end within a step are written: the last ones of the sequences of 70, 33 and 77 keys."""
    case, rule = CASES["tile of two blocks"]
    mask = checked_choice(case, rule)
    expected, _ = assert_attention(case, rule, mask)
    plan = make_shared_plan(case.q, case.k, case.table, *case.longest, block_size=16, tile=32)
    inputs = SharedInputs(case.q, case.k, case.v, plan, case.scale)
    out, lse = torch.full_like(expected, 7.0), torch.empty(case.q.shape[:3])
    lists = Lists.empty(min(chunk, plan.num_tiles), case.num_heads, plan.max_blocks, mask)
    for first in range(0, plan.num_tiles, chunk):
        block_lists(mask, plan, first, lists)
        attend_lists(inputs, out, lse, lists, first, Tile(32, 16, 4, 1), left_by=16)
    left = torch.zeros(case.q.shape[2], dtype=torch.bool)
    for _, q_begin, q_end, position, *_keys in plan.tiles.tolist():
        left[q_begin:q_end] = (position + q_end - q_begin) % 16 != 0
    assert left.sum() == 6 + 1 + 1
    torch.testing.assert_close(out[:, left], expected[:, left])
    assert (out[:, ~left] == 7).all()


def test_queries_outside_every_sequence() -> None:
    """Their sequences come in any order; a call may also have none."""
    q, k = torch.randn(2, 2, 150, 16), torch.randn(2, 1, 100, 16)
    table = torch.tensor([[1, 110, 150, 0, 40], [0, 3, 5, 0, 50], [1, 2, 66, 0, 64]], dtype=torch.int32)
    inside = torch.zeros(2, 150, dtype=torch.bool)
    inside[1, 110:150] = inside[0, 3:5] = inside[1, 2:66] = True
    rule = SharedRule(16, 32, threshold=0.3)
    sequences = Sequences(table, 64, 64, by_row=False)
    mask = shared.select(q, k, sequences, rule, 0.25)
    out, lse = shared.attend(q, k, k, mask, sequences, 16, 32, 0.25)
    assert ((out != 0).all(-1).all(-1) == inside).all()
    assert (out[~inside] == 0).all()
    assert (torch.isfinite(lse).all(1) == inside).all()
    assert (lse.transpose(1, 2)[~inside] == -torch.inf).all()
    nothing = Sequences(table[:0], 0, 0, by_row=False)
    out, lse = shared.attend(q, k, k, mask[:, :0], nothing, 16, 32, 0.25)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize(("queries", "keys"), [(40, 7), (40, 0), (19, 18)])
def test_queries_before_the_first_key(queries: int, keys: int) -> None:
    """On a GPU nobody checks for them: they get zeros, and keys of other sequences are not read."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 50 + queries, 16), torch.randn(1, 1, 50 + keys, 16)
    table = torch.tensor([[0, 0, 50, 0, 50], [0, 50, 50 + queries, 50, 50 + keys]], dtype=torch.int32)
    rule = SharedRule(16, 16, threshold=0.3)

    def run(table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sequences = Sequences(table, 50, 50, by_row=False)
        mask = shared.select(q, k, sequences, rule, 0.25)
        out, lse = shared.attend(q, k, k, mask, sequences, 16, 16, 0.25)
        saved, ones = Attended(q, k, k, out, lse, mask), torch.ones_like(out)
        return out, lse, *shared.attend_backward(ones, 0 * lse.exp(), saved, sequences, 16, 16, 0.25)

    results = run(table)
    out = results[0]
    table[1, 1] = 50 + queries - keys  # the same without these queries
    for got, expected in zip(results, run(table), strict=True):
        assert torch.equal(got, expected)
    assert (out[:, 50 : 50 + queries - keys] == 0).all()


def test_many_sequences_around_queries_outside() -> None:
    begin = 2 * torch.arange(300, dtype=torch.int32)
    columns = [0 * begin, begin, begin + 1, 0 * begin, 0 * begin + 9]
    out, lse = torch.full((1, 601, 3, 50), 7.0), torch.full((1, 3, 601), 7.0)
    fill_outside(out, lse, torch.stack(columns, 1))
    outside = torch.ones(601, dtype=torch.bool)
    outside[begin] = False
    assert (out == torch.where(outside, 0.0, 7.0)[None, :, None, None]).all()
    assert (lse == torch.where(outside, -torch.inf, 7.0)).all()
