"""The Python code in the recipes of docs/architecture.md runs as written and does what the page says."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from model_checks import tiny_model, tokens

import moba_hf
from moba_hf import MobaConfig, patch_model
from moba_hf.op.backend_table import BACKENDS
from moba_hf.op.gates import GATES

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


def recipe(title: str) -> str:
    """The Python of a section, as one program."""
    section = PAGE.read_text(encoding="utf-8").split(f"### {title}\n")[1].split("\n### ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", section.split("\n## ")[0], re.MULTILINE | re.DOTALL)
    assert blocks, title
    return "\n".join(blocks)


@pytest.fixture
def module() -> Iterator[ModuleType]:
    """A module that can be imported by name, like one that a contributor adds."""
    module = ModuleType("newcomers_module")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def test_a_family() -> None:
    exec(recipe("Add a family"), {})


def test_a_gate() -> None:
    try:
        exec(recipe("Add a gate"), {})
        q, k = torch.randn(100, 4, 16), torch.randn(100, 2, 16)
        chosen = moba_hf.select_blocks(q, k, block_size=8, topk=3, gate="first")
        scores = k[:88:8, 1] @ q[90, 3]  # query 90 is in block 11; head 3 reads kv head 1
        assert set(chosen[90, 3].tolist()) == {11, *scores.topk(2).indices.tolist()}
    finally:
        GATES.pop("first", None)


def test_a_backend(module: ModuleType) -> None:
    """Forward and backward of the operator, and a model that names it in its settings."""
    try:
        exec(recipe("Add a backend"), vars(module))
        torch.manual_seed(0)
        q, k, v = (torch.randn(90, heads, 16, requires_grad=True) for heads in (4, 2, 2))
        rule = {"block_size": 8, "topk": 3}
        chosen = moba_hf.select_blocks(q, k, **rule)
        wide = moba_hf.moba_attention(q.double(), k.double(), v.double(), **rule, block_indices=chosen)
        plain = moba_hf.moba_attention(q, k, v, **rule)
        out = moba_hf.moba_attention(q, k, v, **rule, backend="fp64")
        assert torch.equal(out, wide.float())
        assert not torch.equal(out, plain)
        grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, plain)]
        for mine, expected in zip(*grads, strict=True):
            torch.testing.assert_close(mine, expected)
        model, ids = tiny_model(), tokens(2, 40)
        with torch.no_grad():
            expected = patch_model(model, MobaConfig(8, 2, backend="portable"))(ids).logits
            logits = patch_model(model, MobaConfig(8, 2, backend="fp64"))(ids).logits
        torch.testing.assert_close(logits, expected)
        assert not torch.equal(logits, expected)
    finally:
        BACKENDS.pop("fp64", None)


@pytest.mark.parametrize(("capability", "rows"), [((8, 0), 128), ((8, 6), 64)])
def test_a_tile(capability: tuple[int, int], rows: int) -> None:
    """Only the GPU and the kernel of the new entry use the new tile."""
    tuning = pytest.importorskip("moba_hf.kernels.tuning")
    routed = tuning.routed_tile((128, 128), 2, 128, capability)
    before = dict(tuning.TABLE)
    try:
        exec(recipe("Add a tile of a kernel"), {})
        assert tuning.own_tile((128, 128), 2, capability).m == rows
        assert tuning.routed_tile((128, 128), 2, 128, capability) == routed
    finally:
        tuning.TABLE.clear()
        tuning.TABLE.update(before)
