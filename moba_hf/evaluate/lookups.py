"""Definitions inserted into source code to be looked up later, for training and for the task "code-lookup".

A definition is a line of Python with random names and values: a constant or a function signature. A lookup
begins the same line again and asks for the rest. The task uses different words for names and values than
training does.
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
    """A line as token ids: `question` followed by `answer`, without the newline that ends it.

    Attributes:
        kind: one of `KINDS`.
        question: the beginning of the line, after a leading newline.
        answer: the rest of the line.
    """

    kind: str
    question: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole line."""
        return self.question + self.answer


class Definitions:
    """Draws definitions for a tokenizer.

    Args:
        tokenizer: names and values are words from its vocabulary if it has enough of them.
        held_out: use the half of the words that is not used in training.
    """

    def __init__(self, tokenizer: Any, *, held_out: bool = False) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        plain = {word for word in vocabulary if re.fullmatch("[a-z]{4,9}", word)}
        words = sorted(word for word in plain if f"Ġ{word}" in vocabulary or f"▁{word}" in vocabulary)
        if len(words) < _FEWEST_WORDS:  # made-up words of two syllables
            syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
            words = [a + b for a in syllables for b in syllables]
        self.words = np.array(words[int(held_out) :: 2])

    def draw(
        self, rng: np.random.Generator, count: int, kinds: Sequence[str] | None = None
    ) -> list[Definition]:
        """`count` definitions with distinct names; cycles through `kinds`, or draws random kinds for None."""
        names: dict[str, None] = {}
        while len(names) < count:
            names["_".join(rng.choice(self.words, 2))] = None
        kinds = (
            list(rng.choice(KINDS, count)) if kinds is None else [kinds[i % len(kinds)] for i in range(count)]
        )
        lines = [self._line(rng, str(kind), name) for kind, name in zip(kinds, names, strict=True)]
        # tokenized separately, so that a question has the same tokens everywhere
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
    """Bool `(vocabulary,)`: the tokens that contain a newline, before which a line may be inserted."""
    size = max(tokenizer.get_vocab().values()) + 1
    found = np.zeros(size, bool)
    for token, i in tokenizer.get_vocab().items():
        found[i] = any(mark in token for mark in ("\n", "Ċ", "<0x0A>"))
    return found


def weave(text: Ids, lines: Sequence[Sequence[int]], at: Ids) -> tuple[Ids, Ids]:
    """`text` with `lines` inserted before the positions `at`, and where each line begins in the result.

    Args:
        at: `(len(lines),)`, in ascending order.
    """
    if not len(lines):
        return text, np.zeros(0, int)
    sizes, places = np.array([len(line) for line in lines]), np.asarray(at, int)
    flat = np.concatenate([np.asarray(line, text.dtype) for line in lines])
    begins = places + np.concatenate([[0], sizes[:-1].cumsum()])
    return np.insert(text, np.repeat(places, sizes), flat), begins


def snap(places: Ids, allowed: Ids) -> Ids:
    """Moves each of `places` to the first of `allowed` (ascending) at or after it, or else to the last.

    Without any allowed place, returns `places`.
    """
    if not len(allowed):
        return places
    return np.asarray(allowed[np.searchsorted(allowed, places).clip(max=len(allowed) - 1)])


def context_with_definitions(
    sources: Ids, newlines: Ids, length: int, definitions: Sequence[Definition], depths: Sequence[float]
) -> Ids:
    """The first tokens of `sources` with definitions inserted, `length` tokens in all.

    Args:
        sources: token ids.
        newlines: the result of `newline_tokens`.
        depths: where to insert each definition, ascending from 0 (start) to 1 (end).

    Raises:
        ValueError: `sources` has too few tokens.
    """
    size = length - sum(len(d.ids) for d in definitions)
    if size < 1 or len(sources) < size:
        raise ValueError(f"{len(sources)} tokens of sources are too few for a context of {length}")
    text = np.asarray(sources[:size])
    at = snap((np.asarray(depths) * size).astype(int), np.flatnonzero(newlines[text]))
    return weave(text, [d.ids for d in definitions], at)[0]
