"""Safetensors checkpoints on disk: which files hold the weights, and where each tensor lies.

Nothing here reads weights or imports a model: headers and file lengths suffice to detect damage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file.

    Attributes:
        path: the file.
        dtype: its dtype in safetensors notation, e.g. "BF16".
        shape: its shape.
        start: offset in the file of its first byte.
        end: offset in the file just past its last byte.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a folder.

    Attributes:
        shards: file name, relative to the folder -> raw header of that file, length field included.
        tensors: tensor name -> its place.
    """

    shards: dict[str, bytes]
    tensors: dict[str, StoredTensor]


def read_checkpoint(folder: Path, weights_file: str | None = None) -> Checkpoint:
    """The weights in a folder, after checking the index and every shard's header and length.

    Args:
        folder: a folder with model.safetensors, or with shards and model.safetensors.index.json.
        weights_file: name of the weights or index file, if the config gives one (`transformers_weights`).

    Raises:
        ValueError: there are no safetensors, a file is damaged or missing (the message names it), or the
            index points outside the folder.
    """
    weight_map = _weight_map(folder, weights_file)
    names = sorted(set(weight_map.values())) if weight_map else [weights_file or SINGLE_FILE]
    shards: dict[str, bytes] = {}
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        shards[name], found = _read_shard(folder / name)
        tensors.update({key: place for key, place in found.items() if weight_map.get(key, name) == name})
        absent = sorted(key for key, shard in weight_map.items() if shard == name and key not in found)
        if absent:
            raise ValueError(f"{folder / name}: contains no tensor {absent[0]!r}, although the index says so")
    return Checkpoint(shards, tensors)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file is missing, not JSON, or not an object; the message names it.
    """
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object but a {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object in UTF-8, or with ASCII escapes if UTF-8 cannot encode it."""
    try:
        data = json.dumps(values, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate, as in file names that are not UTF-8
        data = json.dumps(values, indent=2).encode()
    path.write_bytes(data + b"\n")


def _weight_map(folder: Path, weights_file: str | None) -> dict[str, str]:
    """Tensor name -> shard name, from the index; empty if there is a single file."""
    if weights_file is not None:
        if not isinstance(weights_file, str):
            raise ValueError(f"{folder / 'config.json'}: transformers_weights is not a file name")
        _check_inside(folder, weights_file, named_by=folder / "config.json")
        if not weights_file.endswith(".index.json"):
            return {}
    elif (folder / SINGLE_FILE).is_file():  # transformers prefers it to an index too
        return {}
    elif not (folder / INDEX_FILE).is_file():
        raise ValueError(_explain_no_safetensors(folder))
    index = folder / (weights_file or INDEX_FILE)
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ValueError(f"{index}: has no weight_map")
    for shard in sorted(set(map(str, weight_map.values()))):
        _check_inside(folder, shard, named_by=index)
        if not (folder / shard).is_file():
            raise ValueError(f"{folder / shard}: missing shard (named by {index.name})")
    return {str(key): str(shard) for key, shard in weight_map.items()}


def _check_inside(folder: Path, name: str, named_by: Path) -> None:
    """Raises ValueError unless `name` is a plain relative path below `folder` on every operating system.

    Links are not followed: in the Hugging Face cache every file of a snapshot is a link to a blob elsewhere.
    """
    path = PureWindowsPath(name)  # accepts both kinds of slash
    if not name or path.anchor or path.drive or ".." in path.parts:
        raise ValueError(f"{named_by}: names {name!r}, which lies outside {folder}")


def _read_shard(path: Path) -> tuple[bytes, dict[str, StoredTensor]]:
    """The raw header and the tensors of a safetensors file. ValueError names a missing or damaged file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy"):  # checks the header, the offsets and the file's length
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from None
    with path.open("rb") as file:
        length_field = file.read(8)
        header = file.read(int.from_bytes(length_field, "little"))
    offset = 8 + len(header)
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    tensors = {}
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        tensors[name] = StoredTensor(
            path, entry["dtype"], tuple(entry["shape"]), offset + start, offset + end
        )
    return length_field + header, tensors


def _explain_no_safetensors(folder: Path) -> str:
    """One line that says what a folder without safetensors contains, and what to do about it."""
    names = sorted(path.name for path in folder.iterdir())

    def first(*suffixes: str) -> str | None:
        return next((name for name in names if name.endswith(suffixes)), None)

    if name := first(".gguf"):
        return f"{folder}: contains no safetensors; to convert the GGUF file, pass its path: {folder / name}"
    if name := first(".safetensors"):
        return f"{folder}: contains {name}, but no {SINGLE_FILE} or {INDEX_FILE}; the download is incomplete"
    if name := first(".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"):
        return (
            f"{folder}: contains {name} but no safetensors; save it as safetensors first: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER), "
            "then convert NEW_FOLDER"
        )
    return f"{folder}: contains no weights (neither {SINGLE_FILE} nor {INDEX_FILE})"
