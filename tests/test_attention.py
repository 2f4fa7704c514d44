"""The attention function that transformers calls, on Llama: refusals, stock calls, policy, training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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
    tiny_model,
    tokens,
)
from torch import nn

import moba_hf.op.ops
from moba_hf import MobaConfig
from moba_hf.config import LayerConfig
from moba_hf.hf.attention import moba_attention_forward
from moba_hf.hf.cache_names import cache_kwargs, cache_of
from moba_hf.hf.mask import moba_mask

# The span of one unpadded row.
FULL = [(0, LENGTH)]


class TestRefused:
    """Unsupported input raises and says what to do; nothing is silently ignored."""

    def call(self, mask: torch.Tensor | None = None, q_len: int = 20, **kwargs: Any) -> torch.Tensor:
        module = tiny_model().model.layers[0].self_attn
        query, key = torch.randn(1, 4, q_len, 8), torch.randn(1, 2, 20, 8)
        return moba_attention_forward(module, query, key, key, mask, **kwargs)[0]

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"dropout": 0.1}, "no attention dropout, got 0.1; set attention_dropout=0"),
            ({"output_attentions": True}, 'returns no attention weights; use attn_implementation="eager"'),
            ({"softcap": 30.0}, "does not support soft-capped scores"),
            ({"s_aux": torch.zeros(4)}, "does not support attention sink parameters"),
            ({"sinks": torch.zeros(4)}, "does not support attention sink parameters"),
            ({"position_bias": torch.zeros(4)}, "does not support position biases"),
            ({"indices": torch.zeros(4)}, "does not support keys chosen by the model itself"),
            ({"cache": object()}, "does not support the paged cache of continuous batching"),
            (
                {"mask": torch.ones(1, 1, 20, 20, dtype=torch.bool)},
                "supports 2-D padding masks only, got a custom mask",
            ),
            ({"mask": torch.zeros(1, 1, 20, 20)}, "supports 2-D padding masks only, got a custom mask"),
            ({"q_len": 21}, r"more queries \(21\) than keys \(20\)"),
        ],
    )
    def test_by_the_attention_function(self, kwargs: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.call(**kwargs)

    def test_the_paged_cache_as_continuous_batching_passes_it(self) -> None:
        offsets = torch.tensor([0, 20], dtype=torch.int32)
        paged = {"cache": object(), "is_causal": False, "cu_seq_lens_q": offsets}
        with pytest.raises(ValueError, match="paged cache of continuous batching"):
            self.call(**paged, cu_seq_lens_k={"full_attention": offsets}, max_length_q=20)

    def test_keywords_that_are_none_or_harmless_pass(self) -> None:
        assert close(self.call(softcap=None, s_aux=None, dropout=0.0), self.call(output_attentions=False))

    def test_dropout_in_training_only(self) -> None:
        model = tiny_model(attention_dropout=0.1)
        logits(model, tokens(1, LENGTH))
        with pytest.raises(ValueError, match=r"no attention dropout, got 0\.1"):
            model.train()(tokens(1, LENGTH))

    def test_output_attentions(self) -> None:
        with pytest.raises(ValueError, match="returns no attention weights"):
            logits(tiny_model(), tokens(1, LENGTH), output_attentions=True)

    @pytest.mark.parametrize("moba", [SMALL, COVERING])
    def test_custom_and_holed_masks(self, moba: MobaConfig) -> None:
        model, ids = tiny_model(moba=moba), tokens(2, LENGTH)
        custom = torch.ones(LENGTH, LENGTH).tril().bool().expand(2, 1, -1, -1)
        with pytest.raises(ValueError, match=r"got a custom mask of torch\.bool"):
            logits(model, ids, attention_mask=custom)
        holed = torch.ones(2, LENGTH, dtype=torch.long)
        holed[1, 20] = 0
        with pytest.raises(ValueError, match="the attention mask of batch row 1 has holes"):
            logits(model, ids, attention_mask=holed)


class TestDelegation:
    @pytest.mark.parametrize("by", ["keyword", "module"])
    def test_non_causal_modules_are_bidirectional(self, by: str) -> None:
        module = SimpleNamespace(is_causal=by == "keyword", num_key_value_groups=2, training=False)
        query, key, value = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
        kwargs = {"is_causal": False} if by == "keyword" else {}
        out, _ = moba_attention_forward(module, query, key, value, None, scaling=0.3, **kwargs)
        keys, values = (x.repeat_interleave(2, dim=1) for x in (key, value))
        expected = nn.functional.scaled_dot_product_attention(query, keys, values, scale=0.3)
        assert close(out, expected.transpose(1, 2))

    def test_bidirectional_masks_are_transformers_own(self) -> None:
        mask = moba_mask(
            2, 10, 10, config=SimpleNamespace(is_causal=False), attention_mask=torch.ones(2, 10).bool()
        )
        assert mask is None or mask.dtype == torch.bool


class TestPolicy:
    @pytest.mark.parametrize("scaling", [0.1, 0.9])
    def test_the_models_scaling_is_used_in_prefill_and_decode(self, scaling: float) -> None:
        model = tiny_model()
        for layer in model.model.layers:
            layer.self_attn.scaling = scaling
        ids = tokens(1, LENGTH)
        with captured() as calls, torch.no_grad():
            cache = cache_of(model(ids[:, :-1], use_cache=True))
            model(ids[:, -1:], **cache_kwargs(model, cache))
        prefill, decode = calls[:3], calls[3:]
        for call in prefill:
            assert call.scaling == scaling
            assert close(call.out, by_hand(call, LayerConfig(8, 2), [(0, LENGTH - 1)]))
            call.scaling = 8**-0.5
            assert not close(call.out, by_hand(call, LayerConfig(8, 2), [(0, LENGTH - 1)]))
        for call in decode:
            assert close(call.out, by_hand(call, None, FULL))

    @pytest.mark.parametrize(
        ("limit", "queries", "dense"), [(1, 1, True), (1, 2, False), (5, 5, True), (5, 6, False)]
    )
    def test_decode_is_full_up_to_decode_max_len(self, limit: int, queries: int, dense: bool) -> None:
        model = tiny_model(moba=MobaConfig(8, 2, decode_max_len=limit))
        ids = tokens(1, LENGTH)
        with torch.no_grad():
            cache = cache_of(model(ids[:, :-queries], use_cache=True))
            with captured() as calls:
                model(ids[:, -queries:], **cache_kwargs(model, cache))
        for call in calls:
            assert call.query.shape[2] == queries
            assert close(call.out, by_hand(call, None if dense else LayerConfig(8, 2), FULL))
            assert not close(call.out, by_hand(call, LayerConfig(8, 2) if dense else None, FULL))

    def test_without_a_cache_every_token_follows_the_prefill_rule(self) -> None:
        model, ids = tiny_model(), tokens(1, LENGTH)
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(ids, use_cache=False, **settings)
        for step in range(6):
            at = LENGTH + step
            assert out[0, at] == logits(model, out[:, :at])[0, -1].argmax()

    @pytest.mark.parametrize("length", [40, 50])
    def test_a_mask_for_the_whole_prompt_may_be_given_with_each_chunk(self, length: int) -> None:
        """transformers reads a longer 2-D mask from its beginning."""
        model = tiny_model()
        ids, mask = padded([tokens(length), tokens(33)], "left")
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        whole = logits(model, ids, attention_mask=mask, position_ids=positions)
        cache = None
        for part in (slice(0, 25), slice(25, length)):
            with torch.no_grad():
                out = model(
                    ids[:, part],
                    attention_mask=mask,
                    position_ids=positions[:, part],
                    **cache_kwargs(model, cache),
                    use_cache=True,
                )
            cache = cache_of(out)
            real = mask[:, part].bool()
            assert close(out.logits[real], whole[:, part][real])

    def test_a_row_of_padding_only(self) -> None:
        ids, mask = padded([tokens(LENGTH), tokens(0)], "left")
        with captured() as calls:
            out = logits(tiny_model(), ids, attention_mask=mask)
        assert out.isfinite().all()
        assert all((call.out[1] == 0).all() for call in calls)

    def test_nothing_of_the_size_of_the_queries_is_copied(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The operator gets the model's own tensors, and its output needs no copy for the model."""
        inner: list[tuple[Any, Any]] = []
        original = moba_hf.op.ops.attend_op

        def spy(*args: Any) -> Any:
            inner.append((args, original(*args)))
            return inner[-1][1]

        monkeypatch.setattr(moba_hf.op.ops, "attend_op", spy)
        layer = tiny_model().model.layers[0].self_attn
        given = [torch.randn(2, LENGTH, heads, 8).transpose(1, 2) for heads in (4, 2, 2)]
        out, _ = moba_attention_forward(layer, *given, None, scaling=0.3)
        ((args, (attended, _)),) = inner
        for ours, theirs in zip((*args[:3], out), (*given, attended), strict=True):
            assert (ours.data_ptr(), ours.stride()) == (theirs.data_ptr(), theirs.stride())
        assert out.is_contiguous()


