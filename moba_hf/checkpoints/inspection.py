"""What a model would do under MoBA and what it would cost, computed from its config without reading weights.

The FLOPs are those of attention over a prompt of N tokens, batch 1: scores, softmax-weighted values and
MoBA's gate. Projections, MLPs and linear-attention layers are not counted, since MoBA does not change them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from moba_hf.checkpoints.load import find_source
from moba_hf.checkpoints.model_config import read_model_config
from moba_hf.config import DEFAULT_PRESET, MobaConfig
from moba_hf.hf.adapter import Adapter, find_adapter
from moba_hf.op.gates import GATES
from moba_hf.op.layer_rule import Rule
from moba_hf.op.shared_rule import SharedRule

LENGTHS = (8192, 32768, 131072, 1048576)


@dataclass(frozen=True)
class LayerRow:
    """One decoder layer.

    Attributes:
        index: index of the layer, from 0.
        kind: "moba", "full" (full attention, as the settings say) or "stock" (left to transformers).
        rule: the MoBA rule of the layer; None if MoBA does not run in it.
        why: the rule as text, or the reason why MoBA does not run.
        key_limit: maximum number of keys a query attends; None: no limit; 0: the layer attends no keys.
    """

    index: int
    kind: str
    rule: Rule | None
    why: str
    key_limit: int | None

    def pairs(self, length: int) -> int:
        """Number of (query, key) pairs attended per head over a prompt of `length` tokens."""
        if self.rule is not None:
            return self.rule.pairs(length)
        return _window_pairs(length, self.key_limit)

    def stock_pairs(self, length: int) -> int:
        """The same without MoBA."""
        return _window_pairs(length, self.key_limit if self.kind == "stock" else None)

    def gate_pairs(self, length: int) -> int:
        """Number of (query, vector) products in the gate; 0 if the rule attends the whole prompt."""
        if self.rule is None or self.rule.dense_len >= length:
            return 0
        if isinstance(self.rule, SharedRule):
            return _shared_gate_pairs(self.rule, length)
        blocks, rest = divmod(length, self.rule.block_size)
        scores = self.rule.block_size * (blocks * (blocks - 1) // 2) + rest * blocks
        return scores * GATES[self.rule.gate].vectors(self.rule.block_size)


@dataclass(frozen=True)
class LengthRow:
    """Costs of one prompt.

    Attributes:
        tokens: length of the prompt.
        key_budget: maximum share of `tokens` that a query may attend, averaged over the layers with
            attention. A shared choice may attend less, depending on the text.
        pair_share: share of the (query, key) pairs of dense causal attention that are attended in these
            layers; with a shared choice, the maximum.
        dense_flops: attention FLOPs of the whole prefill without MoBA, counting 2 per multiply-add.
        moba_flops: the same with MoBA, its gate included.
        kv_cache_bytes: size of the keys and values after the prefill; MoBA keeps all of them.
    """

    tokens: int
    key_budget: float
    pair_share: float
    dense_flops: int
    moba_flops: int
    kv_cache_bytes: int


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_config`.

    Attributes:
        model_type: model type of the config.
        text_model_type: model type of its text config.
        moba: the MoBA settings.
        moba_source: where the settings come from.
        num_heads, num_kv_heads, head_dim: sizes of the attention layers.
        dtype: dtype of keys and values in the cache.
        layers: one row per decoder layer.
        lengths: one row per prompt length.
        max_length: the model's context length in tokens; None if the config does not say.
        rope: the rotary parameters; None if the model has none.
    """

    model_type: str
    text_model_type: str
    moba: MobaConfig
    moba_source: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    layers: tuple[LayerRow, ...]
    lengths: tuple[LengthRow, ...]
    max_length: int | None = None
    rope: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "moba": self.moba.to_dict()}


