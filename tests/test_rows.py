"""Where rows lie: holes, short and custom masks, masks of ones, and how often a forward syncs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from model_checks import LENGTH, SMALL, close, logits, padded, tiny_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from moba_hf import MobaCache, MobaConfig
from moba_hf.hf import rows as rows_module
from moba_hf.hf.cache_names import cache_kwargs, cache_of
from moba_hf.hf.device_rows import on_device
from moba_hf.hf.mask import moba_mask
from moba_hf.hf.rows import Masks, Rows
from moba_hf.op import block_means

HOLED = "the attention mask of batch row 1 has holes"
MIXED = MobaConfig(8, 2, full_attention_layers=(-1,))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes reading a value count as expensive, as on a GPU without MOBA_HF_CHECK."""
    monkeypatch.setattr(rows_module, "check_values", lambda x: False)
    monkeypatch.setattr(block_means, "_on_host", lambda x: False)


@pytest.fixture
def model() -> Any:
    return tiny_model(moba=MIXED)


class TestHoles:
    def test_right_padded_generation(self, model: Any) -> None:
        ids, mask = padded([tokens(LENGTH), tokens(37)], "right")
        with pytest.raises(ValueError, match=HOLED):
            model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)

    @pytest.mark.usefixtures("as_on_a_gpu")
    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_right_padded_generation_without_reading(self, model: Any, kind: str) -> None:
        """The assertion that a GPU checks asynchronously; the CPU raises at once."""
        ids, mask = padded([tokens(LENGTH), tokens(37)], "right")
        extra = {"cache_implementation": "static"} if kind == "static" else {}
        settings = {"max_new_tokens": 3, "do_sample": False, "disable_compile": True}
        with pytest.raises(RuntimeError, match="has holes"):
            model.generate(ids, attention_mask=mask, **settings, **extra)

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize("reading", ["free", "not free"])
    def test_second_turn_of_a_left_padded_batch(
        self, model: Any, kind: str, reading: str, request: pytest.FixtureRequest
    ) -> None:
        if reading == "not free":
            request.getfixturevalue("as_on_a_gpu")
        ids, mask = padded([tokens(30), tokens(22)], "left")
        static = StaticCache(model.config, max_cache_len=64)
        with torch.no_grad():
            cache = static if kind == "static" else None
            cache = cache_of(model(ids, attention_mask=mask, **cache_kwargs(model, cache), use_cache=True))
        turn, more = padded([tokens(12), tokens(7)], "left")
        with pytest.raises(ValueError, match=HOLED):
            logits(model, turn, attention_mask=torch.cat([mask, more], dim=1), **cache_kwargs(model, cache))

    def test_virtual_tokens_before_left_padding(self, model: Any) -> None:
        """As inserted by prompt tuning."""
        ids, mask = padded([tokens(30), tokens(22)], "left")
        embedded = model.get_input_embeddings()(torch.cat([tokens(2, 5), ids], dim=1))
        mask = torch.cat([torch.ones(2, 5, dtype=torch.long), mask], dim=1)
        with pytest.raises(ValueError, match=HOLED), torch.no_grad():
            model(inputs_embeds=embedded, attention_mask=mask)

    @pytest.mark.parametrize("length", [1, LENGTH])
    def test_compiled(self, model: Any, length: int) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
        cache = StaticCache(model.config, max_cache_len=64) if length == 1 else None
        if cache is not None:
            with torch.no_grad():
                model(ids[:, :-1], attention_mask=mask[:, :-1], **cache_kwargs(model, cache))
        given = cache_kwargs(model, cache) if cache is not None else {"use_cache": False}
        mask[1, 20] = 0
        with pytest.raises(RuntimeError, match="has holes"):
            logits(compiled, ids[:, -length:], attention_mask=mask, **given)


