"""Cache layers hold the same as stock layers, and their means equal recomputed ones, after any operations."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moba_cases import batched_moba_attention
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, Qwen3Config, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

import moba_hf
from moba_hf import MobaCache, MobaConfig
from moba_hf.config import LayerConfig
from moba_hf.hf.dynamic_layer import MobaLayer
from moba_hf.hf.static_layer import MobaStaticLayer
from moba_hf.op.block_means import BlockMeans, block_means_of
from moba_hf.op.gates import block_mean
from moba_hf.op.portable_decode import choose
from moba_hf.op.reference import moba_attention_ref, select_blocks_ref

HEADS, DIM = 2, 4
CROP_REFUSES = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="stock layers crop to a positive length"
)


def states(batch: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(batch, HEADS, length, DIM).to(dtype) for _ in range(2))


def assert_means(layer: MobaLayer | MobaStaticLayer, starts: Tensor | None, size: int, written: int) -> None:
    """The layer's means equal those that prefill's routine computes from its keys, row by row."""
    keys = layer.keys[:, :, :written]
    means = layer.moba_means(layer.keys, starts, size)
    for row in range(keys.shape[0]):
        begin = 0 if starts is None else int(starts[row])
        expected = block_mean(keys[row, :, begin:], size)
        torch.testing.assert_close(means[row, :, : expected.shape[1]], expected, rtol=1e-6, atol=1e-7)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 30)),
        st.tuples(st.just("decode"), st.integers(1, 5)),
        st.tuples(st.just("crop"), st.integers(1, 25)),
        st.tuples(st.just("reorder"), st.integers(0, 5)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 5)),
        st.tuples(st.just("reset"), st.just(0)),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("means"), st.sampled_from([3, 4, 7])),
    ),
    min_size=1,
    max_size=14,
)


class TestMeansEqualRecomputed:
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(operations, st.lists(st.integers(0, 9), min_size=2, max_size=2), st.booleans(), st.booleans())
    def test_dynamic(self, steps: list, pads: list, padded: bool, always: bool) -> None:
        """Random sequences of all operations of a dynamic layer, compared with a stock layer."""
        torch.manual_seed(0)
        layer, stock = MobaLayer(), DynamicLayer()
        starts, batch, size = torch.tensor(pads) if padded else None, 2, 4
        for name, value in [("append", 12), *steps, ("means", 4)]:
            if name in ("append", "decode"):
                for _ in range(1 if name == "append" else value):
                    new = states(batch, value if name == "append" else 1)
                    got, expected = layer.update(*new), stock.update(*new)
                    assert torch.equal(got[0], expected[0])
                    assert torch.equal(got[1], expected[1])
                    if always:
                        assert_means(layer, starts, size, layer.get_seq_length())
            elif name == "crop":
                for one in (layer, stock):
                    one.crop(-min(value, stock.get_seq_length()))
            elif name in ("reorder", "select"):
                rows = torch.randperm(batch)[: batch if name == "reorder" else max(1, value % (batch + 1))]
                for one in (layer, stock):
                    one.reorder_cache(rows) if name == "reorder" else one.batch_select_indices(rows)
                if stock.get_seq_length() > 0:
                    starts, batch = None if starts is None else starts[rows], len(rows)
            elif name == "repeat":
                for one in (layer, stock):
                    one.batch_repeat_interleave(value)
                if stock.get_seq_length() > 0 and batch < 9:
                    starts = None if starts is None else starts.repeat_interleave(value)
                    batch *= value
                elif stock.get_seq_length() > 0:
                    for one in (layer, stock):
                        one.batch_select_indices(torch.arange(batch))
            elif name == "reset":
                layer.reset()
                stock = DynamicLayer()
            elif name == "copy":
                layer, stock = copy.deepcopy(layer), copy.deepcopy(stock)
            else:
                size = value
                if stock.get_seq_length() > 0:
                    assert_means(layer, starts, size, layer.get_seq_length())
            assert layer.get_seq_length() == stock.get_seq_length()
            if stock.get_seq_length() > 0:
                assert torch.equal(layer.keys, stock.keys)
                assert torch.equal(layer.values, stock.values)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.lists(
            st.sampled_from(["append", "decode", "reorder", "reset", "skip", "means"]),
            min_size=1,
            max_size=12,
        ),
        st.booleans(),
        st.sampled_from([None, 3, 4]),
    )
    def test_static(self, steps: list, padded: bool, size_known: int | None) -> None:
        torch.manual_seed(0)
        layer, stock = MobaStaticLayer(64, block_size=size_known), StaticLayer(64)
        starts, size = torch.tensor([3, 0]) if padded else None, 4
        for name in ["append", *steps, "means"]:
            length = int(stock.get_seq_length())
            if name in ("append", "decode", "skip") and length < 50:
                new = states(2, 9 if name == "append" else 1)
                for got, expected in zip(layer.update(*new), stock.update(*new), strict=True):
                    assert torch.equal(got, expected)
                if name != "skip":
                    assert_means(layer, starts, size, int(stock.get_seq_length()))
            elif name == "reorder":
                for one in (layer, stock):
                    one.reorder_cache(torch.tensor([1, 0]))
                starts = None if starts is None else starts[[1, 0]]
            elif name == "reset":
                layer.reset()
                stock.reset()
            elif name == "means" and length:
                assert_means(layer, starts, size, length)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_gathered_update_equals_slices(self, dtype: torch.dtype) -> None:
        """The path for GPUs and compiled graphs, run on the CPU and compared with the CPU's own path."""
        keys, starts = states(3, 41, dtype)[0], torch.tensor([0, 5, 40])
        for behind in (41, 17, 1):
            means = [BlockMeans(), BlockMeans()]
            for one, update in zip(means, ("_update_slices", "_update_gathered"), strict=True):
                one.bring_up(keys[:, :, : 41 - behind], 41 - behind, 64, starts, 4, "portable")
                one.behind = behind
                getattr(one, update)(keys, 41, starts)
            torch.testing.assert_close(
                means[0].means[:, :, :-1], means[1].means[:, :, :-1], rtol=1e-6, atol=0
            )


