"""The shared choice on a GPU: head and block shapes, Gluon against Triton, repeated runs, long inputs."""

from __future__ import annotations

import pytest
import torch
from shared_checks import assert_attention, assert_gradients, checked_choice, listed_choice, sequences_of

pytest.importorskip("triton")

from moba_hf.kernels import shared, shared_hopper, shared_tuning
from moba_hf.op.checks import Case
from moba_hf.op.numerics import part_size
from moba_hf.op.sequences import Sequences, batched_table, constant_table
from moba_hf.op.shared import SharedRule, pack_blocks, unpack_blocks
from moba_hf.op.shared_ops import shared_attention
from moba_hf.op.shared_prompt import prompt_attention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

RAGGED = [(300, 1000), (700, 700), (1, 513), (129, 129)]
ALIGNED = [(512, 1024), (640, 640), (100, 513), (1, 129), (192, 320)]
# tiles that end after an odd number of blocks of 32, with few rows, and in the middle of such a block
HALVES = [(480, 992), (96, 1184), (32, 672), (64, 96), (32, 32), (7, 544), (33, 545), (1, 1), (160, 800)]
LENGTHS = {"aligned": ALIGNED, "ragged": RAGGED, "halves": HALVES}


def _case(lengths: list[tuple[int, int]] = RAGGED, **kwargs: object) -> Case:
    return Case(lengths, **{"dtype": torch.bfloat16, "device": "cuda", "num_heads": 4, **kwargs})


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    case = _case(head_dim=head_dim, dtype=dtype)
    rule = SharedRule(64, 64, threshold=0.3, sample=8, dense_below=128)
    mask = checked_choice(case, rule)
    assert_attention(case, rule, mask)
    assert_gradients(case, rule, mask)


@pytest.mark.parametrize(("block_size", "tile"), [(32, 64), (32, 128), (64, 128), (128, 128), (128, 64)])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_blocks_and_tiles(block_size: int, tile: int, num_kv_heads: int) -> None:
    case = _case(head_dim=128, num_kv_heads=num_kv_heads)
    rule = SharedRule(block_size, tile, threshold=0.4, sample=4)
    mask = checked_choice(case, rule)
    assert_attention(case, rule, mask)
    assert_gradients(case, rule, mask)


@pytest.mark.parametrize(("head_dim", "v_dim"), [(128, 128), (64, 64), (128, 64)])
@pytest.mark.parametrize("lengths", list(LENGTHS))
@pytest.mark.parametrize("block_size", [32, 64])
def test_gluon_equals_triton(block_size: int, lengths: str, head_dim: int, v_dim: int) -> None:
    case = _case(LENGTHS[lengths], head_dim=head_dim, v_dim=v_dim)
    rule = SharedRule(block_size, 128, threshold=0.3, sample=8)
    _needs_gluon(case, rule)
    mask = checked_choice(case, rule)
    for use_hopper in (True, False):
        assert_attention(case, rule, mask, use_hopper=use_hopper)


@pytest.mark.parametrize(("block_size", "sample"), [(16, 1), (32, 2), (64, 4)])
@pytest.mark.parametrize("kind", ["normal", "wide", "jump", "infinite", "nan"])
def test_gluon_masses(block_size: int, sample: int, kind: str) -> None:
    """Few or all parts need square roots, or later keys leave the range of exponentials of the first step."""
    case = _case([(500, 5000), (130, 2500), (260, 1300)], head_dim=128, num_kv_heads=1)
    if kind == "wide":
        case.q.mul_(6)
    if kind == "jump":
        case.q.add_(1)
        case.k[:, :, 2400:].add_(32)
    if kind in ("infinite", "nan"):
        case.k[:, :, 2700] = float(kind[:3])
    rule = SharedRule(block_size, 128, threshold=0.2, sample=sample)
    if not shared.tile_of_masses(case.q, case.k, rule).hopper:
        pytest.skip("needs compute capability 9.0 and a known Triton")
    sequences = sequences_of(case)
    parts = rule.block_size // part_size(rule.block_size)
    tiles = (None, None, shared_tuning.mass_tile(128, 2, parts, (9, 0)))
    first, second, triton = (
        shared.select(case.q, case.k, sequences, rule, case.scale, mass_tile=x) for x in tiles
    )
    assert torch.equal(first, second)
    taken, differ = (unpack_blocks(x, x.shape[2] * 32).sum().item() for x in (triton, first ^ triton))
    assert differ <= 1e-3 * taken, (differ, taken)
    if kind in ("normal", "wide"):
        checked_choice(case, rule)


