"""Checks that a converted checkpoint is its source with MoBA turned on, and that it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from moba_hf.checkpoints.changes import Changes
from moba_hf.checkpoints.folders import scan
from moba_hf.checkpoints.gguf_files import (
    is_gguf,
    load_gguf_model,
    load_gguf_tokenizer,
    read_gguf_config,
    tied_names,
)
from moba_hf.checkpoints.load import find_source, load_model, model_class_of
from moba_hf.checkpoints.model_card import CARD, check_card
from moba_hf.checkpoints.model_config import (
    CONFIG,
    check_config,
    read_model_config,
    read_settings,
)
from moba_hf.checkpoints.safetensors_files import (
    INDEX_FILE,
    Checkpoint,
    StoredTensor,
    read_checkpoint,
    read_json_object,
)
from moba_hf.config import NAME
from moba_hf.hf.adapter import Adapter, find_adapter
from moba_hf.hf.loading import RECORD
from moba_hf.hf.remote_code import MODULE
from moba_hf.progress import advanced_by, progress_bar

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# Longest prompt of the comparison with dense attention, in tokens.
_PROMPT = 512
# Number of bytes compared at a time.
_CHUNK = 1 << 26
_TORCH_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: "config", "weights", "files", "load" or "logits".
        passed: whether the check passed.
        detail: the finding, in one line.
    """

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """The checks in the order in which they ran; after a failed check no other runs."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True)
class _Target:
    """The converted checkpoint and its config."""

    folder: Path
    values: dict[str, Any]
    config: PreTrainedConfig
    changes: Changes
    adapter: Adapter


def verify_checkpoint(dst: str | Path, source: str | Path) -> VerifyReport:
    """Compares the converted checkpoint `dst` with its `source`.

    Stops at the first check that fails, and keeps at most one model in memory. The checks are:

    - config: config.json is that of the source with MoBA turned on.
    - weights: they are byte-identical to those of the source, or, for a GGUF source, equal to its dequantised
      tensors in the dtype of `dst`.
    - files: every other file is in the list that the conversion wrote and byte-identical to that of the
      source, or to what is saved for a GGUF source. README.md is that of the source, apart from the section
      that the conversion wrote.
    - load: transformers loads `dst` with MoBA.
    - logits: on random ids that `topk` blocks cover, the logits (hidden states if there is no head) equal
      those of dense attention, in fp32.

    Raises:
        ValueError: `dst` is not a folder, or `source` is neither a folder nor a GGUF file.
    """
    folder, origin = Path(dst), find_source(source)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not origin.is_dir() and not is_gguf(origin):
        raise ValueError(f"{origin}: is not a GGUF file")
    found: dict[str, Any] = {}

    def config() -> str:
        found["target"], detail = _check_settings(folder, origin)
        return detail

    def load() -> str:
        found["model"], detail = _check_load(found["target"])
        return detail

    steps: list[tuple[str, Callable[[], str]]] = [
        ("config", config),
        ("weights", lambda: _check_weights(found["target"], origin)),
        ("files", lambda: _check_files(found["target"], origin)),
        ("load", load),
        ("logits", lambda: _check_logits(found["model"], found["target"])),
    ]
    checks = []
    for name, step in steps:
        checks.append(_run(name, step))
        if not checks[-1].passed:
            break
    return VerifyReport(tuple(checks))


def _run(name: str, step: Callable[[], str]) -> Check:
    try:
        return Check(name, True, step())
    except (KeyboardInterrupt, MemoryError, ImportError):
        raise
    except Exception as error:  # a damaged checkpoint can raise many kinds of errors
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return Check(name, False, " ".join(reason.split()))


def _check_settings(folder: Path, source: Path) -> tuple[_Target, str]:
    values, config = read_model_config(folder)
    adapter = find_adapter(config.model_type)
    key = adapter.nested_key(config)
    moba = read_settings(folder, values, key)
    if moba is None:
        raise ValueError(f"{folder / CONFIG}: has no {NAME!r} settings")
    check_config(config, moba)
    wanted: Any = NAME if key is None else {key: NAME}
    field = values.get("attn_implementation")
    if field != wanted and not (key is not None and isinstance(field, dict) and field.get(key) == NAME):
        raise ValueError(f"{folder / CONFIG}: attn_implementation is {field!r}, not {wanted!r}")
    target = _Target(folder, values, config, Changes.recorded(folder, moba), adapter)
    if source.is_dir():
        _compare_values(folder / CONFIG, values, target.changes.apply(*read_model_config(source)))
    return target, moba.in_words()


def _compare_values(path: Path, values: Any, wanted: Any, where: str = "") -> None:
    """Raises ValueError, naming the entry, if two JSON values differ."""
    if isinstance(values, dict) and isinstance(wanted, dict):
        for name in sorted({*values, *wanted}):
            if name not in wanted:
                raise ValueError(f"{path}: {where}{name} is not in the source")
            if name not in values:
                raise ValueError(f"{path}: {where}{name} is missing")
            _compare_values(path, values[name], wanted[name], f"{where}{name}.")
    elif repr(values) != repr(wanted):  # distinguishes 1 from True; NaN equals NaN
        raise ValueError(f"{path}: {where.removesuffix('.')} is {values!r}, but {wanted!r} in the source")


def _check_weights(target: _Target, source: Path) -> str:
    stored = read_checkpoint(target.folder, target.values.get("transformers_weights"))
    if source.is_dir():
        values, _ = read_model_config(source)
        _compare_folders(stored, read_checkpoint(source, values.get("transformers_weights")))
        return f"{len(stored.tensors)} tensors byte-identical to the source"
    dtype = _compare_gguf(stored, source)
    return f"{len(stored.tensors)} tensors equal to the dequantised ones in {dtype}"


def _check_files(target: _Target, source: Path) -> str:
    """Compares all files except weights and config.json, and the list that the conversion wrote."""
    record = read_json_object(target.folder / RECORD).get("files")
    if not isinstance(record, dict):
        raise ValueError(f"{target.folder / RECORD}: lists no files; 'convert' did not make this folder")
    made = {str(path) for path in scan(target.folder).files}
    for name in sorted({*record} ^ made):
        what = "is missing" if name in record else f"is not in the list of {RECORD}"
        raise ValueError(f"{target.folder / name}: {what}")
    weights = read_checkpoint(target.folder, target.values.get("transformers_weights")).shards
    own = _check_own_files(target, source)
    apart = {*weights, CONFIG, RECORD, *own}
    if source.is_dir():
        wanted = {str(path) for path in scan(source).files} - apart
        _compare_files(target.folder, made - apart, source, wanted)
    else:
        apart |= {INDEX_FILE}
        with TemporaryDirectory() as folder:
            place = Path(folder)
            _write_without_weights(source.absolute(), target, place)
            values = target.changes.apply(*read_model_config(place))
            _compare_values(target.folder / CONFIG, _any_version(target.values), _any_version(values))
            wanted = {str(path) for path in scan(place).files} - apart
            _compare_files(target.folder, made - apart, place, wanted)
    return f"{len(made - apart | own)} other files correct"


def _check_own_files(target: _Target, source: Path) -> set[str]:
    """Checks the model card and the module that the conversion wrote, and returns their names."""
    names = {CARD} if check_card(target.folder, source if source.is_dir() else None) else set()
    module = target.changes.module(target.config)
    if module is None:
        return names
    if (target.folder / MODULE).read_bytes() != module.encode():
        raise ValueError(f"{target.folder / MODULE}: is not what 'convert --remote-code' writes")
    return {*names, MODULE}


def _write_without_weights(source: Path, target: _Target, place: Path) -> None:
    """Writes the files of a converted GGUF file before MoBA is turned on, without the weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_gguf_config(source))
    model.config.architectures = [type(model).__name__]
    model.config.dtype = target.config.dtype
    model.config.save_pretrained(place)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(place)
    load_gguf_tokenizer(source).save_pretrained(place)


