"""Decode kernels on a GPU: prefill's means and choice to the last bit, rows, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from decode_checks import (
    assert_append,
    assert_choice_is_prefill_choice,
    assert_dense,
    assert_means_are_prefill_means,
    in_graph,
)
from forced import with_choices
from moba_cases import batched_moba_attention

from moba_hf.kernels.block_mean import block_mean
from moba_hf.kernels.sparse_decode import decode_attention
from moba_hf.kernels.tiling import make_tiling
from moba_hf.kernels.tuning import Tile
from moba_hf.op.block_means import BlockMeans, block_means_of
from moba_hf.op.checks import Case, assert_attention
from moba_hf.op.dense import dense_attention
from moba_hf.op.sequences import Sequences, batched_table

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

BF16 = torch.bfloat16


def rand(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


class TestMeans:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dim", [64, 72, 80, 128, 192])
    @pytest.mark.parametrize("block_size", [16, 17, 32, 64, 100, 128, 600])
    def test_are_those_of_prefill(self, dim: int, block_size: int, dtype: torch.dtype) -> None:
        k = rand(2, 2, 3000, dim, dtype=dtype)
        starts = torch.tensor([0, 331], device="cuda")
        for steps in ([3000], [1000, 1, 999, 1000], [2999, 1]):
            assert_means_are_prefill_means(k, starts, block_size, steps)

    @pytest.mark.parametrize("block_size", [128, 4096])
    def test_at_length(self, block_size: int) -> None:
        """A cache with 131,072 tokens filled by the layer's own routine, compared with the prefill kernel."""
        k = rand(1, 8, 131072, 128)
        means, before = BlockMeans(), 0
        for length in (100_000, 100_001, 131_072):
            means.appended(length - before)
            before = length
            got = means.bring_up(k[:, :, :length], length, 131072, None, block_size, "triton")
        table = batched_table(1, 1, 131072, k.device)
        tiling = make_tiling(k[:, :, :1], k, table, 1, 131072, block_size=block_size, tile=64)
        prefill = block_mean(k, tiling)
        assert torch.equal(got[0, :, : prefill.shape[1]], prefill)

    def test_gathered_path_agrees(self) -> None:
        """The path for dtypes without a kernel agrees up to rounding."""
        k, starts = rand(2, 2, 1000, 64), torch.tensor([0, 77], device="cuda")
        by_kernel = block_means_of(k, starts, 64, "triton")
        by_torch = block_means_of(k.float(), starts, 64, "portable")
        assert torch.allclose(by_kernel[1, :, :14].float(), by_torch[1, :, :14], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (80, 72)])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_append(dims: tuple[int, int], batch: int, count: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert_append(dtype, "cuda", batch, count, dims)


class TestChoice:
    @pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
    @pytest.mark.parametrize("shift", [-40.0, 0.0, 40.0])
    def test_at_any_distance_below_the_largest_score(self, spread: float, shift: float) -> None:
        """The search starts near the largest score: clustered, spread-out, negative scores, outliers."""
        q, k = rand(1, 8, 30, 128), rand(1, 2, 100_000, 128)
        keys = k * spread + shift * q[:, ::4, :1] / q[0, 0, 0].norm()
        keys[:, :, 320:352] *= 100
        assert_choice_is_prefill_choice(q, keys, torch.tensor([0], device="cuda"), (32, 33, 1, 0), 4)

    @pytest.mark.parametrize(
        "rule", [(128, 16, 0, 0), (32, 64, 1, 1), (64, 8, 2, 0), (512, 3, 0, 0), (16, 2, 0, 0)]
    )
    @pytest.mark.parametrize("count", [1, 4, 16])
    def test_is_that_of_prefill(self, rule: tuple[int, int, int, int], count: int) -> None:
        starts = torch.tensor([0, 5000], device="cuda")
        for seed in range(3):
            torch.manual_seed(seed)
            q, k = rand(2, 8, 100, 128), rand(2, 2, 20000, 128)
            assert_choice_is_prefill_choice(q, k, starts, rule, count)

    @pytest.mark.parametrize("heads", [(1, 1), (7, 1), (32, 8), (70, 1)])
    @pytest.mark.parametrize("dim", [64, 80, 128, 256])
    def test_heads_and_dims(self, heads: tuple[int, int], dim: int) -> None:
        q, k = rand(1, heads[0], 40, dim), rand(1, heads[1], 9000, dim)
        assert_choice_is_prefill_choice(q, k, torch.tensor([0], device="cuda"), (32, 12, 1, 0), 7)

    @pytest.mark.parametrize("sign", [-1, 1])
    def test_ties(self, sign: int) -> None:
        q = sign * torch.randint(0, 3, (1, 4, 30, 64), device="cuda")
        k = torch.randint(0, 2, (1, 1, 400, 64), device="cuda").repeat_interleave(16, 2)
        starts = torch.tensor([0], device="cuda")
        assert_choice_is_prefill_choice(q.to(BF16), k.to(BF16), starts, (16, 9, 0, 1), 16)

    @pytest.mark.parametrize("blocks", [4097, 8190, 8200, 20000])
    def test_many_blocks(self, blocks: int) -> None:
        """Up to 8,192 blocks, near-ties break alike in calls of any length; beyond, only at equal lengths."""
        q, k = rand(1, 4, 20, 64), rand(1, 1, 16 * blocks, 64)
        assert_choice_is_prefill_choice(q, k, torch.tensor([0], device="cuda"), (16, 16, 0, 0), 3)

    def test_more_blocks_than_are_held(self) -> None:
        q, k = rand(1, 4, 20, 64), rand(1, 1, 16 * 5000, 64)
        with with_choices(choose_held=1024):
            assert_choice_is_prefill_choice(q, k, torch.tensor([0], device="cuda"), (16, 33, 1, 1), 16)


class TestRows:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        ("heads", "dims"), [((8, 2), (128, 128)), ((3, 1), (80, 64)), ((4, 4), (192, 128))]
    )
    @pytest.mark.parametrize("q_len", [1, 5, 16])
    def test_dense(
        self, heads: tuple[int, int], dims: tuple[int, int], q_len: int, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        q = rand(2, heads[0], q_len, dims[0], dtype=dtype)
        k, v = (rand(2, heads[1], 5000, dim, dtype=dtype) for dim in dims)
        limits = ([0, 4998 - q_len // 2], [4000, 5000], [4000 - q_len, 5000 - q_len])
        table = batched_table(2, q_len, 5000, q.device, *(torch.tensor(x, device="cuda") for x in limits))
        for tile in (None, Tile(64, 128, 8, 3), Tile(64, 32, 4, 4)):
            if tile is None or max(dims) <= 128:
                assert_dense(q, k, v, table, tile)

    def test_dense_is_what_decode_takes(self) -> None:
        """`dense_attention` of a few queries equals torch's, which the same call uses in fp32."""
        q, k, v = rand(1, 8, 3, 64), rand(1, 2, 3000, 64), rand(1, 2, 3000, 64)
        expected = dense_attention(q.float(), k.float(), v.float(), 0.125)
        assert torch.allclose(dense_attention(q, k, v, 0.125).float(), expected, atol=2e-2)

    @pytest.mark.parametrize("block_size", [64, 600, 4096])
    def test_sparse_by_row(self, block_size: int) -> None:
        """If the kernel itself writes every row, the result equals that of the general launch bit for bit."""
        case = Case(
            [(3, 9000)], num_heads=8, num_kv_heads=2, head_dim=128, block_size=block_size, topk=3,
            dtype=BF16, device="cuda",
        )  # fmt: skip
        choice = case.expected_choice()
        out, lse = assert_attention(case, choice, use_decode=True)
        for segments in (1, 3):
            split = decode_attention(case.q, case.k, case.v, choice, *case.where, segments=segments)
            assert torch.allclose(split[0].float(), out.float(), atol=4e-3, rtol=2**-7)
            assert torch.allclose(split[1], lse, atol=1e-4, rtol=1e-5)
        again = decode_attention(case.q, case.k, case.v, choice, *case.where, by_row=True)
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)

    @pytest.mark.parametrize("q_len", [1, 16])
    def test_sparse_rows_equal_prefill_rows(self, q_len: int) -> None:
        """The last rows of a prefill call and a decode call with cached means choose and output the same."""
        q, k, v = rand(2, 8, 300, 128), rand(2, 2, 8000, 128), rand(2, 2, 8000, 128)
        rule = {"block_size": 64, "topk": 8, "kv_start": torch.tensor([0, 1000], device="cuda")}
        expected, expected_lse = batched_moba_attention(q, k, v, **rule)
        means = block_means_of(k, rule["kv_start"], 64, "triton")
        out, lse = batched_moba_attention(q[:, :, -q_len:], k, v, block_means=means, **rule)
        assert torch.allclose(out.float(), expected[:, -q_len:].float(), atol=4e-3, rtol=2**-7)
        assert torch.allclose(lse, expected_lse[:, :, -q_len:], atol=1e-4, rtol=1e-5)


def test_a_step_never_waits_and_is_captured() -> None:
    """Means, choice and attention with sizes known only on the device; graph replays follow new contents."""
    torch.use_deterministic_algorithms(False)
    k, v = rand(1, 2, 4096, 64), rand(1, 2, 4096, 64)
    q, length = rand(1, 4, 1, 64), torch.tensor(2049, device="cuda")
    start = torch.zeros(1, dtype=torch.int64, device="cuda")
    kept = BlockMeans(64, static=True)
    kept.forget(4096)
    kept.bring_up(k, length, 4096, start, 64, "triton")

    def step() -> tuple[Tensor, Tensor]:
        kept.behind = 1
        means = kept.bring_up(k, length, 4096, start, 64, "triton")
        end = start + length
        limits = {"kv_start": start, "kv_end": end, "q_offset": end - 1}
        sparse, _ = batched_moba_attention(q, k, v, block_size=64, topk=4, **limits, block_means=means)
        table = batched_table(1, 1, 4096, q.device, **limits)
        return sparse, dense_attention(q, k, v, 0.125, Sequences(table, 1, 4096, kv_start=start))

    graph, captured = in_graph(step)
    for now in (2050, 2112, 3000):
        q.normal_()
        length.fill_(now)
        if now == 3000:
            kept.forget(4096)
            kept.bring_up(k, length, 4096, start, 64, "triton")
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            assert torch.equal(got, expected)
        fresh, _ = batched_moba_attention(
            q, k[:, :, :now], v[:, :, :now], block_size=64, topk=4, backend="reference"
        )
        assert torch.allclose(captured[0].float(), fresh.float(), atol=1e-2, rtol=2**-6)
