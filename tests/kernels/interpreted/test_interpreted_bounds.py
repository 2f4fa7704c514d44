"""The kernel for the bounds of padded rows: it agrees with torch operators and needs few launches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from moba_hf import MobaCache, MobaConfig, patch_model
from moba_hf.hf import rows as rows_module
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.hf.device_rows import on_device
from moba_hf.hf.rows import Masks, Rows
from moba_hf.kernels.bounds import row_bounds
from moba_hf.op import block_means
from moba_hf.op.triton_backend import TritonCacheKernels

pytestmark = pytest.mark.usefixtures("poisoned")

SPANS = [(0, 23), (4, 23), (0, 20), (5, 19), (22, 23), (0, 0)]  # of real slots; the last is all padding


def mask_of(spans: list[tuple[int, int]], length: int) -> Tensor:
    slot = torch.arange(length)
    return torch.stack([(slot >= begin) & (slot < end) for begin, end in spans])


@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("more", [0, 9])
def test_equal_those_of_torch(q_len: int, more: int) -> None:
    """Also if the mask continues after the queries, and if its rows are not contiguous in memory."""
    given = mask_of(SPANS, 23 + more)
    given[:, 23:] = True
    offset = 23 - q_len
    rows = Rows(len(SPANS), q_len, 23, offset, "cpu", Masks(given=given[:, :23]))
    expected = on_device(rows).sequences
    for x in (given, given.t().contiguous().t()):
        table, kv_start, unbroken = row_bounds(x, offset, q_len)
        assert torch.equal(table, expected.table)
        assert torch.equal(kv_start, expected.kv_start)
        assert unbroken.all()


def test_many_blocks_and_holes() -> None:
    """Runs across several blocks of the kernel; holes at a block's edge, inside it, and of one slot."""
    length = 2 * 4096 + 100
    spans = [(0, length), (4095, length), (4096, length), (3, 8192)]
    table, kv_start, unbroken = row_bounds(mask_of(spans, length), length - 1, 1)
    assert table[:, 3:].tolist() == [list(span) for span in spans]
    assert kv_start.tolist() == [begin for begin, _ in spans]
    assert unbroken.all()
    for hole in (1, 4095, 4096, 5000, length - 2):
        given = torch.ones(2, length, dtype=torch.bool)
        given[1, hole] = False
        assert row_bounds(given, length - 1, 1)[2].tolist() == [True, False]


class Operators(TorchDispatchMode):
    """Counts torch operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose decode steps read no values, as on a GPU."""
    monkeypatch.setattr(rows_module, "check_values", lambda x: False)
    monkeypatch.setattr(block_means, "_on_host", lambda x: False)
    original = TritonCacheKernels.row_bounds

    def one_launch(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with _disable_current_modes():  # do not count the operators of the interpreter
            return original(*args)

    monkeypatch.setattr(TritonCacheKernels, "row_bounds", one_launch)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 50, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("decode", ["full", "sparse"])
@pytest.mark.parametrize("kind", [MobaCache, DynamicCache])
def test_a_mask_of_ones_adds_few_operators_to_a_decode_step(model: Any, decode: str, kind: Any) -> None:
    patch_model(model, MobaConfig(16, 2, decode=decode, full_attention_layers=(-1,), backend="triton"))
    ids = torch.randint(0, 50, (2, 52))
    counts, logits, names = [], [], []
    for mask in (None, torch.ones_like(ids)):
        cache = kind(config=model.config)
        with torch.no_grad():
            for begin, end in ((0, 50), (50, 51), (51, 52)):
                given = None if mask is None else mask[:, :end]
                with Operators() as operators:
                    out = model(ids[:, begin:end], attention_mask=given, **cache_kwargs(model, cache))
        counts.append(sum(operators.count.values()))
        names.append(operators.count)
        logits.append(out.logits)
    assert torch.equal(*logits)
    assert counts[1] - counts[0] <= 8, (names[1] - names[0], names[0] - names[1])


def test_a_hole_raises(model: Any) -> None:
    patch_model(model, MobaConfig(16, 2, backend="triton"))
    ids, mask = torch.randint(0, 50, (2, 41)), torch.ones(2, 41, dtype=torch.long)
    cache = MobaCache(model.config)
    with torch.no_grad():
        model(ids[:, :40], attention_mask=mask[:, :40], **cache_kwargs(model, cache))
        mask[1, 20] = 0
        with pytest.raises(RuntimeError, match="has holes"):
            model(ids[:, 40:], attention_mask=mask, **cache_kwargs(model, cache))
