"""Chunked prefill: reads a long prompt into a cache with memory bounded by the chunk size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import logging

from moba_hf.config import NAME
from moba_hf.hf.adapter import find_adapter
from moba_hf.hf.cache import MobaCache
from moba_hf.hf.cache_names import cache_kwargs, one_cache
from moba_hf.hf.layer_plan import SUSPENDED, common_tile, moba_config
from moba_hf.hf.output_head import check_virtual_tokens, inner_model, logits_limit
from moba_hf.hf.places import Prompt, close_cache, follows_places, open_cache
from moba_hf.hf.rope import whole_prompt
from moba_hf.op.inputs import require_tensor
from moba_hf.op.numerics import check_int
from moba_hf.progress import progress_bar

# Default number of tokens at the end of a prompt that attend to every key: usually the question.
DENSE_TAIL = 128

logger = logging.get_logger(__name__)


@torch.no_grad()
def prefill(
    model: Any,
    input_ids: Tensor,
    chunk_size: int = 4096,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
    progress: bool = True,
    on_chunk: Callable[[int], None] | None = None,
    *,
    dense_tail: int = DENSE_TAIL,
    past_key_values: Cache | None = None,
) -> Cache:
    """Reads all of `input_ids` except the last token, which `generate` must still see, into a cache::

        cache = moba_hf.prefill(model, input_ids)
        model.generate(input_ids, cache=cache)  # past_key_values=cache before transformers 5.24

    The last `dense_tail` tokens of the prompt attend to every key. That lets a model find short facts if a
    question follows a long text (measured: dev/LOG.md, 2026-11-26). All other rows equal those of a prefill
    in one call; with `dense_tail=0` all rows do. If tiles of queries share a choice of blocks, chunks end
    between tiles for this reason; rows of padded batches can begin inside a tile, so they differ slightly.

    In a stock cache, a chunk of `decode_max_len` tokens or fewer would count as decoding. So a short last
    chunk and the previous one are split evenly. If a filled cache needs no more tokens than that, they are
    left to `generate`.

    In a `MobaCache`, `prefill` records the end of the prompt. Until the next `prefill` on that cache, all
    later tokens follow the decode rule, no matter how many a call has. Assisted and prompt-lookup generation
    then produce the tokens of plain generation. transformers makes them read the whole prompt again in one
    call, which works only if the cache was empty before this `prefill`.

    Args:
        model: a causal language model of transformers.
        input_ids: `(batch, length)`, the whole prompt, including the tokens already in `cache`.
        chunk_size: tokens per row in one call; memory grows with it.
        attention_mask: `(batch, length)`, 0 for padding; None: no padding.
        cache: a cache that contains the beginning of `input_ids`, or an empty one; None: a new `MobaCache`.
        progress: show a progress bar (only in the first process).
        on_chunk: called after each chunk with its number of tokens, e.g. for your own progress display.
        dense_tail: number of tokens at the end of the prompt that attend to every key, extended to whole
            tiles if tiles of queries share a choice. 0: none, as in a plain forward of the model.
        past_key_values: another name of `cache`, as in transformers before 5.24.

    Raises:
        ValueError: wrong shapes, a `chunk_size` not above twice `decode_max_len`, a negative `dense_tail`, or
            a cache that is passed under both names, already contains the whole prompt, contains tokens
            rotated with other frequencies (`hf.rope`), or is static and has fewer slots than tokens; or a
            PEFT model with virtual tokens.
        TypeError: `input_ids` or `attention_mask` is not a tensor, `input_ids` holds no integers, `cache` is
            not a cache, or `dense_tail` is not an int.
    """
    check_virtual_tokens(model)
    shortest = _decode_max_len(model) + 1
    _check(input_ids, chunk_size, attention_mask, shortest)
    check_int("dense_tail", dense_tail, minimum=0)
    length = input_ids.shape[1]
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    cache = one_cache(cache, past_key_values)
    if cache is None:
        cache = MobaCache(model.config, max_cache_len=length + length // 8)
    seen = int(cache.get_seq_length())
    if seen >= length:
        raise ValueError(
            f"the cache already contains {seen} tokens and the prompt has {length}: nothing is left to read"
        )
    _check_slots(cache, length)
    position_ids, longest = None, length
    if attention_mask is not None:
        longest = int(attention_mask.sum(1).max())
        attention_mask = attention_mask.to(model.device)
        position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    last = logits_limit(inner_model(model), 1)
    tail = max(seen, tail_begin(model, length, dense_tail))
    few, padded = follows_places(cache), attention_mask is not None
    chunks = [(n, False) for n in _chunks(model, seen, tail, chunk_size, padded=padded, few=few)]
    read = seen + sum(n for n, _ in chunks)
    if tail < length - 1:
        chunks += [(n, True) for n in _chunk_lengths(length - 1 - read, chunk_size, 1, empty=False)]
    prompt = Prompt(length - 1, dense_from=read, begin=seen)
    bar = progress_bar("prefill", length - 1, " tokens", begin=seen, shown=progress)
    with whole_prompt(model, longest, seen), _reading(cache, prompt), bar:
        for count, dense in chunks:
            end = seen + count
            with attending_everything(model, dense):
                model(
                    input_ids=input_ids[:, seen:end].to(model.device),
                    attention_mask=None if attention_mask is None else attention_mask[:, :end],
                    position_ids=None if position_ids is None else position_ids[:, seen:end],
                    **cache_kwargs(model, cache),
                    use_cache=True,
                    **last,
                )
            bar.update(count)
            if on_chunk is not None:
                on_chunk(count)
            seen = end
    return cache


def tail_begin(model: Any, length: int, dense_tail: int) -> int:
    """Index of the first token of the dense tail, rounded down to a tile boundary; at most `length - 1`.

    The last token belongs to `generate`. A model that does not use MoBA has no tail.
    """
    if dense_tail == 0 or model.config.get_text_config(decoder=True)._attn_implementation != NAME:
        return length - 1
    begin = max(0, length - dense_tail)
    return min(length - 1, begin - begin % common_tile(model))


@contextmanager
def attending_everything(model: Any, wanted: bool = True) -> Iterator[None]:
    """Full attention in every layer inside the `with` block; no effect if `wanted` is False."""
    config = model.config.get_text_config(decoder=True)
    modules: list[Any] = []
    if wanted and config._attn_implementation == NAME:
        layers = find_adapter(model.config.model_type).attention_layers(model)
        modules = [module for _, module in layers if not getattr(module, SUSPENDED, False)]
    for module in modules:
        setattr(module, SUSPENDED, True)
    try:
        yield
    finally:
        for module in modules:
            delattr(module, SUSPENDED)


@contextmanager
def _reading(cache: Cache, prompt: Prompt) -> Iterator[None]:
    """Opens `cache` inside the block, then closes it and records `prompt`, unless the block raises."""
    open_cache(cache)
    try:
        yield
    except BaseException:
        close_cache(cache, None)
        raise
    close_cache(cache, prompt)


def _check(input_ids: Tensor, chunk_size: int, attention_mask: Tensor | None, shortest: int) -> None:
    require_tensor("input_ids", input_ids)
    if attention_mask is not None:
        require_tensor("attention_mask", attention_mask)
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be (batch, length) and not empty, got {tuple(input_ids.shape)}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be token ids of dtype int64 or int32, got {input_ids.dtype}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be (batch, length) = {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    if chunk_size < 2 * shortest - 1:
        raise ValueError(
            f"chunk_size={chunk_size} is too small: calls of decode_max_len={shortest - 1} tokens or fewer "
            f"count as decoding, so it must be at least {2 * shortest - 1}"
        )


def _decode_max_len(model: Any) -> int:
    """The model's `decode_max_len`; 1 if it does not use MoBA."""
    config = model.config.get_text_config(decoder=True)
    return moba_config(config).decode_max_len if config._attn_implementation == NAME else 1


