"""Every kernel compiles for Ampere, Hopper and Blackwell, fits their shared memory, and hardly spills."""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("triton")
kernel_aot = pytest.importorskip("kernel_aot", reason="TRITON_INTERPRET is set")

_SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
_TENSOR_COLUMNS = 512


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("gate", ["mean", "mass"])
def test_one_variant(gate: str, capability: int) -> None:
    _check(kernel_aot.forward_call(head_dim=64, gate=gate), capability, 0)


class TestGluon:
    """The kernels for Hopper, with the installed Triton."""

    @pytest.mark.parametrize("dim", [64, 128])
    @pytest.mark.parametrize(("block_size", "topk", "routed"), [(128, 8, "resident"), (512, 3, "stream")])
    def test_compile(self, dim: int, block_size: int, topk: int, routed: str) -> None:
        call = kernel_aot.forward_call(head_dim=dim, block_size=block_size, topk=topk)
        launches = [x for x in kernel_aot.recorded_for(call, 90) if x[0].is_gluon()]
        assert [x[0].__name__ for x in launches] == ["own_kernel", f"{routed}_kernel"]
        for launch in launches:
            report = kernel_aot.compile_launch(launch, 90)
            assert report.shared <= _SHARED[90], report
            assert report.registers >= 8, report
            assert report.spills <= 256, report  # 0 with Triton 3.6, up to 236 with 3.8

    def test_what_is_tried_before_the_first_use(self) -> None:
        """The arguments made up by `compiles` are like those of a launch: each kernel compiles with them."""
        import torch

        from moba_hf.kernels.hopper import dispatch as hopper

        tried = kernel_aot.recorded(
            lambda: hopper.compiles.__wrapped__(torch.device("cpu")), only_compiled=True
        )
        assert [x[0].__name__ for x in tried] == [
            "own_kernel",
            "resident_kernel",
            "own_kernel",
            "stream_kernel",
        ]
        for launch in tried:
            assert kernel_aot.compile_launch(launch, 90).registers >= 8

    @pytest.mark.parametrize(
        ("length", "covers", "partial"), [(512, True, 0), (500, True, 1), (512, False, 1)]
    )
    def test_launches_of_later_layers(self, length: int, covers: bool, partial: int) -> None:
        """They share the numbering of tiles; no kernel is launched for partial blocks if there are none."""
        import torch

        from moba_hf.config import LayerConfig
        from moba_hf.kernels import attend, select_blocks
        from moba_hf.op.sequences import Sequences, batched_table, constant_table

        kernel_aot.recorded_for(kernel_aot.forward_call(), 90)  # tries the Gluon kernels
        q = torch.empty(1, 4, length, 128, dtype=torch.bfloat16)
        k = q[:, :1]
        table = constant_table(batched_table(1, length, length, q.device), covers=covers)
        sequences = Sequences(table, length, length)

        def call() -> None:
            choice = select_blocks(q, k, sequences, LayerConfig(128, 2))
            attend(q, k, k, choice, sequences, 128, 0.1)

        first, later = (
            [launch[0].__name__ for launch in kernel_aot.recorded_for(call, 90)] for _ in range(2)
        )
        numbering = {"_tiling_kernel": 2, "_tile_table_kernel": 1}
        assert {name: first.count(name) for name in numbering} == numbering
        assert sorted(later) == sorted(name for name in first if name not in numbering)
        assert later.count("own_kernel") == 1
        assert later.count("_own_kernel") == partial

    def test_a_triton_that_does_not_compile_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Plain Triton kernels run instead; one warning names the release and the reason."""
        from moba_hf.kernels.hopper import dispatch as hopper

        def fails(*args: object) -> None:
            try:
                raise AttributeError("module has no attribute 'barrier'")
            except AttributeError as error:
                raise RuntimeError("at 36:8:") from error

        monkeypatch.setattr(hopper, "_compile", fails)
        monkeypatch.setattr(hopper, "compiles", functools.cache(hopper.compiles.__wrapped__))
        call = kernel_aot.forward_call()
        with pytest.warns(RuntimeWarning, match=r"Triton [\d.]+ does not compile .* 'barrier'\)") as said:
            launches = [*kernel_aot.recorded_for(call, 90), *kernel_aot.recorded_for(call, 90)]
        assert len(said) == 1
        assert launches
        assert not any(x[0].is_gluon() for x in launches)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", list(kernel_aot.MAIN))
def test_main_variants(name: str, capability: int) -> None:
    # with 4 warps the mass gate spills 132 bytes at topk 64, but is faster than with 8, which do not spill
    least = 160 if name.startswith("mass") else 64
    _check(kernel_aot.forward_call(**kernel_aot.MAIN[name]), capability, least if capability == 90 else 800)


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_a_tile_of_the_mass_gate_fits_every_gpu(capability: int) -> None:
    import itertools

    from moba_hf.kernels import tuning, tuning_gate

    one = divmod(capability, 10)
    for dim, parts in itertools.product((16, 64, 128, 256), (1, 2, 4, 8, 64)):
        tile = tuning_gate.gate_tile(dim, 2, parts, one)
        assert tuning.fits(tuning_gate.mass_gate_memory(tile, dim, 2, parts), one), (dim, parts)


def test_a_gpu_can_have_its_own_table_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from moba_hf.kernels import tuning
    from moba_hf.kernels.tuning import Tile

    others = tuning.choices((9, 0))
    its_own = replace(others, own=(Tile(32, 32, 4, 2),), mean_gate=Tile(32, 32, 4, 2), resident_tiles=8)
    monkeypatch.setitem(tuning.TABLE, (8, 0), its_own)
    assert tuning.own_tile((128, 128), 2, (8, 0)) == Tile(32, 32, 4, 2)
    assert tuning.own_tile((128, 128), 2, (9, 0)) == others.own[0]
    launched = {
        kernel.__name__: keywords
        for call in (kernel_aot.forward_call(), kernel_aot.decode_call())
        for kernel, _, keywords in kernel_aot.recorded_for(call, 80)
    }
    # a decode step scores blocks with the gate's tile
    for name in ("gate_fwd_kernel", "_score_kernel"):
        assert (launched[name]["BLOCK_M"], launched[name]["BLOCK_N"]) == (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize(("block_size", "parts"), [(16, 1), (32, 2), (64, 4), (128, 8)])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_memory_of_the_mass_gate(head_dim: int, block_size: int, parts: int, capability: int) -> None:
    """`tuning_gate.mass_gate_memory` never predicts less than the compiled kernels use."""
    from moba_hf.kernels import tuning_gate

    tile = tuning_gate.gate_tile(head_dim, 2, parts, divmod(capability, 10))
    rule = {"head_dim": head_dim, "block_size": block_size, "topk": 2048 // block_size, "gate": "mass"}
    call = kernel_aot.forward_call(length=8192, queries=64, **rule)
    reports = kernel_aot.compiled(call, capability, "gate_")
    assert reports
    for report in reports:
        assert report.shared <= tuning_gate.mass_gate_memory(tile, head_dim, 2, parts), report


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_one_decode_step(capability: int) -> None:
    _check(kernel_aot.decode_call(length=1 << 14), capability, 0)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", list(kernel_aot.DECODE))
def test_decode_steps(name: str, capability: int) -> None:
    _check(kernel_aot.decode_call(**kernel_aot.DECODE[name]), capability, 64)


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_one_backward(capability: int) -> None:
    _check(kernel_aot.backward_call(head_dim=256, block_size=64, topk=3), capability, 500)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize("dims", [(64, 64), (64, 256), (96, 80), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("block_size", [32, 64, 128, 512])
def test_backward_variants(block_size: int, dims: tuple[int, int], capability: int) -> None:
    call = kernel_aot.backward_call(head_dim=dims[0], v_dim=dims[1], block_size=block_size, topk=3)
    _check(call, capability, 520)


def _check(call: object, capability: int, most_spills: int) -> None:
    reports = kernel_aot.compiled(call, capability)
    assert len(reports) >= 4
    for report in reports:
        assert report.shared <= _SHARED[capability], report
        assert report.columns <= _TENSOR_COLUMNS, report
        assert report.registers >= 8, (
            report
        )  # fewer means that the compiler gave up and emitted an empty kernel
        assert report.spills <= most_spills, report


def test_a_constant_that_has_changed() -> None:
    """What Triton compares at each launch, and hashes for its cache, shows a change."""
    import triton.language as tl

    from moba_hf.kernels.layout import Constant

    five: object = Constant(5)
    for same in (Constant(5), tl.constexpr(5), 5):
        assert (five != same) is False
        assert bool(same != five) is False
    for other in (Constant(6), tl.constexpr(6), 6, object(), None):
        assert (five != other) is True
        assert other != five
    assert (hash(five), str(five)) == (hash(tl.constexpr(5)), str(tl.constexpr(5)))


def test_backend_refuses_cpu_tensors_without_the_interpreter() -> None:
    import torch

    from moba_hf.config import LayerConfig
    from moba_hf.op.backends import choose_backend

    x = torch.zeros(1, 1, 32, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        choose_backend("triton", x, x, x, LayerConfig(16, 3))
    assert choose_backend("auto", x, x, x, LayerConfig(16, 3)) == "portable"
