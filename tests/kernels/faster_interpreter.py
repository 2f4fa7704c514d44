"""Makes Triton's interpreter faster, without a change of what it computes: `import faster_interpreter`.

Most of its time is spent in its own Python, not in numpy. What is left out here would give the same result
again, or none.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def _patch_once_per_launch() -> None:
    """Calls of device functions look for builtins to replace only if their launch has not replaced them."""
    patch = interpreter._patch_lang
    scope: Any = None
    done: set[str] = set()

    @cache
    def modules(fn: Any) -> frozenset[str]:
        return frozenset(x.__name__ for x in fn.__globals__.values() if x is tl or x is tl.core)

    def patched(fn: Any) -> Any:
        nonlocal scope
        if scope is None or not scope._changes:  # the last launch has ended and has restored the builtins
            done.clear()
            scope = patch(fn)
        elif not modules(fn) <= done:
            patch(fn)
        done.update(modules(fn))
        return scope

    interpreter._patch_lang = patched


def _drop_overflow_checks_that_nobody_reads() -> None:
    """Each sum and product is computed again in int64, for an assertion that needs `debug`, which is off."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)


def _share_types() -> None:
    """What follows from a type alone is computed once for equal types: other types, and tensors' shapes."""
    init_type, make, convert = tl.block_type.__init__, tl.block_type.with_element_ty, tl.block_type.to_ir
    init_tensor, numpy_type = tl.tensor.__init__, interpreter._get_np_dtype
    known: dict[tuple[int, ...], dict[str, Any]] = {}

    def shared_init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (id(element_ty), *[x.value if isinstance(x, tl.constexpr) else x for x in shape])
        if key not in known:
            init_type(self, element_ty, shape)
            known[key] = self.__dict__  # holds the element type, so its id stays its own
        else:
            self.__dict__ = known[key]

    def with_element_ty(self: Any, scalar_ty: Any) -> Any:
        made = self.__dict__.setdefault("_made", {})
        if id(scalar_ty) not in made:
            made[id(scalar_ty)] = make(self, scalar_ty)
        return made[id(scalar_ty)]

    def to_ir(self: Any, builder: Any) -> Any:
        if "_ir" not in self.__dict__:
            self._ir = convert(self, builder)
        return self._ir

    def get_np_dtype(tt_dtype: Any) -> Any:
        if "_numpy" not in tt_dtype.__dict__:
            tt_dtype._numpy = numpy_type(tt_dtype)
        return tt_dtype._numpy

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        fields = type.__dict__.get("_fields")
        if fields is None:
            init_tensor(self, handle, type)
            type._fields = {name: x for name, x in self.__dict__.items() if name != "handle"}
        else:
            self.__dict__.update(fields)
            self.handle = handle

    tl.block_type.__init__ = shared_init
    tl.block_type.with_element_ty = with_element_ty
    tl.block_type.to_ir = to_ir
    tl.tensor.__init__ = tensor_init
    interpreter._get_np_dtype = get_np_dtype


_patch_once_per_launch()
_drop_overflow_checks_that_nobody_reads()
_share_types()
