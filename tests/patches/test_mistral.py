"""Mistral: MoBA runs in all layers without a sliding window, in none with one."""

from typing import Any

import pytest
import torch
from family_contract import FamilyContract
from model_checks import LENGTH, SMALL, logits, padded, sdpa_logits, tiny_model, tokens

from moba_hf import patch_model, unpatch_model
from moba_hf.hf.adapter import find_adapter


class TestMistral(FamilyContract):
    model_type = "mistral"


class TestMistralWithWindow:
    """Like v0.1: the stock implementation runs every layer, and the reason says so."""

    @pytest.fixture
    def model(self) -> Any:
        return tiny_model("mistral", sliding_window=12)

    def test_no_layer_is_eligible(self, model: Any) -> None:
        adapter = find_adapter("mistral")
        assert adapter.eligible_layers(model.config) == []
        assert adapter.stock_reason(model.config, 0) == "sliding window of 12"

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_it_works_as_stock(self, model: Any, side: str) -> None:
        ids, mask = padded([tokens(LENGTH), tokens(37)], side)
        real = mask.bool()
        out = logits(model, ids, attention_mask=mask)
        assert torch.equal(out[real], sdpa_logits(model, ids, attention_mask=mask)[real])

    @pytest.mark.parametrize("extra", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 9}])
    def test_it_generates_as_stock(self, model: Any, extra: dict[str, Any]) -> None:
        ids, mask = padded([tokens(LENGTH), tokens(37)], "left")
        settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "disable_compile": True}
        ours = model.generate(ids, **settings, **extra)
        model.set_attn_implementation("sdpa")
        assert torch.equal(ours, model.generate(ids, **settings, **extra))

    def test_packing_is_separated_or_refused(self, model: Any) -> None:
        positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
        ids = tokens(1, LENGTH)
        out = logits(model, ids, position_ids=positions, use_cache=False)
        alone = logits(model, ids[:, 20:])
        torch.testing.assert_close(out[:, 20:], alone, atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="sliding window of 12"):
            logits(model, ids, position_ids=positions, use_cache=True)
        offsets = torch.tensor([0, 20, 50], dtype=torch.int32)
        with pytest.raises(ValueError, match="sliding window of 12"):
            logits(model, ids, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, use_cache=False)

    def test_switching_on_and_off(self, model: Any) -> None:
        ids = tokens(1, LENGTH)
        before = sdpa_logits(model, ids)
        assert torch.equal(logits(patch_model(model, SMALL), ids), before)
        assert torch.equal(logits(unpatch_model(model), ids), before)