class TestMasks:
    @pytest.mark.parametrize("queries", [1, 5])
    def test_one_token_short(self, model: Any, queries: int) -> None:
        ids = tokens(1, LENGTH)
        for kind in ("dynamic", "static"):
            cache = StaticCache(model.config, max_cache_len=64) if kind == "static" else None
            with torch.no_grad():
                out = model(ids[:, :-queries], **cache_kwargs(model, cache), use_cache=True)
            mask = torch.ones(1, LENGTH - 1, dtype=torch.long)
            with pytest.raises(
                ValueError, match=f"it has length 49, but the cache has {LENGTH - queries} tokens"
            ):
                logits(model, ids[:, -queries:], attention_mask=mask, **cache_kwargs(model, cache_of(out)))

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.bool])
    @pytest.mark.parametrize("rows", [1, LENGTH])
    def test_4d_masks_of_any_dtype_are_custom(self, model: Any, dtype: torch.dtype, rows: int) -> None:
        mask = torch.ones(1, 1, rows, LENGTH, dtype=dtype)
        with pytest.raises(ValueError, match="got a custom mask"):
            logits(model, tokens(1, LENGTH), attention_mask=mask)

    def test_ones_are_no_mask(self, model: Any) -> None:
        """The same bits and no materialised mask, in prefill, chunks and decode steps."""
        ids, ones = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
        results = []
        for mask in (None, ones):
            cache, out = MobaCache(model.config), []
            for begin, end in ((0, 30), (30, 48), (48, 49), (49, 50)):
                given = None if mask is None else mask[:, :end]
                with torch.no_grad():
                    step = model(ids[:, begin:end], attention_mask=given, **cache_kwargs(model, cache))
                out.append(step.logits)
            results.append(torch.cat(out, dim=1))
        assert torch.equal(*results)

    def test_full_layers_keep_the_fast_kernel(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        masks = []
        original = torch.nn.functional.scaled_dot_product_attention

        def spy(*args: Any, **kwargs: Any) -> Any:
            masks.append(kwargs.get("attn_mask"))
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        ids = tokens(2, LENGTH)
        with torch.no_grad():
            ones = torch.ones_like(ids)
            cache = cache_of(model(ids[:, :-1], attention_mask=ones[:, :-1], use_cache=True))
            model(ids[:, -1:], attention_mask=ones, **cache_kwargs(model, cache))
        assert masks == [None] * 4  # one full-attention layer in prefill, three layers in the decode step

    def test_the_rows_of_generate_are_taken_as_they_are(self) -> None:
        rows = Rows(1, 4, 4, 0, "cpu")
        assert moba_mask(1, 4, 4, attention_mask=rows) is rows
        assert (rows.ndim, rows.shape) == (4, (1, 1, 1, 4))


class Waits(TorchDispatchMode):
    """Counts the operators that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        self.count += name in (
            "_local_scalar_dense",
            "nonzero",
            "is_nonzero",
            "equal",
            "masked_select",
            "unique",
        )
        return func(*args, **(kwargs or {}))


@contextmanager
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Records what each device read fetches; any other wait fails the test."""
    seen: list[str] = []
    original = rows_module._read

    def spy(tensors: Any, device: Any) -> Any:
        names = [name for name, x in tensors.items() if x is not None]
        if names:
            seen.append(" ".join(names))
        return original(tensors, device)

    with monkeypatch.context() as patch, Waits() as waits:
        patch.setattr(rows_module, "_read", spy)
        yield seen
    assert waits.count == 0


@pytest.mark.usefixtures("as_on_a_gpu")
class TestWaits:
    """An eager forward with more than one query reads from the device exactly once, whatever it finds."""

    def baseline(self, model: Any, ids: torch.Tensor, **kwargs: Any) -> int:
        """The number of waits of transformers itself, with its own attention."""
        model.set_attn_implementation("sdpa")
        with Waits() as waits, torch.no_grad():
            model(ids, **kwargs)
        model.set_attn_implementation("moba")
        return waits.count

    @pytest.mark.parametrize("what", ["nothing", "ones", "padding", "packing", "offsets"])
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_prefill(self, model: Any, what: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        ids, mask = padded([tokens(LENGTH), tokens(37)], "left")
        given: dict[str, Any] = {
            "nothing": {},
            "ones": {"attention_mask": torch.ones_like(ids)},
            "padding": {"attention_mask": mask},
            "packing": {
                "attention_mask": torch.ones_like(ids),
                "position_ids": torch.cat([torch.arange(20), torch.arange(30)]).expand(2, -1),
            },
            "offsets": {"cu_seq_lens_q": torch.tensor([0, 20, 50]), "max_length_q": 30},
        }[what]
        ids = ids[:1] if what == "offsets" else ids
        with mode(), looks(monkeypatch) as seen:
            for _ in range(2):
                model(ids, **given, use_cache=True)
        assert len(seen) == 2

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize("what", ["nothing", "ones", "padding"])
    @pytest.mark.parametrize("decode", ["full", "sparse"])
    def test_decode(self, kind: str, what: str, decode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model(moba=MobaConfig(8, 2, decode=decode, full_attention_layers=(-1,)))
        ids, mask = padded([tokens(LENGTH), tokens(37)], "left")
        mask = {"nothing": None, "ones": torch.ones_like(ids), "padding": mask}[what]
        static = {"static": True, "max_cache_len": 64} if kind == "static" else {}
        cache = MobaCache(model.config, **static)
        with torch.no_grad(), looks(monkeypatch) as seen:
            for count, begin, end in ((1, 0, 30), (2, 30, 40), (2, 40, 41), (2, 41, 42), (3, 42, 50)):
                given = None if mask is None else mask[:, :end]
                model(ids[:, begin:end], attention_mask=given, **cache_kwargs(model, cache))
                assert len(seen) == count

    def test_a_table_is_made_once(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        tables = []
        original = rows_module.Sequences

        def spy(*args: Any, **kwargs: Any) -> Any:
            tables.append(args)
            return original(*args, **kwargs)

        monkeypatch.setattr(rows_module, "Sequences", spy)
        for mask in (None, torch.ones(2, LENGTH)):
            logits(model, tokens(2, LENGTH), attention_mask=mask)
        assert len(tables) == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_bounds_on_the_device_equal_those_on_the_host(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to build a layout give the same table, also for rows that are all padding."""
    _, mask = padded([tokens(LENGTH), tokens(37), tokens(0)], side)
    for q_len, offset, slots in (
        (LENGTH, 0, LENGTH),
        (20, 30, LENGTH),
        (20, torch.tensor(10), 64),
        (5, 0, 64),
    ):
        rows = Rows(3, q_len, slots, offset, "cpu", Masks(given=mask[:, : int(offset) + q_len].bool()))
        read, unread = rows.layout({}, rows.device), on_device(rows)
        assert torch.equal(read.sequences.table, unread.sequences.table)
        assert torch.equal(read.sequences.kv_start, unread.sequences.kv_start)


def test_padded_rows_in_a_static_cache_by_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps give the same logits whether their bounds stay on the device or are read."""
    model = tiny_model(moba=SMALL)
    ids, mask = padded([tokens(LENGTH), tokens(37)], "left")
    results = []
    for free in (True, False):
        monkeypatch.setattr(rows_module, "check_values", lambda x, free=free: free)
        cache = StaticCache(model.config, max_cache_len=64)
        with torch.no_grad():
            model(ids[:, :-1], attention_mask=mask[:, :-1], **cache_kwargs(model, cache))
            results.append(model(ids[:, -1:], attention_mask=mask, **cache_kwargs(model, cache)).logits)
    assert close(*results)
