"""The gates, which score blocks. "mean" is the paper's gate; "mass" is opt-in and not part of MoBA.

To add a gate, write a subclass of `Gate`, add an instance to `GATES`, and add its definition to `GATES_REF`
in `moba_hf.op.reference`, against which it is tested. All other code uses the object.

The paper scores a block by `q . mean(keys)`. But what a query loses without a block is the block's part of
the softmax, `log sum_k exp(scale * q . k)`. In a model that was not trained with MoBA, the mean approximates
this poorly for two reasons: keys vary around their mean, and the mean hides single tokens with small keys and
nearly zero values on which many heads put most of their attention ("hidden sinks"). So the "mass" gate
estimates the attention mass. It splits a block into parts of `part_size` keys and computes

    part  = log n + scale * q . mean + f(scale^2 * sum_d q_d^2 * var_d)     n: number of keys in the part
    score = log(sum over parts of exp(part) + exp(scale * q . smallest))   smallest: the key with the least
    norm

where `f(v) = v / 2` is the cumulant of a normal distribution, and `f(v) = sqrt(2 v log n) - log n` for `v > 2
log n`, because n samples cannot reach further (the random energy model). `var_d` is the mean of the variances
of the two coordinates that a rotary embedding rotates together. A rotation does not change it, so scores do
not depend on the position of the first token. A block costs `2 * parts + 1` dot products with vectors that
depend only on its keys. Like block means, these vectors are computed in fp32 (fp64) and rounded to the key
dtype; variances and squared queries of fp16 are rounded to bf16. Products of these dtypes are accumulated in
fp32, so that a kernel can do the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from moba_hf.op.numerics import accumulate_dtype, part_size, spread_dtype


class Summary(Protocol):
    """A gate's summary of the complete blocks of one sequence."""

    def scores(self, q: Tensor, columns: int) -> Tensor:
        """Scores `(H, M, columns)` of the first `columns` blocks for `q (H, M, D)`, in fp32 (fp64)."""
        ...


