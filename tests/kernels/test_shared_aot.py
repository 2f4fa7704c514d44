"""The kernels of the shared choice compile for every GPU generation, fit its memory, and hardly spill."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")
from moba_hf.kernels import shared, shared_steps
from moba_hf.kernels.shared_summary import update_kept_mass
from moba_hf.op.gates import KeptMass
from moba_hf.op.sequences import Attended, Sequences, batched_table, constant_table
from moba_hf.op.shared import SharedRule

kernel_aot = pytest.importorskip("kernel_aot", reason="TRITON_INTERPRET is set")

_SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
_VARIANTS = {
    "128/64": (SharedRule(64, 128, threshold=0.01, sample=8), 128, 128),
    "128/32": (SharedRule(32, 128, threshold=0.01, sample=8), 128, 128),
    "64/32 d64": (SharedRule(32, 64, threshold=0.01, sample=1), 64, 64),
    "128/128 d256": (SharedRule(128, 128, share=0.9, topk=20, sample=8), 256, 256),
    "64/64 d192 v128": (SharedRule(64, 64, threshold=0.01, sample=8), 192, 128),
}


def _call(
    rule: SharedRule, head_dim: int, v_dim: int, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], object]:
    """A call that chooses, attends and computes gradients; no values are computed."""
    length, heads = 4096, 8

    def call() -> None:
        q = torch.empty(1, heads, length, head_dim, dtype=dtype)
        k, v = (torch.empty(1, 2, length, x, dtype=dtype) for x in (head_dim, v_dim))
        sequences = Sequences(batched_table(1, length, length, q.device), length, length)
        limits = (sequences, rule.block_size, rule.tile, head_dim**-0.5)
        mask = shared.select(q, k, sequences, rule, head_dim**-0.5)
        out, lse = shared.attend(q, k, v, mask, *limits)
        shared.attend_backward(out, lse, Attended(q, k, v, out, lse, mask), *limits)

    return call


def _steps(rule: SharedRule, head_dim: int, v_dim: int) -> Callable[[], object]:
    """A call that updates the summaries of a cache, chooses and attends for one decode step."""
    length, heads = 1 << 17, 8

    def call() -> None:
        q = torch.empty(1, heads, 1, head_dim, dtype=torch.bfloat16)
        before = q.expand(-1, -1, rule.tile - 1, -1)
        k, v = (torch.empty(1, 2, length, x, dtype=torch.bfloat16) for x in (head_dim, v_dim))
        blocks, width = length // rule.block_size, KeptMass().width(head_dim, rule.block_size)
        kept = torch.empty(1, 2, blocks, width, dtype=torch.bfloat16)
        update_kept_mass(kept, k, None, torch.tensor(length), 1, rule.block_size, rule.rotary_pairs)
        table = batched_table(1, 1, length, q.device)
        for heard in (before, None):
            shared_steps.decode(q, k, v, kept, table, rule, head_dim**-0.5, heard)

    return call


def _check_steps(name: str, capability: int) -> None:
    seen = set()
    for launch in kernel_aot.recorded_for(_steps(*_VARIANTS[name]), capability):
        seen.add(launch[0].__name__)
        report = kernel_aot.compile_launch(launch, capability)
        assert report.shared <= _SHARED[capability], report
        assert report.columns <= 512, report
        assert report.spills <= 64, report
    assert {
        "_update_kept_mass_kernel",
        "step_masses_kernel",
        "step_means_kernel",
        "_attend_steps_kernel",
    } <= seen


def _check(name: str, capability: int) -> None:
    seen = set()
    for launch in kernel_aot.recorded_for(_call(*_VARIANTS[name]), capability):
        if launch[0].__name__ in seen:
            continue
        seen.add(launch[0].__name__)
        report = kernel_aot.compile_launch(launch, capability)
        assert report.shared <= _SHARED[capability], report
        assert report.columns <= 512, report
        # 208 bytes of dk and dv at head_dim 256
        assert report.spills <= (256 if capability == 90 else 800), report
    assert {"_tile_masses_kernel", "_choose_kernel", "_attend_lists_kernel", "_dkv_kernel"} <= seen
    assert seen & {"_row_masses_kernel", "row_masses_kernel"}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_one_variant(capability: int) -> None:
    _check("64/32 d64", capability)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_steps(capability: int) -> None:
    _check_steps("64/32 d64", capability)


@pytest.mark.parametrize(
    ("block_size", "sample", "head_dim", "dtype", "masses"),
    [
        (32, 2, 128, torch.bfloat16, True),
        (16, 1, 128, torch.float16, True),
        (64, 4, 128, torch.bfloat16, True),
        (32, 8, 128, torch.bfloat16, False),  # too few rows of a tile
        (128, 2, 128, torch.bfloat16, False),  # too many parts of a block
        (64, 8, 64, torch.float16, False),
        (32, 2, 64, torch.float16, False),
    ],
)
def test_gluon(block_size: int, sample: int, head_dim: int, dtype: torch.dtype, masses: bool) -> None:
    """The Gluon kernels keep their matrix products asynchronous, and do not spill."""
    rule = SharedRule(block_size, 128, threshold=0.01, sample=sample)
    launches = kernel_aot.recorded_for(_call(rule, head_dim, head_dim, dtype), 90)
    launches = [x for x in launches if x[0].is_gluon()]
    assert ("row_masses_kernel" in {x[0].__name__ for x in launches}) == masses
    for launch in launches:
        report = kernel_aot.compile_launch(launch, 90)
        assert report.shared <= _SHARED[90], report
        assert report.registers >= 8, report
        assert report.spills <= 64, report
        assert not report.serialised, report


@pytest.mark.parametrize(
    ("length", "capability", "covers", "both"),
    [(96, 90, True, False), (97, 90, True, True), (96, 90, False, True), (96, 80, True, False)],
)
def test_tiles_that_gluon_leaves_out(length: int, capability: int, covers: bool, both: bool) -> None:
    """The second kernel is launched unless the host knows that every sequence ends with a whole unit."""
    q = torch.empty(1, 8, length, 128, dtype=torch.bfloat16)
    k, mask = q[:, :2], torch.empty(8, 2, 1, dtype=torch.int32)
    table = constant_table(batched_table(1, length, length, q.device), covers=covers)

    def call() -> None:
        shared.attend(q, k, k, mask, Sequences(table, length, length), 32, 128, 0.1)

    names = [launch[0].__name__ for launch in kernel_aot.recorded_for(call, capability)]
    kernels = [name for name in names if name.endswith("attend_lists_kernel")]
    gluon, triton = "attend_lists_kernel", "_attend_lists_kernel"
    assert kernels == ([gluon, triton] if both else [gluon if capability == 90 else triton])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize("name", list(_VARIANTS))
def test_variants(name: str, capability: int) -> None:
    _check(name, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize("name", list(_VARIANTS))
def test_steps_of_variants(name: str, capability: int) -> None:
    _check_steps(name, capability)