class TestTraining:
    def loss_and_gradients(self, model: Any, **kwargs: Any) -> list[torch.Tensor]:
        ids = tokens(2, LENGTH)
        model.zero_grad()
        loss = model.train()(ids, labels=ids, **kwargs).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    def test_gradient_checkpointing_changes_nothing(self) -> None:
        model = tiny_model()
        plain = self.loss_and_gradients(model, use_cache=False)
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)()
        again = self.loss_and_gradients(model, use_cache=False)
        assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))

    def test_autocast_runs_attention_in_its_dtype(self) -> None:
        model, ids = tiny_model(), tokens(1, LENGTH)
        plain = logits(model, ids)
        with captured() as calls, torch.autocast("cpu", torch.bfloat16):
            out = logits(model, ids)
        with (
            captured(),
            torch.autocast("cpu", torch.bfloat16),
        ):  # torch 2.8 keeps casts made without gradients
            self.loss_and_gradients(model)
        assert calls[0].out.dtype == torch.bfloat16
        for call in calls[:3]:
            call.query, call.key, call.value = (x.bfloat16() for x in (call.query, call.key, call.value))
            assert (call.out.float() - by_hand(call, LayerConfig(8, 2), FULL).float()).abs().max() <= 2**-7
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert (out.float() - plain).abs().mean() < 0.3 * plain.abs().mean()

    def test_compile_of_a_model_is_one_graph(self) -> None:
        model, ids = tiny_model(), tokens(2, LENGTH)
        mask = torch.ones_like(ids)
        mask[1, :9] = 0
        expected = logits(model, ids, attention_mask=mask)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        out = logits(compiled, ids, attention_mask=mask)
        assert close(out[mask.bool()], expected[mask.bool()])
