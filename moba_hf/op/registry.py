"""Named objects that traced functions can look up, created on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Registry:
    """Named objects, stored as attributes.

    During tracing, new attributes are visible, unlike new items of a dict. `keep` must run outside the traced
    code (`torch._dynamo.assume_constant_result`); `getattr` may run inside.
    """

    def keep(self, name: str, make: Callable[[], Any]) -> str:
        """Stores `make()` under `name` if the name is new, and returns `name`."""
        if not hasattr(self, name):
            setattr(self, name, make())
        return name
