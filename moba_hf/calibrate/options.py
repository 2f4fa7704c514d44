"""What a calibration is asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass

from moba_hf.config import MobaConfig
from moba_hf.op.numerics import check_int


@dataclass(frozen=True)
class Options:
    """The goal of `calibrate`, the setting that it starts from, and how hard it looks.

    Attributes:
        max_loss: the allowed rise of the loss of the last `trailing` tokens of every text, in nats; or
        keys: the allowed share, above 0 and at most 1. Where every query chooses for itself it is the key
            budget; where a tile shares a choice it is the share of the dense causal (query, key) pairs that
            the texts attend on average, counted in whole passes.
        setting: the setting whose number is sought. Where a tile shares a choice (`tile` > 1) that is the
            `threshold`, and everything else stays; otherwise it is the `topk` of each layer, or full
            attention, while block size, forced blocks, gate and decoding stay. None: the settings of the
            model, or the preset "default" if it has none.
        block_sizes: the ones tried for a choice per query; one is used in all layers. Empty: that of
            `setting`.
        samples: queries per text and layer whose outputs the local costs compare.
        confirmations: the most settings that one search tries in whole passes; 0: the local costs are
            trusted, which only `keys` with a choice per query allows.
        trailing: tokens at the end of a text whose loss counts.
        seed: of the samples.
        store: a JSON file that keeps the passes made, so that a stopped run goes on.

    Raises:
        ValueError: neither or both of `max_loss` and `keys`, or a value out of range. TypeError: a value of a
            wrong type.
    """

    max_loss: float | None = None
    keys: float | None = None
    setting: MobaConfig | None = None
    block_sizes: tuple[int, ...] = ()
    samples: int = 48
    confirmations: int = 5
    trailing: int = 2048
    seed: int = 0
    store: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_sizes", tuple(self.block_sizes))
        if (self.max_loss is None) == (self.keys is None):
            raise ValueError("give one of max_loss and keys")
        if self.keys is not None and not 0 < self.keys <= 1:
            raise ValueError(f"keys must be above 0 and at most 1, got {self.keys}")
        if self.max_loss is not None and not self.max_loss > 0:
            raise ValueError(f"max_loss must be positive, got {self.max_loss}")
        for name, least in (("samples", 1), ("trailing", 1), ("confirmations", 0 if self.keys else 1)):
            check_int(name, getattr(self, name), minimum=least)
        for size in self.block_sizes:
            check_int("block_sizes", size, minimum=1)
