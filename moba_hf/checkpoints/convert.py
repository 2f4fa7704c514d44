"""Converts a checkpoint: the weights stay the same, and the config turns MoBA on."""

from __future__ import annotations

import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from moba_hf.checkpoints.changes import Changes, check_no_code, loading_class
from moba_hf.checkpoints.context_length import ContextLength
from moba_hf.checkpoints.fingerprint import fingerprint
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
from moba_hf.config import MobaConfig, require_config
from moba_hf.hf.loading import LOADING, RECORD
from moba_hf.hf.remote_code import MODULE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class _Target:
    """What to create.

    Attributes:
        path: the folder.
        changes: what the conversion changes.
        card: further contents of the model card.
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
    runs. Only two files change: config.json gets `moba` (in the text config) and `attn_implementation`, and
    the model card README.md gets a section about MoBA. A GGUF file is dequantised and saved with its
    tokenizer. moba_hf.json records what was written. All inputs are checked before anything is written, and
    the source is checked again afterwards. The result gets its name only when it is complete. An error leaves
    nothing behind; if the process is killed, the next run cleans up.

    Args:
        src: folder with config.json and safetensors, a .gguf file, or "owner/name" of a model in the Hugging
            Face cache. Nothing is downloaded.
        dst: folder to create.
        config: the settings to store, except for `backend`.
        overwrite: replace `dst`, in one step, if it is a checkpoint and nothing else.
        link: hard-link the weight files of `src` instead of copying them, if the file system supports it.
            Modifying such a file in place then changes both.
        dtype: for a GGUF file, the dtype to save the weights in: "float32" (default, exact), "bfloat16" or
            "float16" (half the size, rounded).
        context: a longer context to write into the config; None: unchanged.
        remote_code: write the module that lets `from_pretrained(dst, trust_remote_code=True)` load the
            checkpoint with MoBA without `import moba_hf`. Refused if `src` contains code.
        eval_results: JSON file of `moba-hf eval` with this model and these settings, for the model card.
        command: the command line to show in the model card; None: this call.

    Raises:
        ValueError: the source, the target, the settings or the results cannot be used; the message names the
            file.
        OSError: a file cannot be read or written.
        TypeError: `config` is not a MobaConfig.
    """
    require_config("config", config)
    source, path = find_source(src), Path(dst).resolve()
    recover_folders(path.parent)
    changes = Changes(config, context, remote_code)
    source = source.resolve() if source.is_dir() else source.absolute()
    on_hub = "" if Path(src).exists() else str(src)
    name = on_hub or source.name
    cost = ""
    if eval_results is not None:
        cost = measured_cost(Path(eval_results), config, fingerprint(source, changes))
    card = Card(
        name,
        (command or _call(name, path.name, changes, dtype),),
        base_model=on_hub,
        cost=cost,
    )
    target = _Target(path, changes, card, overwrite)
    if source.is_dir():
        if dtype is not None:
            raise ValueError(
                f"{source}: dtype is for GGUF files; a folder of safetensors is copied unchanged"
            )
        _convert_folder(source, target, link=link)
    elif is_gguf(source):
        if link:
            raise ValueError(f"{source}: a GGUF file is dequantised, so there is nothing to link")
        _convert_gguf(source, target, dtype or DTYPES[0])
    elif source.suffix == ".gguf" and source.is_file():
        raise ValueError(f"{source}: damaged GGUF file (it does not begin like one)")
    else:
        raise ValueError(f"{source}: is not a GGUF file; to convert safetensors, pass their folder")
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
        raise ValueError(f"{target.path}: contains the file that {source / inside[0]} links to")
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
        except SafetensorError as error:  # for example, the disk is full
            raise OSError(f"{folder}: cannot be written ({error})") from error
        tokenizer.save_pretrained(folder)
        values = read_json_object(folder / CONFIG)
        write_json(folder / CONFIG, target.changes.apply(values, model.config))
        card = replace(target.card, weights=f"dequantised to {dtype}")
        _write_about(folder, replace(target, card=card), model.config, None, [])
        check_same(source, before, source.stat())


def _check_usable(path: Path, config: PreTrainedConfig, moba: MobaConfig) -> None:
    """Raises ValueError, naming `path`, if no layer of the model can use MoBA with these settings."""
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
    """Raises ValueError if `folder` does not contain exactly the files of `tree` and `skip`."""
    made = scan(folder).files
    if gone := sorted((set(tree.files) | set(skip)) ^ set(made)):
        raise ValueError(f"{folder / gone[0]}: was added or removed while {folder} was written")
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
    """Writes the model card, the module (if wanted), and the record of the conversion."""
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
    """The call of `convert_checkpoint` that makes these changes, with the names of the folders only."""
    options = {"dtype": dtype, "context": changes.context, "remote_code": changes.remote_code}
    arguments = [repr(source), repr(target), config_call(changes.moba)]
    arguments += [f"{name}={value!r}" for name, value in options.items() if value]
    return f"convert_checkpoint({', '.join(arguments)})"


def _check_apart(source: Path, target: Path) -> None:
    """Raises ValueError if the two are the same or one contains the other."""
    source = source.resolve()
    if _is_same(source, target):
        raise ValueError(f"{target}: is the source itself; choose another target")
    if any(_is_same(source, parent) for parent in target.parents):
        raise ValueError(f"{target}: is inside the source {source}; choose another target")
    if any(_is_same(target, parent) for parent in source.parents):
        raise ValueError(f"{target}: contains the source {source}; choose another target")


def _is_same(one: Path, other: Path) -> bool:
    """Whether two resolved paths are the same place, even if they differ by letter case or a bind mount."""
    return one == other or (one.exists() and other.exists() and one.samefile(other))
