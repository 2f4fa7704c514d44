"""The inputs shared by the stages of a forward call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moba_hf.kernels.shared_plan import SharedPlan
from moba_hf.kernels.tiling import Tiling


@dataclass(frozen=True)
class Inputs:
    """The inputs of one forward call; the last dimension of each tensor is contiguous.

    Attributes:
        q: `(batch, H, q_len, D)`.
        k: `(batch, HK, kv_len, D)`.
        v: `(batch, HK, kv_len, DV)`.
        tiling: the numbering of tiles and blocks.
        softmax_scale: factor of the scores, above 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tiling: Tiling
    softmax_scale: float


@dataclass(frozen=True)
class SharedInputs:
    """The inputs of one forward call under a shared choice; the last dimension of each tensor is contiguous.

    Attributes:
        q: `(batch, H, q_len, D)`.
        k: `(batch, HK, kv_len, D)`.
        v: `(batch, HK, kv_len, DV)`.
        plan: the numbering of tiles and blocks.
        softmax_scale: factor of the scores, above 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: SharedPlan
    softmax_scale: float
