"""Kernels on a GPU: every dtype and head dim, long and skewed inputs, and faults that only size reveals."""

from __future__ import annotations

import pytest
import torch
from forced import fewer_levels

pytest.importorskip("triton")
from moba_hf.config import LayerConfig
from moba_hf.op import ops
from moba_hf.op.backends import choose_backend
from moba_hf.op.checks import Case, assert_attention, assert_choice

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

BF16 = torch.bfloat16
RAGGED = [(500, 700), (0, 5), (333, 333), (0, 0), (1, 777), (64, 2048), (129, 129)]


def case_of(lengths: list[tuple[int, int]], **kwargs: object) -> Case:
    """A bf16 case on the GPU, by default with 4 query heads, 2 kv heads and head_dim 64."""
    rule = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": BF16, "device": "cuda", **kwargs}
    return Case(lengths, **rule)  # type: ignore[arg-type]


def check(case: Case, **kwargs: object) -> None:
    """Checks the gate, then attention under the reference's choice and under its own."""
    choice = case.select()
    assert_choice(case, choice)
    assert_attention(case, case.expected_choice(), **kwargs)
    assert_attention(case, choice, **kwargs)
    assert_attention(case, choice, **{"use_hopper": False, **kwargs})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 160, 192, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(case_of([(700, 1000)], head_dim=head_dim, block_size=64, topk=4, dtype=dtype))


@pytest.mark.parametrize(("head_dim", "v_dim"), [(192, 128), (128, 64), (64, 256), (96, 80)])
def test_value_dims(head_dim: int, v_dim: int) -> None:
    check(case_of([(400, 900)], head_dim=head_dim, v_dim=v_dim, block_size=64, topk=4))


@pytest.mark.parametrize("block_size", [16, 17, 32, 48, 64, 100, 128, 130, 256, 512, 1000, 1024])
@pytest.mark.parametrize("resident", [None, False])
def test_block_sizes(block_size: int, resident: bool | None) -> None:
    length = max(1500, 4 * block_size + 33)
    check(case_of([(700, length)], block_size=block_size, head_dim=128, topk=3), resident=resident)


@pytest.mark.parametrize("group", [(1, 1), (3, 1), (6, 2), (8, 1), (32, 8), (71, 1)])
def test_groups(group: tuple[int, int]) -> None:
    check(case_of([(300, 600)], num_heads=group[0], num_kv_heads=group[1], block_size=32, topk=4))


@pytest.mark.parametrize("topk", [1, 2, 3, 8, 12, 16, 33, 64])
@pytest.mark.parametrize("block_size", [16, 64])
def test_topk(topk: int, block_size: int) -> None:
    check(case_of([(400, 100 * block_size)], topk=topk, block_size=block_size))


@pytest.mark.parametrize(("sink", "local"), [(1, 0), (0, 1), (1, 1), (2, 3), (3, 4)])
def test_forced_blocks(sink: int, local: int) -> None:
    check(case_of(RAGGED, block_size=16, topk=8, sink=sink, local=local))


@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("resident", [None, False])
def test_ragged_and_padded(block_size: int, resident: bool | None) -> None:
    check(case_of(RAGGED, block_size=block_size, topk=4, spare=37), resident=resident)


@pytest.mark.parametrize("kind", ["integer", "periodic", "constant", "skewed"])
@pytest.mark.parametrize("blocks", [33, 65, 200])
def test_structured_inputs(kind: str, blocks: int) -> None:
    check(case_of([(300, 16 * blocks)], block_size=16, topk=9, kind=kind))


@pytest.mark.parametrize("blocks", [33, 65, 1025, 8193])
@pytest.mark.parametrize("topk", [3, 8, 16])
def test_many_blocks(blocks: int, topk: int) -> None:
    for kind in ("normal", "integer"):
        check(case_of([(24, 16 * blocks)], block_size=16, topk=topk, kind=kind), use_decode=False)


@pytest.mark.parametrize("seed", range(10))
def test_fresh_inputs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 900, (6, 2), generator=generator).sort(1).values.tolist()
    block_size = int(torch.randint(16, 200, (), generator=generator))
    check(case_of([tuple(x) for x in lengths], block_size=block_size, topk=4, seed=seed, spare=5))


@pytest.mark.parametrize("levels", [1, 2, 3, 8])
def test_rows_that_need_the_second_kernel(levels: int) -> None:
    case = case_of([(200, 16 * 300), (90, 16 * 280)], block_size=16, topk=8, sink=1, local=1)
    with fewer_levels(levels):
        choice = case.select()
        assert_choice(case, choice)
        assert torch.equal(case.select(), choice)


@pytest.mark.parametrize("block_size", [16, 17, 32, 64, 96, 128, 1000])
@pytest.mark.parametrize("sharp", [1.0, 6.0])
def test_mass_gate(block_size: int, sharp: float) -> None:
    lengths = [(200, 12 * block_size + 33), (100, 100)]
    case = case_of(lengths, block_size=block_size, topk=4, gate="mass")
    case.q.mul_(sharp)  # both branches of the spread estimate
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
def test_mass_gate_dims(head_dim: int, dtype: torch.dtype) -> None:
    rule = {"block_size": 32, "topk": 6, "sink": 1, "local": 1, "gate": "mass"}
    case = case_of([(300, 1500)], num_heads=8, head_dim=head_dim, dtype=dtype, **rule)
    assert_choice(case, case.select())


