"""The end of the prompt in a cache: rows before it follow the rule of prefill, rows after it that of decode.

Only `moba_hf.prefill` records it, in the layers of a `MobaCache` (it "closes" the cache). For other caches, a
call with at most `decode_max_len` queries counts as decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

DECODE, DENSE, PREFILL = "decode", "dense", "prefill"


@dataclass(frozen=True)
class Prompt:
    """The prompt of a cache that `prefill` closed.

    Attributes:
        end: number of its slots; rows from here on are decode steps.
        dense_from: rows `[dense_from, end)` attended to every key, see `prefill(dense_tail=...)`.
        begin: number of slots in use before this `prefill`.
    """

    end: int
    dense_from: int
    begin: int = 0


def row_kinds(layer: Any, q_len: int, kv_len: int, decode_max_len: int) -> list[tuple[int, int, str]]:
    """Splits the rows of a call into runs `(begin, end, kind)`; kinds are `PREFILL`, `DENSE` and `DECODE`.

    Args:
        layer: the MoBA cache layer that the keys come from; None: there is none.
        q_len: number of queries of the call.
        kv_len: number of keys of the call; with a static cache, its number of slots.
        decode_max_len: most queries of a decode step on a cache that is not closed.
    """
    if layer is not None and layer.reading:
        return [(0, q_len, PREFILL)]
    prompt: Prompt | None = None if layer is None else layer.prompt
    if prompt is None:
        return [(0, q_len, DECODE if q_len <= decode_max_len else PREFILL)]
    if layer.is_compileable:  # it forgets a prompt that is cropped, so new tokens come after the prompt
        return [(0, q_len, DECODE)]
    first = kv_len - q_len
    edges = [0, *(min(max(slot - first, 0), q_len) for slot in (prompt.dense_from, prompt.end)), q_len]
    kinds = zip(pairwise(edges), (PREFILL, DENSE, DECODE), strict=True)
    return [(begin, end, kind) for (begin, end), kind in kinds if begin < end]


def open_cache(cache: Any) -> None:
    """Marks `cache` as being filled with a prompt: every row follows the rule of prefill."""
    for layer in _followers(cache):
        layer.prompt, layer.reading = None, True


def close_cache(cache: Any, prompt: Prompt | None) -> None:
    """Ends the reading of a prompt and records `prompt`; None: the end of the prompt stays unknown."""
    for layer in _followers(cache):
        layer.prompt, layer.reading = prompt, False


def follows_places(cache: Any) -> bool:
    """Whether a cache can record where its prompt ends."""
    return bool(_followers(cache))


def _followers(cache: Any) -> list[Any]:
    """The layers of a cache that can record the end of the prompt."""
    return [layer for layer in cache.layers if hasattr(layer, "reading")]
