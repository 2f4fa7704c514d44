"""Checks the header of a GGUF file for damage that makes readers hang or silently read the wrong bytes.

The layout follows the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md), versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

_STRING, _ARRAY = 8, 9
# Size in bytes of each scalar type: u8, i8, u16, i16, u32, i32, f32, bool, u64, i64, f64.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# Limits: values, tensors, bytes in a name, items in an array.
_VALUES, _TENSORS, _NAME, _ITEMS = 1 << 16, 1 << 17, 1 << 16, 1 << 23


def check_gguf_header(path: Path) -> None:
    """Raises a ValueError that names the file if its header is damaged or its tensors are not contiguous."""
    with path.open("rb") as file:
        try:
            _Header(file, path.stat().st_size).check()
        except ValueError as error:
            raise ValueError(f"{path}: damaged GGUF file ({error})") from None


class _Header:
    """Reads a header from front to back; every length is checked against the file size before it is used."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.alignment = file, size, 32

    def check(self) -> None:
        magic, version = self.take(4), self.number("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"not little-endian GGUF of version 2 or 3: {magic!r}, version {version}")
        tensors = self.bounded(self.number("Q"), _TENSORS, "tensors")
        values = self.bounded(self.number("Q"), _VALUES, "values")
        names = [self.value() for _ in range(values)]
        if len(set(names)) < len(names):
            raise ValueError("a value occurs twice")
        places = sorted(self.tensor() for _ in range(tensors))
        if len({name for _, _, name in places}) < len(places):
            raise ValueError("a tensor occurs twice")
        start, expected = self.aligned(self.file.tell()), 0
        for offset, length, name in places:
            if offset != expected:
                raise ValueError(f"{name} lies at offset {offset} instead of {expected}")
            if start + offset + length > self.size:
                raise ValueError(f"{name} extends beyond the end of the file")
            expected = self.aligned(offset + length)

    def value(self) -> str:
        """Skips a name and its value; returns the name."""
        name = self.text(_NAME).decode("utf-8")
        kind = self.number("I")
        if kind == _STRING:
            self.text(self.size)
        elif kind == _ARRAY:
            kind = self.number("I")
            count = self.bounded(self.number("Q"), _ITEMS, f"items of {name}")
            if kind == _STRING:
                for _ in range(count):
                    self.text(self.size)
            else:
                self.skip(count * self.size_of(kind, name))
        elif name == "general.alignment":
            self.alignment = int.from_bytes(self.take(self.size_of(kind, name)), "little")
            if not 0 < self.alignment <= 1 << 16 or self.alignment & (self.alignment - 1):
                raise ValueError(f"general.alignment is {self.alignment}, not a power of two up to 65536")
        else:
            self.skip(self.size_of(kind, name))
        return name

    def tensor(self) -> tuple[int, int, str]:
        """Offset, length in bytes and name of the next tensor."""
        from gguf import GGML_QUANT_SIZES

        name = self.text(_NAME).decode("utf-8")
        dimensions = self.number("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = [self.number("Q") for _ in range(dimensions)]
        kind, offset = self.number("I"), self.number("Q")
        block, block_bytes = next((s for k, s in GGML_QUANT_SIZES.items() if k == kind), (0, 0))
        if not block or not all(shape) or shape[0] % block:
            raise ValueError(
                f"{name} has shape {shape}, which type {kind} does not exist for or does not fit"
            )
        return offset, math.prod(shape) // block * block_bytes, name

    def size_of(self, kind: int, name: str) -> int:
        if kind not in _SIZES:
            raise ValueError(f"{name} has the unknown type {kind}")
        return _SIZES[kind]

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0])

    def text(self, most: int) -> bytes:
        return self.take(self.bounded(self.number("Q"), most, "characters"))

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise ValueError("the file ends within its header")
        return self.file.read(count)

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError("the file ends within its header")
        self.file.seek(count, 1)

    def bounded(self, count: int, most: int, what: str) -> int:
        if count > min(most, self.size):
            raise ValueError(f"too many: {count} {what}")
        return count

    def aligned(self, position: int) -> int:
        return -(-position // self.alignment) * self.alignment
