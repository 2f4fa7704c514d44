"""Decode steps on the Triton backend: the bits of prefill's means and choice, rows equal to the reference."""

from __future__ import annotations

import pytest
import torch
from decode_checks import (
    assert_append,
    assert_choice_is_prefill_choice,
    assert_dense,
    assert_means_are_prefill_means,
)
from forced import with_choices
from moba_cases import batched_moba_attention
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from moba_hf import MobaCache, MobaConfig, use_moba
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.kernels import choose_blocks
from moba_hf.kernels.sparse_decode import decode_attention
from moba_hf.kernels.tuning import Tile
from moba_hf.op.backends import load_backend
from moba_hf.op.block_means import block_means_of
from moba_hf.op.dense import dense_attention
from moba_hf.op.sequences import Sequences, batched_table

pytestmark = pytest.mark.usefixtures("poisoned")


def test_rows_equal_the_reference() -> None:
    torch.manual_seed(0)
    k, v = (torch.randn(2, 2, 100, 16) for _ in range(2))
    starts = torch.tensor([0, 17])
    for q_len, topk in ((1, 3), (3, 9)):
        q = torch.randn(2, 4, q_len, 16)

        def run(backend: str, means: Tensor | None, q: Tensor = q, topk: int = topk) -> tuple[Tensor, Tensor]:
            rule = {"block_size": 16, "topk": topk, "sink_blocks": 1}
            return batched_moba_attention(
                q, k, v, kv_start=starts, backend=backend, block_means=means, **rule
            )

        expected = run("reference", None)
        for means in (None, block_means_of(k, starts, 16, "triton")):
            torch.testing.assert_close(run("triton", means), expected)


def test_only_chosen_blocks_are_read() -> None:
    """The keys and values of all other blocks become NaN once their means are computed."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 2, 16), *(torch.randn(2, 2, 250, 16) for _ in range(2))
    starts, rule = torch.tensor([0, 37]), (16, 3, 1, 0)
    means = block_means_of(k, starts, 16, "triton")
    given = {"kv_start": starts, "block_means": means, "block_size": 16, "topk": 3, "sink_blocks": 1}
    expected = batched_moba_attention(q, k, v, backend="triton", **given)
    choice = choose_blocks(q, means, batched_table(2, 2, 250, q.device, kv_start=starts), 250, *rule)
    for row, start in enumerate(starts.tolist()):
        for head in range(2):
            chosen = choice[row, :, 2 * head : 2 * head + 2].unique()
            block = (torch.arange(250) - start).div(16, rounding_mode="floor")
            other = ~torch.isin(block, chosen)
            assert 100 < int(other.sum()) < 220
            k[row, head, other] = v[row, head, other] = torch.nan
    got = batched_moba_attention(q, k, v, backend="triton", **given)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_model_decodes_as_with_the_portable_backend(kind: str) -> None:
    """Padded rows, then steps that complete a block: both backends and a single call give the same logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 50, "num_hidden_layers": 1}
    config = LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=16, initializer_range=0.3
    )
    model = LlamaForCausalLM(config).eval()
    ids, mask = torch.randint(0, 50, (2, 68)), torch.ones(2, 68, dtype=torch.long)
    mask[0, :11] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rows: list[list[Tensor]] = []
    for backend in ("triton", "portable"):
        with use_moba(model, MobaConfig(16, 2, decode="sparse", backend=backend)), torch.no_grad():
            cache = MobaCache(config, static=kind == "static", max_cache_len=72)
            parts = []
            for begin, end in ((0, 62), *((i, i + 1) for i in range(62, 68))):
                given = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
                parts.append(model(ids[:, begin:end], **cache_kwargs(model, cache), **given).logits)
            rows.append(parts)
    with use_moba(model, MobaConfig(16, 2)), torch.no_grad():
        one_call = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    ours, theirs = (torch.cat(parts, 1)[mask.bool()] for parts in rows)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, one_call[mask.bool()], rtol=1e-4, atol=1e-4)


