"""Torch's attention computes the rows before `dense_below` of a whole prompt; other calls are as before."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from moba_hf import MobaCache, MobaConfig
from moba_hf.evaluate.attended import pairs_of
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.hf.rows import Masks, Rows
from moba_hf.op import shared_prompt
from moba_hf.op.sequences import Sequences, batched_table, constant_table, covers_queries
from moba_hf.op.shared_ops import CHOICE_WATCHERS, shared_attention
from moba_hf.op.shared_prompt import prompt_attention
from moba_hf.op.shared_reference import shared_attention_ref
from moba_hf.op.shared_rule import SharedRule
from tests.model_checks import close, logits, padded, tiny_model, tokens

LENGTH = 131
RULE = SharedRule(8, 16, threshold=0.5, sample=4, dense_below=48)
MOBA = MobaConfig(8, tile=16, threshold=0.5, gate="mass", sample=4, dense_below=32)
SETTINGS: dict[str, Any] = {"softmax_scale": 0.3, "backend": "portable"}


def _tensors(
    heads: int = 4, kv_heads: int = 2, dim: int = 16, v_dim: int = 16, batch: int = 2
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, v_dim))
    return [2 * torch.randn(batch, n, LENGTH, d, generator=generator).double() for n, d in shapes]


def _whole(batch: int) -> Sequences:
    table = constant_table(batched_table(batch, LENGTH, LENGTH, torch.device("cpu")))
    return Sequences(table, LENGTH, LENGTH)


@contextmanager
def _dense_rows() -> Iterator[list[int]]:
    """How many rows each call inside the block gives to torch's attention."""
    found: list[int] = []
    original = shared_prompt.dense_attention

    def spy(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(q.shape[2])
        return original(q, *args, **kwargs)

    with patch.object(shared_prompt, "dense_attention", spy):
        yield found


@pytest.mark.parametrize(
    "shape", [{}, {"heads": 6, "kv_heads": 1, "batch": 1}, {"kv_heads": 4, "dim": 24, "v_dim": 40}]
)
@pytest.mark.parametrize("dense_below", [16, 48, 128])
def test_outputs_are_those_of_the_rule(shape: dict[str, int], dense_below: int) -> None:
    q, k, v = _tensors(**shape)
    rule = SharedRule(8, 16, threshold=0.5, sample=4, dense_below=dense_below)
    with _dense_rows() as rows:
        out = prompt_attention(q, k, v, _whole(len(q)), rule, **SETTINGS)
    assert rows == [dense_below]
    expected = shared_attention(q, k, v, _whole(len(q)), rule, **SETTINGS)[0]
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    for row in range(len(q)):
        parts = (x[row].transpose(0, 1) for x in (q, k, v))
        truth = shared_attention_ref(*parts, rule, 0.3)[0]
        torch.testing.assert_close(out[row], truth, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 16), (torch.bfloat16, 2), (torch.float16, 2)])
def test_low_precision_stays_within_rounding(dtype: torch.dtype, steps: int) -> None:
    q, k, v = (x.to(dtype) for x in _tensors())
    out = prompt_attention(q, k, v, _whole(2), RULE, **SETTINGS)
    expected = shared_attention(q, k, v, _whole(2), RULE, **SETTINGS)[0]
    assert out.dtype == dtype
    assert (out - expected).abs().max() <= steps * torch.finfo(dtype).eps * expected.abs().max()


def test_only_tiles_from_dense_below_on_are_chosen_and_layers_share_their_table() -> None:
    q, k, v = _tensors()
    where = _whole(2)
    with patch.object(shared_prompt, "shared_attention", wraps=shared_attention) as runs:
        for _ in range(2):
            prompt_attention(q, k, v, where, RULE, **SETTINGS)
    later, again = (call.args[3] for call in runs.call_args_list)
    assert later is again
    assert later.table.tolist() == [[row, 48, LENGTH, 0, LENGTH] for row in range(2)]
    assert (later.max_seqlen_q, later.max_seqlen_k) == (LENGTH - 48, LENGTH)
    assert where.table[:, 1].tolist() == [0, 0]


def test_only_rows_without_padding_cover_their_queries() -> None:
    """Kernels may leave the results of other queries unwritten."""
    device, mask = torch.device("cpu"), torch.ones(2, 9, dtype=torch.bool)
    padding = mask.clone()
    padding[1, 0] = False
    for q_len, given, covered in ((9, None, True), (4, None, True), (9, mask, True), (9, padding, False)):
        rows = Rows(2, q_len, 9, 9 - q_len, device, Masks(given=given))
        assert covers_queries(rows.layout({}, device).sequences.table) is covered
    assert covers_queries(shared_prompt._rows_from(_whole(2), 48).table)
    assert not covers_queries(_whole(2).table)


