"""Backend "flash_attn" with stand-ins in plain torch that have the public signatures of flash-attn 2 and 4.

On a GPU with one of the packages installed, the same cases run on the real functions.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from moba_cases import batched_moba_attention
from torch import Tensor

from moba_hf.config import LayerConfig
from moba_hf.op import backends, flash, ops
from moba_hf.op.block_means import block_means_of
from moba_hf.op.checks import Case, assert_attention, assert_choice
from moba_hf.op.registry import Registry

RAGGED = [(50, 70), (0, 5), (33, 33), (0, 0), (1, 77)]
CASES = {
    "ragged": Case(RAGGED, num_heads=4, num_kv_heads=2, topk=4, dtype=torch.float16),
    "spare rows": Case(RAGGED, num_heads=3, topk=3, block_size=17, dtype=torch.bfloat16, spare=5),
    "odd dims": Case([(70, 300)], num_heads=8, head_dim=20, v_dim=12, block_size=40, dtype=torch.float16),
    "wide values": Case([(40, 90)], head_dim=16, v_dim=28, dtype=torch.bfloat16),
    "tiny blocks": Case([(37, 41)], block_size=3, topk=5, dtype=torch.float16),
    "own block only": Case(RAGGED, topk=1, dtype=torch.float16),
    "one block": Case([(20, 20), (3, 9)], block_size=64, dtype=torch.float16),
    "forced blocks": Case(RAGGED, num_heads=2, topk=4, sink=1, local=1, dtype=torch.bfloat16),
    "skewed": Case([(60, 200)], num_heads=4, topk=3, kind="skewed", dtype=torch.float16),
}


def segments(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, mq: int, mk: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The result of a varlen function, segment by segment, in fp32; rows outside all segments are NaN."""
    assert q.shape[2] == k.shape[2] == v.shape[2] <= 256
    assert q.shape[2] % 8 == 0
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.shape == cu_k.shape
    assert cu_q[0] == cu_k[0] == 0
    assert cu_q[-1] <= q.shape[0]
    assert cu_k[-1] <= k.shape[0]
    assert (cu_q.diff() >= 0).all()
    assert (cu_k.diff() >= 0).all()
    assert cu_q.diff().max() <= mq
    assert cu_k.diff().max() <= mk
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], q.shape[0]), torch.nan)
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        if a == b:
            continue
        assert c < d, "queries without keys"
        group = q.shape[1] // k.shape[1]
        queries = q[a:b].float().transpose(0, 1)
        keys, values = (x[c:d].float().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        scores = queries @ keys.transpose(1, 2) * scale
        if causal:
            shift = int(d - c - (b - a))
            scores += torch.full(scores.shape[1:], -torch.inf).triu(shift + 1)
        lse[:, a:b] = scores.logsumexp(2)
        out[a:b] = (scores.softmax(2) @ values).transpose(0, 1).to(q.dtype)
    return out, lse


def flash_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """The signature of flash-attn 2.8.3."""
    assert return_attn_probs
    rest = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
    return *segments(q, k, v, *rest), None


def flash_4(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
):
    """The signature of flash-attn 4.0.0b36."""
    assert return_lse
    rest = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
    return segments(q, k, v, *rest)


def installed(monkeypatch: pytest.MonkeyPatch, version: int | None) -> None:
    """Pretends that flash-attn 2, 4 or neither is installed, and that it runs on CPU tensors."""
    monkeypatch.setattr(backends, "_loaded", Registry())
    monkeypatch.setattr(flash, "DEVICES", ("cpu",))
    package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    if version == 2:
        package.flash_attn_varlen_func = flash_2  # type: ignore[attr-defined]
    cute.flash_attn_varlen_func = flash_4  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", None if version is None else package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute if version == 4 else None)


@pytest.fixture(params=[2, 4])
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, request.param)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", CASES)
def test_holds_the_tolerance_rule(name: str) -> None:
    case = CASES[name]
    case.backend = "flash_attn"
    choice = case.select()
    assert_choice(case, choice)
    assert_attention(case, choice)


@pytest.mark.usefixtures("stand_in")
def test_own_block_in_any_slot_and_chunks_of_queries() -> None:
    case = Case([(60, 130)], num_heads=4, num_kv_heads=2, topk=4, dtype=torch.bfloat16, backend="flash_attn")
    choice = case.select()
    out, lse = case.attend(choice)
    turned = choice[..., [1, 2, 0, 3]].contiguous()
    backend = backends.load_backend("flash_attn")
    args = (case.table, case.block_size, case.scale)
    small = flash.attend(backend._varlen, case.q, case.k, case.v, choice, *args, workspace=1)
    for again, again_lse in (small, case.attend(turned)):
        assert torch.allclose(again.float(), out.float(), atol=2**-7)
        assert torch.allclose(again_lse, lse, atol=1e-5)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale: float) -> None:
    case = Case([(20, 60)], dtype=torch.float16, backend="flash_attn")
    case.softmax_scale = scale
    choice = case.expected_choice()
    out, lse = case.attend(choice)
    exact = (x.float() for x in (case.q, case.k, case.v))
    truth, truth_lse = backends.load_backend("reference").forward(*exact, choice, *case.where)
    assert torch.allclose(out.float(), truth, atol=4e-3)
    assert torch.allclose(lse, truth_lse, atol=1e-4)