def test_padding_rows_are_zero() -> None:
    """Queries before a row's first token and after its last one, in a call with five queries."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 5, 16), *(torch.randn(2, 1, 60, 16) for _ in range(2))
    limits = {"kv_start": torch.tensor([0, 57]), "kv_end": torch.tensor([58, 60])}
    rule = {"block_size": 16, "topk": 2}
    out, lse = batched_moba_attention(q, k, v, backend="triton", **limits, **rule)
    torch.testing.assert_close(
        (out, lse), batched_moba_attention(q, k, v, backend="reference", **limits, **rule)
    )
    assert (out[0, 3:] == 0).all()
    assert (out[1, :2] == 0).all()


@pytest.mark.parametrize(("block_size", "dim"), [(16, 16), (17, 24), (100, 16)])
@pytest.mark.parametrize("steps", [[210], [100, 1, 40, 69], [209, 1]])
def test_means(block_size: int, dim: int, steps: list[int]) -> None:
    k = torch.randn(2, 2, 210, dim).bfloat16()
    assert_means_are_prefill_means(k, torch.tensor([0, 13]), block_size, steps)


@pytest.mark.parametrize(("batch", "count", "dims"), [(1, 1, (16, 16)), (2, 5, (24, 16))])
def test_append(batch: int, count: int, dims: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_append(dtype, "cpu", batch, count, dims)


@pytest.mark.parametrize(
    ("heads", "rule", "count"),
    [((4, 2), (16, 5, 0, 0), 1), ((3, 1), (17, 7, 1, 2), 5), ((2, 1), (16, 20, 1, 0), 16),
     ((2, 1), (16, 3, 1, 1), 3), ((70, 1), (32, 3, 0, 0), 1), ((2, 2), (16, 1, 0, 0), 2)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["normal", "integer"])
def test_choice(heads: tuple[int, int], rule: tuple[int, int, int, int], count: int, kind: str) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, heads[0], 20, 16), torch.randn(2, heads[1], 230, 16)
    if kind == "integer":  # exact scores of both signs with many ties
        q = torch.randint(-1, 2, q.shape).float()
        k = torch.randint(-1, 2, k.shape).float()[:, :, torch.arange(230) // rule[0]]
    assert_choice_is_prefill_choice(q.bfloat16(), k.bfloat16(), torch.tensor([0, 226]), rule, count)


@pytest.mark.parametrize("spread", [1e-3, pytest.param(1.0, marks=pytest.mark.slow), 1e3])
def test_choice_at_any_distance_below_the_largest_score(spread: float) -> None:
    """The search starts near the largest score: clustered, spread-out and negative scores, and outliers."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 1, 16 * 150, 16)
    for shift in (-40.0, 0.0, 40.0):
        keys = (k * spread + shift * q[:, :1, :1] / q[0, 0, 0].norm()).bfloat16()
        keys[:, :, 160:176] *= 100
        assert_choice_is_prefill_choice(q.bfloat16(), keys, torch.tensor([0]), (16, 12, 0, 0), 3)


def test_choice_of_more_blocks_than_are_held() -> None:
    for kind in (torch.randn(1, 1, 3300, 16), torch.randint(0, 2, (1, 1, 3300, 16)).float()):
        q = torch.randn(1, 2, 2, 16).bfloat16()
        with with_choices(choose_held=64):
            assert_choice_is_prefill_choice(q, kind.bfloat16(), torch.tensor([0]), (16, 6, 1, 1), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "q_len"), [((4, 2), 1), ((6, 2), 5), ((8, 1), 16)])
def test_dense(heads: tuple[int, int], q_len: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, heads[0], q_len, 16).to(dtype)
    k, v = torch.randn(2, heads[1], 90, 16).to(dtype), torch.randn(2, heads[1], 90, 24).to(dtype)
    limits = ([0, 88 - q_len // 2], [87, 90], [87 - q_len, 90 - q_len])
    table = batched_table(2, q_len, 90, q.device, *(torch.tensor(x) for x in limits))
    for tile in (None, Tile(16, 16, 4, 2)):
        assert_dense(q, k, v, table, tile)


@pytest.mark.parametrize("segments", [1, 2, 5])
def test_segments_of_a_block(segments: int) -> None:
    """Rows equal the reference however a block is split among programs."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 24)
    table = batched_table(2, 3, 300, q.device, kv_start=torch.tensor([0, 170]))
    choice = torch.zeros(2, 3, 4, 3, dtype=torch.int32)
    choice[0] = torch.tensor([2, 0, 1])
    choice[1] = torch.tensor([1, 0, -1])
    args = (q, k, v, choice, Sequences(table, 3, 300), 100, 0.25)
    expected = load_backend("reference").forward(*args)
    got = decode_attention(*args, by_row=True, segments=segments)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("starts", [None, (0, 21)])
def test_dense_with_more_queries_than_the_kernel_takes(starts: tuple[int, int] | None) -> None:
    """The end of a prompt, read dense in pieces, equals torch's own attention, padding rows included."""
    q = torch.randn(2, 4, 40, 16)
    k, v = (torch.randn(2, 2, 70, 16) for _ in range(2))
    sequences = None
    if starts is not None:
        begin, end = torch.tensor(starts), torch.tensor([70, 55])
        table = batched_table(2, 40, 70, q.device, begin, end, torch.tensor([30]))
        sequences = Sequences(table, 40, 70, True, begin)
    actual = dense_attention(q, k, v, 0.25, sequences, "triton")
    expected = dense_attention(q, k, v, 0.25, sequences, "portable")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
