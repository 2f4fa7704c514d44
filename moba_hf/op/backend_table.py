"""The names of the backends and their classes."""

from __future__ import annotations

# Backends as "module:class"; a module is imported when its backend is first used.
BACKENDS: dict[str, str] = {
    "reference": "moba_hf.op.backends:ReferenceBackend",
    "portable": "moba_hf.op.backends:PortableBackend",
    "triton": "moba_hf.op.triton_backend:TritonBackend",
    "flash_attn": "moba_hf.op.flash:FlashBackend",
}


def check_backend(name: object) -> None:
    """Raises TypeError if `name` is not a string, ValueError if it is neither "auto" nor in `BACKENDS`."""
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string, got {name!r}")
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known are auto, {', '.join(BACKENDS)}")
