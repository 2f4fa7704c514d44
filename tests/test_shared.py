"""The shared choice of blocks: the portable path against the reference, and the properties of the rule."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moba_hf.op import backends, shared_portable, shared_problems
from moba_hf.op.backend_table import BACKENDS
from moba_hf.op.backends import choose_backend, load_backend
from moba_hf.op.operators import flat_sequences
from moba_hf.op.sequences import Sequences, batched_table, packed_table
from moba_hf.op.shared import SharedRule, mask_words, pack_blocks, tile_bound, tile_table, unpack_blocks
from moba_hf.op.shared_ops import flat_shared_rule, select_shared, select_shared_op, shared_attention
from moba_hf.op.shared_reference import select_shared_ref, shared_attention_ref, tile_masses_ref, tiles_ref
from tests.moba_cases import cumulative

RULES = [
    SharedRule(8, 16, threshold=0.3, sample=4),
    SharedRule(16, 8, threshold=0.3, dense_below=24),
    SharedRule(16, 16, share=0.7, sink_blocks=0, local_blocks=2),
    SharedRule(8, 32, share=0.8, threshold=0.2, topk=7, sample=8),
    SharedRule(8, 8, topk=4, rotary_pairs="neighbours"),
    SharedRule(7, 21, threshold=0.5, sink_blocks=0, local_blocks=0, sample=3),
]


def _tensors(q_len: int, kv_len: int, heads: int = 4, kv_heads: int = 2, batch: int = 1) -> list[Tensor]:
    """fp64 q, k, v `(batch, heads, length, dim)` with large queries, so that masses differ."""
    generator = torch.Generator().manual_seed(q_len + kv_len)
    shapes = ((batch, heads, q_len, 16), (batch, kv_heads, kv_len, 16), (batch, kv_heads, kv_len, 12))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [3 * q, k, v]


def _run(q: Tensor, k: Tensor, v: Tensor, table: Tensor, rule: SharedRule, backend: str = "portable"):
    """`out (batch, q_len, heads, dim)`, `lse`, and the choice with its tiles."""
    where = Sequences(table, q.shape[2], k.shape[2])
    scale = q.shape[3] ** -0.5
    mask = select_shared_op(q, k, *flat_sequences(where), *flat_shared_rule(rule), scale, backend)
    settings = {"softmax_scale": scale, "backend": backend}
    out, lse = shared_attention(q, k, v, where, rule, **settings, block_mask=mask)
    if backend == "portable":
        assert torch.equal(shared_attention(q, k, v, where, rule, **settings)[0], out)
    return out, lse, mask, tile_table(table, rule.tile, mask.shape[1])


def _alone(q: Tensor, k: Tensor, v: Tensor, rule: SharedRule, cuts: tuple[int, ...] = ()):
    """The reference's result for one sequence of `(heads, length, dim)` tensors."""
    return shared_attention_ref(*(x.transpose(0, 1) for x in (q, k, v)), rule, cuts=cuts)


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
@pytest.mark.parametrize("lengths", [(131, 131), (40, 131), (1, 100), (7, 7)])
def test_portable_equals_the_reference(rule, lengths) -> None:
    q, k, v = _tensors(*lengths)
    table = batched_table(1, *lengths, q.device)
    out, lse, mask, tiles = _run(q, k, v, table, rule)
    expected, expected_lse = _alone(q[0], k[0], v[0], rule)
    _assert_close(out[0], expected)
    _assert_close(lse[0], expected_lse)
    chosen = select_shared_ref(q[0].transpose(0, 1), k[0].transpose(0, 1), rule)
    used = int((tiles[:, 2] > tiles[:, 1]).sum())
    assert used == chosen.shape[1]
    assert torch.equal(unpack_blocks(mask[:, :used], chosen.shape[2]), chosen)
    assert not mask[:, used:].any()
    assert torch.equal(_run(q, k, v, table, rule, "reference")[2], mask)


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_packed_sequences_equal_each_alone(rule) -> None:
    q_lens, kv_lens = (30, 0, 1, 77, 5), (30, 3, 50, 90, 5)
    q, k, v = _tensors(sum(q_lens), sum(kv_lens))
    out, lse, _, _ = _run(q, k, v, packed_table(cumulative(q_lens), cumulative(kv_lens)), rule)
    q_parts = q[0].split(q_lens, 1)
    for i, (queries, keys, values) in enumerate(
        zip(q_parts, k[0].split(kv_lens, 1), v[0].split(kv_lens, 1), strict=True)
    ):
        at = slice(sum(q_lens[:i]), sum(q_lens[: i + 1]))
        if q_lens[i]:
            expected, expected_lse = _alone(queries, keys, values, rule)
            _assert_close(out[0, at], expected)
            _assert_close(lse[0, :, at], expected_lse)


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_padded_rows_equal_each_alone(rule) -> None:
    """Rows are the same as alone, with padding on either side and NaN in unused slots of a static cache."""
    q, k, v = _tensors(90, 120, batch=3)
    start, end = torch.tensor([0, 41, 17]), torch.tensor([90, 90, 80])
    slot = torch.arange(120)
    empty = ((slot < start[:, None]) | (slot >= end[:, None]))[:, None, :, None]
    k, v = k.masked_fill(empty, torch.nan), v.masked_fill(empty, torch.nan)
    table = batched_table(3, 90, 120, q.device, kv_start=start, kv_end=end, q_offset=torch.zeros(1))
    out, lse, _, _ = _run(q, k, v, table, rule)
    for row, (a, b) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        expected, expected_lse = _alone(q[row, :, a:b], k[row, :, a:b], v[row, :, a:b], rule)
        _assert_close(out[row, a:b], expected)
        _assert_close(lse[row, :, a:b], expected_lse)
        padding = torch.ones(90, dtype=torch.bool)
        padding[a:b] = False
        assert not out[row, padding].any()
        assert (lse[row, :, padding] == -torch.inf).all()


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_chunks_equal_the_reference_with_their_cuts(rule) -> None:
    """Calls that end inside a tile, and single-row steps; chunks of whole tiles equal a single call."""
    length = 118
    q, k, v = _tensors(length, length)
    edges = [0, 50, 64, 100, *range(112, length + 1)]
    outs = []
    for begin, end in itertools.pairwise(edges):
        table = batched_table(1, end - begin, end, q.device)
        outs.append(_run(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], table, rule)[0])
    out = torch.cat(outs, 1)[0]
    _assert_close(out, _alone(q[0], k[0], v[0], rule, cuts=tuple(edges[1:-1]))[0])
    one_shot = _alone(q[0], k[0], v[0], rule)[0]
    cut = {edge // rule.tile for edge in edges[1:-1] if edge % rule.tile}
    whole = [row for row in range(length // rule.tile * rule.tile) if row // rule.tile not in cut]
    assert whole
    _assert_close(out[whole], one_shot[whole])


@pytest.mark.parametrize(
    "rule",
    [
        SharedRule(8, 16, threshold=1e-30),
        SharedRule(16, 8, share=1 - 1e-12),
        SharedRule(8, 8, topk=100),
        SharedRule(8, 16, topk=4, dense_below=144),
    ],
    ids=["threshold", "share", "topk", "dense_below"],
)
def test_everything_attended_is_dense_attention(rule) -> None:
    q, k, v = _tensors(131, 131)
    out = _run(q, k, v, batched_table(1, 131, 131, q.device), rule)[0]
    _assert_close(
        out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    )


def test_rows_before_dense_below_are_dense_and_later_ones_are_as_without_it() -> None:
    q, k, v = _tensors(131, 131)
    table = batched_table(1, 131, 131, q.device)
    rule = SharedRule(8, 16, threshold=0.9)
    plain, partly = (_run(q, k, v, table, dataclasses.replace(rule, dense_below=n))[0][0] for n in (0, 64))
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    _assert_close(partly[:64], dense[:64])
    _assert_close(partly[64:], plain[64:])
    assert (plain[40:64] - dense[40:64]).abs().max() > 1e-3


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_a_token_changes_nothing_before_its_tile(rule) -> None:
    q, k, v = _tensors(131, 131)
    table = batched_table(1, 131, 131, q.device)
    before = _run(q, k, v, table, rule)
    at = 100
    for x in (q, k, v):
        x[:, :, at:] = torch.randn_like(x[:, :, at:]) * 4
    after = _run(q, k, v, table, rule)
    same = at // rule.tile
    assert torch.equal(before[0][0, : same * rule.tile], after[0][0, : same * rule.tile])
    assert torch.equal(before[2][:, :same], after[2][:, :same])
    assert not torch.equal(before[0][0, at:], after[0][0, at:])


def _rotated(x: Tensor, by: float, pairs: str) -> Tensor:
    """`x (..., D)` with every rotary pair rotated by `by` further positions."""
    half = x.shape[-1] // 2
    angle = by * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    shape = (2, half) if pairs == "halves" else (half, 2)
    first, second = x.unflatten(-1, shape).unbind(-2 if pairs == "halves" else -1)
    turned = (first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos())
    return torch.stack(turned, -2 if pairs == "halves" else -1).flatten(-2)


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_masses_do_not_depend_on_where_positions_begin(pairs) -> None:
    q, k, _ = (x[0].transpose(0, 1) for x in _tensors(131, 131))
    rule = SharedRule(8, 16, threshold=0.3, rotary_pairs=pairs)
    other = dataclasses.replace(rule, rotary_pairs="neighbours" if pairs == "halves" else "halves")
    moved = [_rotated(x, 1000.0, pairs) for x in (q, k)]
    for mine, theirs in zip(tile_masses_ref(q, k, rule), tile_masses_ref(*moved, rule), strict=True):
        _assert_close(mine, theirs)
    assert torch.equal(select_shared_ref(q, k, rule), select_shared_ref(*moved, rule))
    wrong = zip(tile_masses_ref(q, k, other), tile_masses_ref(*moved, other), strict=True)
    assert max(float((a - b).abs().max()) for a, b in wrong if a.numel()) > 1e-3


def test_a_row_does_not_depend_on_its_batch() -> None:
    q, k, v = _tensors(131, 131, batch=3)
    rule = RULES[0]
    together = _run(q, k, v, batched_table(3, 131, 131, q.device), rule)[0]
    for row in range(3):
        part = (x[row : row + 1] for x in (q, k, v))
        _assert_close(together[row], _run(*part, batched_table(1, 131, 131, q.device), rule)[0][0])


def test_grouped_heads_equal_repeated_keys() -> None:
    q, k, v = _tensors(131, 131, heads=6, kv_heads=2)
    table = batched_table(1, 131, 131, q.device)
    repeated = [x.repeat_interleave(3, dim=1) for x in (k, v)]
    _assert_close(_run(q, k, v, table, RULES[0])[0], _run(q, *repeated, table, RULES[0])[0])


def test_a_cap_keeps_the_heaviest_and_never_takes_more() -> None:
    q, k, _ = (x[0].transpose(0, 1) for x in _tensors(131, 131))
    rule = SharedRule(8, 16, threshold=0.05, topk=6)
    free = select_shared_ref(q, k, dataclasses.replace(rule, topk=None))
    capped = select_shared_ref(q, k, rule)
    assert int(free.sum(2).max()) > 6
    assert int(capped.sum(2).max()) == 6
    assert not (capped & ~free).any()
    for number, mass in enumerate(tile_masses_ref(q, k, rule)):
        count = mass.shape[1]
        kept, dropped = capped[:, number, :count], free[:, number, :count] & ~capped[:, number, :count]
        kept = kept.clone()
        kept[:, : rule.sink_blocks] = kept[:, max(0, count - rule.local_blocks) :] = False
        for head in range(4):
            if dropped[head].any() and kept[head].any():
                assert mass[head][kept[head]].min() >= mass[head][dropped[head]].max()


def test_equal_masses_keep_the_lower_block() -> None:
    q, k, v = (torch.ones_like(x) for x in _tensors(96, 96))
    rule = SharedRule(8, 8, threshold=0.5, topk=4, sink_blocks=0, local_blocks=1)
    _, _, mask, _ = _run(q, k, v, batched_table(1, 96, 96, q.device), rule)
    assert unpack_blocks(mask[0, 10], 12).nonzero()[:, 0].tolist() == [0, 1, 9, 10]


def test_long_lists_in_pieces_and_batches_equal_the_reference(monkeypatch) -> None:
    monkeypatch.setattr(shared_problems, "_PIECE_KEYS", 24)
    monkeypatch.setattr(shared_portable, "_MASS_BUDGET", 500)
    everything = 1 << 30
    for budget, lists, headroom in itertools.product((1, everything), (1, everything), (16, 1000)):
        monkeypatch.setattr(shared_portable, "_TERM_BUDGET", budget)
        monkeypatch.setattr(shared_problems, "_SCORE_BUDGET", budget)
        monkeypatch.setattr(shared_problems, "_LIST_BUDGET", lists)
        monkeypatch.setattr(shared_problems, "_HEADROOM", headroom)  # 1000: no scores are bounded
        for rule in RULES:
            q, k, v = _tensors(131, 131)
            out, lse, mask, _ = _run(q, k, v, batched_table(1, 131, 131, q.device), rule)
            expected, expected_lse = _alone(q[0], k[0], v[0], rule)
            _assert_close(out[0], expected)
            _assert_close(lse[0], expected_lse)
            chosen = select_shared_ref(q[0].transpose(0, 1), k[0].transpose(0, 1), rule)
            assert torch.equal(unpack_blocks(mask, chosen.shape[2])[:, : chosen.shape[1]], chosen)


def test_scores_beyond_the_range_of_exp_equal_the_reference() -> None:
    """One head's scores are in the thousands, and only there `exp` needs a shift."""
    rule = SharedRule(8, 16, topk=6, sample=4)
    q, k, v = _tensors(131, 131)
    k, v = k.float(), v.float()
    q = (q * torch.tensor([1.0, 300.0, 0.1, 0.3])[:, None, None]).float()
    where = Sequences(batched_table(1, 131, 131, q.device), 131, 131)
    found = []

    def spy(seq, problems, *args):
        found.append((problems.bounded, problems.place.stop - problems.place.start))
        return attend_batch(seq, problems, *args)

    attend_batch = shared_portable._attend_batch
    with patch.object(shared_portable, "_attend_batch", spy):
        out, lse, mask, _ = _run(q, k, v, where.table, rule)
    assert lse[0, 1].max() > 1000
    assert sum(n for bounded, n in found if not bounded) == 2 * 9  # the head's 9 tiles, in two calls
    settings = {"softmax_scale": 0.25, "backend": "reference", "block_mask": mask}
    expected, expected_lse = shared_attention(q, k, v, where, rule, **settings)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_small_values_survive_where_all_scores_are_low(size) -> None:
    """With scores of -70 and values of 1e-12, products without a shift would be 0."""
    rule = SharedRule(8, 16, topk=6, sample=4)
    q, k, v = _tensors(131, 131)
    q, k, v = -8.5 - 0.01 * q, 8.2 + 0.01 * k, size * v.abs()
    q[:, 1:], q, k, v = q[:, 1:] / 8, q[..., :4].float(), k[..., :4].float(), v.float()
    where = Sequences(batched_table(1, 131, 131, q.device), 131, 131)
    settings = {"softmax_scale": 0.25}
    out, lse = shared_attention(q, k, v, where, rule, **settings, backend="portable")
    exact = [x.double() for x in (q, k, v)]
    mask = select_shared(q, k, where, rule, **settings, backend="portable")
    expected, expected_lse = shared_attention(
        *exact, where, rule, **settings, backend="reference", block_mask=mask
    )
    assert expected_lse[0, 0].max() < -60
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bounded", [True, False])
def test_keys_that_are_not_finite_stay_behind_the_rows_that_see_them(bounded, monkeypatch) -> None:
    if not bounded:
        monkeypatch.setattr(shared_problems, "_HEADROOM", 1000)
    rule = SharedRule(8, 16, threshold=1e-30)
    q, k, v = _tensors(131, 131)
    where = Sequences(batched_table(1, 131, 131, q.device), 131, 131)
    settings = {"softmax_scale": 0.25, "backend": "portable"}
    expected, expected_lse = shared_attention(q, k, v, where, rule, **settings)
    v[0, 0, 70, 3], v[0, 1, 90] = torch.inf, torch.nan
    k[0, 1, 120] = torch.nan
    out, lse = shared_attention(q, k, v, where, rule, **settings)
    _assert_close(out[0, :70], expected[0, :70])
    _assert_close(out[0, :90, 2:], expected[0, :90, 2:])
    _assert_close(out[0, 70:, :2, :3], expected[0, 70:, :2, :3])
    assert (out[0, 70:, :2, 3] == torch.inf).all()
    assert out[0, 90:, 2:].isnan().all()
    _assert_close(lse[0, :2], expected_lse[0, :2])
    assert lse[0, 2:, 120:].isnan().all()


def test_the_workspace_does_not_grow_with_the_length(monkeypatch) -> None:
    monkeypatch.setattr(shared_problems, "_PIECE_KEYS", 64)
    for name in ("_SCORE_BUDGET", "_LIST_BUDGET"):
        monkeypatch.setattr(shared_problems, name, 1 << 11)
    made: list[dict[str, Tensor]] = []
    scratch = shared_problems.Scratch

    def spy(like: Tensor) -> shared_problems.Scratch:
        result = scratch(like)
        made.append(result.space)
        return result

    rule, sizes = SharedRule(8, 16, topk=20, sample=4), []
    for length in (200, 800):
        made.clear()
        with patch.object(shared_problems, "Scratch", spy):
            q, k, v = _tensors(length, length)
            _run(q, k, v, batched_table(1, length, length, q.device), rule)
        sizes.append({name: x.numel() for name, x in made[0].items()})
    assert sizes[0] == sizes[1]
    assert set(sizes[0]) == {"scores", "keys", "values"}


@pytest.mark.parametrize("rule", RULES[:4], ids=range(4))
def test_gradients_are_those_of_the_reference_and_of_differences(rule) -> None:
    q_lens, kv_lens = (20, 9), (33, 9)
    tensors = [x.requires_grad_() for x in _tensors(sum(q_lens), sum(kv_lens))]
    where = Sequences(packed_table(cumulative(q_lens), cumulative(kv_lens)), 29, 42, by_row=False)
    q, k, _ = (x.detach() for x in tensors)
    mask = select_shared_op(q, k, *flat_sequences(where), *flat_shared_rule(rule), 0.25, "portable")

    def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = "portable") -> tuple[Tensor, Tensor]:
        settings = {"softmax_scale": 0.25, "backend": backend, "block_mask": mask}
        return shared_attention(q, k, v, where, rule, **settings)

    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)
    grads = []
    for backend in ("portable", "reference"):
        out, lse = attend(*tensors, backend)
        grads.append(torch.autograd.grad(out.square().sum() + lse.sin().sum(), tensors))
    for mine, expected in zip(*grads, strict=True):
        _assert_close(mine, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_follows_the_reference_under_one_choice(dtype) -> None:
    q, k, v = (x.to(dtype) for x in _tensors(131, 131))
    table = batched_table(1, 131, 131, q.device)
    out, _, mask, _ = _run(q, k, v, table, RULES[0])
    where = Sequences(table, 131, 131)
    settings = {"softmax_scale": 0.25, "backend": "reference", "block_mask": mask}
    expected, _ = shared_attention(q, k, v, where, RULES[0], **settings)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    reference = _run(q, k, v, table, RULES[0], "reference")[2]
    assert (mask == reference).float().mean() > 0.9


def test_operators_pass_the_checks_of_torch() -> None:
    q, k, v = (x.float() for x in _tensors(40, 60))
    rule = RULES[0]
    where = flat_sequences(Sequences(batched_table(1, 40, 60, q.device), 40, 60))
    flat = (*where, *flat_shared_rule(rule), 0.25, "portable")
    torch.library.opcheck(torch.ops.moba_hf.select_shared.default, (q, k, *flat))
    mask = select_shared_op(q, k, *flat)
    args = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(
        torch.ops.moba_hf.attend_shared.default, (*args, mask, *where, 8, 16, 0.25, "portable")
    )


@pytest.mark.parametrize("tile", [1, 8, 21])
def test_the_tile_table_lists_every_row_once_and_fits_its_bound(tile) -> None:
    q_lens, kv_lens = (30, 0, 1, 77, 5, 16), (30, 3, 50, 90, 5, 16)
    table = packed_table(cumulative(q_lens), cumulative(kv_lens))
    bound = tile_bound(6, 77, sum(q_lens), tile)
    rows = tile_table(table, tile, bound)
    assert rows.dtype == torch.int32
    covered: list[int] = []
    for batch, q_begin, q_end, position, k_begin, k_end in rows.tolist():
        if q_end == q_begin:
            assert (batch, position, k_begin, k_end) == (0, 0, 0, 0)
            continue
        covered += range(q_begin, q_end)
        assert position // tile == (position + q_end - q_begin - 1) // tile
        assert 0 <= position <= k_end - k_begin - (q_end - q_begin)
    assert covered == list(range(sum(q_lens)))
    expected = sum(len(tiles_ref(q, k, tile)) for q, k in zip(q_lens, kv_lens, strict=True) if q)
    assert int((rows[:, 2] > rows[:, 1]).sum()) == expected <= bound
    assert tile_table(table[:0], tile, 0).shape == (0, 6)


def test_bits_of_blocks() -> None:
    chosen = torch.rand(3, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    chosen[0, 31] = True  # the sign bit of an int32
    words = mask_words(70 * 16 - 3, 16)
    assert words == 3
    mask = pack_blocks(chosen, words)
    assert mask.dtype == torch.int32
    assert bool(mask[0, 0] < 0)
    assert bool((mask[1, 1] >> 2 & 1) == chosen[1, 34])
    assert torch.equal(unpack_blocks(mask, 70), chosen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 24, "block_size": 16, "threshold": 0.1}, "tile=24 must be a multiple or a divisor"),
        ({"threshold": 1.0}, "threshold must lie between 0 and 1, both excluded, got 1.0"),
        ({"share": 0.0}, "share must lie between 0 and 1"),
        ({}, "needs threshold, share or topk"),
        ({"threshold": 0.1, "sample": 3}, "sample=3 must divide tile=16"),
        ({"threshold": 0.1, "dense_below": 40}, "dense_below=40 must be a multiple of tile=16"),
        ({"topk": 3}, "topk=3 is too small: it counts the 2 blocks that a tile overlaps"),
        ({"threshold": 0.1, "rotary_pairs": "none"}, "rotary_pairs must be one of 'halves', 'neighbours'"),
    ],
)
def test_invalid_settings_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        SharedRule(**{"block_size": 8, "tile": 16, **settings})


