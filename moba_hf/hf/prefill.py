"""Prefill in chunks: reads a long prompt into a cache with memory bounded by the chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
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
from moba_hf.hf.layer_plan import SUSPENDED, moba_config
from moba_hf.hf.places import Prompt, close_cache, follows_places, open_cache
from moba_hf.hf.rope import whole_prompt
from moba_hf.op.numerics import check_int
from moba_hf.op.shared_rule import SharedRule
from moba_hf.progress import progress_bar

# Tokens at the end of a prompt that attend every key unless one says otherwise: the question, mostly.
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
    """A cache that holds `input_ids` but for the last token, which `generate` must still see::

        cache = moba_hf.prefill(model, input_ids)
        model.generate(input_ids, cache=cache)  # past_key_values=cache before transformers 5.24

    The end of the prompt, `dense_tail` tokens, attends every key: where a question follows a long text, that
    is what lets a model find short facts (measured: dev/LOG.md, 2026-11-26). Every other row equals that of a
    prefill in one call, and with `dense_tail=0` all do; where queries share a choice of blocks, chunks end
    between tiles for that, and padded batches, whose rows begin anywhere, differ a little. In a stock cache a
    chunk of `decode_max_len` tokens or fewer would count as decoding, so a short tail is split evenly with
    the previous chunk; if a filled cache needs no more tokens than that, they are left to `generate`.

    A `MobaCache` is closed: what comes after the prompt follows the decode rule, however many tokens a call
    holds, until the next `prefill` on that cache. Assisted and prompt-lookup generation then give the tokens
    of plain generation; transformers makes them read the whole prompt once more, in one call, and only a
    cache that was empty before this can serve them.

    Args:
        model: a causal language model of transformers.
        input_ids: `(batch, length)`, the whole prompt, with what `cache` already holds.
        chunk_size: tokens per row in one call; memory grows with it.
        attention_mask: `(batch, length)`, 0 for padding; None: no padding.
        cache: a cache that holds the beginning of `input_ids`, or an empty one; None: a new
            `MobaCache`.
        progress: show a progress bar; of several processes only the first does.
        on_chunk: called after every chunk with its tokens, for a progress display of one's own.
        dense_tail: so many tokens at the end of the prompt attend every key; more where a tile of queries
            that share a choice would be cut. 0: none, as in a plain forward of the model.
        past_key_values: another name of `cache`, as in transformers before 5.24.

    Raises:
        ValueError: wrong shapes, a `chunk_size` not above twice `decode_max_len`, a negative `dense_tail`, a
            cache under both names, or one that holds the whole prompt, holds tokens rotated by other
            frequencies (`hf.rope`), or is static and has not a slot for every token.
    """
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
        raise ValueError(f"the cache holds {seen} tokens, the prompt has {length}: nothing is left to read")
    _check_slots(cache, length)
    position_ids, longest = None, length
    if attention_mask is not None:
        longest = int(attention_mask.sum(1).max())
        attention_mask = attention_mask.to(model.device)
        position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
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
    """Where the dense tail of a prompt of `length` tokens begins, between tiles; at most `length - 1`.

    The last token belongs to `generate`. Where the model does not run MoBA there is no tail.
    """
    if dense_tail == 0 or model.config.get_text_config(decoder=True)._attn_implementation != NAME:
        return length - 1
    begin = max(0, length - dense_tail)
    return min(length - 1, begin - begin % _tile(model))


@contextmanager
def attending_everything(model: Any, wanted: bool = True) -> Iterator[None]:
    """Full attention in every layer inside the block, where `wanted`."""
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
    """Opens `cache` inside the block and closes it after `prompt`; an error leaves it as nobody closed it."""
    open_cache(cache)
    try:
        yield
    except BaseException:
        close_cache(cache, None)
        raise
    close_cache(cache, prompt)


def _check(input_ids: Tensor, chunk_size: int, attention_mask: Tensor | None, shortest: int) -> None:
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be (batch, length) and not empty, got {tuple(input_ids.shape)}")
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
    """The model's `decode_max_len`; 1 where it does not run MoBA."""
    config = model.config.get_text_config(decoder=True)
    return moba_config(config).decode_max_len if config._attn_implementation == NAME else 1


def _check_slots(cache: Cache, length: int) -> None:
    """Raises ValueError where a static layer has fewer slots than tokens; windows use theirs again."""
    layers = [x for x in cache.layers if not getattr(x, "is_sliding", False)]
    slots = min((int(getattr(x, "max_cache_len", length)) for x in layers), default=length)
    if slots < length:
        raise ValueError(
            f"the static cache has {slots} slots, the prompt {length} tokens: make it with "
            "max_cache_len = prompt length + max_new_tokens"
        )


def _chunks(
    model: Any, seen: int, end: int, chunk_size: int, *, padded: bool, few: bool = False
) -> list[int]:
    """Lengths of the chunks of tokens `[seen, end)`, cut between tiles where queries share a choice.

    A tile that is cut is chosen for twice, by the rows of each chunk. Where that cannot be helped it is said.
    Too few tokens to be told from a decode step are a chunk only where the cache can tell, `few`.
    """
    tile, shortest = _tile(model), _decode_max_len(model) + 1
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
        why = "rows of a padded batch begin anywhere" if padded else f"chunk_size={chunk_size} does not fit"
        logger.warning_once(
            f"chunks of this prefill cut tiles of {tile} queries that share a choice of blocks ({why}): rows "
            "of a cut tile choose apart, so results differ a little from a prefill in one call"
        )
    return [b - a for a, b in pairwise([*cuts, end])]


def _tile(model: Any) -> int:
    """A multiple of the tiles of all layers; 1 where every query chooses for itself."""
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != NAME:
        return 1
    moba = moba_config(config)
    layers = int(config.num_hidden_layers)
    rules = [moba.for_layer(i, layers) for i in range(layers)]
    return math.lcm(*(rule.tile for rule in rules if isinstance(rule, SharedRule)))


def _chunk_lengths(total: int, chunk_size: int, shortest: int, *, empty: bool) -> list[int]:
    """Lengths of the chunks of `total` tokens, each between `shortest` and `chunk_size`.

    Fewer than `shortest` tokens are one chunk on an `empty` cache, where prefill and decode agree, else none.
    """
    full, rest = divmod(total, chunk_size)
    if full == 0:
        return [rest] if rest >= shortest or (empty and rest) else []
    if rest == 0 or rest >= shortest:
        return [chunk_size] * full + [rest] * bool(rest)
    last = chunk_size + rest
    return [chunk_size] * (full - 1) + [last - last // 2, last // 2]
