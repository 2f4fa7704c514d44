"""Every kernel compiles for Ampere, Hopper and Blackwell, fits their shared memory, and hardly spills."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
kernel_aot = pytest.importorskip("kernel_aot", reason="TRITON_INTERPRET is set")

_SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("gate", ["mean", "mass"])
def test_one_variant(gate: str, capability: int) -> None:
    _check(kernel_aot.forward_call(head_dim=64, gate=gate), capability, 0)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", list(kernel_aot.MAIN))
def test_main_variants(name: str, capability: int) -> None:
    _check(kernel_aot.forward_call(**kernel_aot.MAIN[name]), capability, 64 if capability == 90 else 400)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_one_decode_step(capability: int) -> None:
    _check(kernel_aot.decode_call(length=1 << 14), capability, 0)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", list(kernel_aot.DECODE))
def test_decode_steps(name: str, capability: int) -> None:
    _check(kernel_aot.decode_call(**kernel_aot.DECODE[name]), capability, 64)


def _check(call: object, capability: int, most_spills: int) -> None:
    reports = kernel_aot.compiled(call, capability)
    assert len(reports) >= 4
    for report in reports:
        assert report.shared <= _SHARED[capability], report
        assert report.spills <= most_spills, report


def test_backend_refuses_cpu_tensors_without_the_interpreter() -> None:
    import torch

    from moba_hf.backends import choose_backend

    x = torch.zeros(1, 1, 32, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        choose_backend("triton", x, x, x, 16)
    assert choose_backend("auto", x, x, x, 16) == "portable"
