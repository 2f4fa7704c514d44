"""The work of a call, counted: unlike times, counts do not depend on the load of the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch.autograd.profiler import profile

Result = TypeVar("Result")


@dataclass
class Cost(Generic[Result]):
    """What a call returned, the number of torch's operators that ran, and the bytes that they allocated."""

    result: Result
    operators: int
    allocated: int


def cost_of(call: Callable[[], Result]) -> Cost[Result]:
    with profile(profile_memory=True) as run:
        result = call()
    events = run.function_events
    return Cost(result, len(events), sum(max(0, event.self_cpu_memory_usage) for event in events))
