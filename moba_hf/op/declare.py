"""Declares torch operators: `operator` the function, `fake` its fake kernel, `gradient` its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Torch defines an operator once. If the package is imported again, or a module reloaded, the operators
# stay and call the new functions: a call of an operator that was removed would crash the process.
_kept: dict[str, Any] = vars(torch.ops.moba_hf).setdefault("kept", {})
_LIBRARY = _kept.setdefault("library", torch.library.Library("moba_hf", "FRAGMENT"))


def operator(name: str, *, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Declares a function as the torch operator `moba_hf::name` for all devices; returns the operator.

    A call costs less than through `torch.library.custom_op` (dev/LOG.md, 2026-11-27), whose operators check
    their results for aliases at run time, as `torch.library.opcheck` does in the tests, and always take a
    detour for autograd.

    Args:
        mutates: the arguments that the function writes to.
    """

    def declare(function: Callable[..., Any]) -> Any:
        schema = name + torch.library.infer_schema(function, mutates_args=mutates)
        kernel = _latest(schema, function)
        if kernel is not None:
            _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
            # a frame that Dynamo skips may call the operator, whose kernels Dynamo must not trace
            _LIBRARY.impl(name, torch.compiler.disable(kernel), "CompositeExplicitAutograd")
        return getattr(torch.ops.moba_hf, name).default

    return declare


def _latest(key: str, function: Callable[..., Any]) -> Callable[..., Any] | None:
    """A function that calls the last one that was given for `key`; None: that has been returned before."""
    first = key not in _kept
    _kept[key] = function
    return (lambda *args, **kwargs: _kept[key](*args, **kwargs)) if first else None


def fake(op: Any) -> Callable[[Callable[..., Any]], None]:
    """Registers a function as the fake kernel of an `operator`."""

    def register(function: Callable[..., Any]) -> None:
        kernel = _latest(f"{op.name()} fake", function)
        if kernel is not None:
            torch.library.register_fake(op, kernel)

    return register


def gradient(op: Any, backward: Callable[..., Any], setup: Callable[..., None] | None = None) -> None:
    """Registers the backward of an `operator`, and what saves tensors for it."""
    setup = None if setup is None else _latest(f"{op.name()} setup", setup)
    kernel = _latest(f"{op.name()} backward", backward)
    if kernel is not None:
        torch.library.register_autograd(op, kernel, setup_context=setup)


def no_second_derivative(*_: Any) -> None:
    """The backward of the operators that compute gradients."""
    raise NotImplementedError("MoBA has no second derivative: its gradients cannot be differentiated")