def test_a_threshold_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(TypeError, match="threshold must be a number between 0 and 1, got 'high'"):
        SharedRule(8, 16, threshold="high")


def test_a_backend_that_cannot_share_a_choice_is_refused() -> None:
    class Unable(type(load_backend("portable"))):  # type: ignore[misc]
        shared = None

    q, k, v = _tensors(8, 8)
    backends._loaded.keep("unable", Unable)
    message = r'"unable" cannot run this: it cannot share a choice of blocks'
    with patch.dict(BACKENDS, {"unable": "none:none"}), pytest.raises(ValueError, match=message):
        choose_backend("unable", q, k, v, RULES[0])
    assert choose_backend("auto", q, k, v, RULES[0]) == "portable"


def test_a_tile_whose_masses_do_not_fit_is_refused() -> None:
    q, k, v = _tensors(8, 8)
    where = Sequences(batched_table(1, 8, 8, q.device), 8, 1 << 17)
    rule = SharedRule(16, 1 << 20, 0.1)
    size = 4 * q.shape[1] * (1 << 17) * (1 << 13) >> 30
    with pytest.raises(ValueError, match=rf"tile=1048576 with sample=1 takes {size}\.0 GiB .* lower tile"):
        shared_attention(q, k, v, where, rule, softmax_scale=1.0)
    few = replace(rule, sample=1 << 12)
    shared_attention(q, k, v, where, few, softmax_scale=1.0)


def test_an_odd_head_dim_is_refused() -> None:
    q, k, v = (x[..., :15] for x in _tensors(8, 8))
    where = Sequences(batched_table(1, 8, 8, q.device), 8, 8)
    with pytest.raises(ValueError, match="needs an even head_dim, got 15"):
        shared_attention(q, k, v, where, RULES[0], softmax_scale=1.0)


def test_masses_and_outputs_are_exact_under_any_precision_of_matmuls(monkeypatch) -> None:
    monkeypatch.setattr(shared_problems, "_PIECE_KEYS", 16)  # outputs are sums of several products
    q, k, v = _tensors(160, 160)
    q, k, v = (x.float() for x in (q, k, v))
    rule = SharedRule(16, 16, share=0.7)
    table = packed_table(cumulative([160]), cumulative([160]))
    expected = _run(q, k, v, table, rule)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        actual = _run(q, k, v, table, rule)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-5
