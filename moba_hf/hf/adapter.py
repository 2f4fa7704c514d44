"""Adapters: the facts about a model family that MoBA needs, and the lookup by model_type.

An adapter copies no `forward`, because transformers already dispatches every attention call. It says which
layers may use MoBA and why the others may not. Third parties publish adapters in the entry-point group
`moba_hf.patches`, one entry per model_type; `patches/README.md` has an example.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, ClassVar

from moba_hf.config import MobaConfig
from moba_hf.op.layer_rule import Rule

if TYPE_CHECKING:
    from torch import nn

# model_type of a text config -> "module:class" under moba_hf.patches
_BUILT_IN = {
    "gemma3_text": "gemma:Gemma3Adapter",
    "llama": "llama:LlamaAdapter",
    "ministral": "mistral:MinistralAdapter",
    "ministral3": "mistral:MistralAdapter",
    "mistral": "mistral:MistralAdapter",
    "mistral3": "mistral:Mistral3Adapter",
    "mixtral": "mixtral:MixtralAdapter",
    "qwen2": "qwen:QwenAdapter",
    "qwen2_5_vl": "qwen_vl:QwenVLAdapter",
    "qwen2_5_vl_text": "qwen_vl:QwenVLAdapter",
    "qwen2_moe": "qwen:QwenAdapter",
    "qwen2_vl": "qwen_vl:QwenVLAdapter",
    "qwen2_vl_text": "qwen_vl:QwenVLAdapter",
    "qwen3": "qwen:QwenAdapter",
    "qwen3_5": "qwen_vl:QwenVLAdapter",
    "qwen3_5_moe": "qwen_vl:QwenVLAdapter",
    "qwen3_5_moe_text": "qwen_vl:QwenVLAdapter",
    "qwen3_5_text": "qwen_vl:QwenVLAdapter",
    "qwen3_moe": "qwen:Qwen3MoeAdapter",
    "qwen3_next": "qwen:QwenAdapter",
    "qwen3_vl": "qwen_vl:QwenVLAdapter",
    "qwen3_vl_moe": "qwen_vl:QwenVLAdapter",
    "qwen3_vl_moe_text": "qwen_vl:QwenVLAdapter",
    "qwen3_vl_text": "qwen_vl:QwenVLAdapter",
}
# model_type -> why no adapter can make MoBA work
_MLA = "it uses multi-head latent attention; its cache contains no keys from which to compute block means"
_SPARSE = "its attention is already sparse: an indexer chooses the keys of every query"
_REFUSED = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3"), _MLA),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), _SPARSE),
    "gemma3": "image tokens attend to later tokens of the same image; load only the text model (gemma3_text)",
    "gpt_oss": "its attention has learned sinks, which MoBA does not compute",
    "mistral4": _MLA,
    "mistral_large4": _SPARSE,
    "mistral_large4_text": _SPARSE,
    "qwen4_exp": _SPARSE,
    "qwen4_exp_text": _SPARSE,
}
ENTRY_POINTS = "moba_hf.patches"
# model_type -> adapter that takes precedence over all others, see `trying`
_TRYING: dict[str, Adapter] = {}


class Adapter:
    """Facts about one family of decoder models. Subclasses override what differs.

    Attributes:
        text_config_key: name of the text config inside the model's config; None: the config is the text
            config. A nested text config has its own model_type, which needs an adapter too.
        window_everywhere: a `sliding_window` in the config applies to every layer.
        rotary_pairs: how rotary embedding pairs the coordinates of a head: "halves" (d with d + D/2), or
            "neighbours" (2d with 2d + 1).
    """

    text_config_key: ClassVar[str | None] = None
    window_everywhere: ClassVar[bool] = False
    rotary_pairs: ClassVar[str] = "halves"

    def text_config(self, config: Any) -> Any:
        """The text config inside `config`, which may be a dict; `config` itself if it has no nested one."""
        key = self.text_config_key
        if key is None:
            return config
        return config.get(key, config) if isinstance(config, dict) else getattr(config, key, config)

    def nested_key(self, config: Any) -> str | None:
        """Name of the text config nested in `config`; None if `config` is the text config."""
        return None if self.text_config(config) is config else self.text_config_key

    def stock_reason(self, config: Any, layer_idx: int) -> str | None:
        """Why layer `layer_idx` keeps the stock implementation; None: it may use MoBA.

        Only the text config is read, so no model need be loaded. The base class reads `layer_types`: all
        layers except "full_attention" stay stock. With `window_everywhere` it also reads `sliding_window`.
        """
        window = getattr(config, "sliding_window", None) if self.window_everywhere else None
        if window is not None:
            return f"sliding window of {window}"
        layer_types = getattr(config, "layer_types", None)
        kind = "full_attention" if layer_types is None else layer_types[layer_idx]
        return None if kind == "full_attention" else str(kind).replace("_", " ")

    def key_limit(self, config: Any, layer_idx: int) -> int | None:
        """How many keys a query of a stock layer attends to at most; None: all; 0: no attention layer.

        Used only to count keys. The base class handles sliding windows and layers without attention.
        """
        layer_types = getattr(config, "layer_types", None)
        kind = "full_attention" if layer_types is None else str(layer_types[layer_idx])
        if "sliding" in kind or (self.window_everywhere and layer_types is None):
            return int(getattr(config, "sliding_window", None) or 0) or None
        return None if "attention" in kind and "linear" not in kind else 0

    def attention_layers(self, model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
        """Yields layer index and attention module of every decoder layer that calls the attention interface.

        The base class finds modules with a `layer_idx` and a `q_proj` whose config is the text config.
        """
        text_config = self.text_config(model.config)
        for module in model.modules():
            attends = hasattr(module, "layer_idx") and hasattr(module, "q_proj")
            if attends and getattr(module, "config", None) is text_config:
                yield int(module.layer_idx), module  # type: ignore[arg-type]

    def output_projection(self, module: nn.Module) -> nn.Module:
        """The output projection of an attention layer; its input is `(..., heads * v_dim)`."""
        return module.o_proj  # type: ignore[return-value]

    def packing_refusal(self, config: Any, given: Collection[str]) -> str | None:
        """Why layers other than attention mix the documents of a packed call; None: they do not.

        Args:
            config: the text config.
            given: names of the keyword arguments that reach the attention layers.
        """
        linear = "linear_attention" in (getattr(config, "layer_types", None) or ())
        if not linear or {"cu_seq_lens_q", "seq_idx"} <= set(given):
            return None
        return (
            "its linear-attention layers carry their state from one document to the next unless "
            "flash-linear-attention is installed and cu_seq_lens_q and seq_idx are passed"
        )

    def num_layers(self, config: Any) -> int:
        """Number of layers of the text model."""
        return int(config.num_hidden_layers)

    def rule(self, config: Any, moba: MobaConfig, layer_idx: int) -> Rule | None:
        """The rule of a layer under `moba`, with the family's `rotary_pairs`; None: full attention."""
        rule = moba.for_layer(layer_idx, self.num_layers(config))
        return None if rule is None else replace(rule, rotary_pairs=self.rotary_pairs)

    def eligible_layers(self, config: Any) -> list[int]:
        """Indices of the layers that may use MoBA."""
        return [i for i in range(self.num_layers(config)) if self.stock_reason(config, i) is None]

    def check(self, config: Any, moba: MobaConfig) -> None:
        """Raises ValueError if `moba` does not fit the text config."""
        moba.check_layers(self.num_layers(config))


