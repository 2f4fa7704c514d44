"""Creates folders atomically, and copies the files of a folder exactly.

A new folder is first built in a working folder next to its target, `.moba-hf-XXXXXXXX`, with a name from
`mkdtemp` and a lock that its process holds while it lives. Only that process deletes the working folder, or,
after the lock is free, a later process. The finished folder is moved to its target in one step.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from tqdm.utils import CallbackIOWrapper

from moba_hf.checkpoints.safetensors_files import read_json_object
from moba_hf.hf.loading import RECORD
from moba_hf.progress import progress_bar

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # not a POSIX system: processes do not clean up after others
    flock = None  # type: ignore[assignment]

_PREFIX = ".moba-hf-"
_LOCK, _NEW, _OLD = "lock", "new", "old"
# linux/fs.h, for renameat2
_NOREPLACE, _EXCHANGE = 1, 2
_AT_FDCWD = -100
_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM)
# Version control, caches and the state of a training run, which are not part of a model.
_LEFT_OUT_FOLDERS = (
    *(".git", ".cache", "checkpoint-[0-9]*", "global_step[0-9]*"),
    *("optimizer_[0-9]*", "pytorch_model_fsdp_[0-9]*"),
)
_LEFT_OUT_FILES = (
    *(".git", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *("trainer_state.json", "training_args.bin", "zero_to_fp32.py"),
)
# Files that are not edited in place, so that a hard link is safe.
_LINKED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Number of bytes copied at a time; an interrupt waits for at most one such copy.
_CHUNK = 1 << 26


@dataclass(frozen=True)
class Tree:
    """The contents of a folder, with paths relative to it.

    Attributes:
        files: every file with its `stat` result; links to files count as files.
        folders: every folder, also empty ones, with its permissions.
        left_out: files and folders that `scan` skipped.
    """

    files: dict[Path, os.stat_result] = field(default_factory=dict)
    folders: dict[Path, int] = field(default_factory=dict)
    left_out: list[Path] = field(default_factory=list)


def scan(folder: Path) -> Tree:
    """The files in `folder`, without version control, caches and the state of training runs.

    Raises:
        ValueError: there is a link to a folder, a broken link, or something that is neither file nor folder.
    """
    tree = Tree(folders={Path(): stat.S_IMODE(folder.stat().st_mode)})

    def visit(inner: Path) -> None:
        for path in sorted((folder / inner).iterdir()):
            name = path.relative_to(folder)
            patterns = _LEFT_OUT_FOLDERS if path.is_dir() else _LEFT_OUT_FILES
            if any(fnmatch(path.name, pattern) for pattern in patterns):
                tree.left_out.append(name)
                continue
            if path.is_symlink() and (path.is_dir() or not path.exists()):
                what = (
                    "a link to a folder; replace it with the folder itself"
                    if path.is_dir()
                    else "a broken link"
                )
                raise ValueError(f"{path}: is {what}")
            found = path.stat()
            if stat.S_ISDIR(found.st_mode):
                tree.folders[name] = stat.S_IMODE(found.st_mode)
                visit(name)
            elif stat.S_ISREG(found.st_mode):
                tree.files[name] = found
            else:
                raise ValueError(f"{path}: is neither a file nor a folder")

    visit(Path())
    return tree


def copy_tree(source: Path, tree: Tree, target: Path, *, skip: Collection[Path], link: bool = False) -> None:
    """Copies the files of `tree` from `source` to `target`, an empty folder, including permissions.

    Args:
        skip: files that are not copied.
        link: use hard links for weight files if possible.

    Raises:
        ValueError: a file has changed since the scan.
    """
    for name, mode in tree.folders.items():
        (target / name).mkdir(exist_ok=True)
        (target / name).chmod(mode | stat.S_IRWXU)
    files = {name: found for name, found in tree.files.items() if name not in skip}
    with progress_bar("copying", sum(found.st_size for found in files.values()), "B") as bar:
        for name, found in files.items():
            copy_file(source / name, target / name, found, link=link, advance=bar.update)


def copy_file(
    source: Path,
    target: Path,
    found: os.stat_result,
    *,
    link: bool = False,
    advance: Callable[[int], Any] = lambda count: None,
) -> None:
    """Copies bytes and permissions of `source` to `target`, following links.

    The copy shares blocks if the file system supports it (a reflink). With `link=True`, weight files are
    hard-linked if possible (not across file systems).

    Args:
        found: `stat` result of the scan.
        link: hard-link weight files.
        advance: called with the number of bytes after each step.

    Raises:
        ValueError: `source` has changed since the scan.
    """
    if link and source.resolve().suffix in _LINKED_SUFFIXES:
        with suppress(OSError):  # another file system, too many links, or not permitted: copy instead
            target.hardlink_to(source.resolve())
            check_same(source, found, target.stat())
            advance(found.st_size)
            return
    # Do not block if the file has been replaced by a pipe.
    reading = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(reading, "rb", buffering=0) as reader, open(target, "xb", buffering=0) as writer:
        check_same(source, found, os.fstat(reading))
        _copy_bytes(reader, writer, advance)
        target.chmod(stat.S_IMODE(found.st_mode))


def check_unchanged(source: Path, tree: Tree) -> None:
    """Raises ValueError if the files of `source` have changed since `tree` was scanned."""
    now = scan(source)
    if changed := sorted(set(now.files) ^ set(tree.files)):
        raise ValueError(f"{source / changed[0]}: was added or removed while {source} was read")
    for name, found in tree.files.items():
        check_same(source / name, found, now.files[name])


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raises ValueError with the reason if `new_folder` cannot create `target`."""
    if target.exists():
        if not target.is_dir():
            raise ValueError(f"{target}: exists and is not a folder")
        if not overwrite:
            raise ValueError(f"{target}: exists already; --overwrite (overwrite=True) replaces it")
        if reason := _no_checkpoint(target):
            raise ValueError(f"{target}: will not be overwritten, because it {reason}; remove it yourself")
        if _is_mounted(target):
            raise ValueError(
                f"{target}: is a mount point, which cannot be replaced; choose a folder inside it"
            )
    parent = next(path for path in target.parents if path.exists())  # the root at the latest
    if not parent.is_dir():
        raise ValueError(f"{parent}: is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{parent}: cannot be written to")


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder, which becomes `target` in one step if the block succeeds.

    Missing parents are created. If the block fails, nothing new remains and an existing `target` is
    unchanged. If the process is killed, the working folder remains until `recover_folders` finds it.

    Args:
        target: absolute path of the folder to create, already accepted by `check_target`.
        overwrite: replace an existing `target`, which is deleted last.

    Raises:
        ValueError: `target` has been created in the meantime and must not be overwritten.
    """
    parents = [path for path in target.parents if not path.exists()]
    work, lock = _working_folder(target)
    try:
        (work / _NEW).mkdir()
        yield work / _NEW
        _put_in_place(work, target, overwrite=overwrite)
    finally:
        _discard(work, lock)
        for path in parents:
            with suppress(OSError):  # not empty: it contains the target or other files
                path.rmdir()


def recover_folders(parent: Path) -> None:
    """Cleans up after processes that were killed while they were creating a folder in `parent`.

    Unfinished folders are removed. An old target that had been moved aside is moved back if its name is free.
    Working folders of running processes are not touched.
    """
    if flock is None or not parent.is_dir() or not os.access(parent, os.R_OK | os.W_OK):
        return
    for work in sorted(parent.glob(f"{_PREFIX}*")):
        if work.is_symlink() or not work.is_dir():
            continue
        with suppress(OSError):
            work.rmdir()  # its process was killed before it had a lock; fails if the folder is not empty
            continue
        with suppress(OSError):  # no lock, or a lock in use
            if not {path.name for path in work.iterdir()} <= {_LOCK, _NEW, _OLD}:
                continue
            lock = open(work / _LOCK, "r+b")  # noqa: SIM115 (closed by _discard)
            try:
                flock(lock, LOCK_EX | LOCK_NB)
            except OSError:
                lock.close()
                continue
            target = parent / os.fsdecode(lock.read())
            if (work / _OLD).exists() and target != parent and not target.exists():
                (work / _OLD).rename(target)
            _discard(work, lock)


def _working_folder(target: Path) -> tuple[Path, IO[bytes]]:
    """A new working folder for `target`, and its lock, which is held until it is closed."""
    for attempt in range(100):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            work = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target.parent))
            lock = open(work / _LOCK, "xb")  # noqa: SIM115 (closed by _discard)
            if flock is not None:
                flock(lock, LOCK_EX | LOCK_NB)
            lock.write(os.fsencode(target.name))
            lock.flush()
            if os.path.samestat(os.fstat(lock.fileno()), (work / _LOCK).stat()):
                return work, lock
        except (FileNotFoundError, BlockingIOError):
            if attempt == 99:
                raise
            # otherwise another process has removed it, before it was locked
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
                raise
            return work, lock  # a file system without locks: other processes do not clean up either
    raise AssertionError("the last attempt returns or raises")


def _put_in_place(work: Path, target: Path, *, overwrite: bool) -> None:
    """Moves `work/new` to `target`; a previous `target` is in `work` afterwards."""
    try:
        if not _rename(work / _NEW, target, _NOREPLACE):
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            os.rename(work / _NEW, target)
        return
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    check_target(target, overwrite=overwrite)  # again, because it may have changed in the meantime
    if not _rename(work / _NEW, target, _EXCHANGE):
        os.rename(target, work / _OLD)
        try:
            os.rename(work / _NEW, target)
        except BaseException:
            os.rename(work / _OLD, target)
            raise
        os.rename(work / _OLD, work / _NEW)  # so that `recover_folders` never restores it half deleted


def _rename(source: Path, target: Path, flags: int) -> bool:
    """Calls renameat2 of Linux; returns False if the system or the file system does not support it."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def _discard(work: Path, lock: IO[bytes]) -> None:
    """Removes our own working folder, the lock last; warns if that fails."""
    for path in (work / _NEW, work / _OLD):
        for root, folders, _ in os.walk(path):
            for name in [root, *(os.path.join(root, folder) for folder in folders)]:
                if not os.path.islink(name):
                    with suppress(OSError):
                        os.chmod(name, stat.S_IRWXU)  # a folder without write permission keeps its files
        shutil.rmtree(path, ignore_errors=True)
    if not (work / _NEW).exists() and not (work / _OLD).exists():
        with suppress(OSError):
            (work / _LOCK).unlink()
        with suppress(OSError):
            work.rmdir()
    lock.close()
    if work.exists():
        warnings.warn(f"{work}: could not be removed; remove it yourself", stacklevel=2)


