"""The options of a calibration."""

from __future__ import annotations

import os
from dataclasses import dataclass

from moba_hf.config import MobaConfig
from moba_hf.op.numerics import check_int


@dataclass(frozen=True)
class Options:
    """The goal of `calibrate`, the setting that it starts from, and the effort.

    Attributes:
        max_loss: the allowed increase of the loss of the last `trailing` tokens of every text, in nats.
            Exactly one of `max_loss` and `keys` must be set.
        keys: the allowed share, above 0 and at most 1. If every query chooses for itself, it is the key
            budget. If a tile shares a choice, it is the average share of the dense causal query-key pairs
            that are attended in the texts, counted in whole passes.
        setting: the setting to tune. If a tile shares a choice (`tile` > 1), its `threshold` is tuned and
            everything else stays. Otherwise each layer gets a `topk` or full attention, while block size,
            sink and local blocks, gate and decoding stay. None: the settings of the model, or the preset
            "default" if it has none.
        block_sizes: the block sizes to try if every query chooses for itself; one is used in all layers.
            Empty: that of `setting`.
        samples: number of queries per text and layer from which local costs are computed.
        confirmations: the most settings that one search tries in whole passes. 0: trust the local costs,
            which is only possible with `keys` and a choice per query.
        trailing: number of tokens at the end of a text whose loss counts.
        seed: seed of the samples.
        store: a JSON file for the results of passes, so that an interrupted run can be resumed.

    Raises:
        ValueError: neither or both of `max_loss` and `keys` are set, or a value is out of range.
        TypeError: a value has the wrong type.
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
            raise ValueError("pass one of max_loss and keys")
        if self.keys is not None and not 0 < self.keys <= 1:
            raise ValueError(f"keys must be above 0 and at most 1, got {self.keys}")
        if self.max_loss is not None and not self.max_loss > 0:
            raise ValueError(f"max_loss must be positive, got {self.max_loss}")
        for name, least in (("samples", 1), ("trailing", 1), ("confirmations", 0 if self.keys else 1)):
            check_int(name, getattr(self, name), minimum=least)
        for size in self.block_sizes:
            check_int("block_sizes", size, minimum=1)

    def check_keys(self, dense: float) -> None:
        """Raises ValueError if `keys` limits nothing.

        Args:
            dense: the share with full attention in every layer that may use MoBA; below 1 in hybrid models.
        """
        if self.keys is not None and self.keys > dense + 1e-9:
            raise ValueError(
                f"keys={self.keys} limits nothing: with full attention in every layer that may use MoBA, the "
                f"model attends to {dense:.1%} of the keys at this length, because its other layers attend "
                "to fewer; pass less than that"
            )