def known_families() -> list[str]:
    """All model_types that have an adapter, built in or installed, sorted."""
    return sorted({*_BUILT_IN, *(entry.name for entry in metadata.entry_points(group=ENTRY_POINTS))})


def has_adapter(model_type: str) -> bool:
    """Whether `find_adapter` would find one."""
    return model_type in _BUILT_IN or model_type in known_families()  # reading entry points takes 3 ms


@cache
def find_adapter(model_type: str) -> Adapter:
    """The adapter of `model_type`: the built-in one, else one from the entry points.

    Raises:
        ValueError: there is no adapter. The message names the known families and how to add one, or says why
            the architecture cannot use MoBA.
    """
    if model_type in _TRYING:
        return _TRYING[model_type]
    if model_type in _REFUSED:
        raise ValueError(f"MoBA cannot be used in {model_type!r} models: {_REFUSED[model_type]}")
    if model_type in _BUILT_IN:
        module, name = _BUILT_IN[model_type].split(":")
        adapter: type[Adapter] = getattr(import_module(f"moba_hf.patches.{module}"), name)
        return adapter()
    for entry in metadata.entry_points(group=ENTRY_POINTS, name=model_type):
        found = entry.load()()
        if not isinstance(found, Adapter):
            raise ValueError(
                f"the entry point {entry.value} for {model_type!r} is not a moba_hf.hf.adapter.Adapter"
            )
        return found
    raise ValueError(
        f"no MoBA adapter for model_type {model_type!r}; known: {', '.join(known_families())}. "
        "To add one, subclass moba_hf.hf.adapter.Adapter and publish it under the entry-point group "
        f"{ENTRY_POINTS!r} (patches/README.md shows how)"
    )


@contextmanager
def trying(adapter: Adapter, model_types: Collection[str]) -> Iterator[None]:
    """Inside the `with` block, `find_adapter` returns `adapter` for `model_types`, installed or not."""
    previous = dict(_TRYING)
    _TRYING.update(dict.fromkeys(model_types, adapter))
    find_adapter.cache_clear()
    try:
        yield
    finally:
        _TRYING.clear()
        _TRYING.update(previous)
        find_adapter.cache_clear()