def inspect_config(
    config: Any, moba: MobaConfig | None = None, lengths: tuple[int, ...] = LENGTHS
) -> Inspection:
    """What a model of `config` does in every layer under MoBA, and what that costs.

    Args:
        config: a transformers config.
        moba: the settings; None: those in the config, or the preset "default" if it has none.
        lengths: prompt lengths in tokens.

    Raises:
        ValueError: an unknown or unsupported architecture, or settings that do not fit it.
    """
    adapter = find_adapter(config.model_type)
    text = adapter.text_config(config)
    source = "as asked"
    if moba is None:
        stored = getattr(text, "moba", None)
        source = f"preset {DEFAULT_PRESET}" if stored is None else "config.moba"
        moba = MobaConfig.from_preset(DEFAULT_PRESET) if stored is None else MobaConfig.from_dict(stored)
    adapter.check(text, moba)
    layers = tuple(_layer_row(adapter, text, moba, i) for i in range(adapter.num_layers(text)))
    num_heads = int(text.num_attention_heads)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    dtype = getattr(text, "dtype", None) or getattr(config, "dtype", None) or torch.bfloat16
    if isinstance(dtype, str):  # a saved config holds its name
        dtype = getattr(torch, dtype.removeprefix("torch."))
    shape = _Shape(
        num_heads, int(getattr(text, "num_key_value_heads", None) or num_heads), int(head_dim), dtype
    )
    return Inspection(
        model_type=config.model_type,
        text_model_type=text.model_type,
        moba=moba,
        moba_source=source,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=str(dtype).removeprefix("torch."),
        layers=layers,
        lengths=tuple(_length_row(layers, shape, length) for length in lengths),
        max_length=getattr(text, "max_position_embeddings", None),
        rope=getattr(text, "rope_parameters", None) or None,
    )


def inspect_checkpoint(src: str | Path, moba: MobaConfig | None = None) -> Inspection:
    """`inspect_config` for a folder with a config.json, or for that file; no other file is read.

    If `src` is not a path, "owner/name" is looked up in the Hugging Face cache.

    Raises:
        ValueError: config.json is missing or damaged, or as for `inspect_config`.
    """
    path = find_source(src)
    folder = path.parent if path.name == "config.json" and path.is_file() else path
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder with a config.json")
    _, config = read_model_config(folder)
    try:
        return inspect_config(config, moba)
    except Exception as error:  # the errors of a bad config have no common class
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


@dataclass(frozen=True)
class _Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


def _layer_row(adapter: Adapter, config: Any, moba: MobaConfig, index: int) -> LayerRow:
    stock = adapter.stock_reason(config, index)
    if stock is not None:
        return LayerRow(index, "stock", None, stock, adapter.key_limit(config, index))
    rule = moba.for_layer(index, adapter.num_layers(config))
    if rule is None:
        return LayerRow(index, "full", None, "in full_attention_layers", None)
    kept = [("sink", rule.sink_blocks), ("local", rule.local_blocks)]
    words = "".join(f", {count} {name}" for name, count in kept if count)
    gate = GATES[rule.gate].words
    if isinstance(rule, SharedRule):
        most = "" if rule.topk is None else f", at most {rule.topk}"
        dense = f", dense below {rule.dense_below:,}" if rule.dense_below else ""
        why = f"blocks of {rule.block_size} shared by {rule.tile} queries, threshold {rule.threshold:g}"
        why += f", one query in {rule.sample} scored" if rule.sample > 1 else ""
        return LayerRow(index, "moba", rule, f"{why}{most}{words}{dense}", rule.max_keys)
    why = f"{rule.topk} blocks of {rule.block_size}{words}{gate and f', {gate}'}"
    return LayerRow(index, "moba", rule, why, rule.max_keys)