def test_gradients_and_the_reference_go_through_one_operator() -> None:
    tensors = [x.requires_grad_() for x in _tensors()]
    with _dense_rows() as rows:
        out = prompt_attention(*tensors, _whole(2), RULE, **SETTINGS)
        expected = shared_attention(*tensors, _whole(2), RULE, **SETTINGS)[0]
        assert torch.equal(out, expected)
        grads = [torch.autograd.grad(x.square().sum(), tensors) for x in (out, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        with torch.no_grad():
            prompt_attention(*tensors, _whole(2), RULE, softmax_scale=0.3, backend="reference")
        assert rows == []
        with torch.no_grad():
            prompt_attention(*tensors, _whole(2), RULE, **SETTINGS)
        assert rows == [48]


def test_watchers_see_the_choice_of_every_row() -> None:
    tensors = _tensors()
    found: dict[str, Tensor] = {}
    for run in (prompt_attention, shared_attention):
        seen: list[Tensor] = []
        CHOICE_WATCHERS.append(lambda *call, seen=seen: seen.append(pairs_of(*call)))
        try:
            with _dense_rows() as rows:
                run(*tensors, _whole(2), RULE, **SETTINGS)
        finally:
            CHOICE_WATCHERS.pop()
        assert rows == ([48] if run is prompt_attention else [])
        found[run.__name__] = torch.stack(seen).sum(0)
    assert torch.equal(found["prompt_attention"], found["shared_attention"])
    assert found["prompt_attention"].min() > 2 * 48 * 49 // 2


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from torch, at its first dual number
def test_tangents_are_refused() -> None:
    from torch.autograd import forward_ad

    q, k, v = _tensors()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            prompt_attention(dual, k, v, _whole(2), RULE, **SETTINGS)


def _model_rows(model: Any, ids: Tensor, **kwargs: Any) -> tuple[list[int], Tensor]:
    with _dense_rows() as rows:
        result = logits(model, ids, **kwargs)
    return rows, result


def test_a_prompt_is_split_in_every_layer() -> None:
    model = tiny_model(moba=MOBA)
    rows, split = _model_rows(model, tokens(2, 90))
    assert rows == [32] * 3
    with patch.object(shared_prompt, "_splits", return_value=False):
        rows, whole = _model_rows(model, tokens(2, 90))
    assert rows == []
    assert close(split, whole)
    ones = torch.ones(2, 90, dtype=torch.long)
    rows, masked = _model_rows(model, tokens(2, 90), attention_mask=ones)
    assert rows == [32] * 3
    assert torch.equal(masked, split)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_are_not_split(side: str) -> None:
    ids, mask = padded([tokens(90), tokens(70)], side)
    assert _model_rows(tiny_model(moba=MOBA), ids, attention_mask=mask)[0] == []


def test_packed_sequences_are_not_split() -> None:
    position_ids = torch.cat([torch.arange(50), torch.arange(40)])[None]
    rows, _ = _model_rows(tiny_model(moba=MOBA), tokens(1, 90), position_ids=position_ids, use_cache=False)
    assert rows == []


@pytest.mark.parametrize(
    ("edges", "split"),
    [((0, 48, 96), [32]), ((0, 32, 96), []), ((0, 16, 64, 96), []), ((0, 64, 80, 96), [32])],
)
@pytest.mark.parametrize("static", [False, True])
def test_chunks_equal_one_call(edges: tuple[int, ...], split: list[int], static: bool) -> None:
    """Only a first chunk that ends behind `dense_below` is split; static caches are not."""
    model = tiny_model(moba=MOBA)
    ids = tokens(1, 96)
    cache = MobaCache(model.config, max_cache_len=128, static=static)
    with _dense_rows() as rows:
        parts = [
            logits(model, ids[:, a:b], **cache_kwargs(model, cache)) for a, b in itertools.pairwise(edges)
        ]
    assert rows == ([] if static else split * 3)
    assert close(torch.cat(parts, 1), logits(model, ids))


def test_training_is_not_split() -> None:
    model = tiny_model(moba=MOBA)
    with _dense_rows() as rows:
        model(tokens(1, 90)).logits.sum().backward()
    assert rows == []


def test_a_compiled_model_is_not_split_and_gives_the_same() -> None:
    model = tiny_model(moba=MOBA)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in (90, 41):
        ids = tokens(1, length)
        rows, result = _model_rows(compiled, ids, use_cache=False)
        assert rows == []
        assert close(result, logits(model, ids, use_cache=False))
