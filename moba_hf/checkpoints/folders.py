"""Folders that appear whole or not at all, and faithful copies of a folder's files.

A new folder is made inside a working folder beside its target, `.moba-hf-XXXXXXXX`: `mkdtemp` names it, and
a lock in it is held as long as its process lives. Only that process deletes it or, once the lock is free, the
next one that comes by. The finished folder takes its place in one step.
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
except ImportError:  # not a POSIX system: there nobody tidies up after others
    flock = None  # type: ignore[assignment]

_PREFIX = ".moba-hf-"
_LOCK, _NEW, _OLD = "lock", "new", "old"
# linux/fs.h, for renameat2
_NOREPLACE, _EXCHANGE = 1, 2
_AT_FDCWD = -100
_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM)
# Files about the source as a place, and the state of a training run: no part of a model.
_LEFT_OUT_FOLDERS = (
    *(".git", ".cache", "checkpoint-[0-9]*", "global_step[0-9]*"),
    *("optimizer_[0-9]*", "pytorch_model_fsdp_[0-9]*"),
)
_LEFT_OUT_FILES = (
    *(".git", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *("trainer_state.json", "training_args.bin", "zero_to_fp32.py"),
)
# Files that nobody edits in place, so that sharing them through a hard link is safe.
_LINKED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Bytes copied at once: an interrupt waits no longer than that.
_CHUNK = 1 << 26


@dataclass(frozen=True)
class Tree:
    """What lies below a folder, paths relative to it.

    Attributes:
        files: every file, and what the system says about it; links to files count as files.
        folders: every folder, empty ones too, and its permissions.
        left_out: files and folders that `scan` does not take.
    """

    files: dict[Path, os.stat_result] = field(default_factory=dict)
    folders: dict[Path, int] = field(default_factory=dict)
    left_out: list[Path] = field(default_factory=list)


def scan(folder: Path) -> Tree:
    """The files below `folder`, without version control, caches and the state of training runs.

    Raises:
        ValueError: a link to a folder, a broken link, or something that is neither file nor folder.
    """
    tree = Tree(folders={Path(): stat.S_IMODE(folder.stat().st_mode)})

    def visit(inner: Path) -> None:
        for path in sorted((folder / inner).iterdir()):
            name = path.relative_to(folder)
            patterns = _LEFT_OUT_FOLDERS if path.is_dir() else _LEFT_OUT_FILES
            if any(fnmatch(path.name, pattern) for pattern in patterns):
                tree.left_out.append(name)
                continue
            if path.is_symlink() and not path.is_file():
                what = (
                    "a link to a folder; replace it by the folder itself"
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
    """Makes `target`, an empty folder, hold what `tree` found in `source`, permissions included.

    Args:
        skip: files that are not copied.
        link: share weight files through hard links where that can be.

    Raises:
        ValueError: a file is not the one that was found.
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
    """Makes `target` hold the bytes and permissions of `source`, following links, at the least cost.

    The blocks are shared where the file system can (a reflink). With `link=True` a hard link for weight
    files; where that cannot be, as across file systems, a copy.

    Args:
        advance: called with the number of bytes, as they are copied.

    Raises:
        ValueError: `source` is not the file that was `found`.
    """
    if link and source.resolve().suffix in _LINKED_SUFFIXES:
        with suppress(OSError):  # another file system, too many links, not permitted: copy
            target.hardlink_to(source.resolve())
            check_same(source, found, target.stat())
            advance(found.st_size)
            return
    # A pipe that has taken the file's place must not be waited for.
    reading = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(reading, "rb", buffering=0) as reader, open(target, "xb", buffering=0) as writer:
        check_same(source, found, os.fstat(reading))
        _copy_bytes(reader, writer, advance)
        target.chmod(stat.S_IMODE(found.st_mode))