class Gate(ABC):
    """A way to score blocks.

    Attributes:
        words: its name in `inspect` and in warnings; "" for the paper's gate.
        reads_scale: whether its scores depend on `softmax_scale`.
    """

    words: ClassVar[str] = ""
    reads_scale: ClassVar[bool] = False

    @abstractmethod
    def kept(self, rotary_pairs: str = "halves") -> Kept:
        """The summary of a complete block that a cache keeps, so that decode steps need not read its keys."""

    @abstractmethod
    def summary_of(
        self,
        kept: Tensor,
        head_dim: int,
        block_size: int,
        softmax_scale: float,
        rotary_pairs: str = "halves",
    ) -> Summary:
        """The summary from the values `kept (HK, blocks, width)` of a cache."""

    def summary(
        self,
        k: Tensor,
        block_size: int,
        softmax_scale: float,
        kept: Tensor | None = None,
        rotary_pairs: str = "halves",
    ) -> Summary:
        """The summary of the complete blocks of `k (HK, N, D)`.

        Args:
            kept: `(HK, >= complete blocks, width)`, the values from a cache; None: computed here.
            rotary_pairs: one of `ROTARY_PAIRS`, for gates that use it.
        """
        if kept is None:
            kept = self.kept(rotary_pairs).take(k, block_size)
        kept = kept[:, : k.shape[1] // block_size]
        return self.summary_of(kept, k.shape[2], block_size, softmax_scale, rotary_pairs)

    @abstractmethod
    def vectors(self, block_size: int) -> int:
        """Number of dot products per score."""


class MeanGate(Gate):
    """The paper's gate: `q . mean(keys)`, unscaled (arXiv 2502.13189, equations 5 and 6)."""

    def kept(self, rotary_pairs: str = "halves") -> Kept:
        return KeptMeans()

    def summary_of(
        self,
        kept: Tensor,
        head_dim: int,
        block_size: int,
        softmax_scale: float,
        rotary_pairs: str = "halves",
    ) -> Summary:
        return MeanSummary(kept.to(accumulate_dtype(kept.dtype)))

    def vectors(self, block_size: int) -> int:
        return 1


class MassGate(Gate):
    """An estimate of each block's attention mass, see the module docstring."""

    words = "mass gate"
    reads_scale = True

    def kept(self, rotary_pairs: str = "halves") -> Kept:
        return KeptMass(rotary_pairs)

    def summary_of(
        self,
        kept: Tensor,
        head_dim: int,
        block_size: int,
        softmax_scale: float,
        rotary_pairs: str = "halves",
    ) -> Summary:
        return MassSummary.of_kept(kept, head_dim, block_size, softmax_scale, rotary_pairs)

    def vectors(self, block_size: int) -> int:
        return 2 * (block_size // part_size(block_size)) + 1


# All gates by their name in the settings.
GATES: dict[str, Gate] = {"mean": MeanGate(), "mass": MassGate()}


def block_mean(k: Tensor, block_size: int) -> Tensor:
    """Means of complete blocks of `k (..., N, D)`: `(..., N // block_size, D)`, k's dtype, summed in fp32."""
    count = k.shape[-2] // block_size
    blocks = k[..., : count * block_size, :].unflatten(-2, (count, block_size))
    return blocks.mean(dim=-2, dtype=accumulate_dtype(k.dtype)).to(k.dtype)


class MeanSummary:
    """Scores from block means `(HK, blocks, D)` in fp32 (fp64)."""

    def __init__(self, means: Tensor):
        self.means = means

    def scores(self, q: Tensor, columns: int) -> Tensor:
        queries = q.to(self.means.dtype).reshape(self.means.shape[0], -1, q.shape[-1])
        scores = queries @ self.means[:, :columns].transpose(1, 2)
        return scores.view(q.shape[0], q.shape[1], columns)


_Summary = TypeVar("_Summary", bound="MassSummary")


class MassSummary:
    """Scores of the complete blocks of one sequence's keys by the mass gate.

    Legend: H query heads, HK kv heads, D head dim, M queries of a chunk.

    Args:
        k: `(HK, N, D)`.
        block_size: tokens per block.
        scale: factor of the scores in the softmax.
        rotary_pairs: which coordinates a rotary embedding rotates together: "halves" (d and d + D/2) or
            "neighbours" (2d and 2d + 1).
    """

    def __init__(self, k: Tensor, block_size: int, scale: float, rotary_pairs: str = "halves"):
        self._hold(mass_vectors(k, block_size, rotary_pairs), block_size, scale, rotary_pairs)

    @classmethod
    def of_kept(
        cls: type[_Summary],
        kept: Tensor,
        head_dim: int,
        block_size: int,
        scale: float,
        rotary_pairs: str = "halves",
    ) -> _Summary:
        """The summary from the values `kept (HK, blocks, width)` of a cache; see `KeptMass`."""
        summary = cls.__new__(cls)
        vectors = KeptMass(rotary_pairs).split(kept, head_dim, block_size)
        summary._hold(vectors, block_size, scale, rotary_pairs)
        return summary

    def _hold(
        self, vectors: tuple[Tensor, Tensor, Tensor], block_size: int, scale: float, rotary_pairs: str
    ) -> None:
        mean, var, smallest = vectors
        dtype = accumulate_dtype(mean.dtype)
        self.pairs, self.narrow = rotary_pairs, spread_dtype(mean.dtype)
        self.mean = mean.to(dtype).transpose(1, 2) * scale  # (HK, parts, blocks, D)
        self.var = self._of_pairs(var.to(dtype)).transpose(1, 2) * scale**2  # (HK, parts, blocks, D)
        self.smallest = smallest.to(dtype) * scale  # (HK, blocks, D)
        self.centers = torch.cat([self.mean, self.smallest[:, None]], 1)
        self.log_size = math.log(part_size(block_size))

    def scores(self, q: Tensor, columns: int) -> Tensor:
        queries = q.to(self.mean.dtype).reshape(self.mean.shape[0], -1, q.shape[2])
        squares = self.squares(queries)
        total = queries @ self.smallest[:, :columns].transpose(1, 2)
        # a block longer than the text has thousands of parts
        for part in range(self.mean.shape[1] if columns else 0):
            score = queries @ self.mean[:, part, :columns].transpose(1, 2)
            spread = squares @ self.var[:, part, :columns].transpose(1, 2)
            far = (2 * self.log_size * spread).sqrt_() - self.log_size
            score += torch.where(spread <= 2 * self.log_size, spread / 2, far) + self.log_size
            total = torch.logaddexp(total, score)
        return total.view(q.shape[0], q.shape[1], columns)

    def squares(self, queries: Tensor) -> Tensor:
        """The factor of `var`: squares of `queries (..., D)`, rounded like `var`, in fp32 (fp64)."""
        return queries.square().to(self.narrow).to(queries.dtype)

    def _of_pairs(self, var: Tensor) -> Tensor:
        """The variance of each coordinate's pair, `(..., D)` from `var (..., D/2)`."""
        return torch.cat([var, var], -1) if self.pairs == "halves" else var.repeat_interleave(2, -1)


class PairedMassSummary(MassSummary):
    """`MassSummary` with one variance per pair, `(HK, parts, blocks, D/2)`, which halves the products.

    In low precision it rounds the sum of two squares, whereas `MassSummary` rounds each.
    """

    def squares(self, queries: Tensor) -> Tensor:
        return pair_sums(queries.square(), self.pairs).to(self.narrow).to(queries.dtype)

    def _of_pairs(self, var: Tensor) -> Tensor:
        return var


def pair_sums(x: Tensor, rotary_pairs: str) -> Tensor:
    """Sums of `x (..., D)` over rotary pairs, `(..., D/2)`."""
    if rotary_pairs == "halves":
        return x.unflatten(-1, (2, -1)).sum(-2)
    return x.unflatten(-1, (-1, 2)).sum(-1)


def mass_vectors(k: Tensor, block_size: int, rotary_pairs: str) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors of the mass gate for the complete blocks of `k (..., N, D)`, rounded as in a cache.

    Returns:
        Means `(..., blocks, parts, D)` in k's dtype, variances of pairs `(..., blocks, parts, D / 2)` in
        `spread_dtype`, and the key with the smallest norm `(..., blocks, D)` in k's dtype.
    """
    count, size = k.shape[-2] // block_size, part_size(block_size)
    keys = k[..., : count * block_size, :].to(accumulate_dtype(k.dtype))
    parts = keys.unflatten(-2, (count, block_size // size, size))
    mean = parts.mean(-2)
    var = (parts - mean[..., None, :]).square_().mean(-2)  # `Tensor.var` is slow on a CPU
    var = pair_sums(var, rotary_pairs) / 2
    blocks = keys.unflatten(-2, (count, block_size))
    least = blocks.square().sum(-1).argmin(-1)[..., None, None].expand(*blocks.shape[:-2], 1, k.shape[-1])
    return mean.to(k.dtype), var.to(spread_dtype(k.dtype)), blocks.gather(-2, least)[..., 0, :].to(k.dtype)


class Kept(Protocol):
    """What a cache keeps of each complete block: a vector of `width` numbers in the dtype of the keys."""

    def width(self, head_dim: int, block_size: int) -> int:
        """Number of values per block and kv head."""
        ...

    def take(self, k: Tensor, block_size: int) -> Tensor:
        """Computes the vectors of the complete blocks of `k (..., N, D)`: `(..., N // block_size, width)`."""
        ...


@dataclass(frozen=True)
class KeptMeans:
    """The mean of a block."""

    def width(self, head_dim: int, block_size: int) -> int:
        return head_dim

    def take(self, k: Tensor, block_size: int) -> Tensor:
        return block_mean(k, block_size)


@dataclass(frozen=True)
class KeptMass:
    """The vectors of the mass gate: means of the parts, the smallest key, and variances of the parts.

    Attributes:
        rotary_pairs: as for `MassSummary`.
    """

    rotary_pairs: str = "halves"

    def width(self, head_dim: int, block_size: int) -> int:
        return sum(self._sizes(head_dim, block_size))

    def take(self, k: Tensor, block_size: int) -> Tensor:
        mean, var, smallest = mass_vectors(k, block_size, self.rotary_pairs)
        # variances of fp16 keys are bf16: store their bits as fp16
        return torch.cat([mean.flatten(-2), smallest, var.view(k.dtype).flatten(-2)], -1)

    def split(self, kept: Tensor, head_dim: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Splits `kept (..., blocks, width)` into the result of `mass_vectors`."""
        mean, smallest, var = kept.split(self._sizes(head_dim, block_size), -1)
        parts = block_size // part_size(block_size)
        mean, var = (x.unflatten(-1, (parts, -1)) for x in (mean, var.view(spread_dtype(kept.dtype))))
        return mean, var, smallest

    @staticmethod
    def _sizes(head_dim: int, block_size: int) -> list[int]:
        parts = block_size // part_size(block_size)
        return [parts * head_dim, head_dim, parts * (head_dim // 2)]
