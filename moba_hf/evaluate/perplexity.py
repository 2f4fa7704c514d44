"""Perplexity by position: how much a setting costs, and where in the text."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_hf.config import MobaConfig
from moba_hf.evaluate.passes import attention, check_ids, hidden_states, logits
from moba_hf.op.inputs import require_tensor

_CHUNK = 1024  # rows of logits held at a time


@dataclass(frozen=True)
class Perplexity:
    """Mean losses of one text, in nats per token.

    Attributes:
        tokens: number of predicted tokens, one less than the text has.
        loss: mean over all of them.
        trailing: mean over the last `trailing_tokens`.
        trailing_tokens: number of tokens in `trailing`.
        buckets: `(first position, position after the last, mean loss)`, by position of the predicted token.
    """

    tokens: int
    loss: float
    trailing: float
    trailing_tokens: int
    buckets: tuple[tuple[int, int, float], ...]

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return math.exp(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


@torch.no_grad()
def token_losses(model: Any, ids: Tensor, config: MobaConfig | None = None) -> Tensor:
    """Loss of each predicted token in nats, fp32 `(length - 1,)` on the CPU; entry i belongs to token i + 1.

    Args:
        ids: token ids, `(1, length)`.
        config: MoBA settings; None: dense.

    Raises:
        ValueError: `ids` has another shape, or fewer than two tokens.
        TypeError: `ids` is not a tensor.
    """
    check_ids(ids)
    with attention(model, config):
        hidden = hidden_states(model, ids)
        targets = ids[0, 1:].to(hidden.device)
        parts = zip(hidden[:-1].split(_CHUNK), targets.split(_CHUNK), strict=True)
        return torch.cat([F.cross_entropy(logits(model, x), y, reduction="none") for x, y in parts]).cpu()


def summarize(losses: Tensor, buckets: int = 8, trailing: int = 2048) -> Perplexity:
    """Means of `losses (length - 1,)`: overall, over the last `trailing`, and over `buckets` equal ranges."""
    require_tensor("losses", losses)
    count = len(losses)
    trailing = min(trailing, count)
    edges = [count * i // buckets for i in range(buckets + 1)]
    means = [
        (begin + 1, end + 1, float(losses[begin:end].double().mean()))
        for begin, end in itertools.pairwise(edges)
        if end > begin
    ]
    tail = float(losses[count - trailing :].double().mean())
    return Perplexity(count, float(losses.double().mean()), tail, trailing, tuple(means))


@dataclass(frozen=True)
class Positions:
    """Mean losses of one text in nats per token, by ranges of positions that double in length.

    Attributes:
        tokens: number of predicted tokens.
        ranges: `(first position, position after the last, mean loss)`, by position of the predicted token.
    """

    tokens: int
    ranges: tuple[tuple[int, int, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def by_position(losses: Tensor, first: int = 1024) -> Positions:
    """Means of `losses (length - 1,)` over the ranges that end at `first`, `2 * first`, `4 * first` ..."""
    require_tensor("losses", losses)
    count = len(losses)
    edges = [1]
    while edges[-1] <= count:
        edges.append(first if edges[-1] == 1 else 2 * edges[-1])
    edges[-1] = count + 1
    means = [
        (begin, end, float(losses[begin - 1 : end - 1].double().mean()))
        for begin, end in itertools.pairwise(edges)
        if end > begin
    ]
    return Positions(count, tuple(means))


def perplexity(
    model: Any, ids: Tensor, config: MobaConfig | None = None, *, buckets: int = 8, trailing: int = 2048
) -> Perplexity:
    """Perplexity of `ids (1, length)` under `config` (None: dense)."""
    return summarize(token_losses(model, ids, config), buckets, trailing)