def _needs_gluon(case: Case, rule: SharedRule) -> None:
    if not shared_hopper.takes(case.q, case.k, case.v, rule.block_size, rule.tile):
        pytest.skip("needs compute capability 9.0 and a known Triton")


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("most", [1, 5])
@pytest.mark.parametrize("lengths", list(LENGTHS))
@pytest.mark.parametrize(
    ("head_dim", "v_dim", "num_kv_heads", "dtype"),
    [(128, 128, 2, torch.bfloat16), (64, 128, 8, torch.float16), (128, 64, 1, torch.float16)],
)
def test_lists_of_few_blocks(
    block_size: int,
    most: int,
    lengths: str,
    head_dim: int,
    v_dim: int,
    num_kv_heads: int,
    dtype: torch.dtype,
) -> None:
    """No block, one block, odd and even numbers; slots behind and before the sequences are NaN."""
    shape = {"head_dim": head_dim, "v_dim": v_dim, "num_kv_heads": num_kv_heads, "num_heads": 8}
    case = _case(LENGTHS[lengths], dtype=dtype, spare=64, **shape)
    rule = SharedRule(block_size, 128, threshold=0.3, sample=8)
    _needs_gluon(case, rule)
    mask = listed_choice(case, rule, most)
    for x in (case.q, case.k, case.v):
        x[:, :, :64] = torch.nan
        x[:, :, -64:] = torch.nan
    assert_attention(case, rule, mask, use_hopper=False)
    first = assert_attention(case, rule, mask, use_hopper=True)
    chunked = assert_attention(case, rule, mask, use_hopper=True, workspace=1 << 12)
    assert all(torch.equal(a, b) for a, b in zip(first, chunked, strict=True))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_pairs_of_small_blocks_equal_large_blocks_bit_for_bit(head_dim: int) -> None:
    """Each program attends several items, so that the ring of the Gluon kernel wraps around many times."""
    case = _case([(4096, 6144), (2048, 2048)], head_dim=head_dim, num_heads=16, num_kv_heads=4)
    large, small = (SharedRule(x, 128, threshold=0.3, sample=8) for x in (64, 32))
    _needs_gluon(case, small)
    mask = listed_choice(case, large, 40)
    halves = unpack_blocks(mask, mask.shape[2] * 32).repeat_interleave(2, -1)
    wanted = assert_attention(case, large, mask, use_hopper=True)
    for _ in range(2):
        found = assert_attention(case, small, pack_blocks(halves, 2 * mask.shape[2]), use_hopper=True)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_long_lists_of_small_blocks() -> None:
    case = _case([(3000, 6000), (2080, 2080)], head_dim=128, num_heads=8, num_kv_heads=2)
    rule = SharedRule(32, 128, threshold=0.3, sample=8)
    _needs_gluon(case, rule)
    mask = listed_choice(case, rule, 90)
    first, second = (assert_attention(case, rule, mask, use_hopper=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_attention(case, rule, mask, use_hopper=False)


def test_runs_and_budgets_agree_bit_for_bit() -> None:
    case, rule = _case(head_dim=128), SharedRule(64, 128, share=0.8, sample=8)
    masks = [checked_choice(case, rule, workspace=x) for x in (None, None, 1 << 18)]
    assert all(torch.equal(masks[0], x) for x in masks[1:])
    outs = [assert_attention(case, rule, masks[0], workspace=x) for x in (None, None, 1 << 16)]
    assert all(torch.equal(a, b) for x in outs[1:] for a, b in zip(outs[0], x, strict=True))


@pytest.mark.parametrize("length", [2049, 2112, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(2, 128), (8, 64), (1, 96)])
def test_torch_computes_rows_below_dense_below_of_a_prompt(
    length: int, dtype: torch.dtype, num_kv_heads: int, head_dim: int
) -> None:
    rule = SharedRule(32, 128, threshold=0.01, sample=2, dense_below=2048)
    q, k, v = (
        torch.randn(2, heads, length, head_dim, device="cuda", dtype=dtype)
        for heads in (8, num_kv_heads, num_kv_heads)
    )
    table = constant_table(batched_table(2, length, length, q.device))
    settings = {"softmax_scale": head_dim**-0.5, "backend": "triton"}
    sequences = Sequences(table, length, length)
    expected = shared_attention(q, k, v, sequences, rule, **settings)[0]
    prompt_attention(q, k, v, sequences, rule, **settings)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = prompt_attention(q, k, v, sequences, rule, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out[:, 2048:], expected[:, 2048:])
    error = (out[:, :2048] - expected[:, :2048]).abs().max() / expected.abs().max()
    assert error <= 2 * torch.finfo(dtype).eps, error


def test_nothing_waits_for_the_device() -> None:
    case, rule = _case(head_dim=128), SharedRule(64, 128, threshold=0.3, sample=8)
    limits = (sequences_of(case), rule.block_size, rule.tile, case.scale)
    shared.attend(case.q, case.k, case.v, checked_choice(case, rule), *limits)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = shared.select(case.q, case.k, limits[0], rule, case.scale)
        shared.attend(case.q, case.k, case.v, mask, *limits)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_a_million_tokens() -> None:
    """Offsets beyond 2**31 elements: the last tile computed alone equals the same tile of the whole call."""
    length, heads, kv_heads, dim = 1 << 20, 32, 2, 128
    rule = SharedRule(64, 128, threshold=0.5, sample=8)
    q = torch.randn(1, heads, length, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, kv_heads, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    whole = Sequences(batched_table(1, length, length, q.device), length, length)
    last = Sequences(batched_table(1, 128, length, q.device), 128, length)
    mask = shared.select(q[:, :, -128:], k, last, rule, dim**-0.5)
    limits = (rule.block_size, rule.tile, dim**-0.5)
    out, lse = shared.attend(q[:, :, -128:], k, v, mask, last, *limits)
    everything = torch.zeros(heads, length // 128, mask.shape[2], dtype=torch.int32, device="cuda")
    everything[:, -1] = mask[:, 0]
    full, full_lse = shared.attend(q, k, v, everything, whole, *limits)
    assert torch.equal(full[:, -128:], out)
    assert torch.equal(full_lse[:, :, -128:], lse)