def _shared_gate_pairs(rule: SharedRule, length: int) -> int:
    """Number of (sampled query, vector) products that score the blocks for all tiles."""
    tiles = range(rule.dense_below, length, rule.tile)
    scores = sum(-(-min(rule.tile, length - t) // rule.sample) * (t // rule.block_size) for t in tiles)
    return scores * GATES["mass"].vectors(rule.block_size)


def _length_row(layers: tuple[LayerRow, ...], shape: _Shape, length: int) -> LengthRow:
    attending = [layer for layer in layers if layer.key_limit != 0]
    shares = [min(1.0, (layer.key_limit or length) / length) for layer in attending]
    pairs = sum(layer.pairs(length) for layer in attending)
    stock_pairs = sum(layer.stock_pairs(length) for layer in attending)
    gate_pairs = sum(layer.gate_pairs(length) for layer in attending)
    means = length * sum(layer.gate_pairs(length) > 0 for layer in attending)
    held = sum(min(length, (layer.kind == "stock" and layer.key_limit) or length) for layer in attending)
    per_pair = 4 * shape.num_heads * shape.head_dim  # q.k and weight * v, a multiply and an add each
    return LengthRow(
        tokens=length,
        key_budget=sum(shares) / max(1, len(attending)),
        pair_share=pairs / max(1, len(attending) * _window_pairs(length, None)),
        dense_flops=per_pair * stock_pairs,
        moba_flops=per_pair * pairs
        + 2 * shape.num_heads * shape.head_dim * gate_pairs
        + shape.num_kv_heads * shape.head_dim * means,
        kv_cache_bytes=2 * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize * held,
    )


def _window_pairs(length: int, window: int | None) -> int:
    """Number of causal (query, key) pairs if a query sees at most `window` keys, its own included."""
    seen = length if window is None else min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def describe(inspection: Inspection) -> str:
    """The inspection as text, with a row per range of equal layers and a row per length."""
    kinds = {kind: sum(row.kind == kind for row in inspection.layers) for kind in ("moba", "full", "stock")}
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    most = "up to " if any(isinstance(row.rule, SharedRule) for row in inspection.layers) else ""
    lines = [
        f"{inspection.model_type}: {len(inspection.layers)} layers ({counts}), {inspection.num_heads} heads, "
        f"{inspection.num_kv_heads} kv heads, head_dim {inspection.head_dim}, {inspection.dtype}",
        f"MoBA settings: {inspection.moba_source}",
        *([] if inspection.max_length is None else [f"context: {inspection.max_length:,} tokens"]),
        *([] if inspection.rope is None else [f"rotary embedding: {_rope_text(inspection.rope)}"]),
        "",
        *text_table(
            [("LAYERS", "ATTENTION", "WHY"), *_layer_ranges(inspection.layers)],
        ),
        "",
        *text_table(
            [
                ("TOKENS", "KEY BUDGET", "OF DENSE PAIRS", "DENSE FLOPS", "MOBA FLOPS", "KV CACHE"),
                *(
                    (
                        f"{row.tokens:,}",
                        f"{most}{row.key_budget:.1%}",
                        f"{most}{row.pair_share:.1%}",
                        f"{row.dense_flops:.3g}",
                        f"{most}{row.moba_flops:.3g}",
                        f"{row.kv_cache_bytes / 2**30:,.2f} GiB",
                    )
                    for row in inspection.lengths
                ),
            ],
            right=True,
        ),
    ]
    if most:
        lines += [
            "",
            "How many blocks a shared choice takes depends on the text. The shares above are upper limits; "
            "'moba-hf eval' measures the actual ones.",
        ]
    if inspection.model_type != inspection.text_model_type:
        lines.insert(1, f"text model: {inspection.text_model_type}; every other tower stays stock")
    return "\n".join(lines)


def _layer_ranges(layers: Sequence[LayerRow]) -> list[tuple[str, str, str]]:
    """Layers (`3`, or `3-7` for equal neighbours), kind and reason."""
    ranges = []
    for (kind, why), rows in groupby(layers, key=lambda row: (row.kind, row.why)):
        numbers = [row.index for row in rows]
        first, last = numbers[0], numbers[-1]
        ranges.append((str(first) if first == last else f"{first}-{last}", kind, why))
    return ranges


def _rope_text(rope: dict[str, Any]) -> str:
    """Rotary parameters on one line; if they differ by layer type, one type after the other."""
    if all(isinstance(value, dict) for value in rope.values()):
        return "; ".join(f"{kind}: {_rope_text(one)}" for kind, one in rope.items())
    shown = {name: value for name, value in rope.items() if not isinstance(value, (list, tuple))}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def text_table(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """The lines of a table in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = str.rjust if right else str.ljust
    return ["  ".join(map(align, row, widths)).rstrip() for row in rows]
