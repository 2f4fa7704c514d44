"""The MoBA settings of a model as one frozen, validated dataclass, and the presets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from moba_hf.op.backend_table import check_backend
from moba_hf.op.layer_rule import LAYER_FIELDS, SHARED_FIELDS, LayerConfig, Rule, make_rule
from moba_hf.op.numerics import check_int, plain_int

# Names used by the original MoBA release; `from_dict` reads them too.
_ALIASES = {"moba_chunk_size": "block_size", "moba_topk": "topk"}
_DECODE = ("full", "sparse")

DEFAULT_PRESET = "default"
# The name of MoBA as an `attn_implementation` of transformers.
NAME = "moba"


@dataclass(frozen=True)
class MobaConfig:
    """MoBA settings of a model (arXiv 2502.13189); stored as `config.moba` of its text config.

    Attributes:
        block_size: tokens in a block, at least 1.
        topk: total number of blocks a query attends, its own included; at least
            `1 + sink_blocks + local_blocks`. With `tile` > 1, the maximum number of blocks a tile attends, or
            None for no maximum.
        sink_blocks: number of blocks at the start of the sequence that every query attends (0 in the paper).
        local_blocks: number of blocks just before the own one that every query attends (0 in the paper).
        full_attention_layers: indices of layers that keep full attention; negative ones count from the
            last layer. They are checked when the settings are applied to a model.
        decode: "full": a decode step attends every cached key (the paper's choice). "sparse": a decode step
            follows the prefill rule, with its own choice for each query; fastest with a `MobaCache`, which
            keeps the block summaries that the gate needs.
        decode_max_len: a call with at most this many queries counts as decoding, unless `prefill` has already
            marked the end of the prompt in the cache. At most `topk * block_size`, so that the decode and
            prefill rules agree on an empty cache.
        backend: "auto" or a name in `op.backend_table.BACKENDS`; machine-dependent, so it is never saved.
        layers: `(layer index, overrides)` pairs; an override sets any of `block_size`, `topk`,
            `sink_blocks`, `local_blocks`, `gate`, `tile`, `threshold`, `sample`, `dense_below` for that
            layer. Mappings are accepted and normalised.
        gate: how blocks are scored: "mean" (the paper's MoBA) or "mass" (an estimate of a block's attention
            mass, see `moba_hf.op.gates`; better for models never trained with MoBA).
        tile: number of neighbouring queries of a head that share one choice of blocks; a multiple or a
            divisor of `block_size`. 1: every query makes its own choice. Above 1 it is not the paper's MoBA,
            see `moba_hf.op.shared`.
        threshold: with `tile` > 1, a tile attends the blocks whose mass is at least `threshold` times the
            largest mass; strictly between 0 and 1.
        sample: with `tile` > 1, masses are estimated from every `sample`-th query of a tile (the last of each
            group in the call); a divisor of `tile`. 1: from all queries.
        dense_below: with `tile` > 1, queries before this position attend every key; a multiple of `tile`.

    Raises:
        ValueError: a value out of range.
        TypeError: a value of the wrong type.
    """

    block_size: int
    topk: int | None = None
    sink_blocks: int = 0
    local_blocks: int = 0
    full_attention_layers: tuple[int, ...] = ()
    decode: str = "full"
    decode_max_len: int = 1
    backend: str = "auto"
    layers: tuple[tuple[int, tuple[tuple[str, Any], ...]], ...] = field(default=())
    gate: str = "mean"
    tile: int = 1
    threshold: float | None = None
    sample: int = 1
    dense_below: int = 0

    def __post_init__(self) -> None:
        for name in (*LAYER_FIELDS, *SHARED_FIELDS, "decode_max_len"):
            object.__setattr__(self, name, plain_int(getattr(self, name)))
        _ = self._base  # raises if the rule is invalid
        object.__setattr__(self, "full_attention_layers", _int_tuple(self.full_attention_layers))
        object.__setattr__(self, "layers", _normalise_layers(self.layers))
        if self.decode not in _DECODE:
            raise ValueError(f"decode must be one of {', '.join(map(repr, _DECODE))}, got {self.decode!r}")
        check_int("decode_max_len", self.decode_max_len, minimum=1)
        check_backend(self.backend)
        for layer in [self._base, *(self._override(pairs) for _, pairs in self.layers)]:
            if self.decode_max_len > layer.dense_len:
                what = "topk * block_size" if isinstance(layer, LayerConfig) else "dense_below and tile"
                raise ValueError(
                    f"decode_max_len={self.decode_max_len} exceeds {what} = {layer.dense_len}; "
                    "longer calls are prefill, so lower decode_max_len"
                )

    @property
    def _base(self) -> Rule:
        return make_rule(**self._values)

    @property
    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*LAYER_FIELDS, *SHARED_FIELDS)}

    def in_words(self) -> str:
        """The rule of layers without overrides, as text: `name=value` for each setting that applies."""
        return ", ".join(
            f"{name}={value}"
            for name, value in self._values.items()
            if value not in (None, SHARED_FIELDS.get(name))
        )

    def _override(self, pairs: tuple[tuple[str, Any], ...]) -> Rule:
        values: dict[str, Any] = dict(pairs)
        own = values.get("tile") == 1  # then the shared-choice fields are not inherited
        return make_rule(**{**self._values, **(SHARED_FIELDS if own else {}), **values})

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError if a layer index does not exist in a model with `num_layers` layers."""
        for name, indices in (
            ("full_attention_layers", self.full_attention_layers),
            ("layers", tuple(index for index, _ in self.layers)),
        ):
            for index in indices:
                if not -num_layers <= index < num_layers:
                    raise ValueError(f"{name} names layer {index}, but the model has {num_layers} layers")
        overridden = [index for index, _ in self.layers]
        for index in overridden:
            if index < 0 and index + num_layers in overridden:
                raise ValueError(f"layers names layer {index + num_layers} twice, also as {index}")

    def for_layer(self, layer_idx: int, num_layers: int) -> Rule | None:
        """The rule of layer `layer_idx` (from 0) in a model of `num_layers` layers; None: full attention."""
        self.check_layers(num_layers)
        if layer_idx in {index % num_layers for index in self.full_attention_layers}:
            return None
        for index, pairs in self.layers:
            if index % num_layers == layer_idx:
                return self._override(pairs)
        return self._base

    def key_budget(self, length: int, num_layers: int) -> float:
        """Mean over layers of `min(1, topk * block_size / length)`; a full-attention layer counts as 1.

        A layer with a shared choice counts with the maximum it may attend, which is 1 without a `topk`.

        Args:
            length: tokens in the sequence.
            num_layers: number of layers in the model.
        """
        check_int("length", length, minimum=1)
        rules = [self.for_layer(i, num_layers) for i in range(num_layers)]
        most = [length if r is None or r.max_keys is None else r.max_keys for r in rules]
        return sum(min(1.0, keys / length) for keys in most) / num_layers

    def pair_share(self, length: int, num_layers: int) -> float:
        """Mean over layers of the share of dense causal (query, key) pairs that are attended.

        This exceeds the key budget, because early queries have few keys to leave out. A layer with a shared
        choice counts with the maximum it may attend.
        """
        dense = length * (length + 1) // 2
        rules = [self.for_layer(i, num_layers) for i in range(num_layers)]
        return sum(1.0 if r is None else r.pairs(length) / dense for r in rules) / num_layers

    def scaled(self, length: int, new_length: int) -> MobaConfig:
        """Settings with the same key budget at `new_length` tokens as these have at `length`.

        Every topk is scaled in proportion, but not below the number of blocks that are always attended, which
        stays the same.
        """

        def topk(rule: Rule) -> int | None:
            if rule.topk is None:
                return None
            return max(rule.forced_blocks, round(rule.topk * new_length / length))

        layers = {i: {**dict(pairs), "topk": topk(self._override(pairs))} for i, pairs in self.layers}
        return dataclasses.replace(self, topk=topk(self._base), layers=layers)  # type: ignore[arg-type]

    @classmethod
    def from_preset(cls, name: str) -> MobaConfig:
        """The preset `name`, read from `moba_hf/configs`.

        Raises:
            ValueError: an unknown name; the message lists the valid ones.
        """
        return cls.from_dict(read_preset(name)["moba"])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MobaConfig:
        """A config from JSON-like values; accepts the names of the original MoBA release too.

        Raises:
            ValueError: unknown keys, missing keys, or values out of range.
            TypeError: `values` is not a mapping, or a value has the wrong type.
        """
        if not isinstance(values, Mapping):  # a MobaConfig stored in a model config could not be saved
            raise TypeError(
                "MoBA settings must be a mapping, such as MobaConfig.from_preset('default')"
                f".to_dict(), got {values!r}"
            )
        named: dict[str, Any] = {}
        for key, value in values.items():
            name = _ALIASES.get(key, key)
            if name in named:
                raise ValueError(f"{name} is given twice (as {key!r} too)")
            named[name] = value
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(str(key) for key in named if key not in known)
        if unknown:
            raise ValueError(f"unknown MoBA settings: {', '.join(unknown)}; known are {', '.join(known)}")
        needed = ("block_size", "topk") if named.get("tile", 1) == 1 else ("block_size", "threshold")
        missing = [name for name in needed if name not in named]
        if missing:
            raise ValueError(f"a MoBA config needs {' and '.join(missing)}")
        return cls(**named)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values that `from_dict` reads back.

        Leaves out `backend`, and with `tile` = 1 the fields that apply to a shared choice only.
        """
        shared = {name: getattr(self, name) for name in SHARED_FIELDS} if self.tile > 1 else {}
        return {
            **shared,
            "block_size": self.block_size,
            "topk": self.topk,
            "sink_blocks": self.sink_blocks,
            "local_blocks": self.local_blocks,
            "gate": self.gate,
            "full_attention_layers": list(self.full_attention_layers),
            "decode": self.decode,
            "decode_max_len": self.decode_max_len,
            "layers": {str(index): dict(pairs) for index, pairs in self.layers},
        }


def require_config(name: str, value: object) -> None:
    """Raises TypeError if the argument `name` is not a MobaConfig."""
    if not isinstance(value, MobaConfig):
        maker = "from_preset" if isinstance(value, str) else "from_dict"
        raise TypeError(f"{name} must be a MobaConfig, got {value!r}; MobaConfig.{maker}(...) makes one")


def preset_names() -> list[str]:
    """The names of the presets, sorted."""
    folder = resources.files("moba_hf.configs")
    return sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))


def read_preset(name: str) -> dict[str, Any]:
    """The preset file `name`: `description`, `sources` (number -> origin) and `moba` (the settings)."""
    names = preset_names()
    if name not in names:
        raise ValueError(f"unknown preset {name!r}; valid presets are {', '.join(names)}")
    text = resources.files("moba_hf.configs").joinpath(f"{name}.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def _int_tuple(values: object) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"full_attention_layers must be a list of ints, got {values!r}")
    result = tuple(plain_int(value) for value in values)
    for value in result:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"full_attention_layers must hold ints, got {value!r}")
    return result


def _normalise_layers(layers: Any) -> tuple[tuple[int, tuple[tuple[str, Any], ...]], ...]:
    """Sorted `(index, ((name, value), ...))` pairs from a mapping (JSON keys are strings) or pairs."""
    try:
        pairs_of = layers.items() if isinstance(layers, Mapping) else [*layers]
        items = [(key, dict(pairs)) for key, pairs in pairs_of]
        if isinstance(layers, (str, bytes)):
            raise TypeError
    except (TypeError, ValueError):
        raise TypeError(f"layers must map a layer index to its overrides, got {layers!r}") from None
    result = []
    for key, pairs in items:
        try:
            index = int(str(key))  # str() rejects 1.5 and True
        except ValueError:
            raise ValueError(f"layers is keyed by layer index, got {key!r}") from None
        unknown = sorted(set(pairs) - {*LAYER_FIELDS, *SHARED_FIELDS})
        if unknown:
            raise ValueError(
                f"layer {index} overrides {', '.join(unknown)}; it may set "
                f"{', '.join([*LAYER_FIELDS, *SHARED_FIELDS])}"
            )
        result.append((index, tuple(sorted((name, plain_int(value)) for name, value in pairs.items()))))
    if len({index for index, _ in result}) != len(result):
        raise ValueError("layers names a layer twice")
    return tuple(sorted(result))
