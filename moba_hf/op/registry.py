"""Objects by name that traced functions may look up, made when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Registry:
    """Named objects, kept as attributes.

    A graph that is being traced sees attributes that are set meanwhile, unlike new items of a dict. `keep`
    must run outside what is traced (`torch._dynamo.assume_constant_result`), `getattr` may run inside.
    """

    def keep(self, name: str, make: Callable[[], Any]) -> str:
        """`name`, under which `getattr` finds `make()`, called where the name is new."""
        if not hasattr(self, name):
            setattr(self, name, make())
        return name