def _no_checkpoint(folder: Path) -> str:
    """Why a folder is not just a checkpoint, so must not be replaced; "" if it is one."""
    names = {path.name for path in folder.iterdir()}
    if not names:
        return ""
    if "config.json" not in names:
        return "contains no config.json"
    if ".git" in names:
        return "contains a .git"
    with suppress(ValueError):
        known = read_json_object(folder / RECORD).get("files")
        if isinstance(known, dict) and all(str(path) in known for path in scan(folder).files):
            return ""
    try:
        if "model_type" not in read_json_object(folder / "config.json"):
            return "contains a config.json that is not of a model"
    except ValueError as error:
        return f"contains no readable config.json ({error})"
    inner = next((path.parent for path in folder.glob("*/**/config.json")), None)
    return "" if inner is None else f"contains another checkpoint ({inner.relative_to(folder)})"


def _is_mounted(folder: Path) -> bool:
    """Whether `folder` is a mount point, including bind mounts."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    points = {line.split()[4] for line in lines}
    name = os.fsencode(folder)
    for char in b"\\ \t\n":
        name = name.replace(bytes([char]), b"\\%03o" % char)
    return name in points


def check_same(path: Path, found: os.stat_result, now: os.stat_result) -> None:
    """Raises ValueError if `path` differs in two `stat` results, except for name, links and access time."""

    def signature(s: os.stat_result) -> tuple[int, ...]:
        return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, stat.S_IFMT(s.st_mode)

    if signature(found) != signature(now):
        raise ValueError(f"{path}: changed while it was copied")


def _copy_bytes(reader: IO[bytes], writer: IO[bytes], advance: Callable[[int], Any]) -> None:
    """Copies the rest of a file; on Linux in the kernel, which shares blocks if possible."""
    if hasattr(os, "copy_file_range"):
        try:
            while count := os.copy_file_range(reader.fileno(), writer.fileno(), _CHUNK):
                advance(count)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
    shutil.copyfileobj(CallbackIOWrapper(advance, reader, "read"), writer, _CHUNK)
