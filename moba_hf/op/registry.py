"""Named objects that traced functions can look up, created on first use."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any


class Registry:
    """Named objects, stored as attributes.

    During tracing, new attributes are visible, unlike new items of a dict. `keep` must run outside the traced
    code (`torch.compiler.assume_constant_result`); `getattr` may run inside.
    """

    def __init__(self) -> None:
        self._attributes: dict[str, str] = {}
        self._numbers = itertools.count()

    def keep(self, name: str, make: Callable[[], Any]) -> str:
        """Stores `make()` if `name` is new, and returns the attribute that holds the object.

        The attribute is a plain identifier: torch before 2.13 splits attributes at dots to guard them.
        """
        if name not in self._attributes:
            made = make()
            attribute = f"kept_{next(self._numbers)}"  # another thread gets another number
            setattr(self, attribute, made)
            self._attributes.setdefault(name, attribute)
        return self._attributes[name]
