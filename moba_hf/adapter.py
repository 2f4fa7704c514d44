"""Adapters: the facts about a model family that MoBA needs, and where they are looked up.

An adapter copies no `forward`: transformers already dispatches every attention call. It answers which layers
may use MoBA and why the others may not. Third parties ship theirs under the entry-point group
`moba_hf.patches`, named by model_type; `patches/README.md` shows one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, ClassVar

from moba_hf.config import MobaConfig

if TYPE_CHECKING:
    from torch import nn

# model_type of a text config -> "module:class" under moba_hf.patches
_BUILT_IN = {
    "llama": "llama:LlamaAdapter",
    "mistral": "mistral:MistralAdapter",
    "qwen2": "qwen:QwenAdapter",
    "qwen3": "qwen:QwenAdapter",
}
ENTRY_POINTS = "moba_hf.patches"


class Adapter:
    """Facts about one family of decoder models; override what differs.

    Attributes:
        text_config_key: name of the text config inside the model's config; None: it is the config itself.
    """

    text_config_key: ClassVar[str | None] = None

    def text_config(self, config: Any) -> Any:
        """The text config inside `config`, which may be a dict; that config itself where it is one."""
        key = self.text_config_key
        if key is None:
            return config
        return config.get(key, config) if isinstance(config, dict) else getattr(config, key, config)

    def stock_reason(self, config: Any, layer_idx: int) -> str | None:
        """Why layer `layer_idx` keeps the stock implementation; None: MoBA may run there.

        Answered from the text config alone, so without loading a model. The base class reads `layer_types`:
        everything but "full_attention" stays stock.
        """
        layer_types = getattr(config, "layer_types", None)
        kind = "full_attention" if layer_types is None else layer_types[layer_idx]
        return None if kind == "full_attention" else str(kind).replace("_", " ")

    def attention_layers(self, model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
        """Layer index and attention module of every decoder layer that calls the attention interface.

        The base class takes modules with a `layer_idx` and a `q_proj` whose config is the text config.
        """
        for module in model.modules():
            if hasattr(module, "layer_idx") and hasattr(module, "q_proj"):
                config = getattr(module, "config", None)
                if config is self.text_config(config):
                    yield int(module.layer_idx), module  # type: ignore[arg-type]

    def num_layers(self, config: Any) -> int:
        """Layers of the text model."""
        return int(config.num_hidden_layers)

    def eligible_layers(self, config: Any) -> list[int]:
        """Indices of the layers that MoBA may run in."""
        return [i for i in range(self.num_layers(config)) if self.stock_reason(config, i) is None]

    def check(self, config: Any, moba: MobaConfig) -> None:
        """Raises ValueError when `moba` does not fit the text config."""
        moba.check_layers(self.num_layers(config))


def known_families() -> list[str]:
    """Every model_type with an adapter, built in or installed, sorted."""
    return sorted({*_BUILT_IN, *(entry.name for entry in metadata.entry_points(group=ENTRY_POINTS))})


@cache
def find_adapter(model_type: str) -> Adapter:
    """The adapter of `model_type`: built in, else from the entry points.

    Raises:
        ValueError: no adapter; the message names the known families and shows how to write one.
    """
    if model_type in _BUILT_IN:
        module, name = _BUILT_IN[model_type].split(":")
        adapter: type[Adapter] = getattr(import_module(f"moba_hf.patches.{module}"), name)
        return adapter()
    for entry in metadata.entry_points(group=ENTRY_POINTS, name=model_type):
        found = entry.load()()
        if not isinstance(found, Adapter):
            raise ValueError(
                f"the entry point {entry.value} for {model_type!r} is no moba_hf.adapter.Adapter"
            )
        return found
    raise ValueError(
        f"no MoBA adapter for model_type {model_type!r}; known: {', '.join(known_families())}. "
        "To add one, subclass moba_hf.adapter.Adapter and publish it under the entry-point group "
        f"{ENTRY_POINTS!r} (patches/README.md shows how)"
    )
