"""Rotary embeddings whose frequencies depend on the length of a text: one set for a whole prompt.

Transformers chooses the frequencies of "dynamic" and "longrope" embeddings in every forward, by the largest
position in it. A prompt that is read in chunks would be rotated by several sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_KINDS = ("dynamic", "longrope")


@contextmanager
def whole_prompt(model: nn.Module, length: int, seen: int) -> Iterator[None]:
    """Lets `model` rotate every chunk by the frequencies of a prompt of `length` tokens.

    Args:
        seen: tokens that the cache holds already.

    Raises:
        ValueError: the cached tokens were rotated by other frequencies.
    """
    with ExitStack() as hooks:
        for module in model.modules():
            limits = _limits(module)
            if not limits:
                continue
            for kind, limit in limits:
                if seen > 0 and limit < length and (kind == "dynamic" or seen <= limit):
                    raise ValueError(
                        f'rotary embeddings of type "{kind}" change beyond {limit} tokens: the cache holds '
                        f"{seen} tokens rotated for a shorter text, the prompt has {length}; start from an "
                        "empty cache"
                    )
            before = module.register_forward_pre_hook(_Lengthen(length), with_kwargs=True)
            hooks.callback(before.remove)
            hooks.callback(module.register_forward_hook(_shorten).remove)
        yield


def _limits(module: nn.Module) -> list[tuple[str, int]]:
    """(kind, tokens beyond which frequencies change) of a rotary module, where they depend on the length."""
    kinds = getattr(module, "rope_type", None)
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
    if kinds is None or not parameters:
        return []
    by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
    result = []
    for layer, kind in by_layer.items():
        if kind in _KINDS:
            values: dict[str, Any] = parameters if layer is None else parameters[layer]
            own = (
                values["original_max_position_embeddings"]
                if kind == "longrope"
                else module.original_max_seq_len
            )
            result.append((kind, int(own)))  # type: ignore[arg-type]
    return result


class _Lengthen:
    """Adds the last position of the prompt to the positions of a call, by which frequencies are chosen."""

    def __init__(self, length: int):
        self.last = length - 1

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if not isinstance(positions, Tensor):
            raise ValueError(
                f"prefill cannot tell {type(module).__name__}, whose frequencies depend on the length, how "
                "long the prompt is: read it in one call"
            )
        longer = torch.cat([positions, torch.full_like(positions[..., :1], self.last)], dim=-1)
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": longer}
        return (args[0], longer, *args[2:]), kwargs


def _shorten(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`(cos, sin)`, `(..., length + 1, dim)`, without the position that was added."""
    cos, sin = output
    return cos[..., :-1, :], sin[..., :-1, :]