class TestDynamicLayer:
    def test_a_decode_step_moves_nothing(self) -> None:
        layer = MobaLayer()
        layer.update(*states(1, 800))
        before = layer.keys.data_ptr()
        for _ in range(50):
            keys, _ = layer.update(*states(1, 1))
        assert keys.data_ptr() == before
        assert keys.shape[2] == 850

    def test_grows_by_an_eighth(self) -> None:
        layer, moves, last = MobaLayer(), 0, 0
        layer.update(*states(1, 1000))
        for _ in range(1000):
            layer.update(*states(1, 1))
            moves += layer.keys.data_ptr() != last
            last = layer.keys.data_ptr()
            assert layer._buffers[0].shape[2] <= layer.get_seq_length() * 1.125 + 64
        assert moves <= 8

    def test_reserve_is_exact(self) -> None:
        layer = MobaLayer(max_cache_len=120)
        layer.update(*states(1, 100))
        assert layer._buffers[0].shape[2] == 120

    def test_is_freed_with_its_cache(self) -> None:
        """There is no reference cycle: a long cache is freed at once, not by the garbage collector."""
        layer = MobaLayer()
        keys, _ = layer.update(*states(1, 8))
        assert keys.moba_layer is layer
        seen = weakref.ref(layer)
        gc.disable()
        try:
            del layer, keys
            assert seen() is None
        finally:
            gc.enable()

    def test_copy_is_independent(self) -> None:
        layer = MobaLayer()
        layer.update(*states(1, 20))
        assert_means(layer, None, 4, 20)
        other = copy.deepcopy(layer)
        other.update(*states(1, 9))
        layer.update(*states(1, 3))
        assert_means(layer, None, 4, 23)
        assert_means(other, None, 4, 29)

    def test_only_new_blocks_are_read(self) -> None:
        """Old keys may be arbitrary once their means are computed."""
        layer = MobaLayer()
        layer.update(*states(1, 16))
        before = layer.moba_means(layer.keys, None, 4)[:, :, :4].clone()
        layer.keys.fill_(torch.nan)
        layer.update(*states(1, 4))
        means = layer.moba_means(layer.keys, None, 4)
        assert torch.equal(means[:, :, :4], before)
        assert not means[:, :, :5].isnan().any()

    def test_another_start_or_size_rebuilds(self) -> None:
        layer = MobaLayer()
        layer.update(*states(2, 30))
        for starts, size in [(None, 4), (torch.tensor([3, 0]), 4), (torch.tensor([0, 5]), 4), (None, 7)]:
            assert_means(layer, starts, size, 30)

    def test_assigned_keys_are_noticed(self) -> None:
        layer = MobaLayer()
        layer.update(*states(1, 16))
        assert_means(layer, None, 4, 16)
        layer.keys, layer.values = states(1, 9)
        assert layer.get_seq_length() == 9
        assert_means(layer, None, 4, 9)

    def test_inference_mode_before_no_grad(self) -> None:
        layer = MobaLayer()
        with torch.inference_mode():
            layer.update(*states(1, 16))
            layer.moba_means(layer.keys, None, 4)
        with torch.no_grad():
            layer.update(*states(1, 8))
            assert_means(layer, None, 4, 24)

    def test_gradients_reach_cached_states(self) -> None:
        layer, first, second = MobaLayer(), states(1, 6), states(1, 3)
        for x in (*first, *second):
            x.requires_grad_()
        layer.update(*first)
        keys, values = layer.update(*second)
        (keys.square().sum() + values.sum()).backward()
        assert torch.equal(first[0].grad, 2 * first[0].detach())
        assert torch.equal(second[1].grad, torch.ones_like(second[1]))

    def test_offload_and_prefetch_keep_everything(self) -> None:
        """Whole buffers move and the means stay unchanged, even if their keys have become arbitrary."""
        layer = MobaLayer(max_cache_len=40)
        layer.update(*states(1, 16))
        expected = layer.keys.clone()
        before = layer.moba_means(layer.keys, None, 4)[:, :, :4].clone()
        layer.offload()
        layer.prefetch()
        assert torch.equal(layer.keys, expected)
        assert layer._buffers[0].shape[2] == 40
        layer.keys.fill_(torch.nan)
        layer.update(*states(1, 4))
        assert torch.equal(layer.moba_means(layer.keys, None, 4)[:, :, :4], before)

    @pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
    def test_dtypes_promote_as_in_a_stock_layer(self, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        """Under autocast, some states have a narrower dtype than without it."""
        layer, stock = MobaLayer(), DynamicLayer()
        for dtype, length in zip(dtypes, (17, 1), strict=True):
            new = states(1, length, dtype)
            for got, expected in zip(layer.update(*new), stock.update(*new), strict=True):
                assert got.dtype == expected.dtype
                assert torch.equal(got, expected)
            assert_means(layer, None, 4, layer.get_seq_length())

    @pytest.mark.parametrize("shape", [(1, HEADS, DIM), (3, HEADS, DIM), (2, 1, DIM), (2, HEADS, 1)])
    def test_states_of_another_shape_are_refused(self, shape: tuple[int, int, int]) -> None:
        """The assignment would broadcast a single row or head over all of them."""
        batch, heads, dim = shape
        layer = MobaLayer()
        layer.update(*states(2, 5))
        expected = layer.keys.clone()
        with pytest.raises(ValueError, match=r"\(2, 2, 4\), got .* batch_repeat_interleave"):
            layer.update(*(torch.randn(batch, heads, 1, dim) for _ in range(2)))
        assert torch.equal(layer.keys, expected)
        layer.reset()
        keys, _ = layer.update(*(torch.randn(batch, heads, 3, dim) for _ in range(2)))
        assert keys.shape == (batch, heads, 3, dim)

    def test_a_static_layer_keeps_its_shape_after_a_reset(self) -> None:
        layer = MobaStaticLayer(16, block_size=4)
        layer.update(*states(2, 9))
        layer.reset()
        with pytest.raises(ValueError, match=r"\(2, 2, 4\), got \(3, 2, 4\): create another cache"):
            layer.update(*states(3, 9))
        new = states(2, 9)
        keys, _ = layer.update(*new)
        assert torch.equal(keys[:, :, :9], new[0])
        assert_means(layer, None, 4, 9)

    def test_crop_ends_the_recording_for_assisted_generation(self) -> None:
        """If the end of a text is noticed one step late, cropping directly follows the recording."""
        layer = MobaLayer()
        layer.update(*states(1, 8))
        layer.activate_past_recording()
        layer.crop(0)
        keys, _ = layer.update(*states(1, 5))
        assert keys.shape[2] == 13

    @pytest.mark.parametrize("layer", [MobaLayer, pytest.param(DynamicLayer, marks=CROP_REFUSES)])
    @pytest.mark.parametrize("length", [5, 30])
    def test_positive_crop_is_refused_as_in_stock_layers(self, layer: type, length: int) -> None:
        filled = layer()
        filled.update(*states(1, 16))
        with pytest.raises(ValueError, match=str(length)):
            filled.crop(length)
        assert filled.get_seq_length() == 16


class TestDecode:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("num_heads", [2, 6])
    @pytest.mark.parametrize(("sink", "local"), [(0, 0), (1, 0), (1, 2)])
    @pytest.mark.parametrize("backend", ["portable", "reference"])
    def test_rows_equal_the_reference(
        self, dtype: torch.dtype, num_heads: int, sink: int, local: int, backend: str
    ) -> None:
        """1 to 5 queries at the end of left-padded rows, with and without cached means."""
        size, topk, length = 4, 5, 43
        layer = MobaLayer()
        keys, values = layer.update(*states(3, length, dtype))
        starts = torch.tensor([0, 6, 41])
        for q_len in (1, 5):
            q = torch.randn(3, num_heads, q_len, DIM).to(dtype)
            for means in (None, layer.moba_means(keys, starts, size)):
                out, lse = batched_moba_attention(
                    q, keys, values, kv_start=starts, block_size=size, topk=topk, sink_blocks=sink,
                    local_blocks=local, backend=backend, block_means=means,
                )  # fmt: skip
                for row, start in enumerate(starts.tolist()):
                    real = min(q_len, length - start)
                    parts = [
                        x[row].transpose(0, 1)
                        for x in (q[:, :, -real:], keys[:, :, start:], values[:, :, start:])
                    ]
                    expected, expected_lse = moba_attention_ref(
                        *parts, block_size=size, topk=topk, sink_blocks=sink, local_blocks=local
                    )
                    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.bfloat16 else {}
                    torch.testing.assert_close(out[row, -real:], expected, **tolerance)
                    torch.testing.assert_close(lse[row, :, -real:], expected_lse, **tolerance)
                    assert not out[row, : q_len - real].any()

    @pytest.mark.parametrize("q_len", [1, 3])
    def test_only_chosen_blocks_are_read(self, q_len: int) -> None:
        """The keys and values of all other blocks may be arbitrary once the means are computed."""
        layer, rule = MobaLayer(), {"block_size": 4, "topk": 3, "sink_blocks": 1}
        keys, values = layer.update(*states(2, 70))
        q, starts = torch.randn(2, 2 * HEADS, q_len, DIM), torch.tensor([0, 9])
        means = layer.moba_means(keys, starts, 4)
        given = {"kv_start": starts, "block_means": means, **rule}
        expected = batched_moba_attention(q, keys, values, **given)
        for row, start in enumerate(starts.tolist()):
            for head in range(HEADS):
                queries = q[row, 2 * head : 2 * head + 2].transpose(0, 1)
                chosen = select_blocks_ref(queries, keys[row, head, start:, None], **rule).unique()
                block = (torch.arange(70) - start).div(4, rounding_mode="floor")
                other = ~torch.isin(block, chosen)
                assert 20 < int(other.sum()) < 70
                keys[row, head, other] = values[row, head, other] = torch.nan
        for got, want in zip(batched_moba_attention(q, keys, values, **given), expected, strict=True):
            assert torch.equal(got, want)

    def test_unwritten_slots_are_never_read(self) -> None:
        keys, values = states(1, 32)
        q = torch.randn(1, HEADS, 1, DIM)
        limits = {"kv_end": torch.tensor([21]), "q_offset": torch.tensor([20])}
        rule = {"block_size": 4, "topk": 3}
        expected, _ = batched_moba_attention(q, keys[:, :, :21], values[:, :, :21], **rule)
        keys[:, :, 21:], values[:, :, 21:] = torch.nan, torch.nan
        out, _ = batched_moba_attention(q, keys, values, **limits, **rule)
        torch.testing.assert_close(out, expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("sign", [-1.0, 1.0])
    def test_ties_go_to_the_lower_block(self, dtype: torch.dtype, sign: float) -> None:
        """All blocks score the same, with either sign, since the bits of negative floats sort backwards."""
        keys = torch.full((41, 1, 4), sign, dtype=dtype)
        q = torch.ones(1, 2, 4, dtype=dtype)
        expected = select_blocks_ref(q, keys, block_size=4, topk=5)
        means = block_mean(keys.transpose(0, 1), 4)[None]
        got = choose(q.transpose(0, 1)[None], means, torch.tensor([[40]]), LayerConfig(4, 5))
        assert torch.equal(got[0, :, 0].sort().values.int(), expected[0].sort().values)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_choice_equals_the_reference(self, dtype: torch.dtype) -> None:
        """Scores of both signs, with few distinct values and more than 1024 blocks."""
        keys = torch.randint(-2, 3, (2200, 1, 4)).to(dtype)
        for q in (torch.randint(-2, 3, (1, 4, 4)).to(dtype), torch.randn(1, 4, 4, dtype=dtype)):
            expected = select_blocks_ref(q, keys, block_size=2, topk=9)
            means = block_mean(keys.transpose(0, 1), 2)[None]
            got = choose(q.transpose(0, 1)[None], means, torch.tensor([[2199]]), LayerConfig(2, 9))
            assert torch.equal(got[0, :, 0].sort().values.int(), expected[0].sort().values)

    def test_gradients_take_the_differentiable_path(self) -> None:
        keys, values = (x.requires_grad_() for x in states(1, 24))
        q = torch.randn(1, HEADS, 1, DIM, requires_grad=True)
        out, _ = batched_moba_attention(q, keys, values, block_size=4, topk=2)
        out.sum().backward()
        assert q.grad.abs().sum() > 0
        assert keys.grad.abs().sum() > 0


class TestMobaCache:
    def config(self) -> Qwen3Config:
        config = Qwen3Config(
            hidden_size=8, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
            use_sliding_window=True, sliding_window=16, max_window_layers=2,
        )  # fmt: skip
        config.moba = MobaConfig(4, 2, full_attention_layers=(0,)).to_dict()
        return config

    def test_hybrid_layers_are_transformers_own(self) -> None:
        cache = MobaCache(self.config())
        assert [type(x) for x in cache.layers] == [MobaLayer] * 2 + [DynamicSlidingWindowLayer] * 2

    @pytest.mark.parametrize("change", [("batch_repeat_interleave", 2), ("batch_select_indices", [0])])
    def test_rows_of_sliding_static_layers_cannot_change(self, change: tuple[str, Any]) -> None:
        """They are refused before any layer has changed."""
        kinds = ["full_attention", "sliding_attention"]
        window = {"sliding_window": 8, "use_sliding_window": True}
        config = Qwen3Config(num_hidden_layers=2, layer_types=kinds, **window)
        cache = MobaCache(config, static=True, max_cache_len=16)
        for layer in range(2):
            cache.update(*states(2, 5), layer)
        with pytest.raises(ValueError, match=f"StaticSlidingWindowLayer, which has no {change[0]}"):
            getattr(cache, change[0])(change[1])
        assert [layer.keys.shape[0] for layer in cache.layers] == [2, 2]

    def test_static_knows_its_rules(self) -> None:
        """Full-attention layers, and layers whose rule attends the whole cache, keep no means."""
        cache = MobaCache(self.config(), static=True, max_cache_len=64)
        assert cache.is_compileable
        assert [x.block_means.block_size for x in cache.layers[:2]] == [None, 4]
        short = MobaCache(self.config(), static=True, max_cache_len=8)
        assert short.layers[1].block_means.block_size is None

    def test_static_needs_a_length(self) -> None:
        with pytest.raises(ValueError, match="needs max_cache_len"):
            MobaCache(self.config(), static=True)

    def test_a_model_instead_of_its_config(self) -> None:
        with pytest.raises(TypeError, match=r"must be the model's config \(model\.config\), got Linear"):
            MobaCache(torch.nn.Linear(2, 2))

    @pytest.mark.parametrize("static", [False, True])
    def test_an_invalid_length(self, static: bool) -> None:
        for length, kind in ((0, ValueError), (-5, ValueError), (64.0, TypeError), ("64", TypeError)):
            with pytest.raises(kind, match="max_cache_len must be"):
                MobaCache(self.config(), static=static, max_cache_len=length)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="offloading works here")
    def test_offloading_needs_a_gpu(self) -> None:
        with pytest.raises(ValueError, match="CUDA device"):
            MobaCache(self.config(), offloading=True)

    def test_import_changes_no_table(self) -> None:
        assert cache_utils.DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] is DynamicLayer
        assert cache_utils.STATIC_LAYER_TYPE_MAPPING["full_attention"] is StaticLayer

    def test_opt_in_and_out(self) -> None:
        with moba_hf.use_moba_cache():
            with moba_hf.use_moba_cache():
                pass
            assert isinstance(DynamicCache(config=self.config()).layers[0], MobaLayer)
        assert type(DynamicCache(config=self.config()).layers[0]) is DynamicLayer
        handle = moba_hf.use_moba_cache()
        assert isinstance(DynamicCache(config=self.config()).layers[0], MobaLayer)
        handle.undo()
        assert type(DynamicCache(config=self.config()).layers[0]) is DynamicLayer


def test_means_without_a_cache() -> None:
    keys, starts = states(2, 19)[0], torch.tensor([2, 0])
    means = block_means_of(keys, starts, 4, "portable")
    torch.testing.assert_close(means[0, :, :4], block_mean(keys[0, :, 2:], 4))
    torch.testing.assert_close(means[1, :, :4], block_mean(keys[1], 4))
