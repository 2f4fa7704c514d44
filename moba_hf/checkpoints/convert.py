"""Checkpoint to checkpoint: the same weights, with MoBA in the config."""

from __future__ import annotations

import stat
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from moba_hf.checkpoints.context_length import CHANGED, ContextLength, with_context
from moba_hf.checkpoints.folders import (
    Tree,
    check_same,
    check_target,
    check_unchanged,
    copy_tree,
    new_folder,
    recover_folders,
    scan,
)
from moba_hf.checkpoints.gguf_files import (
    DTYPES,
    is_gguf,
    load_gguf_model,
    load_gguf_tokenizer,
    read_gguf_config,
)
from moba_hf.checkpoints.load import check_complete, find_source
from moba_hf.checkpoints.model_config import (
    CONFIG,
    check_config,
    read_model_config,
    with_moba,
)
from moba_hf.checkpoints.safetensors_files import read_checkpoint, read_json_object, write_json
from moba_hf.config import NAME, MobaConfig
from moba_hf.hf.adapter import Adapter, find_adapter
from moba_hf.hf.loading import LOADING, RECORD

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    config: MobaConfig,
    *,
    overwrite: bool = False,
    link: bool = False,
    dtype: str | None = None,
    context: ContextLength | None = None,
) -> Path:
    """Writes `src` as a checkpoint that transformers loads with MoBA, and returns its folder.

    A folder of safetensors is copied byte for byte, without version control, caches and the state of training
    runs, and only config.json changes: it gains `moba` (in the text config) and `attn_implementation`. A GGUF
    file is dequantised and saved with its tokenizer. The file moba_hf.json says what was written. Everything
    is checked before anything is written, and the source again afterwards; the result appears under its name
    only when it is whole. After an error nothing is left beside it; after a kill the next run tidies up.

    Args:
        src: folder with config.json and safetensors, a .gguf file, or "owner/name" of a model in the Hugging
            Face cache. Nothing is downloaded.
        dst: folder to make.
        config: the settings to store; its `backend` is not stored.
        overwrite: replace `dst`, in one step, if it is a checkpoint and nothing else.
        link: share the weight files of `src` through hard links instead of copying them, where the file
            system can. Changing such a file in place then changes both.
        dtype: for a GGUF file what to save the weights as: "float32" (default, exact), "bfloat16" or
            "float16" (half the size, rounded).
        context: a longer context to write into the config as well; None: as it is.

    Raises:
        ValueError: a source, a target or settings that cannot be used; the message names the file.
        OSError: the file system refused.
    """
    source, target = find_source(src), Path(dst).resolve()
    recover_folders(target.parent)
    if source.is_dir():
        if dtype is not None:
            raise ValueError(f"{source}: dtype is for GGUF files; a folder of safetensors is copied as it is")
        _convert_folder(source.resolve(), target, config, context, overwrite=overwrite, link=link)
    elif is_gguf(source):
        if link:
            raise ValueError(f"{source}: a GGUF file is dequantised, so there is nothing to link")
        chosen = dtype or DTYPES[0]
        _convert_gguf(source.absolute(), target, config, context, overwrite=overwrite, dtype=chosen)
    elif source.suffix == ".gguf" and source.is_file():
        raise ValueError(f"{source}: damaged GGUF file (it does not begin as one)")
    else:
        raise ValueError(f"{source}: is not a GGUF file; to convert safetensors pass their folder")
    return target


def _convert_folder(
    source: Path,
    target: Path,
    moba: MobaConfig,
    context: ContextLength | None,
    *,
    overwrite: bool,
    link: bool,
) -> None:
    tree = scan(source)
    values, config = read_model_config(source)
    adapter = _check_usable(source / CONFIG, config, moba)
    weights = read_checkpoint(source, values.get("transformers_weights"))
    check_complete(source, config)
    _check_apart(source, target)
    if inside := [path for path in tree.files if target in (source / path).resolve().parents]:
        raise ValueError(f"{target}: holds the file that {source / inside[0]} links to")
    check_target(target, overwrite=overwrite)
    key = adapter.nested_key(config)
    converted = with_moba(with_context(values, adapter.text_config(config), context, key), moba, key)
    written = (Path(CONFIG), Path(RECORD))
    with new_folder(target, overwrite=overwrite) as folder:
        copy_tree(source, tree, folder, skip=written, link=link)
        write_json(folder / CONFIG, converted)
        (folder / CONFIG).chmod(stat.S_IMODE(tree.files[Path(CONFIG)].st_mode))
        _write_record(folder, source, tree.left_out, context)
        check_unchanged(source, tree)
        _check_copy(folder, tree, skip=written)
        if read_checkpoint(folder, values.get("transformers_weights")).shards != weights.shards:
            raise ValueError(f"{source}: its weights changed while they were copied")


def _convert_gguf(
    source: Path,
    target: Path,
    moba: MobaConfig,
    context: ContextLength | None,
    *,
    overwrite: bool,
    dtype: str,
) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; valid are {', '.join(DTYPES)}")
    _check_apart(source, target)
    check_target(target, overwrite=overwrite)
    before = source.stat()
    _check_usable(source, read_gguf_config(source), moba)
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
        values = read_json_object(folder / CONFIG)
        key = adapter.nested_key(model.config)
        values = with_context(values, adapter.text_config(model.config), context, key)
        write_json(folder / CONFIG, with_moba(values, moba, key))
        _write_record(folder, source, [], context)
        check_same(source, before, source.stat())


def _check_usable(path: Path, config: PreTrainedConfig, moba: MobaConfig) -> Adapter:
    """The adapter of a model that MoBA can run in; ValueError names `path`."""
    try:
        adapter = check_config(config, moba)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    text = adapter.text_config(config)
    if not adapter.eligible_layers(text):
        reason = adapter.stock_reason(text, 0)
        raise ValueError(
            f"{path}: no layer of this {config.model_type} model can use MoBA (layer 0: {reason})"
        )
    return adapter


def _check_copy(folder: Path, tree: Tree, skip: Collection[Path]) -> None:
    """Raises ValueError unless `folder` holds the files of `tree`, and those in `skip`."""
    made = scan(folder).files
    if gone := sorted((set(tree.files) | set(skip)) ^ set(made)):
        raise ValueError(f"{folder / gone[0]}: came or went while {folder} was written")
    for name, found in tree.files.items():
        if name not in skip and made[name].st_size != found.st_size:
            raise ValueError(f"{folder / name}: changed while it was written")


def _write_record(
    folder: Path, source: Path, left_out: Sequence[Path], context: ContextLength | None
) -> None:
    """Says in the folder what was made of what, and how it is loaded."""
    record = folder / RECORD
    record.unlink(missing_ok=True)  # of an earlier conversion
    files = {str(name): found.st_size for name, found in scan(folder).files.items()}
    write_json(
        record,
        {
            "about": LOADING,
            "source": source.name,
            "changed": {CONFIG: [NAME, "attn_implementation", *(CHANGED if context else ())]},
            **({"context": asdict(context)} if context else {}),
            "left_out": [str(name) for name in left_out],
            "files": {**files, RECORD: None},
        },
    )


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
