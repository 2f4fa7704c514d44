"""The header of a GGUF file, checked where a reader could hang on it or silently read the wrong bytes.

The layout is that of the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md), versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

_STRING, _ARRAY = 8, 9
# Bytes of a value by its type: u8, i8, u16, i16, u32, i32, f32, bool, u64, i64, f64.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# The most values, tensors, characters of a name or items of an array that a file may have.
_VALUES, _TENSORS, _NAME, _ITEMS = 1 << 16, 1 << 17, 1 << 16, 1 << 23


def check_gguf_header(path: Path) -> None:
    """Raises ValueError, naming the file, for a damaged header or tensors that do not lie side by side."""
    with path.open("rb") as file:
        try:
            _Header(file, path.stat().st_size).check()
        except ValueError as error:
            raise ValueError(f"{path}: damaged GGUF file ({error})") from None


class _Header:
    """Reads on through a file; every length is held against the rest of the file before it is used."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.alignment = file, size, 32

    def check(self) -> None:
        magic, version = self.take(4), self.number("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"no little-endian GGUF of version 2 or 3: {magic!r}, version {version}")
        tensors = self.bounded(self.number("Q"), _TENSORS, "tensors")
        values = self.bounded(self.number("Q"), _VALUES, "values")
        names = [self.value() for _ in range(values)]
        if len(set(names)) < len(names):
            raise ValueError("it gives a value twice")
        places = sorted(self.tensor() for _ in range(tensors))
        if len({name for _, _, name in places}) < len(places):
            raise ValueError("it names a tensor twice")
        start, expected = self.aligned(self.file.tell()), 0
        for offset, length, name in places:
            if offset != expected:
                raise ValueError(f"{name} lies at {offset} instead of {expected}")
            if start + offset + length > self.size:
                raise ValueError(f"{name} ends behind the end of the file")
            expected = self.aligned(offset + length)

    def value(self) -> str:
        """Skips a name and its value; gives the name."""
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
                raise ValueError(f"general.alignment is {self.alignment}, no power of two up to 65536")
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
            raise ValueError(f"{name} has the shape {shape} and the unknown or unfit type {kind}")
        return offset, math.prod(shape) // block * block_bytes, name

    def size_of(self, kind: int, name: str) -> int:
        if kind not in _SIZES:
            raise ValueError(f"{name} has the type {kind}, which no reader knows")
        return _SIZES[kind]

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0])

    def text(self, most: int) -> bytes:
        return self.take(self.bounded(self.number("Q"), most, "characters"))

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise ValueError("it ends in its header")
        return self.file.read(count)

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError("it ends in its header")
        self.file.seek(count, 1)

    def bounded(self, count: int, most: int, what: str) -> int:
        if count > min(most, self.size):
            raise ValueError(f"{count} {what}")
        return count

    def aligned(self, position: int) -> int:
        return -(-position // self.alignment) * self.alignment