@pytest.mark.parametrize("topk", [2, 8, 33, 64])
@pytest.mark.parametrize("blocks", [65, 300, 4097])
def test_mass_gate_of_many_blocks(blocks: int, topk: int) -> None:
    case = case_of([(64, 32 * blocks)], block_size=32, topk=topk, gate="mass")
    assert_choice(case, case.select())
    if topk > 2:
        with fewer_levels(2):
            few = case.select()
        with fewer_levels(8):
            assert torch.equal(few.sort(3).values, case.select().sort(3).values)


def test_mass_gate_of_ragged_rows_and_ties() -> None:
    for kind in ("normal", "constant", "periodic"):
        case = case_of(RAGGED, block_size=16, topk=5, spare=37, sink=1, kind=kind, gate="mass")
        assert_choice(case, case.select())


@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize("block_size", [64, 600, 4096])
def test_decode(batch: int, block_size: int) -> None:
    lengths = [(1, 3000 + 777 * i) for i in range(batch)]
    case = case_of(lengths, num_heads=8, head_dim=128, block_size=block_size, topk=4)
    out, _ = assert_attention(case, case.expected_choice(), use_decode=True)
    other, _ = assert_attention(case, case.expected_choice(), use_decode=False)
    assert torch.allclose(out.float(), other.float(), atol=2e-2)


def test_runs_and_chunks_are_bit_identical() -> None:
    case = case_of([(5000, 6000), (3000, 3000)], num_heads=8, head_dim=128, block_size=128, topk=8)
    choice = case.select()
    out, lse = case.attend(choice)
    for workspace in (4 << 30, 64 << 20, 16 << 20, 8 << 20):
        again, again_lse = case.attend(case.select(), workspace=workspace)
        assert torch.equal(again, out)
        assert torch.equal(again_lse, lse)


def test_auto_is_triton_and_gradients_flow() -> None:
    case = case_of(RAGGED, topk=4)
    assert choose_backend("auto", case.q, case.k, case.v, LayerConfig(16, 4)) == "triton"
    assert (
        choose_backend("auto", case.q.float(), case.k.float(), case.v.float(), LayerConfig(16, 4))
        == "portable"
    )
    edges = torch.tensor([(0, 0), *RAGGED]).cumsum(0).to("cuda", torch.int32)
    rule = {"block_size": 16, "topk": 4, "cu_seqlens_q": edges[:, 0], "cu_seqlens_k": edges[:, 1]}
    results = []
    for backend in ("auto", "portable"):
        q, k, v = (x[0].transpose(0, 1).clone().requires_grad_() for x in (case.q, case.k, case.v))
        choice = case.expected_choice()[0]
        out = ops.moba_attention(q, k, v, **rule, block_indices=choice, backend=backend)
        results.append(torch.autograd.grad(out.float().square().sum(), (q, k, v)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()


def test_compiled_as_one_graph() -> None:
    case = case_of([(600, 600)], topk=4)
    q, k, v = (x[0].transpose(0, 1) for x in (case.q, case.k, case.v))

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ops.moba_attention(q, k, v, block_size=16, topk=4)

    assert torch.equal(torch.compile(call, fullgraph=True)(q, k, v), call(q, k, v))


def test_never_waits_for_the_device() -> None:
    case, by_mass = case_of(RAGGED, topk=4), case_of(RAGGED, topk=4, gate="mass")
    case.attend(case.select())  # compiled
    by_mass.select()
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.attend(case.select(), use_decode=False)
        case.attend(case.select(), use_decode=True)
        by_mass.select()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_in_a_graph() -> None:
    case = case_of([(600, 900), (100, 100)], topk=4)
    expected = case.attend(case.select())[0]
    graph = torch.cuda.CUDAGraph()
    torch.use_deterministic_algorithms(False)
    with torch.cuda.graph(graph):
        out = case.attend(case.select())[0]
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """With 2.2e9 elements of q, k and outputs, and int32 pair keys, the last rows equal a separate call."""
    length, heads, dim = 540_672, 32, 128
    q, k, v = (torch.randn(length, heads, dim, dtype=BF16, device="cuda") for _ in range(3))
    torch.use_deterministic_algorithms(False)
    rule = {"block_size": 128, "topk": 3}
    out = ops.moba_attention(q, k, v, **rule)
    part = ops.moba_attention(q[-512:], k, v, **rule)
    assert torch.isfinite(out[-4096:]).all()
    assert torch.equal(out[-512:], part)
    early = ops.moba_attention(q[:4096], k[:4096], v[:4096], **rule)
    assert torch.equal(out[:4096], early)


@pytest.mark.slow
def test_a_strided_view_far_into_memory() -> None:
    """Rows beyond 2**31 elements from the start of their storage, as in a large preallocated cache."""
    store = torch.zeros(1, 2, 9_000_000, 128, dtype=BF16, device="cuda")
    case = case_of([(300, 2000)], num_heads=2, head_dim=128, block_size=64, topk=4)
    k = store[:, :, -2000:]
    k.copy_(case.k)
    expected, (out, _) = case.select(), case.attend(case.select())
    case.k = k
    assert torch.equal(case.select(), expected)
    assert torch.equal(case.attend(expected)[0], out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "topk", "most"), [(1 << 17, 8, 4.5), (1 << 20, 12, 12.0)], ids=["131K-128/8", "1M-128/12"]
)
def test_peak_memory(length: int, topk: int, most: float) -> None:
    """The operator's peak in GiB, in addition to q, k, v and out, with 32 query and 8 kv heads of 128."""
    q, k, v = (torch.randn(length, heads, 128, dtype=BF16, device="cuda") for heads in (32, 8, 8))
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = ops.moba_attention(q, k, v, block_size=128, topk=topk)
    peak = (torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()) / 2**30
    print(f"{length:,} tokens, topk {topk}: {peak:.2f} GiB")
    assert peak < most, f"{peak:.2f} GiB"
