"""Saves the cache of a long text on disk and reuses it while model, settings and text stay the same.

    cache, reused = read_with_saved_cache(model, input_ids, "codebase.safetensors")

A file contains the keys and values of every layer; its header has the settings and hashes of the model and of
each chunk of the text. If the text has changed, everything before the first changed chunk is reused. A file
from another model or other settings is refused, and so is one whose header and tensors do not fit together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from moba_hf.config import NAME
from moba_hf.files import replacing
from moba_hf.hf.adapter import find_adapter
from moba_hf.hf.cache import MobaCache
from moba_hf.hf.dynamic_layer import MobaLayer
from moba_hf.hf.identity import identity_of
from moba_hf.hf.layer_plan import SUSPENDED, moba_config
from moba_hf.hf.places import close_cache
from moba_hf.hf.prefill import prefill
from moba_hf.op.inputs import require_tensor
from moba_hf.op.numerics import check_int

_FORMAT = "moba_hf cache 1"

logger = logging.get_logger(__name__)


def read_with_saved_cache(
    model: Any,
    input_ids: Tensor,
    path: str | os.PathLike[str],
    *,
    chunk_size: int = 4096,
    progress: bool = True,
) -> tuple[MobaCache, int]:
    """Returns a cache with all of `input_ids`, and how many of its tokens came from the file at `path`.

    If the file did not contain all tokens, it is rewritten. If that fails, as on a full disk, a warning says
    so, and the cache is returned all the same. The cache does not record an end of the prompt, because a
    question that follows still belongs to it: a further `prefill` reads the question and records the end.

    Args:
        model: a causal language model of transformers that uses MoBA, without sliding windows.
        input_ids: `(1, length)`.
        path: the file, which need not exist.
        chunk_size: number of tokens that are hashed and read at a time; a multiple of `tile` if tiles of
            queries share a choice of blocks.

    Raises:
        ValueError: `path` is not a saved cache, is damaged, or was made by another model or with other
            settings or chunks; its folder does not exist or cannot be written to; or the model does not run
            MoBA, or runs full attention (`suspend_moba`).
    """
    check_int("chunk_size", chunk_size, minimum=1)
    _check_model(model)
    file = Path(path)
    _check_place(file)
    require_tensor("input_ids", input_ids)
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be (1, length) and not empty, got {tuple(input_ids.shape)}")
    _check_tiles(model, chunk_size)
    made_of, hashes = _made_of(model, chunk_size), chunk_hashes(input_ids[0], chunk_size)
    length = input_ids.shape[1]
    cache = MobaCache(model.config, max_cache_len=length + length // 8)
    if unfit := [layer for layer in cache.layers if not isinstance(layer, DynamicLayer) or layer.is_sliding]:
        raise ValueError(
            f"the cache of {model.config.model_type} contains a {type(unfit[0]).__name__} and cannot be saved"
        )
    reused = 0
    if file.exists():
        reused = _load(file, made_of, hashes, chunk_size, length, cache, model.device)
    if reused < length:
        padded = torch.cat([input_ids, input_ids[:, -1:]], dim=1)  # `prefill` does not read the last token
        prefill(model, padded, chunk_size, cache=cache, progress=progress, dense_tail=0)
        _save(file, made_of, hashes, cache)
    close_cache(cache, None)
    for layer in cache.layers:
        if isinstance(layer, MobaLayer):
            layer.recent.forget()  # a file contains no queries, and both ways must give the same cache
    return cache, reused


def chunk_hashes(ids: Tensor, chunk_size: int) -> list[str]:
    """For each chunk of `ids (length,)`, a hash of everything up to the end of the chunk."""
    found, so_far = [], hashlib.sha256()
    for chunk in ids.cpu().to(torch.int64).split(chunk_size):
        so_far.update(chunk.numpy().tobytes())
        found.append(so_far.copy().hexdigest()[:16])
    return found


def _check_model(model: Any) -> None:
    """Raises ValueError if the model would fill the cache by another rule than that of its settings."""
    adapter = find_adapter(model.config.model_type)
    if (runs := adapter.text_config(model.config)._attn_implementation) != NAME:
        raise ValueError(f"the model does not use MoBA but {runs!r}: a saved cache belongs to MoBA settings")
    if any(getattr(module, SUSPENDED, False) for _, module in adapter.attention_layers(model)):
        raise ValueError("the model runs full attention: call suspend_moba(model, False) before")


def _check_place(file: Path) -> None:
    """Raises ValueError, before the text is read, if `file` cannot be written."""
    folder = file.parent
    if file.exists() and not file.is_file():
        raise ValueError(f"{file}: is not a file, so no cache can be saved there")
    if not folder.is_dir():
        raise ValueError(f"{file}: the folder {folder} does not exist; create it")
    if not os.access(folder, os.W_OK) and not file.exists():
        raise ValueError(f"{file}: the folder {folder} cannot be written to")


def _check_tiles(model: Any, chunk_size: int) -> None:
    """Raises ValueError if a chunk would end inside a tile of queries that share a choice."""
    adapter = find_adapter(model.config.model_type)
    text = adapter.text_config(model.config)
    config, layers = moba_config(text), adapter.num_layers(text)
    tiles = {getattr(config.for_layer(i, layers), "tile", 1) for i in range(layers)}
    if cut := [tile for tile in sorted(tiles) if chunk_size % tile]:
        raise ValueError(f"chunk_size={chunk_size} must be a multiple of tile={cut[0]}")


def _made_of(model: Any, chunk_size: int) -> dict[str, str]:
    text = model.config.get_text_config(decoder=True)
    settings = {"moba": moba_config(text).to_dict(), "dtype": str(model.dtype), "chunk_size": chunk_size}
    return {
        "format": _FORMAT,
        "model": identity_of(model),
        "settings": json.dumps(settings, sort_keys=True),
    }


def _load(
    file: Path,
    made_of: dict[str, str],
    hashes: Sequence[str],
    chunk_size: int,
    length: int,
    cache: MobaCache,
    device: torch.device,
) -> int:
    """Copies the reusable part of the text from `file` to `cache` and returns its number of tokens."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as stored:
            known = stored.metadata() or {}
            _check(file, known, made_of)
            held = json.loads(known["chunks"])
            tokens = int(known["tokens"]) if known["tokens"].isdecimal() else 0
            _check_fit(stored, held, tokens, chunk_size, len(cache.layers))
            same = next((i for i, (a, b) in enumerate(zip(held, hashes, strict=False)) if a != b), None)
            chunks = min(len(held), len(hashes)) if same is None else same
            # the last chunk in the file may be incomplete
            reused = min(tokens, chunks * chunk_size, length)
            if chunks == len(held) and len(hashes) > chunks:
                reused = min(reused, tokens // chunk_size * chunk_size)
            for index in range(len(cache.layers) if reused else 0):
                states = (stored.get_slice(f"{name}.{index}")[:, :, :reused] for name in ("keys", "values"))
                cache.update(*states, index)
            return reused
    except (SafetensorError, KeyError, json.JSONDecodeError, _Damaged) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: damaged, or not a saved cache ({reason}); remove it") from error


def _check(file: Path, known: dict[str, str], made_of: dict[str, str]) -> None:
    for name, value in made_of.items():
        if known.get(name) != value:
            what = {"format": "not a cache that this release can read", "model": "made by another model"}
            reason = what.get(name, f"made with other settings ({known.get(name)}, not {value})")
            raise ValueError(f"{file}: {reason}; remove it or name another file")


class _Damaged(Exception):
    """The header of a file and its tensors do not fit together."""


def _check_fit(stored: Any, held: Any, tokens: int, chunk_size: int, layers: int) -> None:
    """Raises _Damaged unless the header has a hash of each chunk, and every tensor holds all tokens."""
    if not isinstance(held, list) or tokens < 1 or len(held) != -(-tokens // chunk_size):
        raise _Damaged(f"the header does not describe {tokens} tokens in chunks of {chunk_size}")
    for index in range(layers):
        for name in (f"keys.{index}", f"values.{index}"):
            shape = stored.get_slice(name).get_shape()
            if len(shape) != 4 or (shape[0], shape[2]) != (1, tokens):
                raise _Damaged(f"{name} of shape {tuple(shape)} does not hold {tokens} tokens")


def _save(file: Path, made_of: dict[str, str], hashes: Sequence[str], cache: MobaCache) -> None:
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        tensors[f"keys.{index}"] = layer.keys.contiguous()
        tensors[f"values.{index}"] = layer.values.contiguous()
    about = {**made_of, "chunks": json.dumps(list(hashes)), "tokens": str(cache.get_seq_length())}
    try:
        with replacing(file) as beside:
            save_file(tensors, beside, about)
    except (OSError, SafetensorError) as error:  # the cache is worth more than the file
        logger.warning(
            f"{file}: the cache could not be saved, so the text will be read again next time ({error})"
        )
