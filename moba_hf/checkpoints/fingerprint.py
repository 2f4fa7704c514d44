"""A hash that tells apart the models of checkpoints, from their files alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moba_hf.checkpoints.changes import Changes
from moba_hf.checkpoints.gguf_files import is_gguf
from moba_hf.checkpoints.load import find_source, has_safetensors
from moba_hf.checkpoints.model_config import read_model_config
from moba_hf.checkpoints.safetensors_files import read_checkpoint
from moba_hf.hf.identity import values_of_model

_PIECE, _PIECES = 64, 3  # bytes, and pieces of each tensor, that are hashed
_PIECES_OF_GGUF = 4096  # spread over a GGUF file, whose tensors are not looked up


def fingerprint(source: str | Path, changes: Changes | None = None) -> str | None:
    """A hash of the config and a sample of every weight of a checkpoint; None: it has no safetensors.

    A copy has the same hash, and so has a checkpoint that was converted from `source`: `config.moba` and how
    the model runs do not change it. A longer context does.

    Args:
        source: a folder, a GGUF file, or "owner/name" of a model in the Hugging Face cache.
        changes: what a conversion of `source` changes in its config; None: nothing.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    path = find_source(source)
    found = hashlib.sha256()
    if is_gguf(path):
        size = path.stat().st_size
        longer = None if changes is None else changes.context
        found.update(f"{size} {longer}".encode())
        found.update(_sample(path, 0, size, _PIECES_OF_GGUF))
        return found.hexdigest()[:16]
    values, config = read_model_config(path)
    if not has_safetensors(path, values):
        return None
    weights = read_checkpoint(path, values.get("transformers_weights"))
    given: Mapping[str, Any] = values if changes is None else changes.apply(values, config)
    found.update(json.dumps(values_of_model(given), sort_keys=True).encode())
    for name, place in sorted(weights.tensors.items()):
        found.update(f"{name} {place.dtype} {place.shape}".encode())
        found.update(_sample(place.path, place.start, place.end, _PIECES))
    return found.hexdigest()[:16]


def _sample(path: Path, start: int, end: int, pieces: int) -> bytes:
    """`pieces` pieces of the bytes `[start, end)` of a file, from the first to the last."""
    room = max(0, end - start - _PIECE)
    with path.open("rb") as file:
        sampled = []
        for piece in range(pieces):
            file.seek(start + room * piece // (pieces - 1))
            sampled.append(file.read(min(_PIECE, end - start)))
    return b"".join(sampled)
