"""Where a cache's prompt ends: rows before that follow the rule of prefill, rows after it that of decode.

`moba_hf.prefill` writes it into the layers of a `MobaCache`; nobody else does. On a cache without it, a call
of at most `decode_max_len` queries is decoding.
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
        end: its slots; rows from here on are decode steps.
        dense_from: rows `[dense_from, end)` attended every key, see `prefill(dense_tail=...)`.
        begin: slots that were there before this `prefill`.
    """

    end: int
    dense_from: int
    begin: int = 0


def row_kinds(layer: Any, q_len: int, kv_len: int, decode_max_len: int) -> list[tuple[int, int, str]]:
    """Runs `(begin, end, kind)` of a call's rows, in order: what each follows, `PREFILL`, `DENSE`, `DECODE`.

    Args:
        layer: the MoBA cache layer that the keys come from; None: there is none.
        q_len, kv_len: queries and keys of the call; `kv_len` counts the slots of a static cache.
        decode_max_len: queries of a decode step on a cache that nobody closed.
    """
    if layer is not None and layer.reading:
        return [(0, q_len, PREFILL)]
    prompt: Prompt | None = None if layer is None else layer.prompt
    if prompt is None:
        return [(0, q_len, DECODE if q_len <= decode_max_len else PREFILL)]
    if layer.is_compileable:  # nothing is ever taken back from it, so what is added comes after the prompt
        return [(0, q_len, DECODE)]
    first = kv_len - q_len
    edges = [0, *(min(max(slot - first, 0), q_len) for slot in (prompt.dense_from, prompt.end)), q_len]
    kinds = zip(pairwise(edges), (PREFILL, DENSE, DECODE), strict=True)
    return [(begin, end, kind) for (begin, end), kind in kinds if begin < end]


def open_cache(cache: Any) -> None:
    """Says that a prompt is being read into `cache`: every row follows the rule of prefill."""
    for layer in _followers(cache):
        layer.prompt, layer.reading = None, True


def close_cache(cache: Any, prompt: Prompt | None) -> None:
    """Says that the prompt is read; None: that it was not."""
    for layer in _followers(cache):
        layer.prompt, layer.reading = prompt, False


def follows_places(cache: Any) -> bool:
    """Whether a cache knows where its prompt ends."""
    return bool(_followers(cache))


def _followers(cache: Any) -> list[Any]:
    """The layers of a cache that keep the place."""
    return [layer for layer in cache.layers if hasattr(layer, "reading")]
