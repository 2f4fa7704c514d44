"""Extends the context of a checkpoint with new rotary parameters in its config; the weights do not change.

There are three ways, all of which transformers supports in the config:

    theta   a larger rotary base (NTK-aware scaling): the slowest pairs reach the new length
    linear  position interpolation (arXiv 2306.15595): every position is divided by the factor
    yarn    YaRN (arXiv 2309.00071): slow pairs are interpolated, fast ones kept, attention sharpened

Without further training each of them costs quality, which `moba-hf eval` measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moba_hf.op.numerics import check_int

ROPES = ("theta", "linear", "yarn")
# The entries of a text config that change with the context length.
CHANGED = ("max_position_embeddings", "rope_parameters", "rope_theta", "rope_scaling")
_FULL = "full_attention"


@dataclass(frozen=True)
class ContextLength:
    """The context length to extend a checkpoint to, and how.

    Attributes:
        length: the new context length in tokens.
        rope: how to extend RoPE, one of `ROPES`.
        theta: the new base, only with rope "theta"; None: `base * factor ** (dim / (dim - 2))`, which gives
            the slowest pair of `dim` rotary dimensions the same wavelength as interpolation.
        rescale: also extend a checkpoint whose rotary embedding is already scaled.

    Raises:
        ValueError: a value out of range.
        TypeError: a value of the wrong type.
    """

    length: int
    rope: str = "theta"
    theta: float | None = None
    rescale: bool = False

    def __post_init__(self) -> None:
        check_int("context_length", self.length, minimum=1)
        if self.rope not in ROPES:
            raise ValueError(f"rope must be one of {', '.join(map(repr, ROPES))}, got {self.rope!r}")
        if self.theta is not None and self.rope != "theta":
            raise ValueError(f'theta={self.theta} needs rope="theta", got rope={self.rope!r}')
        if self.theta is not None and not self.theta > 0:
            raise ValueError(f"theta must be positive, got {self.theta}")


def with_context_length(values: Mapping[str, Any], config: Any, wanted: ContextLength) -> dict[str, Any]:
    """The JSON of a text config with a longer context.

    The result has the names of transformers 5 (`rope_parameters`) and those of earlier releases
    (`rope_theta`, `rope_scaling`), which other engines read.

    Args:
        values: the JSON of the text config; it is not changed.
        config: the same config as read by transformers.
        wanted: the context to extend to.

    Raises:
        ValueError: the model has no rotary embedding, the context is not longer, or the rotary embedding is
            already scaled and `rescale` is not set or cannot scale it further.
    """
    old = int(config.max_position_embeddings)
    if wanted.length <= old:
        raise ValueError(
            f"context_length={wanted.length} is not above the {old} tokens of the model's context"
        )
    rope = dict(getattr(config, "rope_parameters", None) or {})
    nested = _FULL in rope
    source = dict(rope[_FULL]) if nested else rope
    if "rope_theta" not in source:
        raise ValueError(f"{config.model_type} has no rotary embedding to extend")
    extended = _extended(source, config, old, wanted)
    result = {**values, "max_position_embeddings": wanted.length}
    if nested:  # other layer types keep their embedding; earlier releases had no common format for this
        return {**result, "rope_parameters": {**rope, _FULL: extended}}
    scaling = {name: value for name, value in extended.items() if name != "rope_theta"}
    plain = extended["rope_type"] == "default" and len(scaling) == 1
    return {
        **result,
        "rope_parameters": extended,
        "rope_theta": extended["rope_theta"],
        "rope_scaling": None if plain else scaling,
    }


def with_context(
    values: Mapping[str, Any], text_config: Any, wanted: ContextLength | None, key: str | None
) -> dict[str, Any]:
    """The JSON of a whole config with a longer context; unchanged if `wanted` is None.

    Args:
        values: the JSON of config.json; it is not changed.
        text_config: its text config as read by transformers.
        wanted: the context to extend to.
        key: name of the nested text config, or None.
    """
    if wanted is None:
        return dict(values)
    if key is None or not values.get(key):
        return with_context_length(values, text_config, wanted)
    return {**values, key: with_context_length(values[key], text_config, wanted)}


def _extended(source: dict[str, Any], config: Any, old: int, wanted: ContextLength) -> dict[str, Any]:
    """The rotary parameters `source` extended from `old` to `wanted.length` tokens."""
    kind, factor = str(source.get("rope_type", "default")), wanted.length / old
    if kind != "default" and not wanted.rescale:
        raise ValueError(
            f"the rotary embedding of this checkpoint is already scaled (rope_type {kind!r}); pass rescale "
            "(--rescale) to extend it anyway"
        )
    base = float(source["rope_theta"])
    if wanted.rope == "theta":
        dim = _rotary_dim(source, config)
        theta = base * factor ** (dim / (dim - 2)) if wanted.theta is None else float(wanted.theta)
        return {**source, "rope_type": kind, "rope_theta": theta}
    if kind == "default":
        scaled = {**source, "rope_type": wanted.rope, "factor": factor}
        return scaled if wanted.rope == "linear" else {**scaled, "original_max_position_embeddings": old}
    if kind == wanted.rope:
        return {**source, "factor": float(source["factor"]) * factor}
    if (kind, wanted.rope) == ("llama3", "linear"):
        return _linear_over_llama3(source, config, old, factor)
    raise ValueError(f"rope {wanted.rope!r} cannot be combined with rope_type {kind!r}; use 'theta'")


def _rotary_dim(source: Mapping[str, Any], config: Any) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * float(source.get("partial_rotary_factor", 1.0)))


def _linear_over_llama3(source: dict[str, Any], config: Any, old: int, factor: float) -> dict[str, Any]:
    """Llama 3's scaled frequencies with interpolation on top, as "longrope" with a factor per dimension."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim, base = _rotary_dim(source, config), float(source["rope_theta"])
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = [base ** (-2 * i / dim) for i in range(dim // 2)]
    factors = [factor * p / float(f) for p, f in zip(plain, frequencies.double(), strict=True)]
    dropped = ("factor", "low_freq_factor", "high_freq_factor")
    return {
        **{name: value for name, value in source.items() if name not in dropped},
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": old,
        "short_factor": factors,
        "long_factor": factors,
    }
