"""GGUF checkpoints, dequantised by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# What a GGUF file may be saved as; the first is the default. Only float32 holds every dequantised weight
# exactly: a Q8_0 weight is a float16 scale times an 8-bit integer, up to 19 significant bits.
DTYPES = ("float32", "bfloat16", "float16")
_MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins as GGUF does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_gguf_config(path: Path) -> PreTrainedConfig:
    """The transformers config that a GGUF file describes.

    Raises:
        ValueError: the file is damaged or of an architecture transformers cannot read.
        ImportError: the package `gguf` is not installed.
    """
    from transformers import AutoConfig

    return _read(path, AutoConfig)


def load_gguf_model(path: Path, dtype: torch.dtype) -> Any:
    """The dequantised model, on the CPU, with stock attention.

    Args:
        path: the .gguf file.
        dtype: of the parameters; weights are dequantised in float32 and then cast.

    Raises:
        ValueError: the file is damaged.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    dequantize = GgufConfig(dequantize=True)
    return _read(
        path, AutoModelForCausalLM, dtype=dtype, attn_implementation="sdpa", quantization_config=dequantize
    )


def load_gguf_tokenizer(path: Path) -> Any:
    """The tokenizer, chat template included, that a GGUF file holds."""
    from transformers import AutoTokenizer

    return _read(path, AutoTokenizer)


def _read(path: Path, auto_class: Any, **kwargs: Any) -> Any:
    _require_gguf()
    try:
        return auto_class.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True, **kwargs)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # the readers let numpy's, struct's and their own errors through
        raise ValueError(f"{path}: cannot be read as GGUF ({type(error).__name__}: {error})") from error


def _require_gguf() -> None:
    from transformers.utils.import_utils import is_gguf_available

    if not is_gguf_available():
        raise ImportError("reading a GGUF file needs the package gguf: pip install gguf")
