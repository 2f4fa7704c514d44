"""Checkpoint to checkpoint: the same weights, with MoBA in the config."""

from __future__ import annotations

import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from moba_hf.checkpoints.changes import Changes, check_no_code, loading_class
from moba_hf.checkpoints.context_length import ContextLength
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
from moba_hf.checkpoints.measured import measured_cost
from moba_hf.checkpoints.model_card import CARD, Card, config_call, read_card
from moba_hf.checkpoints.model_config import CONFIG, check_config, read_model_config
from moba_hf.checkpoints.safetensors_files import read_checkpoint, read_json_object, write_json
from moba_hf.config import MobaConfig
from moba_hf.hf.loading import LOADING, RECORD
from moba_hf.hf.remote_code import MODULE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class _Target:
    """What is to be made.

    Attributes:
        path: the folder.
        changes: what the conversion changes.
        card: what the model card says beside them.
        overwrite: replace the folder if it is a checkpoint.
    """

    path: Path
    changes: Changes
    card: Card
    overwrite: bool


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    config: MobaConfig,
    *,
    overwrite: bool = False,
    link: bool = False,
    dtype: str | None = None,
    context: ContextLength | None = None,
    remote_code: bool = False,
    eval_results: str | Path | None = None,
    command: str | None = None,
) -> Path:
    """Writes `src` as a checkpoint that transformers loads with MoBA, and returns its folder.

    A folder of safetensors is copied byte for byte, without version control, caches and the state of training
    runs. Only config.json changes, which gains `moba` (in the text config) and `attn_implementation`, and the
    model card README.md, which gains a part about MoBA. A GGUF file is dequantised and saved with its
    tokenizer. The file moba_hf.json says what was written. Everything is checked before anything is written,
    and the source again afterwards; the result appears under its name only when it is whole. After an error
    nothing is left beside it; after a kill the next run tidies up.

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
        remote_code: write the module by which `from_pretrained(dst, trust_remote_code=True)` loads the
            checkpoint with MoBA without `import moba_hf`. Refused where `src` brings code of its own.
        eval_results: JSON file of `moba-hf eval` about these settings, for the model card.
        command: the command line that the model card names; None: this call.

    Raises:
        ValueError: a source, a target, settings or results that cannot be used; the message names the file.
        OSError: the file system refused.
    """
    source, path = find_source(src), Path(dst).resolve()
    recover_folders(path.parent)
    changes = Changes(config, context, remote_code)
    source = source.resolve() if source.is_dir() else source.absolute()
    on_hub = "" if Path(src).exists() else str(src)
    name = on_hub or source.name
    card = Card(
        name,
        (command or _call(name, path.name, changes, dtype),),
        base_model=on_hub,
        cost="" if eval_results is None else measured_cost(Path(eval_results), config),
    )
    target = _Target(path, changes, card, overwrite)
    if source.is_dir():
        if dtype is not None:
            raise ValueError(f"{source}: dtype is for GGUF files; a folder of safetensors is copied as it is")
        _convert_folder(source, target, link=link)
    elif is_gguf(source):
        if link:
            raise ValueError(f"{source}: a GGUF file is dequantised, so there is nothing to link")
        _convert_gguf(source, target, dtype or DTYPES[0])
    elif source.suffix == ".gguf" and source.is_file():
        raise ValueError(f"{source}: damaged GGUF file (it does not begin as one)")
    else:
        raise ValueError(f"{source}: is not a GGUF file; to convert safetensors pass their folder")
    return path


