"""The module in a checkpoint that lets `trust_remote_code=True` load it with MoBA, without `import moba_hf`.

`auto_map` in config.json names a class of this module. The module imports moba_hf, and its class delegates to
the class of transformers, so the loaded model is the same as after `import moba_hf`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

AUTO_MAP = "auto_map"
MODULE = "modeling_moba.py"

_STEM = MODULE.removesuffix(".py")
_TEXT = '''\
"""Loads this checkpoint with MoBA (Mixture of Block Attention), which the package moba_hf provides.

    AutoClass.from_pretrained(folder, trust_remote_code=True)

This module imports moba_hf, which makes "moba" known to transformers, and changes nothing else.
"""

import transformers

try:
    import moba_hf  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "moba_hf":
        raise
    raise ImportError("this checkpoint runs MoBA, which needs moba_hf: pip install moba-hf") from None


class ClassName(transformers.ClassName):
    """Delegates to the class of this name in transformers."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Loads the model, now that transformers knows "moba"."""
        return transformers.ClassName.from_pretrained(*args, **{**kwargs, "trust_remote_code": False})
'''


def module_text(auto_class: str, class_name: str) -> str:
    """The source of the module with which `auto_class` of transformers loads models of class `class_name`."""
    return _TEXT.replace("AutoClass", auto_class).replace("ClassName", class_name)


def auto_map(auto_class: str, class_name: str) -> dict[str, str]:
    """The entry `auto_map` of config.json for `module_text`."""
    return {auto_class: f"{_STEM}.{class_name}"}


def read_auto_map(found: Any) -> tuple[str, str] | None:
    """Auto class and class name in an entry `auto_map`; None: it is not from `auto_map()`."""
    if not isinstance(found, dict) or len(found) != 1:
        return None
    auto_class, reference = next(iter(found.items()))
    module, _, class_name = str(reference).partition(".")
    names = (auto_class, class_name)
    return names if module == _STEM and all(str(name).isidentifier() for name in names) else None


def write_missing_module(folder: Path, config: Any) -> None:
    """Writes the module into a folder if the saved `config` names it, as transformers does not copy it."""
    names = read_auto_map(getattr(config, AUTO_MAP, None))
    if names is not None and not (folder / MODULE).exists():
        (folder / MODULE).write_text(module_text(*names), encoding="utf-8")