def _compare_files(folder: Path, names: set[str], source: Path, wanted: set[str]) -> None:
    """Raises ValueError at the first file that is not byte-identical."""
    for name in sorted(names ^ wanted):
        raise ValueError(f"{folder / name}: {'is missing' if name in wanted else 'is not in the source'}")
    for name in sorted(names):
        if not cmp(folder / name, source / name, shallow=False):
            raise ValueError(f"{folder / name}: differs from the source")


def _any_version(values: dict[str, Any]) -> dict[str, Any]:
    """A config without the version of transformers that wrote it."""
    return {name: value for name, value in values.items() if name != "transformers_version"}


def _compare_folders(stored: Checkpoint, original: Checkpoint) -> None:
    """Raises ValueError, naming file and tensor, at the first difference."""
    _compare_names(set(stored.tensors), set(original.tensors))
    with progress_bar("comparing weights", _size(stored), "B") as bar:
        for name, place in sorted(stored.tensors.items()):
            _compare_tensor(name, place, original.tensors[name], bar)
    if stored.shards.keys() == original.shards.keys():
        for shard, header in stored.shards.items():
            if header != original.shards[shard]:
                raise ValueError(f"{shard}: its header differs from the source")


def _compare_tensor(name: str, place: StoredTensor, wanted: StoredTensor, bar: Any) -> None:
    """Raises ValueError if the tensors differ; advances `bar` by the number of bytes compared."""
    if (place.dtype, place.shape) != (wanted.dtype, wanted.shape):
        raise ValueError(
            f"{place.path}: {name} is {place.dtype} {place.shape}, "
            f"but {wanted.dtype} {wanted.shape} in the source"
        )
    for a, b in zip(_read_chunks(place), _read_chunks(wanted), strict=True):
        if not np.array_equal(a, b):
            raise ValueError(f"{place.path}: {name} differs from the source")
        bar.update(len(a))


