"""The checkpoint loader of all commands: it refuses incomplete checkpoints and names the file in errors."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moba_hf.checkpoints.gguf_files import (
    is_gguf,
    load_gguf_model,
    load_gguf_tokenizer,
    read_gguf_config,
)
from moba_hf.checkpoints.model_config import read_model_config
from moba_hf.checkpoints.safetensors_files import INDEX_FILE, SINGLE_FILE, read_checkpoint
from moba_hf.hf.adapter import find_adapter
from moba_hf.hf.loading import auto_class, dense_on_purpose
from moba_hf.hf.parallel import check_tensor_parallel, launched_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Weights of decoder layers. Other weights that the model has no place for are heads that it does not need.
_LAYER = re.compile(r"(^|\.)layers\.\d+\.")
# transformers changes process-wide settings while it builds a model.
_LOADING = threading.RLock()
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_source(source: str | Path) -> Path:
    """The folder or file that `source` names: a path, or "owner/name" of a model in the Hugging Face cache.

    Nothing is downloaded, so a mistyped path fails at once.

    Raises:
        ValueError: neither exists.
    """
    path = Path(source)
    if path.exists():
        return path
    hint = ""
    if _HUB_NAME.fullmatch(str(source)):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(str(source), local_files_only=True))
        except Exception:  # the error for "not in the cache" varies by version
            hint = f", and no model of that name in the Hugging Face cache (hf download {source} fetches it)"
    raise ValueError(f"{source}: no such file or folder{hint}")


def load_checkpoint(
    source: str | Path,
    dtype: str = "auto",
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    spread: bool = False,
) -> tuple[Any, Any]:
    """The model of a checkpoint with stock attention, in evaluation mode, and its tokenizer.

    A vision-language checkpoint is loaded with all its towers.

    Args:
        source: a folder, a GGUF file, or "owner/name" of a model in the Hugging Face cache.
        dtype: one of `DTYPES`; "auto" is the checkpoint's own, or float32 for a GGUF file.
        device: where to put the model; None: distributed over the available GPUs, or on the CPU without any.
        trust_remote_code: run the Python code that the checkpoint contains for its tokenizer.
        spread: if `torchrun` started several ranks, shard every layer over them (tensor parallel).

    Raises:
        ValueError: nothing to load, an unsupported architecture, missing weights, a number of key-value heads
            that is not divisible by the ranks, or a tokenizer that needs code. The message names the file or
            folder.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; valid are {', '.join(DTYPES)}")
    path = find_source(source)
    ranks = launched_ranks() if spread else 1
    if is_gguf(path):
        if ranks > 1:
            raise ValueError(f"{path}: a GGUF file cannot be sharded over {ranks} ranks; convert it first")
        return _load_gguf(path, dtype, device)
    if not path.is_dir():
        raise ValueError(f"{path}: neither a folder with a config.json nor a GGUF file")
    values, config = read_model_config(path)
    check_tensor_parallel(config, ranks)
    check_files(path)
    if has_safetensors(path, values):
        read_checkpoint(path, values.get("transformers_weights"))
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)

    import torch

    auto = auto_class(config)
    check_complete(path, config, auto)
    place = device or ("auto" if torch.cuda.is_available() else None)
    options: dict[str, Any] = {"device_map": place} if place else {}
    if ranks > 1:
        from transformers.distributed.configuration_utils import DistributedConfig

        options = {"distributed_config": DistributedConfig(tp_size=ranks)}
    return load_model(path, auto, dtype=dtype, attn_implementation="sdpa", **options), tokenizer


def has_safetensors(folder: Path, values: Mapping[str, Any]) -> bool:
    """Whether the weights of a folder, whose config.json holds `values`, are safetensors."""
    named = bool(values.get("transformers_weights"))
    return named or any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))


def load_model(folder: Path, model_class: Any, **kwargs: Any) -> Any:
    """`model_class.from_pretrained(folder, **kwargs)` in evaluation mode; refuses an incomplete checkpoint.

    Raises:
        ValueError: weights are missing or have the wrong shape, or the checkpoint has additional layers.
    """
    with _LOADING, reported(folder), dense_on_purpose():
        model, info = model_class.from_pretrained(
            folder,
            **kwargs,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refuse_incomplete names them below
        )
    refuse_incomplete(folder, model, info)
    return model.eval()


def refuse_incomplete(folder: Path, model: Any, info: dict[str, Any]) -> None:
    """Raises ValueError if transformers initialised weights at random or ignored decoder layers."""
    name = type(model).__name__
    for kind, what in (
        ("missing_keys", "are missing, so it is not a complete"),
        ("mismatched_keys", "do not have the shapes that config.json gives this"),
    ):
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(kind) or ())
        if keys:
            raise ValueError(f"{folder}: {len(keys)} weights {what} {name} (the first: {keys[0]})")
    if extra := sorted(key for key in map(str, info.get("unexpected_keys") or ()) if _LAYER.search(key)):
        raise ValueError(
            f"{folder}: contains {len(extra)} weights of layers that config.json does not name "
            f"(the first: {extra[0]})"
        )


def check_complete(folder: Path, config: PreTrainedConfig, model_class: Any = None) -> None:
    """Raises ValueError unless the folder has every weight of its model in the right shape.

    The model is built on the meta device, so no weights are read or allocated. Quantised checkpoints are not
    checked, since the names of their weights depend on packages that may be missing.

    Args:
        folder: the checkpoint.
        config: its config.
        model_class: class of the model; None: the one that config.json names.
    """
    if getattr(config, "quantization_config", None):
        return
    load_model(folder, model_class or model_class_of(config), device_map="meta", attn_implementation="sdpa")


def model_class_of(config: PreTrainedConfig) -> Any:
    """The model class that config.json names, or `AutoModelForCausalLM` if transformers does not know it."""
    import transformers

    names = getattr(config, "architectures", None) or [""]
    found = getattr(transformers, str(names[0]), None)
    return transformers.AutoModelForCausalLM if found is None else found


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder.

    Raises:
        ValueError: it is missing or damaged, or it needs code and `trust_remote_code` is off.
    """
    from transformers import AutoTokenizer

    with reported(folder, "its tokenizer does not load"):
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )


def check_files(folder: Path) -> None:
    """Raises ValueError for a pipe, device or socket in `folder`, which could be read forever."""
    for path in sorted(folder.iterdir()):
        if not path.is_file() and not path.is_dir() and path.exists():
            raise ValueError(f"{path}: neither a file nor a folder")


@contextmanager
def reported(path: Path, what: str = "does not load") -> Iterator[None]:
    """Turns errors in the block into a ValueError that names `path`; bad files raise many kinds of error."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, ImportError):
        raise
    except BaseException as error:  # panics of the Rust tokenizers are not Exceptions
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: {what} ({type(error).__name__}: {reason})") from error


def _load_gguf(path: Path, dtype: str, device: str | None) -> tuple[Any, Any]:
    import torch

    find_adapter(read_gguf_config(path.absolute()).model_type)
    tokenizer = load_gguf_tokenizer(path.absolute())
    model = load_gguf_model(path.absolute(), getattr(torch, "float32" if dtype == "auto" else dtype))
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer
