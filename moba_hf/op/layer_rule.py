"""The rule of a MoBA layer: `LayerConfig` if every query makes its own choice, else a `SharedRule`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moba_hf.op.gates import GATES
from moba_hf.op.numerics import check_int, plain_int
from moba_hf.op.shared_rule import SharedRule, check_rotary_pairs

# Fields that a single layer may override.
LAYER_FIELDS = ("block_size", "topk", "sink_blocks", "local_blocks", "gate")
# Fields that apply to a shared choice only, with their values when there is none.
SHARED_FIELDS: dict[str, Any] = {"tile": 1, "threshold": None, "sample": 1, "dense_below": 0}


@dataclass(frozen=True)
class LayerConfig:
    """The rule of one MoBA layer in which every query makes its own choice.

    Attributes:
        block_size: tokens in a block.
        topk: total number of blocks a query attends, its own included.
        sink_blocks: number of blocks at the start of the sequence that are always attended; part of `topk`.
        local_blocks: number of blocks just before the own one that are always attended; part of `topk`.
        gate: how blocks are scored, a name in `moba_hf.op.gates.GATES`.
        rotary_pairs: how the model's rotary embedding pairs coordinates, one of `ROTARY_PAIRS`; used by the
            mass gate.
    """

    block_size: int
    topk: int
    sink_blocks: int = 0
    local_blocks: int = 0
    gate: str = "mean"
    rotary_pairs: str = "halves"

    def __post_init__(self) -> None:
        check_rotary_pairs(self.rotary_pairs)
        check_rule(self.block_size, self.topk, self.sink_blocks, self.local_blocks, self.gate)

    def forces(self, block: Tensor, own: Tensor) -> Tensor:
        """Whether queries with own block `own` always attend `block`, which must not come after `own`."""
        return (block < self.sink_blocks) | (block >= own - self.local_blocks)

    @property
    def max_keys(self) -> int:
        """Maximum number of keys a query attends: `topk * block_size`."""
        return self.block_size * self.topk

    @property
    def dense_len(self) -> int:
        """Maximum length in tokens at which a sequence is attended in full."""
        return self.max_keys

    @property
    def forced_blocks(self) -> int:
        """Number of blocks a query always attends; the minimum of `topk`."""
        return 1 + self.sink_blocks + self.local_blocks

    def to_dict(self) -> dict[str, Any]:
        """The rule as keyword arguments of `moba_attention` and `select_blocks`."""
        return {name: getattr(self, name) for name in (*LAYER_FIELDS, "rotary_pairs")}

    def pairs(self, length: int) -> int:
        """Number of (query, key) pairs attended per head in a causal sequence of `length` tokens."""
        whole, rest = divmod(length, self.block_size)
        own = whole * self.block_size * (self.block_size + 1) // 2 + rest * (rest + 1) // 2
        rising = min(whole, self.topk)  # block c attends min(c, topk - 1) earlier blocks
        earlier = rising * (rising - 1) // 2 + (whole - rising) * (self.topk - 1)
        earlier_keys = self.block_size * (self.block_size * earlier + rest * min(whole, self.topk - 1))
        return own + earlier_keys


Rule = LayerConfig | SharedRule


def make_rule(
    block_size: int,
    topk: int | None = None,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    gate: str = "mean",
    tile: int = 1,
    threshold: float | None = None,
    dense_below: int = 0,
    sample: int = 1,
    rotary_pairs: str = "halves",
) -> Rule:
    """The rule for these settings: the paper's if `tile` is 1, else a choice shared by `tile` queries.

    Raises:
        ValueError: values out of range, or values that apply only to the other rule.
        TypeError: values of the wrong type.
    """
    block_size, topk, sink_blocks, local_blocks, tile, dense_below, sample = (
        plain_int(x) for x in (block_size, topk, sink_blocks, local_blocks, tile, dense_below, sample)
    )
    check_int("tile", tile, minimum=1)
    if tile == 1:
        for name, value in (("threshold", threshold), ("sample", sample), ("dense_below", dense_below)):
            if value != SHARED_FIELDS[name]:
                raise ValueError(
                    f"{name}={value} needs tile > 1: with tile=1 every query attends topk blocks"
                )
        if topk is None:
            raise ValueError("topk is missing: with tile=1 every query attends topk blocks")
        return LayerConfig(block_size, topk, sink_blocks, local_blocks, gate, rotary_pairs)
    if gate != "mass":
        raise ValueError(f"tile={tile} needs gate='mass', got gate={gate!r}")
    if threshold is None:
        raise ValueError(
            f"threshold is missing: with tile={tile} a block is attended if its mass is at least threshold "
            "times the largest mass"
        )
    return SharedRule(
        block_size,
        tile,
        threshold,
        topk=topk,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        sample=sample,
        dense_below=dense_below,
        rotary_pairs=rotary_pairs,
    )


def check_rule(block_size: int, topk: int, sink_blocks: int, local_blocks: int, gate: str = "mean") -> None:
    """Raises TypeError or ValueError unless the four numbers form a valid rule and the gate is known."""
    check_int("block_size", block_size, minimum=1)
    check_int("topk", topk, minimum=1)
    check_int("sink_blocks", sink_blocks, minimum=0)
    check_int("local_blocks", local_blocks, minimum=0)
    if topk < 1 + sink_blocks + local_blocks:
        raise ValueError(
            f"topk={topk} is too small: it counts the query's own block, {sink_blocks} sink_blocks and "
            f"{local_blocks} local_blocks, so it must be at least {1 + sink_blocks + local_blocks}"
        )
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(map(repr, GATES))}, got {gate!r}")
