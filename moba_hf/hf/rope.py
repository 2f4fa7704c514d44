"""Rotary embeddings whose frequencies depend on the text length: uses one set for a whole prompt.

transformers chooses the frequencies of "dynamic" and "longrope" embeddings in every forward, from the largest
position in the call. The chunks of one prompt would be rotated with different frequencies.
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
    """Makes `model` rotate every chunk with the frequencies for a prompt of `length` tokens.

    Args:
        seen: number of tokens already in the cache.

    Raises:
        ValueError: the cached tokens were rotated with other frequencies.
    """
    with ExitStack() as hooks:
        for module in model.modules():
            limits = _limits(module)
            if not limits:
                continue
            for kind, limit in limits:
                if seen > 0 and limit < length and (kind == "dynamic" or seen <= limit):
                    raise ValueError(
                        f'rotary embeddings of type "{kind}" change beyond {limit} tokens: the {seen} tokens '
                        f"in the cache were rotated for a shorter text, but the prompt has {length}; start "
                        "with an empty cache"
                    )
            before = module.register_forward_pre_hook(_Lengthen(length), with_kwargs=True)
            hooks.callback(before.remove)
            hooks.callback(module.register_forward_hook(_shorten).remove)
        yield


def _limits(module: nn.Module) -> list[tuple[str, int]]:
    """`(kind, tokens beyond which frequencies change)` of a rotary module; empty if they never change."""
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
    """Appends the last position of the prompt to the positions of a call, which determine the frequencies."""

    def __init__(self, length: int):
        self.last = length - 1

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if not isinstance(positions, Tensor):
            raise ValueError(
                f"the frequencies of {type(module).__name__} depend on the text length, and prefill cannot "
                "pass it the length of the prompt: read the prompt in one call"
            )
        longer = torch.cat([positions, torch.full_like(positions[..., :1], self.last)], dim=-1)
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": longer}
        return (args[0], longer, *args[2:]), kwargs


def _shorten(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Removes the appended position from `(cos, sin)`, each `(..., length + 1, dim)`."""
    cos, sin = output
    return cos[..., :-1, :], sin[..., :-1, :]
