"""Whole repositories of source files as tokens; each file comes after the files it imports."""

from __future__ import annotations

import ast
import os
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from moba_hf.files import replacing

Ids = np.ndarray[Any, Any]

# What np.load, the use of its result, and the reading of an entry raise for files of another kind.
_NOT_AN_ARCHIVE = (
    *(ValueError, KeyError, TypeError, AttributeError, EOFError),
    *(zipfile.BadZipFile, zlib.error),
)

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Repository:
    """The files of a folder as one sequence of tokens.

    Attributes:
        name: name used in messages.
        ids: token ids, one-dimensional.
        files: index at which each file begins, ascending; the first is 0.
    """

    name: str
    ids: Ids
    files: Ids

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or not len(self.ids):
            raise ValueError(f"{self.name}: the repository has no tokens")
        if not len(self.files) or self.files[0] != 0 or self.files[-1] >= len(self.ids):
            raise ValueError(f"{self.name}: the first file must begin at token 0, the last before the end")


def file_order(folder: Path, files: Sequence[Path]) -> list[Path]:
    """`files` sorted by path, except that Python files come after the files of `folder` they import."""
    modules = {".".join(_module(folder, path)): path for path in files if path.suffix == ".py"}
    order: dict[Path, None] = {}
    visiting: set[Path] = set()

    def visit(start: Path) -> None:  # depth first; an import cycle is broken where it closes
        stack = [(start, iter(_imported(folder, start, modules)))]
        visiting.add(start)
        while stack:
            path, rest = stack[-1]
            if (following := next((p for p in rest if p not in visiting), None)) is None:
                order[path] = None
                stack.pop()
            else:
                visiting.add(following)
                stack.append((following, iter(_imported(folder, following, modules))))

    for path in sorted(files):
        if path not in visiting:
            visit(path)
    return list(order)


def _module(folder: Path, path: Path) -> tuple[str, ...]:
    parts = path.relative_to(folder.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _imported(folder: Path, path: Path, modules: dict[str, Path]) -> list[Path]:
    """Files that a Python file imports, in order; empty if the file cannot be parsed."""
    if path.suffix != ".py":
        return []
    try:
        tree = ast.parse(source_text(path)[0])
    except (SyntaxError, ValueError, RecursionError):
        return []
    package = _module(folder, path)
    package = package if path.name == "__init__.py" else package[:-1]
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            names += [f"{base}.{alias.name}" for alias in node.names] + [base]
    found = [modules[name] for name in names if name in modules]
    return [other for other in dict.fromkeys(found) if other != path]


def read_repository(folder: str | os.PathLike[str], tokenizer: Any, suffix: str = ".py") -> Repository:
    """The files in and below `folder` that end in `suffix`, each preceded by a comment with its path.

    Files are read as `source_text` does; a warning names those that lose characters.

    Raises:
        ValueError: there is no such file.
    """
    root = Path(folder).absolute()
    if not (paths := [path for path in root.rglob(f"*{suffix}") if path.is_file()]):
        raise ValueError(f"{root}: found no file that ends in {suffix}")
    paths = file_order(root, paths)
    read = [source_text(path) for path in paths]
    if lossy := [path for path, (_, whole) in zip(paths, read, strict=True) if not whole]:
        logger.warning(
            f"{len(lossy)} of {len(paths)} files are not UTF-8 and do not name their encoding, so characters "
            f"are replaced: {', '.join(map(str, lossy[:3]))}"
        )
    texts = [
        f"# {path.relative_to(root.parent)}\n{text}\n" for path, (text, _) in zip(paths, read, strict=True)
    ]
    parts = [np.asarray(ids, np.int32) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    parts = [part for part in parts if len(part)]
    begins = np.concatenate([[0], np.cumsum([len(part) for part in parts])[:-1]]).astype(np.int64)
    return Repository(root.name, np.concatenate(parts), begins)


def source_text(path: Path) -> tuple[str, bool]:
    """The text of a source file, without byte-order mark, and whether no character had to be replaced.

    The encoding is the one that a Python file names (PEP 263), or UTF-8 if the file cannot be read in it.
    """
    data = path.read_bytes()
    encodings = ["utf-8-sig"]
    if path.suffix == ".py":
        with suppress(SyntaxError):  # an unknown encoding, or not UTF-8
            encodings.insert(0, tokenize.detect_encoding(iter(data.splitlines(keepends=True)).__next__)[0])
    for encoding in encodings:
        with suppress(UnicodeError, LookupError):  # LookupError: a codec that is not for text, such as "hex"
            return _unix_lines(data.decode(encoding)), True
    return _unix_lines(data.decode("utf-8", errors="replace")), False


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def save_repositories(path: str | os.PathLike[str], repositories: Sequence[Repository]) -> None:
    """Writes the token ids and file offsets of `repositories` to a compressed .npz file, whole or not at all.

    Raises:
        ValueError: two repositories have the same name, so one would replace the other.
    """
    names = [one.name for one in repositories]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: two repositories are named {twice[0]!r}; give one of them another name")
    arrays: dict[str, Ids] = {}
    for one in repositories:
        small = one.ids.max() < 1 << 16
        arrays[f"{one.name}:ids"] = one.ids.astype(np.uint16 if small else np.uint32)
        arrays[f"{one.name}:files"] = one.files
    with replacing(Path(path)) as beside, open(beside, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load_repositories(path: str | os.PathLike[str]) -> list[Repository]:
    """Reads a file written by `save_repositories`. Raises a ValueError that names any other file."""
    try:
        with np.load(path) as stored:
            names = [name.removesuffix(":ids") for name in stored.files if name.endswith(":ids")]
            found = [Repository(name, stored[f"{name}:ids"], stored[f"{name}:files"]) for name in names]
    except _NOT_AN_ARCHIVE as error:
        raise ValueError(f"{path}: damaged, or not a file of repositories ({error})") from error
    if not found:
        raise ValueError(f"{path}: holds no repositories")
    return found