def check_unchanged(source: Path, tree: Tree) -> None:
    """Raises ValueError unless `source` still holds the files that `tree` found, as they were."""
    now = scan(source)
    if changed := sorted(set(now.files) ^ set(tree.files)):
        raise ValueError(f"{source / changed[0]}: came or went while {source} was read")
    for name, found in tree.files.items():
        check_same(source / name, found, now.files[name])


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raises ValueError, naming the reason, when `new_folder` cannot make `target`."""
    if target.exists():
        if not target.is_dir():
            raise ValueError(f"{target}: exists and is not a folder")
        if not overwrite:
            raise ValueError(f"{target}: exists already; --overwrite (overwrite=True) replaces it")
        if reason := _no_checkpoint(target):
            raise ValueError(f"{target}: will not be overwritten, as it {reason}; remove it yourself")
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
    """Yields an empty folder, which becomes `target` in one step when the block ends well.

    Missing parents are made. If the block fails, nothing new stays and an older `target` stays as it was.
    After a kill the working folder stays until `recover_folders` finds it.

    Args:
        target: absolute path of the folder to make; `check_target` has accepted it.
        overwrite: replace an existing `target`, which is removed last.

    Raises:
        ValueError: `target` has come to be meanwhile, and is not to be overwritten.
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
            with suppress(OSError):  # not empty: the target is there, or somebody else's files
                path.rmdir()


def recover_folders(parent: Path) -> None:
    """Tidies up after processes that were killed while making a folder in `parent`.

    What they had half written is removed. An older target that stood aside is put back where its place is
    free. The working folders of living processes are left alone.
    """
    if flock is None or not parent.is_dir() or not os.access(parent, os.R_OK | os.W_OK):
        return
    for work in sorted(parent.glob(f"{_PREFIX}*")):
        if work.is_symlink() or not work.is_dir():
            continue
        with suppress(OSError):
            work.rmdir()  # killed before it had a lock; fails where anything is in it
            continue
        with suppress(OSError):  # no lock, or a living one
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
    """A fresh working folder for `target` and its lock, which is held until it is closed."""
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
            # else another process took it for a dead one's before it was locked
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
                raise
            return work, lock  # a file system without locks, where nobody tidies up either
    raise AssertionError("the last attempt returns or raises")


def _put_in_place(work: Path, target: Path, *, overwrite: bool) -> None:
    """Gives `work/new` the name `target`; what had that name is in `work` afterwards."""
    try:
        if not _rename(work / _NEW, target, _NOREPLACE):
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            os.rename(work / _NEW, target)
        return
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    check_target(target, overwrite=overwrite)  # again: it may have come or changed meanwhile
    if not _rename(work / _NEW, target, _EXCHANGE):
        os.rename(target, work / _OLD)
        try:
            os.rename(work / _NEW, target)
        except BaseException:
            os.rename(work / _OLD, target)
            raise
        os.rename(work / _OLD, work / _NEW)  # half deleted it must not come back as the target


def _rename(source: Path, target: Path, flags: int) -> bool:
    """renameat2 of Linux; False where the system or the file system does not have it."""
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
    """Removes a working folder of one's own, the lock last; says so where that is not allowed."""
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
    """Why a folder is more, or something else, than a checkpoint that may be replaced; "": it is one."""
    names = {path.name for path in folder.iterdir()}
    if not names:
        return ""
    if "config.json" not in names:
        return "holds no config.json"
    if ".git" in names:
        return "holds a .git"
    with suppress(ValueError):
        known = read_json_object(folder / RECORD).get("files")
        if isinstance(known, dict) and all(str(path) in known for path in scan(folder).files):
            return ""
    try:
        if "model_type" not in read_json_object(folder / "config.json"):
            return "holds a config.json that is no model's"
    except ValueError as error:
        return f"holds no readable config.json ({error})"
    inner = next((path.parent for path in folder.glob("*/**/config.json")), None)
    return "" if inner is None else f"holds another checkpoint ({inner.relative_to(folder)})"


def _is_mounted(folder: Path) -> bool:
    """Whether `folder` is a mount point, also of a part of its own file system."""
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
    """Raises ValueError unless both say the same about `path`; its name, links and reading do not count."""

    def signature(s: os.stat_result) -> tuple[int, ...]:
        return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, stat.S_IFMT(s.st_mode)

    if signature(found) != signature(now):
        raise ValueError(f"{path}: changed while it was copied")


def _copy_bytes(reader: IO[bytes], writer: IO[bytes], advance: Callable[[int], Any]) -> None:
    """Copies a file from where both stand; on Linux inside the system, which shares blocks where it can."""
    if hasattr(os, "copy_file_range"):
        try:
            while count := os.copy_file_range(reader.fileno(), writer.fileno(), _CHUNK):
                advance(count)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
    shutil.copyfileobj(CallbackIOWrapper(advance, reader, "read"), writer, _CHUNK)
