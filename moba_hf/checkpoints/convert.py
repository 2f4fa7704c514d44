"""Checkpoint to checkpoint: the same weights, with MoBA in the config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from moba_hf.checkpoints.folders import check_target, copy_file, list_files, new_folder, recover_folder
from moba_hf.checkpoints.gguf_files import (
    DTYPES,
    is_gguf,
    load_gguf_model,
    load_gguf_tokenizer,
    read_gguf_config,
)
from moba_hf.checkpoints.safetensors_files import read_checkpoint, read_json_object
from moba_hf.config import MobaConfig
from moba_hf.hf.adapter import Adapter, find_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_CONFIG = "config.json"
# Some checkpoints carry this; on loading it would win over the public field.
_PRIVATE = "_attn_implementation"


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    config: MobaConfig,
    *,
    overwrite: bool = False,
    link: bool = False,
    dtype: str | None = None,
) -> Path:
    """Writes `src` as a checkpoint that transformers loads with MoBA, and returns its folder.

    A folder of safetensors is copied byte for byte, `.git` and `.cache` excepted, and only config.json
    changes: it gains `moba` (in the text config) and `attn_implementation`. A GGUF file is dequantised and
    saved with its tokenizer. Everything is checked before anything is written; the result appears under its
    name only when it is whole, and after an error or an interrupt nothing is left beside it.

    Args:
        src: folder with config.json and safetensors, or a .gguf file.
        dst: folder to make.
        config: the settings to store; its `backend` is not stored.
        overwrite: replace `dst` if it is a checkpoint already.
        link: share the weight files of `src` through hard links instead of copying them, where the file
            system can. Changing such a file in place then changes both.
        dtype: for a GGUF file what to save the weights as: "float32" (default, exact), "bfloat16" or
            "float16" (half the size, rounded).

    Raises:
        ValueError: a source, a target or settings that cannot be used; the message names the file.
        OSError: the file system refused.
    """
    source, target = Path(src), Path(dst).resolve()
    recover_folder(target)
    if source.is_dir():
        if dtype is not None:
            raise ValueError(f"{source}: dtype is for GGUF files; a folder of safetensors is copied as it is")
        _convert_folder(source.resolve(), target, config, overwrite=overwrite, link=link)
    elif is_gguf(source):
        if link:
            raise ValueError(f"{source}: a GGUF file is dequantised, so there is nothing to link")
        _convert_gguf(source.absolute(), target, config, overwrite=overwrite, dtype=dtype or DTYPES[0])
    elif source.suffix == ".gguf" and source.is_file():
        raise ValueError(f"{source}: damaged GGUF file (it does not begin as one)")
    elif source.is_file():
        raise ValueError(f"{source}: is not a GGUF file; to convert safetensors pass their folder")
    else:
        raise ValueError(
            f"{source}: no such file or folder (of a model on the Hub pass the downloaded folder)"
        )
    return target


def read_model_config(folder: Path) -> tuple[dict[str, Any], PreTrainedConfig]:
    """config.json of a checkpoint, as JSON and as the config class of its model_type.

    Raises:
        ValueError: config.json is missing, not JSON, or not a config of the model_type it names.
    """
    path = folder / _CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: {_explain_no_config(folder)}")
    values = read_json_object(path)
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{path}: names no model_type")
    find_adapter(model_type)  # an unknown one is told with the families there are

    from transformers import CONFIG_MAPPING

    try:
        return values, CONFIG_MAPPING[model_type].from_dict(deepcopy(values))
    except Exception as error:  # config classes raise what they like on bad values
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a config of model_type {model_type!r} ({reason})") from error


def check_config(config: PreTrainedConfig, moba: MobaConfig) -> Adapter:
    """The adapter of a model; ValueError when it has none or when `moba` does not fit the model."""
    adapter = find_adapter(config.model_type)
    adapter.check(adapter.text_config(config), moba)
    return adapter


def with_moba(values: Mapping[str, Any], moba: MobaConfig, key: str | None) -> dict[str, Any]:
    """The JSON of a config with MoBA turned on, everything else as it is.

    Args:
        values: the JSON of config.json; not changed.
        moba: the settings to store.
        key: name of the nested text config, or None.
    """
    values = {name: value for name, value in values.items() if name != _PRIVATE}
    if key is None:
        return {**values, "moba": moba.to_dict(), "attn_implementation": "moba"}
    # A plain string would reach the vision tower too; a choice made for it is kept.
    chosen = values.get("attn_implementation")
    towers = chosen if isinstance(chosen, dict) else {}
    text = {name: value for name, value in (values.get(key) or {}).items() if name != _PRIVATE}
    return {
        **values,
        key: {**text, "moba": moba.to_dict()},
        "attn_implementation": {**towers, key: "moba"},
    }


def _convert_folder(source: Path, target: Path, moba: MobaConfig, *, overwrite: bool, link: bool) -> None:
    values, config = read_model_config(source)
    adapter = check_config(config, moba)
    read_checkpoint(source, values.get("transformers_weights"))
    files = list_files(source)
    _check_apart(source, target)
    if inside := [path for path in files if target in (source / path).resolve().parents]:
        raise ValueError(f"{target}: holds the file that {source / inside[0]} links to")
    check_target(target, overwrite=overwrite)
    key = adapter.nested_key(config)
    if key is not None and not values.get(key):  # published flat: the text model's values at the top level
        values = {**values, key: adapter.text_config(config).to_dict()}
    converted = with_moba(values, moba, key)
    with new_folder(target, overwrite=overwrite) as folder:
        for path in files:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if path != Path(_CONFIG):
                copy_file(source / path, folder / path, link=link)
        _write_config(folder, converted)


def _convert_gguf(source: Path, target: Path, moba: MobaConfig, *, overwrite: bool, dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; valid are {', '.join(DTYPES)}")
    _check_apart(source, target)
    check_target(target, overwrite=overwrite)
    check_config(read_gguf_config(source), moba)
    tokenizer = load_gguf_tokenizer(source)

    import torch

    model = load_gguf_model(source, getattr(torch, dtype))
    with new_folder(target, overwrite=overwrite) as folder:
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(f"{folder}: cannot be written ({error})") from error
        tokenizer.save_pretrained(folder)
        adapter = find_adapter(model.config.model_type)
        values = read_json_object(folder / _CONFIG)
        _write_config(folder, with_moba(values, moba, adapter.nested_key(model.config)))


def _check_apart(source: Path, target: Path) -> None:
    """Raises ValueError when one of the two lies in the other."""
    source = source.resolve()
    if _is_same(source, target):
        raise ValueError(f"{target}: is the source itself; choose another target")
    if any(_is_same(source, parent) for parent in target.parents):
        raise ValueError(f"{target}: lies inside the source {source}; choose another target")
    if any(_is_same(target, parent) for parent in source.parents):
        raise ValueError(f"{target}: holds the source {source}; choose another target")


def _is_same(one: Path, other: Path) -> bool:
    """Whether two resolved paths are one place, also where letter case or a bind mount tells them apart."""
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def _write_config(folder: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")


def _explain_no_config(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return "holds a PEFT adapter, not a model; merge it into its base model and convert that"
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"holds no config.json; to convert the GGUF file pass it itself: {folder / gguf[0]}"
    return "holds no config.json, so it is not a transformers checkpoint"
