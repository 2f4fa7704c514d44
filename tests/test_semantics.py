"""The semantics of MoBA: every property of the definition, on the operator, over a grid of shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from moba_cases import (
    Case,
    assert_as_accurate,
    assert_choice,
    batched_moba_attention,
    cumulative,
    error,
    grid,
    packed_attend_ref,
    plain_attention,
)

from moba_hf import moba_attention, select_blocks
from moba_hf.op.reference import attend_ref, moba_attention_ref, select_blocks_ref

pytestmark = pytest.mark.usefixtures("poison")

GRID = grid()
BLOCK_SIZES = (1, 7, 64, 100, 512)
SMALL = {"block_size": 7, "topk": 3, "sink_blocks": 0, "local_blocks": 0}


def case(length: int = 101, *, group_size: int = 3, dtype=torch.float64, **rule: int) -> Case:
    """One sequence under a rule, in fp64, so that two correct computations agree to 1e-12."""
    return Case((length,), (length,), group_size, 2, 16, 16, dtype, SMALL | rule)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to fp64 rounding; never true for NaN."""
    return actual.shape == expected.shape and error(actual, expected) < 1e-12


def covering(length: int, block_size: int) -> int:
    return -(-length // block_size)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's causal attention for one packed sequence."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)


class TestGrid:
    """Each stage against the reference: the choice, then attention and gradients under the same choice."""

    @pytest.mark.parametrize("case", GRID, ids=str)
    def test_choice(self, case: Case) -> None:
        q, k, _ = case.tensors()
        choice = select_blocks(q, k, **case.rule, **case.offsets(), backend="portable")
        assert_choice(case, choice)

    @pytest.mark.parametrize("case", GRID, ids=str)
    def test_attention_and_gradients_under_one_choice(self, case: Case) -> None:
        q, k, v = case.tensors(requires_grad=True)
        choice = case.choice
        out, lse = moba_attention(
            q, k, v, **case.rule, **case.offsets(), block_indices=choice, backend="portable", return_lse=True
        )
        weight = torch.randn_like(out)
        grads = torch.autograd.grad(out, (q, k, v), weight)

        plain = plain_attention(case, q, k, v, choice)
        plain_grads = torch.autograd.grad(plain, (q, k, v), weight)
        leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
        exact, exact_lse = packed_attend_ref(case, *leaves, choice)
        exact_grads = torch.autograd.grad(exact, leaves, weight.double())

        assert_as_accurate(out, plain, exact)
        for name, got, other, truth in zip("qkv", grads, plain_grads, exact_grads, strict=True):
            assert_as_accurate(got, other, truth, f"gradient of {name}")
        assert lse.dtype == torch.float32
        assert_as_accurate(lse, exact_lse.float(), exact_lse, "lse")

    @pytest.mark.parametrize("backend", ["portable", "reference"])
    @pytest.mark.parametrize("case", [c for c in GRID if c.dtype == torch.float64][::2], ids=str)
    def test_whole(self, case: Case, backend: str) -> None:
        q, k, v = case.tensors()
        out, lse = moba_attention(q, k, v, **case.rule, **case.offsets(), backend=backend, return_lse=True)
        for at, parts in case.sequences(q, k, v):
            expected, expected_lse = moba_attention_ref(*parts, **case.rule)
            assert same(out[at], expected)
            assert error(lse[:, at], expected_lse) < 1e-5  # returned in fp32


class TestDense:
    @pytest.mark.parametrize("block_size", BLOCK_SIZES)
    @pytest.mark.parametrize("group_size", [1, 4])
    def test_topk_covers_everything(self, block_size: int, group_size: int) -> None:
        length = {1: 61, 512: 1111}.get(block_size, 201)
        q, k, v = case(length, group_size=group_size).tensors()
        out = moba_attention(q, k, v, block_size=block_size, topk=covering(length, block_size))
        assert same(out, dense(q, k, v))

    @pytest.mark.parametrize("topk", [1, 2, 8])
    def test_one_block_covers_everything(self, topk: int) -> None:
        q, k, v = case(101).tensors()
        for block_size in (101, 102, 512):
            assert same(moba_attention(q, k, v, block_size=block_size, topk=topk), dense(q, k, v))

    @pytest.mark.parametrize("block_size", [1, 7, 64, 100])
    def test_topk_one_is_the_own_block_alone(self, block_size: int) -> None:
        q, k, v = case(233).tensors()
        out = moba_attention(q, k, v, block_size=block_size, topk=1)
        parts = [x.split(block_size) for x in (q, k, v)]
        assert same(out, torch.cat([dense(*part) for part in zip(*parts, strict=True)]))
        assert error(out, dense(q, k, v)) > 1e-2  # and not full attention


class TestForcedBlocks:
    def test_forced_blocks_count_in_topk_and_once(self) -> None:
        """If kept blocks use up topk, exactly the first, the previous and the own block are attended."""
        q, k, _ = case(70).tensors()
        rule = {"block_size": 7, "topk": 3, "sink_blocks": 1, "local_blocks": 1}
        choice = select_blocks(q, k, **rule)
        expected = [{0}, {0, 1}, {0, 1, 2}, *({0, i - 1, i} for i in range(3, 10))]
        for i in range(70):
            assert {x for x in choice[i, 0].tolist() if x >= 0} == expected[i // 7]

    @pytest.mark.parametrize(("sink", "local"), [(2, 0), (0, 2), (2, 2), (1, 3)])
    def test_a_block_forced_twice_frees_a_slot_for_the_best(self, sink: int, local: int) -> None:
        c = case(101, topk=5, sink_blocks=sink, local_blocks=local)
        q, k, _ = c.tensors()
        assert_choice(c, select_blocks(q, k, **c.rule))

    def test_defaults_force_nothing(self) -> None:
        q, k, _ = case(101).tensors()
        plain = select_blocks(q, k, block_size=7, topk=3)
        assert torch.equal(plain, select_blocks(q, k, **SMALL))
        assert not (plain[49:] == 0).any(2).all()  # the first block is not in every choice


class TestTies:
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    @pytest.mark.parametrize("backend", ["portable", "reference"])
    def test_equal_scores_go_to_the_lower_block(self, sign: float, backend: str) -> None:
        """If all keys are equal, all earlier blocks score the same, with either sign; the first ones win."""
        q = torch.ones(60, 3, 8) * sign
        k = torch.ones(60, 1, 8)
        choice = select_blocks(q, k, block_size=5, topk=4, backend=backend)
        for i in range(60):
            own = i // 5
            assert sorted(x for x in choice[i, 1].tolist() if x >= 0) == sorted({own, *range(min(3, own))})

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("forced", [(0, 0), (1, 0), (0, 1), (1, 2)])
    def test_integer_scores(self, dtype: torch.dtype, forced: tuple[int, int]) -> None:
        """With few distinct, exact scores of both signs, the choice must equal the reference's as a set."""
        rule = {"block_size": 4, "topk": 6, "sink_blocks": forced[0], "local_blocks": forced[1]}
        q = torch.randint(-1, 2, (150, 4, 4)).to(dtype)
        k = torch.randint(-1, 2, (150, 2, 4)).to(dtype) * 4
        got = select_blocks(q, k, **rule, backend="portable")
        want = select_blocks_ref(q, k, **rule)
        assert torch.equal(got.sort(2).values, want.sort(2).values)


class TestPacked:
    @pytest.mark.parametrize("lengths", [(30, 71), (0, 50, 0, 0, 51, 0), (1, 1, 99), (0, 0)])
    def test_each_sequence_alone(self, lengths: tuple[int, ...]) -> None:
        c = Case(lengths, lengths, 3, 2, 16, 16, torch.float64, SMALL)
        q, k, v = c.tensors()
        out, lse = moba_attention(q, k, v, **c.rule, cu_seqlens_q=cumulative(lengths), return_lse=True)
        choice = select_blocks(q, k, **c.rule, cu_seqlens_q=cumulative(lengths))
        assert out.shape == q.shape
        for at, parts in c.sequences(q, k, v):
            alone, alone_lse = moba_attention(*parts, **c.rule, return_lse=True)
            assert same(out[at], alone)
            assert error(lse[:, at], alone_lse) < 1e-6
            assert torch.equal(choice[at], select_blocks(*parts[:2], **c.rule))

    def test_no_sequence_at_all(self) -> None:
        q, k, v = (torch.zeros(0, heads, 8, requires_grad=True) for heads in (4, 2, 2))
        out = moba_attention(q, k, v, block_size=4, topk=2, cu_seqlens_q=torch.zeros(1, dtype=torch.int32))
        out.sum().backward()
        assert out.shape == (0, 4, 8)
        assert k.grad.shape == k.shape


class TestRows:
    """The batched entry: padding, chunks and caches."""

    @pytest.mark.parametrize("backend", ["portable", "reference"])
    def test_padded_rows_equal_the_rows_alone_and_padding_is_zero(self, backend: str) -> None:
        q, k, v = (torch.randn(4, heads, 60, 8, dtype=torch.float64) for heads in (6, 2, 2))
        start, end = torch.tensor([0, 13, 0, 20]), torch.tensor([60, 60, 41, 20])
        for row in range(4):  # padding is never read
            for x in (k, v):
                x[row, :, : start[row]] = x[row, :, end[row] :] = torch.nan
        out, lse = batched_moba_attention(q, k, v, **SMALL, kv_start=start, kv_end=end, backend=backend)
        for row in range(4):
            real = slice(int(start[row]), int(end[row]))
            parts = [x[row, :, real].transpose(0, 1) for x in (q, k, v)]
            alone, alone_lse = moba_attention_ref(*parts, **SMALL)
            assert same(out[row, real], alone)
            assert same(lse[row, :, real], alone_lse)
            padding = torch.ones(60, dtype=torch.bool)
            padding[real] = False
            assert (out[row, padding] == 0).all()
            assert (lse[row, :, padding] == -torch.inf).all()

    def test_padded_rows_give_no_gradient(self) -> None:
        leaves = [torch.randn(2, heads, 40, 8, dtype=torch.float64) for heads in (4, 2, 2)]
        q, k, v = (x.requires_grad_() for x in leaves)
        out, _ = batched_moba_attention(q, k, v, **SMALL, kv_start=torch.tensor([0, 11]))
        out.sum().backward()
        for x in (q, k, v):
            assert (x.grad[1, :, :11] == 0).all()
            assert x.grad.isfinite().all()
            assert (x.grad[0] != 0).any()

    @pytest.mark.parametrize("chunk", [1, 5, 7, 20])
    def test_chunks_equal_one_shot(self, chunk: int) -> None:
        q, k, v = (torch.randn(1, heads, 60, 8, dtype=torch.float64) for heads in (6, 2, 2))
        whole, whole_lse = batched_moba_attention(q, k, v, **SMALL)
        for begin in range(0, 60, chunk):
            end = min(60, begin + chunk)
            parts = q[:, :, begin:end], k[:, :, :end], v[:, :, :end]
            out, lse = batched_moba_attention(*parts, **SMALL)
            assert same(out, whole[:, begin:end])
            assert same(lse, whole_lse[:, :, begin:end])

    def test_static_cache_rows_beyond_the_written_are_never_read(self) -> None:
        q, k, v = (torch.randn(2, heads, 60, 8, dtype=torch.float64) for heads in (6, 2, 2))
        start = torch.tensor([0, 9])
        expected, _ = batched_moba_attention(
            q[:, :, 30:45], k[:, :, :45], v[:, :, :45], **SMALL, kv_start=start
        )
        k[:, :, 45:] = v[:, :, 45:] = torch.nan
        out, _ = batched_moba_attention(
            q[:, :, 30:45],
            k,
            v,
            **SMALL,
            kv_start=start,
            kv_end=torch.tensor([45, 45]),
            q_offset=torch.tensor([30]),
        )
        assert same(out, expected)

    def test_short_queries_stand_at_the_end(self) -> None:
        q, k, v = case(101).tensors()
        out = moba_attention(q[60:], k, v, block_size=7, topk=3)
        assert same(out, moba_attention(q, k, v, block_size=7, topk=3)[60:])


class TestRest:
    @pytest.mark.parametrize("group_size", [3, 4, 8])
    def test_grouped_heads_equal_repeated_keys(self, group_size: int) -> None:
        q, k, v = case(101, group_size=group_size).tensors()
        repeated = [x.repeat_interleave(group_size, dim=1) for x in (k, v)]
        out = moba_attention(q, k, v, block_size=7, topk=3)
        assert same(out, moba_attention(q, *repeated, block_size=7, topk=3))

    def test_every_query_head_chooses_for_itself(self) -> None:
        q, k, _ = case(101, group_size=4).tensors()
        choice = select_blocks(q, k, block_size=7, topk=3)
        assert not torch.equal(choice[:, 0], choice[:, 1])

    @pytest.mark.parametrize("scale", [0.01, 0.5, 2.0])
    @pytest.mark.parametrize("backend", ["portable", "reference"])
    def test_softmax_scale_is_used_and_leaves_the_choice_alone(self, scale: float, backend: str) -> None:
        c = case(101)
        q, k, v = c.tensors()
        out, lse = moba_attention(q, k, v, **c.rule, softmax_scale=scale, backend=backend, return_lse=True)
        expected, expected_lse = attend_ref(
            q, k, v, select_blocks_ref(q, k, **c.rule), block_size=7, softmax_scale=scale
        )
        assert same(out, expected)
        assert error(lse, expected_lse) < 1e-5

    def test_fp64_is_computed_in_fp64(self) -> None:
        """Keys that fp32 cannot distinguish decide the choice and the output."""
        q = torch.ones(12, 1, 2, dtype=torch.float64)
        k = torch.ones(12, 1, 2, dtype=torch.float64)
        k[4:8] += 1e-12  # the best block by less than fp32 can resolve; a tie would go to block 0
        v = torch.randn(12, 1, 2, dtype=torch.float64)
        choice = select_blocks(q, k, block_size=4, topk=2)
        assert choice[8:, 0].tolist() == [[2, 1]] * 4
        out, _ = moba_attention(q, k, v, block_size=4, topk=2, return_lse=True)
        assert out.dtype == torch.float64
        assert same(out, moba_attention_ref(q, k, v, block_size=4, topk=2)[0])

    def test_block_means_are_rounded_to_the_key_dtype(self) -> None:
        """The bf16 means of 256 and 257 tie although the fp32 means differ, so the lower block wins."""
        q = torch.ones(6, 1, 1, dtype=torch.bfloat16)
        k = torch.tensor([256.0, 256.0, 256.0, 258.0, 0.0, 0.0], dtype=torch.bfloat16).view(6, 1, 1)
        for backend in ("portable", "reference"):
            assert select_blocks(q, k, block_size=2, topk=2, backend=backend)[4:, 0, 1].tolist() == [0, 0]

    @pytest.mark.parametrize("blocks", [33, 65, 127, 1025])
    @pytest.mark.parametrize("topk", [1, 2, 4, 16])
    def test_exactly_topk_of_many_blocks(self, blocks: int, topk: int) -> None:
        """A single top-k runs over all blocks, however many there are, not one per group of blocks."""
        kv_len = blocks * 3 + 1
        c = Case((9,), (kv_len,), 2, 1, 8, 8, torch.float32, SMALL | {"block_size": 3, "topk": topk})
        q, k, v = c.tensors()
        choice = select_blocks(q, k, **c.rule)
        assert_choice(c, choice)
        assert ((choice >= 0).sum(2) == topk).all()
        out = moba_attention(q, k, v, **c.rule)
        expected, _ = packed_attend_ref(c, *(x.double() for x in (q, k, v)), choice)
        assert_as_accurate(out, plain_attention(c, q, k, v, choice), expected)

    def test_an_edit_in_place_is_seen(self) -> None:
        """Nothing is cached by a tensor's identity, neither offsets nor keys."""
        q, k, v = case(60).tensors()
        offsets = cumulative((20, 40))
        moba_attention(q, k, v, **SMALL, cu_seqlens_q=offsets)
        offsets[1] = 33
        k.neg_()
        out = moba_attention(q, k, v, **SMALL, cu_seqlens_q=offsets)
        assert same(out, moba_attention(q, k.clone(), v, **SMALL, cu_seqlens_q=cumulative((33, 27))))
