"""Source files as they are found on disk: encodings, things that are no files, and damaged archives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Letters

from moba_hf.evaluate import repositories
from moba_hf.evaluate.repositories import (
    Repository,
    file_order,
    load_repositories,
    read_repository,
    save_repositories,
)


def text_of(folder: Path) -> str:
    return bytes(read_repository(folder, Letters()).ids.astype(np.uint8).tolist()).decode()


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(repositories.logger, "warning", found.append)
    return found


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"# -*- coding: latin-1 -*-\nx = '\xe9'\n", "# -*- coding: latin-1 -*-\nx = '\u00e9'\n"),
        (b"\xef\xbb\xbfx = '\xc3\xa9'\r\n", "x = '\u00e9'\n"),
        (b"# coding: klingon\nx = 1\n", "# coding: klingon\nx = 1\n"),
        (b"# coding: hex\nx = 1\n", "# coding: hex\nx = 1\n"),
        (b"# coding: undefined\nx = 1\n", "# coding: undefined\nx = 1\n"),
        (b"", ""),
    ],
)
def test_files_are_read_in_their_encoding(
    data: bytes, text: str, tmp_path: Path, warnings: list[str]
) -> None:
    (tmp_path / "a.py").write_bytes(data)
    assert text_of(tmp_path) == f"# {tmp_path.name}/a.py\n{text}\n"
    assert not warnings


def test_a_file_in_an_unknown_encoding_is_named(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "a.py").write_bytes(b"x = '\xe9'\n")
    (tmp_path / "b.py").write_bytes(b"y = 1\n")
    assert "x = '\ufffd'" in text_of(tmp_path)
    assert warnings[0].startswith("1 of 2 files")
    assert "a.py" in warnings[0]


def test_a_byte_order_mark_does_not_hide_imports(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfimport %s.b\n" % tmp_path.name.encode())
    (tmp_path / "b.py").write_bytes(b"y = 1\n")
    order = file_order(tmp_path, [tmp_path / "a.py", tmp_path / "b.py"])
    assert [path.name for path in order] == ["b.py", "a.py"]


def test_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"x = 1\n")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "link.py").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.py")
    assert len(read_repository(tmp_path, Letters()).files) == 1


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    path, one = tmp_path / "x.npz", Repository("r", np.arange(5), np.array([0]))
    save_repositories(path, [one])
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        save_repositories(path, [one, Repository("s", np.arange(5), np.array([0]))])
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


def test_another_archive_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    save_repositories(path, [Repository("r", np.arange(500), np.array([0]))])
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.npz: damaged, or not a file of repositories"):
            load_repositories(path)
    np.save(tmp_path / "one.npy", np.arange(3))
    path.write_bytes((tmp_path / "one.npy").read_bytes())
    with pytest.raises(ValueError, match=r"x\.npz: damaged, or not a file of repositories"):
        load_repositories(path)
    np.savez(path, **{"r:ids": np.arange(3)})
    with pytest.raises(ValueError, match=r"x\.npz: damaged, or not a file of repositories"):
        load_repositories(path)
    np.savez(path)
    with pytest.raises(ValueError, match=r"x\.npz: holds no repositories"):
        load_repositories(path)
