"""The names of the backends, and where each is found."""

from __future__ import annotations

# Every backend as "module:class"; modules are imported when a backend is first used.
BACKENDS: dict[str, str] = {
    "reference": "moba_hf.op.backends:ReferenceBackend",
    "portable": "moba_hf.op.backends:PortableBackend",
    "triton": "moba_hf.op.triton_backend:TritonBackend",
    "flash_attn": "moba_hf.op.flash:FlashBackend",
}


def check_backend(name: object) -> None:
    """Raises TypeError unless `name` is a string, ValueError unless it is "auto" or in `BACKENDS`."""
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string, got {name!r}")
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known are auto, {', '.join(BACKENDS)}")
