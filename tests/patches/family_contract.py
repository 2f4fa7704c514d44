"""What the models of every family must do; each family's test file subclasses `FamilyContract`."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from model_checks import (
    COVERING,
    LENGTH,
    SMALL,
    by_hand,
    captured,
    close,
    logits,
    padded,
    sdpa_logits,
    tiny_model,
    tokens,
    with_rule,
)
from transformers import StaticCache

from moba_hf import MobaConfig, patch_model, unpatch_model, use_moba
from moba_hf.hf.adapter import find_adapter
from moba_hf.hf.cache_names import cache_kwargs, cache_of


class FamilyContract:
    """Subclasses set model_type, values (of the config) and eligible (the layers in which MoBA runs)."""

    model_type: ClassVar[str]
    values: ClassVar[dict[str, Any]] = {}
    eligible: ClassVar[list[int]] = [0, 1, 2]

    @pytest.fixture
    def model(self) -> Any:
        return tiny_model(self.model_type, **self.values)

    def test_eligible_layers(self, model: Any) -> None:
        adapter = find_adapter(self.model_type)
        assert adapter.eligible_layers(model.config) == self.eligible
        assert [i for i, _ in adapter.attention_layers(model)] == [0, 1, 2]

    def test_topk_that_covers_everything_equals_sdpa(self, model: Any) -> None:
        ids = tokens(2, LENGTH)
        assert close(logits(with_rule(model, COVERING), ids), sdpa_logits(model, ids))

    def test_small_topk_differs_from_sdpa(self, model: Any) -> None:
        ids = tokens(2, LENGTH)
        assert not torch.allclose(logits(model, ids), sdpa_logits(model, ids), atol=1e-2)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_each_layer_equals_the_reference_by_hand(self, model: Any, side: str) -> None:
        """Computed from the queries, keys and values of the layer, per row, with the layer's own rule."""
        moba = MobaConfig(8, 3, sink_blocks=1, full_attention_layers=[-1], layers={0: {"topk": 2}})
        ids, mask = padded([tokens(LENGTH), tokens(37)], side)
        spans = [(0, 50), (13, 50) if side == "left" else (0, 37)]
        with captured() as calls:
            logits(with_rule(model, moba), ids, attention_mask=mask)
        assert [call.layer_idx for call in calls] == [0, 1, 2]
        for call in calls:
            if call.layer_idx in self.eligible:
                assert close(call.out, by_hand(call, moba.for_layer(call.layer_idx, 3), spans))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_rows_equal_the_rows_alone(self, model: Any, side: str) -> None:
        rows = [tokens(LENGTH), tokens(37).flip(0), tokens(9)]
        ids, mask = padded(rows, side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = logits(model, ids, attention_mask=mask, position_ids=positions)
        assert out.isfinite().all()
        for row, real, alone in zip(out, mask.bool(), rows, strict=True):
            assert close(row[real], logits(model, alone[None])[0])

    @pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
    @pytest.mark.parametrize("use_cache", [False, True])
    def test_packed_sequences_equal_each_alone(self, model: Any, how: str, use_cache: bool) -> None:
        rows = [tokens(31), tokens(LENGTH).flip(0), tokens(4)]
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        kwargs: dict[str, Any] = {"position_ids": positions, "use_cache": use_cache}
        if how == "cu_seq_lens":
            offsets = torch.tensor([0, 31, 81, 85], dtype=torch.int32)
            kwargs |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
            kwargs |= {"max_length_q": 50, "max_length_k": 50}
        ids = torch.cat(rows)[None]
        if use_cache and len(self.eligible) < 3:  # transformers' window mask then mixes the documents
            with pytest.raises(ValueError, match="packed sequences reach a layer that keeps the stock"):
                logits(model, ids, **kwargs)
            return
        out = logits(model, ids, **kwargs)[0]
        for part, row in zip(out.split([31, 50, 4]), rows, strict=True):
            assert close(part, logits(model, row[None])[0])

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize("chunk", [7, 20, 49])
    def test_prefill_in_chunks_equals_one_shot(self, model: Any, kind: str, chunk: int) -> None:
        """With left padding too; a last chunk of one token counts as decoding and is not compared."""
        ids, mask = padded([tokens(LENGTH), tokens(37)], "left")
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        whole = logits(model, ids, attention_mask=mask, position_ids=positions)
        cache = StaticCache(model.config, max_cache_len=64) if kind == "static" else None
        for begin in range(0, LENGTH, chunk):
            part = slice(begin, min(begin + chunk, LENGTH))
            with torch.no_grad():
                out = model(
                    ids[:, part],
                    attention_mask=mask[:, : part.stop],
                    position_ids=positions[:, part],
                    **cache_kwargs(model, cache),
                    use_cache=True,
                )
            cache = cache_of(out)
            real = mask[:, part].bool()
            if real.any() and part.stop - begin > 1:
                assert close(out.logits[real], whole[:, part][real])

    def test_every_way_to_generate_agrees(self, model: Any) -> None:
        rows = [tokens(LENGTH), tokens(37).flip(0)]
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        alone = [model.generate(row[None], **settings)[0, len(row) :] for row in rows]
        ids, mask = padded(rows, "left")
        for extra in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 9}):
            out = model.generate(ids, attention_mask=mask, **settings, **extra, disable_compile=True)
            assert torch.equal(out[:, LENGTH:], torch.stack(alone)), extra

    def test_beam_search_of_padded_rows_equals_the_rows_alone(self, model: Any) -> None:
        rows = [tokens(LENGTH), tokens(37).flip(0)]
        settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "eos_token_id": None}
        alone = [model.generate(row[None], **settings, pad_token_id=0)[0, len(row) :] for row in rows]
        ids, mask = padded(rows, "left")
        out = model.generate(ids, attention_mask=mask, **settings, pad_token_id=0)
        assert torch.equal(out[:, LENGTH:], torch.stack(alone))

    def test_gradients_equal_those_through_the_reference(self) -> None:
        grads = []
        ids, mask = padded([tokens(LENGTH), tokens(37)], "left")
        for backend in ("portable", "reference"):
            model = tiny_model(self.model_type, **self.values)
            patch_model(model, MobaConfig(8, 2, backend=backend))
            model.train()
            labels = ids.masked_fill(mask == 0, -100)
            model(ids, attention_mask=mask, labels=labels).loss.backward()
            grads.append({name: p.grad for name, p in model.named_parameters()})
        for name, grad in grads[0].items():
            assert close(grad, grads[1][name]), name
            assert grad.abs().max() > 0, name

    @pytest.mark.parametrize("stock", ["sdpa", "eager"])
    def test_switching_on_and_off_gives_the_same_bits(self, model: Any, stock: str) -> None:
        ids = tokens(1, LENGTH)
        del model.config.moba
        model.set_attn_implementation(stock)
        before = logits(model, ids)
        inside = logits(patch_model(model, SMALL), ids)
        unpatch_model(model)
        assert torch.equal(logits(model, ids), before)
        assert not hasattr(model.config, "moba")
        with use_moba(model, SMALL):
            assert torch.equal(logits(model, ids), inside)
        assert torch.equal(logits(model, ids), before)
        assert model.config._attn_implementation == stock
        assert not torch.equal(inside, before)
