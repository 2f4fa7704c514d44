"""Folders that appear whole or not at all, and the cheapest faithful copy of a file."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

try:
    from fcntl import ioctl
except ImportError:  # not a POSIX system
    ioctl = None  # type: ignore[assignment]

_FICLONE = 0x40049409  # linux/fs.h: share the data blocks of another file
# Files about the source as a place, wrong in a copy.
_SKIPPED_FOLDERS = (".git", ".cache")
# Files that nobody edits in place, so that sharing them through a hard link is safe.
_LINKED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Temporary folders that this process is writing.
_ACTIVE: set[Path] = set()


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `target`, renamed to `target` when the block ends well.

    Missing parents are made. If the block or the renaming fails, or SIGINT, SIGTERM or SIGHUP arrives,
    nothing new stays, and an older `target` stays as it was. After a SIGKILL the temporary folder stays
    until `recover_folder`.

    Args:
        target: absolute path of the folder to make; `check_target` has accepted it.
        overwrite: replace an existing `target`; it is moved aside and removed last.
    """
    temporary, aside = _beside(target, "new"), _beside(target, "old")
    parents = [path for path in target.parents if not path.exists()]
    with _Interrupts() as interrupts:
        _ACTIVE.update((temporary, aside))
        try:
            with interrupts.held():
                temporary.mkdir(parents=True)
            yield temporary
            with interrupts.held():
                _put_in_place(temporary, target, aside, overwrite)
        finally:
            with interrupts.held():
                shutil.rmtree(temporary, ignore_errors=True)
                for path in parents:
                    with suppress(OSError):  # no longer empty: the target is there
                        path.rmdir()
                _ACTIVE.difference_update((temporary, aside))


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raises ValueError, naming the reason, when `new_folder` cannot make `target`."""
    if target.exists():
        if not target.is_dir():
            raise ValueError(f"{target}: exists and is not a folder")
        if not overwrite:
            raise ValueError(f"{target}: exists already; --overwrite (overwrite=True) replaces it")
        if any(target.iterdir()) and not (target / "config.json").is_file():
            raise ValueError(
                f"{target}: will not be overwritten, as it holds no config.json; remove it yourself"
            )
    parent = next(path for path in target.parents if path.exists())  # the root at the latest
    if not parent.is_dir():
        raise ValueError(f"{parent}: is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{parent}: cannot be written to")


def recover_folder(target: Path) -> None:
    """Tidies up after processes that were killed while making `target`.

    Half-written folders are removed. An older `target` that was moved aside is put back if the new one had
    not taken its place, else removed. Folders of living processes and of other machines are left alone.
    """
    pattern = re.compile(re.escape(f".{target.name}.moba-hf-{_host()}-") + r"(\d+)\.(new|old)")
    if not target.parent.is_dir() or not os.access(target.parent, os.R_OK):
        return
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if not match or path in _ACTIVE or _is_alive(int(match[1])):
            continue
        if match[2] == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def list_files(folder: Path) -> list[Path]:
    """Paths, relative to `folder`, of every file below it, without `.git` and `.cache`; sorted.

    Links to files count as files.

    Raises:
        ValueError: a link to a folder, a broken link, or something that is neither file nor folder.
    """

    def fail(error: OSError) -> None:
        raise error

    files = []
    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(set(folders) - set(_SKIPPED_FOLDERS))
        for path in (Path(root, name) for name in folders):
            if path.is_symlink():
                raise ValueError(f"{path}: is a link to a folder; replace it by the folder itself")
        for path in (Path(root, name) for name in names):
            if not path.is_file():
                kind = "a broken link" if path.is_symlink() else "neither a file nor a folder"
                raise ValueError(f"{path}: is {kind}")
            files.append(path.relative_to(folder))
    return sorted(files)


def copy_file(source: Path, target: Path, *, link: bool = False) -> None:
    """Makes `target` hold the bytes of `source`, following links, at the least cost.

    A reflink (shared until one is written to) where the file system can, else a copy. With `link=True` a hard
    link for weight files; where that cannot be, as across file systems, a copy.
    """
    source = source.resolve()
    if link and source.suffix in _LINKED_SUFFIXES:
        try:
            target.hardlink_to(source)
            return
        except OSError:  # another file system, too many links, not permitted: copy
            target.unlink(missing_ok=True)
    if not _reflink(source, target):
        shutil.copyfile(source, target)


def _reflink(source: Path, target: Path) -> bool:
    if ioctl is None:
        return False
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError:
            return False
    return True


def _put_in_place(temporary: Path, target: Path, aside: Path, overwrite: bool) -> None:
    """Renames `temporary` to `target`; an older target goes aside first and away last."""
    replaced = overwrite and target.exists()
    if replaced:
        target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        if replaced:
            aside.rename(target)
        raise
    if replaced:
        shutil.rmtree(aside)


def _beside(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.moba-hf-{_host()}-{os.getpid()}.{kind}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname())[:32]


def _is_alive(pid: int) -> bool:
    """Whether another process has this id; this process answers through `_ACTIVE`."""
    if os.name != "posix":
        return True  # there os.kill would end it
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


class _Interrupts:
    """Inside the `with` block SIGINT, SIGTERM and SIGHUP raise, so that `finally` runs; `held()` delays them.

    Only the main thread can have handlers; handlers that the program set itself are left in place.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._held = False
        self._pending: int | None = None
        self._raised = False

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals that arrive inside this block raise at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self._pending is not None:
                self._raise(self._pending)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._raised:
            return  # already on the way out; what it still does is short
        if self._held:
            self._pending = number
        else:
            self._raise(number)

    def _raise(self, number: int) -> None:
        self._pending, self._raised = None, True
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)
