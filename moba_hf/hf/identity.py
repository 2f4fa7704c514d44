"""A hash that identifies the models and tensors from which a result was computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Config entries that say where a model comes from or how it runs, not what it computes.
_NOT_OF_THE_MODEL = {
    *("moba", "attn_implementation", "_attn_implementation", "_name_or_path", "transformers_version"),
    *("dtype", "torch_dtype", "architectures", "use_cache", "auto_map"),
}
_SAMPLE = 256  # approximate number of values of each weight that `identity_of` hashes


def identity_of(*things: Any) -> str:
    """A hash of tensors, and of models: their config, a sample of every weight, and which PEFT adapters run.

    How a model runs (`config.moba`, its attention implementation) does not change the hash.
    """
    found = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Tensor):
            found.update(f"{thing.dtype} {tuple(thing.shape)}".encode() + thing.cpu().numpy().tobytes())
            continue
        config = json.dumps(values_of_model(thing.config.to_dict()), sort_keys=True, default=str)
        found.update(config.encode())
        for name, weight in thing.named_parameters():
            step = max(1, weight.numel() // _SAMPLE)
            some = weight.detach().reshape(-1)[::step]
            found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            if not weight.is_meta:  # offloaded
                found.update(some.float().cpu().numpy().tobytes())
        for name, module in thing.named_modules():  # PEFT marks the layers that hold adapters
            disabled: Any = getattr(module, "disable_adapters", None)
            if isinstance(disabled, bool):
                active = [] if disabled else list(module.active_adapters)
                found.update(f"{name} {active}".encode())
    return found.hexdigest()[:16]


def values_of_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config, nested ones too, that say what the model computes, not how it runs."""
    return {
        name: values_of_model(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in _NOT_OF_THE_MODEL
    }
