"""Packed sequences in a model's rows: where and how often they are looked for, and what is refused."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from model_checks import LENGTH, close, logits, tiny_model, tokens
from transformers import StaticCache

from moba_hf.hf import packing
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.hf.packing import find_packing


class TestRefused:
    @pytest.mark.parametrize(
        ("offsets", "message"),
        [
            ([0, 60], "at most the 50 tokens"),
            ([1, 50], "must rise from 0"),
            ([0, 30, 20, 50], "must rise from 0"),
        ],
    )
    def test_offsets_that_leave_the_call(self, offsets: list[int], message: str) -> None:
        cu = torch.tensor(offsets, dtype=torch.int32)
        with pytest.raises(ValueError, match=message):
            logits(tiny_model(), tokens(1, LENGTH), cu_seq_lens_q=cu, cu_seq_lens_k=cu)

    def test_packing_where_it_cannot_be_told_apart(self) -> None:
        model, ids = tiny_model(), tokens(1, LENGTH)
        positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
        cache = StaticCache(model.config, max_cache_len=64)
        with pytest.raises(ValueError, match="packed sequences"):
            logits(model, ids, position_ids=positions, **cache_kwargs(model, cache))
        offsets = torch.tensor([0, 20, 50], dtype=torch.int32)
        with pytest.raises(ValueError, match="one packed row, got a batch of 2"):
            logits(model, ids.expand(2, -1), cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)


class TestPositionIds:
    def test_packing_follows_position_ids_edited_in_place(self) -> None:
        """The answer of the last forward is not taken for that of a tensor that has changed since."""
        model, ids = tiny_model(), tokens(1, LENGTH)
        positions = torch.arange(LENGTH)[None].clone()
        whole = logits(model, ids, position_ids=positions)
        positions[:, 20:] -= 20
        split = logits(model, ids, position_ids=positions)
        assert close(split[:, 20:], logits(model, ids[:, 20:]))
        assert not close(split, whole)
        del positions
        gc.collect()
        assert torch.equal(logits(model, ids, position_ids=torch.arange(LENGTH)[None]), whole)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_packing_is_looked_for_once_per_forward(self, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Looking waits for the device: layers after the first take its answer."""
        looked: list[str] = []
        for name in ("_from_position_ids", "_from_mask"):
            original = getattr(packing, name)

            def spy(*args: Any, name: str = name, original: Any = original) -> Any:
                looked.append(name)
                return original(*args)

            monkeypatch.setattr(packing, name, spy)
        model, ids = tiny_model(), tokens(1, LENGTH)
        positions = torch.arange(LENGTH)[None].clone()
        with mode():
            for split in (False, True, True):
                here = positions - 20 * (positions >= 20) * split
                model(ids, position_ids=here, use_cache=False)
        assert looked == ["_from_position_ids", "_from_mask", "_from_mask"]

    def test_packing_in_inference_mode_is_kept_within_a_forward_only(self) -> None:
        """Tensors made there count no edits, so an earlier or equal layer, or another model, looks again."""
        one, two = tiny_model().config, tiny_model().config

        def ends(ids: torch.Tensor, *asker: Any) -> list[int]:
            found = find_packing(
                {"position_ids": ids}, 1, 6, 6, padding_given=False, asker=asker if asker else None
            )
            return [6] if found is None else [end for _, _, end in found.spans()]

        with torch.inference_mode():
            ids = torch.arange(6)[None].clone()
            assert ends(ids, one, 0) == ends(ids, one, 2) == [6]
            ids[:, 4:] -= 4
            assert ends(ids, one, 3) == [6]  # still the same forward
            assert ends(ids, one, 3) == [4, 6]
            ids[:, 2:4] -= 2
            assert ends(ids, two, 5) == [2, 4, 6]
            ids.copy_(torch.arange(6))
            assert ends(ids) == [6]