def _convert_folder(source: Path, target: _Target, *, link: bool) -> None:
    tree = scan(source)
    values, config = read_model_config(source)
    _check_usable(source / CONFIG, config, target.changes.moba)
    if target.changes.remote_code:
        check_no_code(source, tree.files, config)
    text = read_card(source)
    weights = read_checkpoint(source, values.get("transformers_weights"))
    check_complete(source, config)
    _check_apart(source, target.path)
    if inside := [path for path in tree.files if target.path in (source / path).resolve().parents]:
        raise ValueError(f"{target.path}: holds the file that {source / inside[0]} links to")
    check_target(target.path, overwrite=target.overwrite)
    converted = target.changes.apply(values, config)
    written = {Path(name) for name in (CONFIG, RECORD, CARD)}
    written |= {Path(MODULE)} if target.changes.remote_code else set()
    with new_folder(target.path, overwrite=target.overwrite) as folder:
        copy_tree(source, tree, folder, skip=written, link=link)
        write_json(folder / CONFIG, converted)
        _write_about(folder, target, config, text, tree.left_out)
        for name in written & set(tree.files):
            (folder / name).chmod(stat.S_IMODE(tree.files[name].st_mode))
        check_unchanged(source, tree)
        _check_copy(folder, tree, skip=written)
        if read_checkpoint(folder, values.get("transformers_weights")).shards != weights.shards:
            raise ValueError(f"{source}: its weights changed while they were copied")


def _convert_gguf(source: Path, target: _Target, dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; valid are {', '.join(DTYPES)}")
    _check_apart(source, target.path)
    check_target(target.path, overwrite=target.overwrite)
    before = source.stat()
    _check_usable(source, read_gguf_config(source), target.changes.moba)
    tokenizer = load_gguf_tokenizer(source)

    import torch

    model = load_gguf_model(source, getattr(torch, dtype))
    with new_folder(target.path, overwrite=target.overwrite) as folder:
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(f"{folder}: cannot be written ({error})") from error
        tokenizer.save_pretrained(folder)
        values = read_json_object(folder / CONFIG)
        write_json(folder / CONFIG, target.changes.apply(values, model.config))
        card = replace(target.card, weights=f"dequantised to {dtype}")
        _write_about(folder, replace(target, card=card), model.config, None, [])
        check_same(source, before, source.stat())


def _check_usable(path: Path, config: PreTrainedConfig, moba: MobaConfig) -> None:
    """Raises ValueError, naming `path`, unless MoBA can run in some layer of the model."""
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


def _check_copy(folder: Path, tree: Tree, skip: Collection[Path]) -> None:
    """Raises ValueError unless `folder` holds the files of `tree`, and those in `skip`."""
    made = scan(folder).files
    if gone := sorted((set(tree.files) | set(skip)) ^ set(made)):
        raise ValueError(f"{folder / gone[0]}: came or went while {folder} was written")
    for name, found in tree.files.items():
        if name not in skip and made[name].st_size != found.st_size:
            raise ValueError(f"{folder / name}: changed while it was written")


def _write_about(
    folder: Path,
    target: _Target,
    config: PreTrainedConfig,
    source_card: str | None,
    left_out: Sequence[Path],
) -> None:
    """Writes the model card, the module if one is wanted, and the record of what was made of what."""
    card = replace(target.card, loader=loading_class(config))
    section = card.section(target.changes)
    (folder / CARD).write_bytes(card.text(source_card, section).encode())
    if (module := target.changes.module(config)) is not None:
        (folder / MODULE).write_bytes(module.encode())
    record = folder / RECORD
    record.unlink(missing_ok=True)  # of an earlier conversion
    files = {str(name): found.st_size for name, found in scan(folder).files.items()}
    write_json(
        record,
        {
            "about": LOADING,
            **target.changes.record(),
            **card.record(section),
            "left_out": [str(name) for name in left_out],
            "files": {**files, RECORD: None},
        },
    )


def _call(source: str, target: str, changes: Changes, dtype: str | None) -> str:
    """The call of `convert_checkpoint` that makes these changes, by the names of the folders alone."""
    options = {"dtype": dtype, "context": changes.context, "remote_code": changes.remote_code}
    arguments = [repr(source), repr(target), config_call(changes.moba)]
    arguments += [f"{name}={value!r}" for name, value in options.items() if value]
    return f"convert_checkpoint({', '.join(arguments)})"


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
