"""Packed sequences in a model's rows: how they are recognised, and what is refused."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from model_checks import LENGTH, close, logits, padded, tiny_model, tokens
from transformers import StaticCache

from moba_hf.hf.cache_names import cache_kwargs, cache_of
from moba_hf.op.dense import dense_packed_attention

# Three documents in one row.
CUTS = [0, 20, 21, LENGTH]
PACKED = torch.cat([torch.arange(end - begin) for begin, end in itertools.pairwise(CUTS)])[None]


def each_alone(model: Any, ids: torch.Tensor, cuts: list[int] = CUTS) -> torch.Tensor:
    """Logits of a row's documents, each from a separate call."""
    parts = [logits(model, ids[:, begin:end]) for begin, end in itertools.pairwise(cuts)]
    return torch.cat(parts, dim=1)


def offsets(*cuts: int, **more: Any) -> dict[str, Any]:
    cu = torch.tensor(cuts, dtype=torch.int32)
    return {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, **more}


class TestOffsets:
    @pytest.mark.parametrize(
        ("cuts", "message"),
        [
            ([0, 60], "at most the 50 tokens"),
            ([1, 50], "must rise from 0"),
            ([0, 30, 20, 50], "must rise from 0"),
        ],
    )
    def test_offsets_that_leave_the_call(self, cuts: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            logits(tiny_model(), tokens(1, LENGTH), **offsets(*cuts))

    def test_packing_of_several_rows_is_refused(self) -> None:
        model, ids = tiny_model(), tokens(1, LENGTH)
        positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
        cache = StaticCache(model.config, max_cache_len=64)
        with pytest.raises(ValueError, match="packed sequences"):
            logits(model, ids, position_ids=positions, **cache_kwargs(model, cache))
        with pytest.raises(ValueError, match="one packed row, got a batch of 2"):
            logits(model, ids.expand(2, -1), **offsets(0, 20, 50))

    def test_offsets_of_keys_that_differ(self) -> None:
        given = offsets(0, 20, 50) | {"cu_seq_lens_k": torch.tensor([0, 10, 50], dtype=torch.int32)}
        with pytest.raises(ValueError, match=r"cu_seq_lens_k must equal cu_seq_lens_q \[0, 20, 50\], got"):
            logits(tiny_model(), tokens(1, LENGTH), **given)

    @pytest.mark.parametrize("name", ["max_length_q", "max_length_k"])
    def test_a_bound_below_the_longest(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name}=29 is below the longest packed sequence, 30 tokens"):
            logits(tiny_model(), tokens(1, LENGTH), **offsets(0, 20, 50, **{name: 29}))

    def test_beside_a_mask(self) -> None:
        """A mask of ones, or of exactly the packed tokens, is accepted; any other mask is refused."""
        model, ids = tiny_model(), tokens(1, LENGTH)
        alone = each_alone(model, ids)
        mask = torch.ones_like(ids)
        assert close(logits(model, ids, attention_mask=mask, position_ids=PACKED, **offsets(*CUTS)), alone)
        mask[:, 40:] = 0
        positions = PACKED.clone()
        out = logits(model, ids, attention_mask=mask, position_ids=positions, **offsets(0, 20, 21, 40))
        assert close(out[:, :40], alone[:, :40])
        with pytest.raises(ValueError, match="50 tokens are real, but the attention mask disagrees"):
            logits(model, ids, attention_mask=mask, **offsets(*CUTS))
        mask = torch.ones_like(ids)
        mask[:, :10] = 0
        with pytest.raises(ValueError, match="50 tokens are real, but the attention mask disagrees"):
            logits(model, ids, attention_mask=mask, **offsets(*CUTS))


class TestPositionIds:
    def test_packing_follows_position_ids_edited_in_place(self) -> None:
        """A result cached in the last forward is not reused for a tensor that has changed since."""
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

    def test_packing_in_inference_mode_follows_edits_too(self) -> None:
        """Inference tensors have no version counter, so every forward, of any model, looks again."""
        models, ids = (tiny_model(), tiny_model()), tokens(1, LENGTH)
        with torch.inference_mode():
            positions = torch.arange(LENGTH)[None].clone()
            for model in models:
                whole = logits(model, ids, position_ids=positions)
                positions[:, 20:] -= 20
                assert close(
                    logits(model, ids, position_ids=positions), each_alone(model, ids, [0, 20, LENGTH])
                )
                positions[:, 20:] += 20
                assert torch.equal(logits(model, ids, position_ids=positions), whole)

    @pytest.mark.parametrize("use_cache", [False, True])
    def test_beside_a_mask_of_ones(self, use_cache: bool) -> None:
        """Collators made for FlashAttention-2 return both."""
        model, ids = tiny_model(), tokens(1, LENGTH)
        given = {"attention_mask": torch.ones_like(ids), "position_ids": PACKED, "use_cache": use_cache}
        assert close(logits(model, ids, **given), each_alone(model, ids))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_beside_padding(self, side: str) -> None:
        """Documents and padding in one row; position ids of padding are ignored."""
        model, ids = tiny_model(), tokens(1, LENGTH)
        batch, mask = padded([ids[0], tokens(37)], side)
        positions = torch.zeros_like(batch)
        positions[0] = PACKED
        positions[1, mask[1].bool()] = torch.arange(37)
        out = logits(model, batch, attention_mask=mask, position_ids=positions)
        assert close(out[:1], each_alone(model, ids))
        assert close(out[1, mask[1].bool()][None], logits(model, tokens(37)[None]))

    def test_padding_between_documents(self) -> None:
        model, ids = tiny_model(), tokens(1, LENGTH)
        mask = torch.ones_like(ids)
        mask[:, 18:20] = 0
        alone = each_alone(model, ids)
        out = logits(model, ids, attention_mask=mask, position_ids=PACKED)
        assert close(out[:, :18], alone[:, :18])
        assert close(out[:, 20:], alone[:, 20:])

    @pytest.mark.parametrize("use_cache", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    def test_positions_that_jump_ahead_are_one_document(self, use_cache: bool, masked: bool) -> None:
        """In pruned prompts or with stretched positions, a jump changes only RoPE, not what is attended."""
        model, ids = tiny_model(), tokens(1, LENGTH)
        model.config.moba = {"block_size": 8, "topk": 100}
        positions = torch.cat([torch.arange(25), torch.arange(25) + 140])[None]
        mask = torch.ones_like(ids) if masked else None
        got = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=use_cache)
        model.set_attn_implementation("sdpa")
        assert close(got, logits(model, ids, attention_mask=torch.ones_like(ids), position_ids=positions))

    def test_positions_that_jump_ahead_in_a_later_chunk(self) -> None:
        model, ids = tiny_model(), tokens(1, LENGTH)
        positions = torch.cat([torch.arange(25), torch.arange(25) + 140])[None]
        whole = logits(model, ids, position_ids=positions)
        with torch.no_grad():
            cache = cache_of(model(ids[:, :20], position_ids=positions[:, :20], use_cache=True))
        given = {"position_ids": positions[:, 20:], **cache_kwargs(model, cache)}
        assert close(logits(model, ids[:, 20:], **given), whole[:, 20:])

    def test_packing_on_a_filled_cache(self) -> None:
        model, ids = tiny_model(), tokens(1, LENGTH)
        with torch.no_grad():
            cache = cache_of(model(ids[:, :10], use_cache=True))
        positions = torch.cat([torch.arange(10, 20), torch.arange(30)])[None]
        with pytest.raises(ValueError, match="got 40 queries and 50 keys"):
            logits(model, ids[:, 10:], position_ids=positions, **cache_kwargs(model, cache))


class TestFullAttention:
    """Documents that the rule covers entirely."""

    SPANS = ((0, 0, 7), (0, 9, 10), (0, 10, 22), (1, 3, 24))

    def tensors(self) -> list[torch.Tensor]:
        torch.manual_seed(0)
        shapes = ((2, 4, 24, 8), (2, 2, 24, 8), (2, 2, 24, 6))
        return [torch.randn(shape, requires_grad=True) for shape in shapes]

    def test_is_that_of_each_document_alone(self) -> None:
        q, k, v = self.tensors()
        out = dense_packed_attention(q, k, v, 0.3, self.SPANS)
        weight = torch.randn_like(out)
        expected, grads = torch.zeros_like(out), torch.autograd.grad((out * weight).sum(), (q, k, v))
        for row, begin, end in self.SPANS:
            one = [x[row : row + 1, :, begin:end] for x in (q, k, v)]
            keys, values = (x.repeat_interleave(2, dim=1) for x in one[1:])
            hidden = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
            scores = (one[0] @ keys.transpose(2, 3) * 0.3).masked_fill(hidden, -torch.inf)
            expected[row, begin:end] = (scores.softmax(3) @ values).transpose(1, 2)[0]
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grads, torch.autograd.grad((expected * weight).sum(), (q, k, v)))
        assert not out[0, 7:9].any()
        assert not dense_packed_attention(q, k, v, 0.3, ()).any()

    def test_its_backward_passes_over_the_tokens_once(self) -> None:
        """The backward of a slice, or of a write to one, passes over all tokens for each document."""
        out = dense_packed_attention(*self.tensors(), 0.3, self.SPANS)
        seen, left = set(), [out.grad_fn]
        while left:
            node = left.pop()
            if node is not None and node not in seen:
                seen.add(node)
                left.extend(one for one, _ in node.next_functions)
        names = {node.name() for node in seen}
        assert "SplitBackward0" in names or "SplitWithSizesBackward0" in names
        assert not names & {"SliceBackward0", "CopySlices", "SelectBackward0", "AsStridedBackward0"}
