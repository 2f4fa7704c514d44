"""How close predictions under MoBA are to dense ones: KL divergence and top-1 agreement."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moba_hf.config import MobaConfig
from moba_hf.evaluate.passes import attention, check_ids, hidden_states, logits

_CHUNK = 512


@dataclass(frozen=True)
class Agreement:
    """Agreement of MoBA with dense attention over the last `tokens` positions of a text.

    Attributes:
        tokens: number of positions compared.
        kl: mean `KL(dense || moba)` of the next-token distributions, in nats.
        top1: share of positions at which both predict the same token.
    """

    tokens: int
    kl: float
    top1: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


@torch.no_grad()
def agreement(model: Any, ids: Tensor, config: MobaConfig, *, trailing: int = 2048) -> Agreement:
    """Compares MoBA with dense at the last `trailing` positions of `ids (1, length)`, in two passes."""
    check_ids(ids)
    with attention(model, None):
        dense = hidden_states(model, ids)[-trailing:]
    with attention(model, config):
        sparse = hidden_states(model, ids)[-trailing:]
    kl = torch.zeros((), dtype=torch.float64, device=dense.device)
    same = torch.zeros((), dtype=torch.int64, device=dense.device)
    for a, b in zip(dense.split(_CHUNK), sparse.split(_CHUNK), strict=True):
        p, q = logits(model, a).log_softmax(1), logits(model, b).log_softmax(1)
        kl += (p.exp() * (p - q)).sum().double()
        same += (p.argmax(1) == q.argmax(1)).sum()
    return Agreement(len(dense), float(kl) / len(dense), int(same) / len(dense))
