"""GGUF checkpoints, dequantised by transformers."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moba_hf.checkpoints.gguf_header import check_gguf_header

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# The dtypes a GGUF file may be converted to; the first is the default. Only float32 represents every
# dequantised weight exactly: a Q8_0 weight is a float16 scale times an 8-bit integer, with up to 19
# significant bits.
DTYPES = ("float32", "bfloat16", "float16")
_MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins with the GGUF magic."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_gguf_config(path: Path) -> PreTrainedConfig:
    """The transformers config that a GGUF file describes.

    Raises:
        ValueError: the file is damaged, is one part of several, has an architecture that transformers cannot
            read, or has RoPE scaling, which transformers would silently drop.
        ImportError: the package `gguf` is not installed.
    """
    _tensor_names(path, path.stat().st_mtime_ns)

    from transformers import AutoConfig

    return _read(path, lambda: AutoConfig.from_pretrained(path.parent, gguf_file=path.name))


def load_gguf_model(path: Path, dtype: torch.dtype) -> Any:
    """The dequantised model, on the CPU, with stock attention.

    Args:
        path: the .gguf file.
        dtype: dtype of the parameters; weights are dequantised in float32 and then cast.

    Raises:
        ValueError: as for `read_gguf_config`, or the file's tensors are not those of the model.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    names = _tensor_names(path, path.stat().st_mtime_ns)

    def load() -> Any:
        # transformers' progress bar would fill log files
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            return AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=dtype,
                attn_implementation="sdpa",
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )

    model, info = _read(path, load)
    if missing := sorted(map(str, info["missing_keys"])):  # transformers would initialise them at random
        raise ValueError(f"{path}: contains no {missing[0]} ({len(missing)} tensors are missing)")
    # Names of dense layers correspond one to one; experts are stacked in the file and fused in the model.
    stored = [name for name in names if "_exps" not in name]
    own = [name for name in set(model.state_dict()) - tied_names(model) if "experts" not in name]
    if len(stored) != len(own):
        raise ValueError(f"{path}: contains {len(stored)} tensors, but {type(model).__name__} has {len(own)}")
    return model


def tied_names(model: Any) -> set[str]:
    """Names of parameters that are tied to another one; checkpoints leave them out."""
    return set(getattr(model, "all_tied_weights_keys", None) or ())


def load_gguf_tokenizer(path: Path) -> Any:
    """The tokenizer in a GGUF file, including its chat template."""
    from transformers import AutoTokenizer

    return _read(path, lambda: AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))


@lru_cache(maxsize=1)
def _tensor_names(path: Path, _modified: int) -> tuple[str, ...]:
    """Names of the tensors in a GGUF file. Raises ValueError if transformers cannot read it faithfully."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ImportError("reading a GGUF file needs the package gguf: pip install gguf") from None
    check_gguf_header(path)
    reader = _read(path, lambda: GGUFReader(path))
    names = tuple(str(tensor.name) for tensor in reader.tensors)

    def field(name: str) -> Any:
        return reader.fields[name].contents() if name in reader.fields else None

    architecture = field("general.architecture")
    if (parts := field("split.count") or 1) > 1:
        raise ValueError(f"{path}: is one of {parts} parts; merge them first (llama-gguf-split --merge)")
    scaling = field(f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none") or any(
        name.startswith(("rope_freqs", "rope_factors")) for name in names
    ):
        raise ValueError(
            f"{path}: has RoPE scaling, which transformers drops when it reads GGUF; "
            "convert the safetensors checkpoint of this model instead"
        )
    return names


def _read(path: Path, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except (KeyboardInterrupt, SystemExit, MemoryError, ImportError):
        raise
    except BaseException as error:  # of numpy, struct, the readers, and panics of the Rust tokenizers
        raise ValueError(f"{path}: cannot be read as GGUF ({type(error).__name__}: {error})") from error
