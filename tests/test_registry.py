"""Named objects stay apart, whichever thread stores them."""

from __future__ import annotations

from typing import Any

from moba_hf.op.registry import Registry


class Interrupted(Registry):
    """A registry in which another thread stores an object while `first` is being stored."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if value == "first":
            self.keep("b", lambda: "second")


def test_names_of_two_threads_get_two_objects() -> None:
    registry = Interrupted()
    found = [getattr(registry, registry.keep(name, lambda: "first")) for name in ("a", "b", "a")]
    assert found == ["first", "second", "first"]
