"""Rows of tokens for long-context training, made of whole repositories with files in a sensible order.

A row depends on the seed and its index alone, so a resumed run sees the same rows as an uninterrupted one.
`position_ids` restart at 0 for each document of a row; MoBA and transformers' attention functions use this to
keep documents from attending each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers.utils import logging

from moba_hf.evaluate.lookups import Definition, Definitions, newline_tokens, snap, weave
from moba_hf.evaluate.repositories import Repository
from moba_hf.op.numerics import check_int

Ids = np.ndarray[Any, Any]
IGNORED = -100
WEIGHTS = "loss_weights"  # name of the weights in a row
_ASKED = ("string", "number", "signature", "signature")  # kinds of lookups are drawn from these
_NEAREST = 32  # the shortest distance of a lookup, before it is moved to the end of a line
_IGNORED_WEIGHTS = (
    f"These rows have {WEIGHTS}, which transformers.Trainer drops without a word: use "
    "moba_hf.training.LongRowTrainer, or make Rows with lookup_weight=1. If your own training loop passes "
    "them to moba_hf.training.loss_in_pieces, set rows.weights_applied = True"
)
_ASKED_IN_TAIL = 0.6  # share of the tail that lookups fill at most

logger = logging.get_logger(__name__)


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of `length` tokens with `input_ids`, `labels` and `position_ids`, each int64 `(length,)`.

    A long row draws a repository with probability proportional to its length and takes as much of it as fits,
    starting at the beginning of a file; other repositories fill the remaining room. A share of the rows holds
    single files instead, so that the model keeps training on short texts.

    Definitions are inserted into the longest piece of each long row and looked up later in that piece: most
    of them after a few dozen tokens to a whole row (distances are uniform on a logarithmic scale, since
    copying is learned at short distances first), and with `tail` as many as fit, up to half of them, in the
    last `tail` tokens. Of these lines, only the answers have labels.

    Args:
        repositories: the texts to draw from.
        length: tokens in a row.
        count: number of rows.
        seed: seed of all random choices.
        short_share: probability that a row holds short texts, from 0 to 1.
        short_length: maximum number of tokens in a short text.
        lookups: number of definitions in each long row.
        tail: number of tokens at the end of a long row that ask for definitions, see `LongRowTrainer`; below
            half of `length`. If it is above 0, a long row is a single document, as a prompt is, also where
            it holds several repositories.
        lookup_weight: weight of the answers in the loss, at least 1. Above 1, rows have `loss_weights`, fp32
            `(length,)`, which only `LongRowTrainer` applies. Other trainers ignore them, which a warning
            says; with a `MobaCallback`, their first step raises ValueError.
        tokenizer: required if `lookups` is above 0.

    Attributes:
        weights_applied: whether the loss has the weights. `LongRowTrainer` sets it; while it is False, the
            first row with weights warns.

    Raises:
        ValueError: no repositories, or values out of range.
    """

    def __init__(
        self,
        repositories: Sequence[Repository],
        length: int,
        count: int,
        *,
        seed: int = 0,
        short_share: float = 0.1,
        short_length: int = 2048,
        lookups: int = 0,
        tail: int = 0,
        lookup_weight: float = 1.0,
        tokenizer: Any = None,
    ) -> None:
        if not repositories:
            raise ValueError("there is no repository to read")
        for name, value, least in (
            ("length", length, 2),
            ("count", count, 1),
            ("short_length", short_length, 1),
        ):
            check_int(name, value, minimum=least)
        if not 0 <= short_share <= 1:
            raise ValueError(f"short_share must be from 0 to 1, got {short_share}")
        if lookups < 0 or (lookups and tokenizer is None):
            raise ValueError(f"lookups must be at least 0 and need a tokenizer, got {lookups}")
        if not 0 <= tail <= length // 2:
            raise ValueError(f"tail must be from 0 to half of a row of {length} tokens, got {tail}")
        if lookup_weight < 1:
            raise ValueError(f"lookup_weight must be at least 1, got {lookup_weight}")
        self.repositories, self.length, self.count, self.seed = list(repositories), length, count, seed
        self.short_share, self.short_length, self.lookups = short_share, short_length, lookups
        self.tail, self.lookup_weight, self.weights_applied = tail, lookup_weight, False
        sizes = np.array([len(one.ids) for one in repositories], float)
        self.chances = sizes / sizes.sum()
        if lookups:
            self.definitions, self.newlines = Definitions(tokenizer), newline_tokens(tokenizer)

    @property
    def weighted(self) -> bool:
        """Whether rows have `loss_weights`."""
        return self.lookup_weight > 1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -self.count <= index < self.count:
            raise IndexError(f"there are {self.count} rows, so no row {index}")
        index %= self.count
        rng = np.random.default_rng([self.seed, index])
        if rng.random() < self.short_share:
            pieces = self._short_pieces(rng)
            labels = [piece.copy() for piece in pieces]
            weights = [np.ones(len(piece), np.float32) for piece in pieces]
        else:
            pieces, labels, weights = self._long_pieces(rng)
        for label in labels:
            label[0] = IGNORED  # a document's first token has no context to predict it from
        positions = [np.arange(len(piece)) for piece in pieces]
        row = {"input_ids": pieces, "labels": labels, "position_ids": positions}
        if self.weighted:
            row[WEIGHTS] = weights
            if not self.weights_applied:
                logger.warning_once(_IGNORED_WEIGHTS)
        return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in row.items()}

    def _short_pieces(self, rng: np.random.Generator) -> list[Ids]:
        pieces, room = [], self.length
        while room:
            one = self.repositories[rng.choice(len(self.repositories), p=self.chances)]
            which = int(rng.integers(len(one.files)))
            end = one.files[which + 1] if which + 1 < len(one.files) else len(one.ids)
            begin = int(one.files[which])
            size = min(room, self.short_length, int(end) - begin)
            pieces.append(one.ids[begin : begin + size].astype(np.int64))
            room -= size
        return pieces

    def _long_pieces(self, rng: np.random.Generator) -> tuple[list[Ids], list[Ids], list[Ids]]:
        """The documents of a long row, their labels and the weights of these."""
        made: list[Definition] = []
        if self.lookups:
            made = self.definitions.draw(rng, self.lookups, list(rng.choice(_ASKED, self.lookups)))
        room = self.length - 2 * sum(len(one.ids) for one in made)
        if room < self.length // 2:
            raise ValueError(f"{len(made)} lookups leave less than half of a row of {self.length} tokens")
        pieces: list[Ids] = []
        order = rng.permutation(len(self.repositories)).tolist()
        order.insert(0, int(rng.choice(len(self.repositories), p=self.chances)))
        while room:
            one = self.repositories[order.pop(0) if order else int(rng.integers(len(self.repositories)))]
            size = min(room, len(one.ids))
            starts = one.files[one.files <= len(one.ids) - size]
            begin = int(rng.choice(starts))
            pieces.append(one.ids[begin : begin + size].astype(np.int64))
            room -= size
        if self.tail:
            pieces = [np.concatenate(pieces)]
        labels = [piece.copy() for piece in pieces]
        weights = [np.ones(len(piece), np.float32) for piece in pieces]
        if made:
            which = max(range(len(pieces)), key=lambda i: len(pieces[i]))
            found = self._with_lookups(rng, pieces[which], made)
            pieces[which], labels[which], weights[which] = found
        return pieces, labels, weights

    def _with_lookups(
        self, rng: np.random.Generator, text: Ids, made: Sequence[Definition]
    ) -> tuple[Ids, Ids, Ids]:
        """`text` with each definition inserted twice, its labels, and the weights of these."""
        sizes = np.cumsum([len(one.ids) for one in made[: len(made) // 2]])
        late = int((sizes <= _ASKED_IN_TAIL * self.tail).sum())  # so many are asked in the tail
        body = len(text) - (self.tail - int(sizes[late - 1]) if late else 0)
        distance = np.exp(rng.uniform(np.log(_NEAREST), np.log(max(_NEAREST + 1, body)), len(made)))
        distance = np.minimum(distance, body - 1).astype(int)
        distance[:late] = 0
        first = rng.integers(0, body - distance)
        second = first + distance
        second[:late] = rng.integers(body, max(body + 1, len(text)), late)
        allowed = np.flatnonzero(self.newlines[text])
        first = snap(first, allowed[allowed < body])
        second = np.concatenate(
            [
                snap(second[:late], allowed),
                np.maximum(first[late:], snap(second[late:], allowed[allowed < body])),
            ]
        )
        places = np.concatenate([first, second])
        order = np.argsort(places, kind="stable")  # at the same place, a definition comes before its lookup
        ids, begins = weave(text, [made[i % len(made)].ids for i in order.tolist()], places[order])
        labels, weights = ids.copy(), np.ones(len(ids), np.float32)
        for i, begin in zip(order.tolist(), begins.tolist(), strict=True):
            one = made[i % len(made)]
            asked = begin + len(one.question)
            end = begin + len(one.ids)
            labels[begin : end if i < len(made) else asked] = IGNORED  # random, so nothing predicts it
            if i >= len(made):
                weights[asked:end] = self.lookup_weight
        return ids, labels, weights


def weighted_rows(*datasets: Any) -> Iterator[Rows]:
    """The `Rows` with weights among `datasets`, also in dicts and in torch's subsets and concatenations."""
    for one in datasets:
        if isinstance(one, Rows):
            if one.weighted:
                yield one
        elif isinstance(one, dict):
            yield from weighted_rows(*one.values())
        elif isinstance(one, Subset):
            yield from weighted_rows(one.dataset)
        elif isinstance(one, ConcatDataset):
            yield from weighted_rows(*one.datasets)
