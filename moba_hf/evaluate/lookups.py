"""Definitions in sources that are looked up later: to train on, and the task "code-lookup".

A definition is a line of Python with random names and values: a constant or the head of a function. A lookup
begins the same line again and asks for its rest. Names and values of the task are made of other words than
those of training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Ids = np.ndarray[Any, Any]

KINDS = ("string", "number", "signature")
_FEWEST_WORDS = 512
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Definition:
    """A line as token ids; question and answer together are the line, the next one's newline aside.

    Attributes:
        kind: one of `KINDS`.
        question: what a lookup begins with, its newline first.
        answer: what must follow.
    """

    kind: str
    question: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """All of the line."""
        return self.question + self.answer


class Definitions:
    """Draws definitions for a tokenizer.

    Args:
        tokenizer: names and values are words of its vocabulary where it has enough of them.
        held_out: use the half of the words that training does not use.
    """

    def __init__(self, tokenizer: Any, *, held_out: bool = False) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        plain = {word for word in vocabulary if re.fullmatch("[a-z]{4,9}", word)}
        words = sorted(word for word in plain if f"Ġ{word}" in vocabulary or f"▁{word}" in vocabulary)
        if len(words) < _FEWEST_WORDS:  # of two syllables
            syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
            words = [a + b for a in syllables for b in syllables]
        self.words = np.array(words[int(held_out) :: 2])

    def draw(
        self, rng: np.random.Generator, count: int, kinds: Sequence[str] | None = None
    ) -> list[Definition]:
        """`count` definitions of different names; of the given kinds in turn, else of random ones."""
        names: dict[str, None] = {}
        while len(names) < count:
            names["_".join(rng.choice(self.words, 2))] = None
        kinds = (
            list(rng.choice(KINDS, count)) if kinds is None else [kinds[i % len(kinds)] for i in range(count)]
        )
        lines = [self._line(rng, str(kind), name) for kind, name in zip(kinds, names, strict=True)]
        # apart, so that a question is the same tokens wherever it stands
        parts = self.tokenizer([x for line in lines for x in line], add_special_tokens=False).input_ids
        pairs = zip(kinds, parts[::2], parts[1::2], strict=True)
        return [Definition(str(kind), tuple(question), tuple(answer)) for kind, question, answer in pairs]

    def _line(self, rng: np.random.Generator, kind: str, name: str) -> tuple[str, str]:
        if kind == "number":
            return f"\n{name} =", f" {rng.integers(100_000, 1_000_000)}"
        words = list(rng.choice(self.words, 3))
        if kind == "string":
            return f'\n{name} = "', f'{" ".join(words)}"'
        return f"\ndef {name}(", f"{', '.join(words)}):"


def newline_tokens(tokenizer: Any) -> Ids:
    """Which token ids hold a newline, `(vocabulary,)` of bool: a line may be put in before them."""
    size = max(tokenizer.get_vocab().values()) + 1
    found = np.zeros(size, bool)
    for token, i in tokenizer.get_vocab().items():
        found[i] = any(mark in token for mark in ("\n", "Ċ", "<0x0A>"))
    return found


def weave(text: Ids, lines: Sequence[Sequence[int]], at: Ids) -> tuple[Ids, Ids]:
    """`text` with `lines` put in before the places `at`, and where each line begins in the result.

    Args:
        at: `(len(lines),)`, rising.
    """
    if not len(lines):
        return text, np.zeros(0, int)
    sizes, places = np.array([len(line) for line in lines]), np.asarray(at, int)
    flat = np.concatenate([np.asarray(line, text.dtype) for line in lines])
    begins = places + np.concatenate([[0], sizes[:-1].cumsum()])
    return np.insert(text, np.repeat(places, sizes), flat), begins


def snap(places: Ids, allowed: Ids) -> Ids:
    """Each of `places` moved to the nearest of the rising `allowed` at or after it; as it is without any."""
    if not len(allowed):
        return places
    return np.asarray(allowed[np.searchsorted(allowed, places).clip(max=len(allowed) - 1)])


def context_with_definitions(
    sources: Ids, newlines: Ids, length: int, definitions: Sequence[Definition], depths: Sequence[float]
) -> Ids:
    """`length` tokens of sources with definitions at rising `depths`, from 0 (start) to 1.

    Args:
        sources: token ids; their start is read.
        newlines: what `newline_tokens` gives.

    Raises:
        ValueError: too few tokens.
    """
    size = length - sum(len(d.ids) for d in definitions)
    if size < 1 or len(sources) < size:
        raise ValueError(f"{len(sources)} tokens of sources are too few for a context of {length}")
    text = np.asarray(sources[:size])
    at = snap((np.asarray(depths) * size).astype(int), np.flatnonzero(newlines[text]))
    return weave(text, [d.ids for d in definitions], at)[0]