@pytest.mark.usefixtures("stand_in")
def test_padded_batch_of_strided_views() -> None:
    q, k, v = (torch.randn(2, 70, heads, 24)[..., :16].transpose(1, 2).half() for heads in (4, 2, 2))
    start, end = torch.tensor([0, 21]), torch.tensor([58, 70])
    rule = {"block_size": 16, "topk": 3, "kv_start": start, "kv_end": end, "q_offset": torch.tensor([0])}
    k[0, :, 58:], k[1, :, :21] = torch.nan, torch.nan
    v[0, :, 58:], v[1, :, :21] = torch.nan, torch.nan
    out, lse = batched_moba_attention(q, k, v, backend="flash_attn", **rule)
    for row in range(2):
        part = slice(int(start[row]), int(end[row]))
        alone = ops.moba_attention(
            *(x[row, :, part].transpose(0, 1) for x in (q, k, v)), block_size=16, topk=3, backend="reference"
        )
        assert torch.allclose(out[row, part].float(), alone.float(), atol=4e-3)
        assert (out[row, : part.start] == 0).all()
        assert (out[row, part.stop :] == 0).all()
        assert (lse[row, :, : part.start] == -torch.inf).all()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("cached", [False, True])
def test_decode_steps_over_cached_means(q_len: int, cached: bool) -> None:
    q, k, v = (torch.randn(2, heads, length, 16).half() for heads, length in ((4, q_len), (2, 90), (2, 90)))
    start = torch.tensor([0, 21])
    means = block_means_of(k, start, 16, "portable") if cached else None
    rule = {"block_size": 16, "topk": 3, "kv_start": start}
    out, lse = batched_moba_attention(q, k, v, backend="flash_attn", block_means=means, **rule)
    expected = batched_moba_attention(*(x.float() for x in (q, k, v)), backend="reference", **rule)
    assert torch.allclose(out.float(), expected[0], atol=4e-3)
    assert torch.allclose(lse, expected[1], atol=4e-3)


@pytest.mark.usefixtures("stand_in")
def test_gradients_are_those_of_the_reference() -> None:
    case = Case(RAGGED, num_heads=4, num_kv_heads=2, topk=3, dtype=torch.float16)
    edges = torch.tensor([(0, 0), *RAGGED]).cumsum(0).to(torch.int32)
    rule = {"block_size": 16, "topk": 3, "cu_seqlens_q": edges[:, 0], "cu_seqlens_k": edges[:, 1]}
    grads = []
    for backend, dtype in (("flash_attn", torch.float16), ("reference", torch.float32)):
        q, k, v = (x[0].transpose(0, 1).to(dtype).clone().requires_grad_() for x in (case.q, case.k, case.v))
        choice = case.expected_choice()[0]
        out = ops.moba_attention(q, k, v, **rule, block_indices=choice, backend=backend)
        grads.append(torch.autograd.grad((out.float() * torch.arange(16)).sum(), (q, k, v)))
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).abs().max() <= 0.01 * theirs.abs().max()


@pytest.mark.usefixtures("stand_in")
def test_empty_inputs() -> None:
    for lengths in ([(0, 40)], [(0, 0)]):
        case = Case(lengths, dtype=torch.float16, backend="flash_attn")
        out, lse = case.attend(case.select())
        assert out.shape[1] == lse.shape[2] == 0


@pytest.mark.usefixtures("stand_in")
def test_unsupported_inputs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([(20, 60)], dtype=torch.float16)
    assert backends.choose_backend("flash_attn", case.q, case.k, case.v, LayerConfig(1, 3)) == "flash_attn"
    with pytest.raises(ValueError, match="bf16 and fp16, not"):
        backends.choose_backend(
            "flash_attn", case.q.float(), case.k.float(), case.v.float(), LayerConfig(16, 3)
        )
    wide = case.q.new_zeros(1, 1, 4, 257)
    with pytest.raises(ValueError, match="at most 256"):
        backends.choose_backend("flash_attn", wide, wide, wide, LayerConfig(16, 3))
    monkeypatch.setattr(flash, "DEVICES", ("cuda",))
    with pytest.raises(ValueError, match="CUDA device; q is on cpu"):
        backends.choose_backend("flash_attn", case.q, case.k, case.v, LayerConfig(16, 3))


def test_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None)
    case = Case([(20, 60)], dtype=torch.float16)
    with pytest.raises(ValueError, match=r'pip install "moba-hf\[flash\]"\) is not installed'):
        backends.choose_backend("flash_attn", case.q, case.k, case.v, LayerConfig(16, 3))


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
@pytest.mark.parametrize("block_size", [16, 128, 1000])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_on_the_real_functions(head_dim: int, block_size: int) -> None:
    case = Case(
        [(500, 700), (0, 5), (333, 3330), (1, 777)],
        num_heads=8,
        num_kv_heads=2,
        head_dim=head_dim,
        block_size=block_size,
        topk=4,
        dtype=torch.bfloat16,
        spare=37,
        device="cuda",
        backend="flash_attn",
    )
    choice = case.select()
    assert_choice(case, choice)
    assert_attention(case, choice)