def _check_slots(cache: Cache, length: int) -> None:
    """Raises ValueError if a static layer, except sliding windows, has fewer slots than `length`."""
    layers = [x for x in cache.layers if not getattr(x, "is_sliding", False)]
    slots = min((int(getattr(x, "max_cache_len", length)) for x in layers), default=length)
    if slots < length:
        raise ValueError(
            f"the static cache has {slots} slots, but the prompt has {length} tokens: create it with "
            "max_cache_len = prompt length + max_new_tokens"
        )


def _chunks(
    model: Any, seen: int, end: int, chunk_size: int, *, padded: bool, few: bool = False
) -> list[int]:
    """Lengths of the chunks of tokens `[seen, end)`, cut between tiles if tiles of queries share a choice.

    If a tile is cut, its two parts choose blocks separately; if that is unavoidable, a warning says so.

    Args:
        padded: the batch has padding.
        few: chunks may be as short as a decode step, because the cache records what is prompt.
    """
    tile, shortest = common_tile(model), _decode_max_len(model) + 1
    if tile == 1 or end - seen <= chunk_size:
        return _chunk_lengths(end - seen, chunk_size, shortest, empty=few or seen == 0)
    size = chunk_size - chunk_size % tile
    size = size if size >= 2 * shortest - 1 else chunk_size
    cuts = [seen]
    while end - cuts[-1] > chunk_size:
        cut = (cuts[-1] + size) // tile * tile
        cuts.append(cut if cut - cuts[-1] >= shortest else cuts[-1] + size)
    if end - cuts[-1] < shortest:  # would count as decoding
        cut = (end - shortest) // tile * tile
        fits = cut - cuts[-2] >= shortest and end - cut <= chunk_size
        cuts[-1] = cut if fits else (cuts[-2] + end) // 2
    if padded or any(cut % tile for cut in cuts[1:]):
        why = "padded rows may begin inside a tile" if padded else f"chunk_size={chunk_size} does not fit"
        logger.warning_once(
            f"chunks of this prefill cut tiles of {tile} queries that share a choice of blocks ({why}): the "
            "parts of a cut tile choose separately, so results differ slightly from a prefill in one call"
        )
    return [b - a for a, b in pairwise([*cuts, end])]


def _chunk_lengths(total: int, chunk_size: int, shortest: int, *, empty: bool) -> list[int]:
    """Lengths of the chunks of `total` tokens, each between `shortest` and `chunk_size`.

    Fewer than `shortest` tokens form one chunk if the cache is `empty`, because prefill and decode then
    agree; otherwise there is no chunk.
    """
    full, rest = divmod(total, chunk_size)
    if full == 0:
        return [rest] if rest >= shortest or (empty and rest) else []
    if rest == 0 or rest >= shortest:
        return [chunk_size] * full + [rest] * bool(rest)
    last = chunk_size + rest
    return [chunk_size] * (full - 1) + [last - last // 2, last // 2]
