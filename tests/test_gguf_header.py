"""GGUF headers that make readers hang or silently read the wrong data."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import write_tiny_gguf

from moba_hf.checkpoints.gguf_files import read_gguf_config
from moba_hf.checkpoints.gguf_header import check_gguf_header

Data = bytearray


@pytest.fixture
def path(tmp_path: Path) -> Path:
    pytest.importorskip("gguf")
    write_tiny_gguf(tmp_path / "m.gguf")
    return tmp_path / "m.gguf"


def after(data: Data, name: bytes) -> int:
    """The position just past a name."""
    return data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


def put(data: Data, position: int, number: int, form: str = "Q") -> None:
    struct.pack_into(f"<{form}", data, position, number)


def swap_norms(data: Data) -> None:
    """Swaps the offsets of two norms of the same shape; llama.cpp refuses that too."""
    places = [after(data, name) + 4 + 8 + 4 for name in (b"blk.0.attn_norm.weight", b"blk.0.ffn_norm.weight")]
    offsets = [struct.unpack_from("<Q", data, place)[0] for place in places]
    put(data, places[0], offsets[0] + 32)
    put(data, places[1], offsets[1])


def lengthen(data: Data) -> None:
    """An array of 2^32 bytes; the reader of the gguf package takes hours for it."""
    put(data, after(data, TYPES) + 4, 0, "I")
    put(data, after(data, TYPES) + 8, 2**32)


TOKENS = b"tokenizer.ggml.tokens"
TYPES = b"tokenizer.ggml.token_type"
NORM = b"output_norm.weight"
DAMAGES: dict[str, tuple[Callable[[Data], None], str]] = {
    "2^32 items": (lambda d: put(d, after(d, TOKENS) + 8, 2**32), "items of tokenizer.ggml.tokens"),
    "2^32 bytes": (lengthen, "items of tokenizer.ggml.token_type"),
    "an array of arrays": (lambda d: put(d, after(d, TOKENS) + 4, 9, "I"), "type 9"),
    "a long string": (lambda d: put(d, after(d, TOKENS) + 16, 2**62), "characters"),
    "many tensors": (lambda d: put(d, 8, 2**40), "tensors"),
    "many values": (lambda d: put(d, 16, 2**40), "values"),
    "a version": (lambda d: put(d, 4, 1, "I"), "version 1"),
    "an unknown type": (lambda d: put(d, after(d, NORM) + 4 + 8, 999, "I"), "type 999"),
    "no dimensions": (lambda d: put(d, after(d, NORM), 0, "I"), "0 dimensions"),
    "a moved norm": (swap_norms, "lies at"),
    "another shape": (lambda d: put(d, after(d, NORM) + 4, 32), "lies at"),
    "a cut": (lambda d: d.__delitem__(slice(len(d) - 100, None)), "extends beyond the end"),
    "a cut header": (lambda d: d.__delitem__(slice(300, None)), "in its header"),
}


def test_an_undamaged_file_passes(path: Path) -> None:
    check_gguf_header(path)
    assert read_gguf_config(path).model_type == "llama"


@pytest.mark.parametrize("name", DAMAGES)
def test_refuses_damaged_headers(name: str, path: Path) -> None:
    damage, message = DAMAGES[name]
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"m\.gguf: damaged GGUF file \(.*{message}"):
        read_gguf_config(path)