def _size(stored: Checkpoint) -> int:
    """Total size of all tensors in bytes."""
    return sum(place.end - place.start for place in stored.tensors.values())


def _compare_gguf(stored: Checkpoint, source: Path) -> str:
    """Compares the weights with a GGUF file and returns their dtype; ValueError at the first difference."""
    import torch

    dtypes = {place.dtype for place in stored.tensors.values()}
    if len(dtypes) != 1 or not dtypes <= _TORCH_DTYPES.keys():
        raise ValueError(f"saved in {', '.join(sorted(dtypes))}, which a conversion from GGUF never does")
    for shard, header in stored.shards.items():
        if b'"__metadata__":{"format":"pt"}' not in header:
            raise ValueError(f"{shard}: its header was not written by transformers")
    dtype = _TORCH_DTYPES[dtypes.pop()]
    model = load_gguf_model(source.absolute(), getattr(torch, dtype))
    tensors = model.state_dict()
    _compare_names(set(stored.tensors), set(tensors) - (tied_names(model) - set(stored.tensors)))
    with progress_bar("comparing weights", _size(stored), "B") as bar:
        for name, place in sorted(stored.tensors.items()):
            wanted = tensors[name].contiguous().flatten().view(torch.uint8).numpy()
            size = place.end - place.start
            got = np.memmap(place.path, dtype=np.uint8, mode="r", offset=place.start, shape=(size,))
            if place.shape != tuple(tensors[name].shape) or not np.array_equal(got, wanted):
                raise ValueError(f"{place.path}: {name} differs from the dequantised tensor")
            bar.update(size)
    return dtype


def _compare_names(stored: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - stored):
        raise ValueError(f"{missing[0]} is missing ({len(missing)} tensors in total)")
    if extra := sorted(stored - wanted):
        raise ValueError(f"{extra[0]} is not in the source ({len(extra)} tensors in total)")


def _read_chunks(place: StoredTensor) -> Iterator[np.ndarray[Any, Any]]:
    """Yields the bytes of a tensor in chunks."""
    with place.path.open("rb") as file:
        file.seek(place.start)
        for start in range(place.start, place.end, _CHUNK):
            yield np.frombuffer(file.read(min(_CHUNK, place.end - start)), dtype=np.uint8)


def _check_load(target: _Target) -> tuple[Any, str]:
    import torch

    model = load_model(target.folder, model_class_of(target.config), dtype=torch.float32)
    implementation = target.adapter.text_config(model.config)._attn_implementation
    if implementation != NAME:
        raise ValueError(f"{target.folder}: loads with attn_implementation={implementation!r}")
    return model, f"{type(model).__name__} with attn_implementation={NAME!r}"


def _check_logits(model: Any, target: _Target) -> str:
    import torch

    text = target.adapter.text_config(model.config)
    length = _prompt_length(target, text)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(text.vocab_size, (1, length), generator=generator)
    modules = [module for _, module in target.adapter.attention_layers(model)]
    with progress_bar("comparing logits", 3 * len(modules), " layers") as bar, advanced_by(bar, modules):
        moba, sdpa, eager = (_logits(model, name, ids, target) for name in (NAME, "sdpa", "eager"))
    error, plain = ((x - eager).abs().max().item() for x in (moba, sdpa))
    # Twice the difference between two dense implementations, plus the rounding of the largest logit.
    bound = 2 * plain + torch.finfo(eager.dtype).eps * eager.abs().max().item()
    found = f"largest difference from dense logits {error:.2g} over {length} tokens"
    if not error <= bound:
        raise ValueError(f"{found}, more than the {bound:.2g} that rounding explains")
    return found


def _prompt_length(target: _Target, text: Any) -> int:
    """Length of a prompt for which all MoBA layers compute full attention."""
    layers = target.adapter.num_layers(text)
    rules = [target.changes.moba.for_layer(i, layers) for i in range(layers)]
    limits = [rule.dense_len for rule in rules if rule is not None]
    return min([_PROMPT, *limits, getattr(text, "max_position_embeddings", None) or _PROMPT])


def _logits(model: Any, implementation: str, ids: torch.Tensor, target: _Target) -> torch.Tensor:
    import torch

    key = target.adapter.nested_key(model.config)
    model.set_attn_implementation(implementation if key is None else {key: implementation})
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False)[0]
    return logits.float()
