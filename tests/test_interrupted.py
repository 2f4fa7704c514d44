"""Conversions that fail or are killed half-way keep the old target and leave nothing else behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from checkpoints import MOBA, save_tiny, snapshot
from fuzz.races import race_threads

from moba_hf import MobaConfig
from moba_hf.checkpoints import convert, folders
from moba_hf.checkpoints.convert import convert_checkpoint
from moba_hf.checkpoints.folders import recover_folders

OTHER = MobaConfig(block_size=16, topk=3)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """A sharded llama."""
    return save_tiny(tmp_path / "src", max_shard_size="20KB")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The parent folder of all targets, where leftover files would be."""
    path = tmp_path / "out"
    path.mkdir()
    return path


def test_overwrite_replaces_the_target(src: Path, out: Path) -> None:
    made = convert_checkpoint(src, out / "dst", MOBA)
    (made / "extra").touch()
    convert_checkpoint(src, made, OTHER, overwrite=True)
    assert json.loads((made / "config.json").read_text())["moba"] == OTHER.to_dict()
    assert not (made / "extra").exists()
    assert os.listdir(out) == ["dst"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_while_copying_leaves_the_old_target(
    error: BaseException, src: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, tree: object, target: Path, **_: object) -> None:
        assert target != out / "dst"
        (target / "half").write_text("half")
        raise error

    made = convert_checkpoint(src, out / "dst", MOBA)
    before = snapshot(out)
    monkeypatch.setattr(convert, "copy_tree", fail)
    with pytest.raises(type(error)):
        convert_checkpoint(src, made, OTHER, overwrite=True)
    assert snapshot(out) == before
    with pytest.raises(type(error)):
        convert_checkpoint(src, out / "new" / "parents" / "dst", OTHER)
    assert os.listdir(out) == ["dst"]


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without renameat2."""
    monkeypatch.setattr(folders, "_rename", lambda *_: False)


@pytest.mark.parametrize("exchange", [True, False])
def test_an_error_while_renaming_keeps_the_old_target(
    exchange: bool, src: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = convert_checkpoint(src, out / "dst", MOBA)
    before = snapshot(out)

    def fail(source: Path, target: Path, *_: object) -> bool:
        if Path(source).name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target) is None

    rename = os.rename
    if exchange:
        monkeypatch.setattr(folders, "_rename", fail)
    else:
        no_exchange(monkeypatch)
        monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        convert_checkpoint(src, made, OTHER, overwrite=True)
    assert snapshot(out) == before


def test_the_target_is_there_at_every_moment(src: Path, out: Path) -> None:
    """A reader that polls all the time never finds it missing."""
    made = convert_checkpoint(src, out / "dst", MOBA)
    missed, done = [], threading.Event()

    def look() -> None:
        while not done.wait(0.0002):
            missed.extend([] if (made / "config.json").exists() else [made])

    reader = threading.Thread(target=look)
    reader.start()
    for moba in (OTHER, MOBA) * 2:
        convert_checkpoint(src, made, moba, overwrite=True)
    done.set()
    reader.join()
    assert not missed


def test_replaces_without_an_exchange(src: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_exchange(monkeypatch)
    made = convert_checkpoint(src, out / "dst", MOBA)
    convert_checkpoint(src, made, OTHER, overwrite=True)
    assert json.loads((made / "config.json").read_text())["moba"] == OTHER.to_dict()
    with pytest.raises(ValueError, match="exists already"):
        convert_checkpoint(src, made, OTHER)
    assert os.listdir(out) == ["dst"]


def test_a_target_created_meanwhile_is_kept(src: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = convert.copy_tree

    def intrude(*args: object, **kwargs: object) -> None:
        copy(*args, **kwargs)  # type: ignore[arg-type]
        (out / "dst").mkdir()
        (out / "dst" / "mine").touch()

    monkeypatch.setattr(convert, "copy_tree", intrude)
    with pytest.raises(ValueError, match="exists already"):
        convert_checkpoint(src, out / "dst", MOBA)
    assert snapshot(out) == {"dst/mine": b""}
    assert os.listdir(out) == ["dst"]


def test_an_old_target_that_cannot_be_removed_is_reported(
    src: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = convert_checkpoint(src, out / "dst", MOBA)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.warns(UserWarning, match=r"\.moba-hf-\w+: could not be removed"):
            convert_checkpoint(src, made, OTHER, overwrite=True)
    assert json.loads((made / "config.json").read_text())["moba"] == OTHER.to_dict()
    convert_checkpoint(src, out / "next", MOBA)  # cleans up, without restoring the old target
    assert sorted(os.listdir(out)) == ["dst", "next"]


def test_a_read_only_old_target_is_replaced(src: Path, out: Path) -> None:
    made = convert_checkpoint(src, out / "dst", MOBA)
    made.chmod(0o555)
    convert_checkpoint(src, made, OTHER, overwrite=True)
    assert os.listdir(out) == ["dst"]


# Several at once


def test_threads_on_one_target(src: Path, out: Path) -> None:
    assert race_threads(src, out, 12) == {"incomplete": 0, "leftovers": 0, "pairs": 12}


def test_a_second_run_deletes_nothing_of_the_first(src: Path, out: Path) -> None:
    """Process ids do not help: two containers on the same disk may share one."""
    with folders.new_folder(out / "dst") as first:
        (first / "half").touch()
        for source in (src, src / "missing"):
            with suppress(ValueError):
                convert_checkpoint(source, out / "dst", MOBA)
        assert (first / "half").exists()
        shutil.rmtree(out / "dst")
    assert [path.name for path in (out / "dst").iterdir()] == ["half"]


def test_files_that_vanish_from_the_working_folder_are_noticed(
    src: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = convert.copy_tree

    def lose(source: Path, tree: object, target: Path, **kwargs: object) -> None:
        copy(source, tree, target, **kwargs)  # type: ignore[arg-type]
        (target / "tokenizer.json").unlink()

    monkeypatch.setattr(convert, "copy_tree", lose)
    with pytest.raises(ValueError, match=r"tokenizer\.json: was added or removed"):
        convert_checkpoint(src, out / "dst", MOBA)
    assert os.listdir(out) == []


# Kills

# Starts one process for each signal after the imports, which take seconds, and prints how each has ended.
STALL = """
import json, os, sys, time
from moba_hf import MobaConfig
from moba_hf.checkpoints import convert
from moba_hf_cli import app, main
copy = convert.copy_tree
def stall(*args, **kwargs):
    copy(*args, **kwargs)
    print("half-way", flush=True)
    time.sleep(60)
convert.copy_tree = stall
children = {}
for name, source, target, said in json.loads(sys.argv[1]):
    children[name] = os.fork()
    if children[name] == 0:
        for stream in (1, 2):
            os.dup2(os.open(f"{said}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
        if name == "kill":
            convert.convert_checkpoint(source, target, MobaConfig(8, 2), overwrite=True)
        main(["convert", source, target, "--block-size", "8", "--topk", "2", "--overwrite"])
print(json.dumps(children), flush=True)
print(json.dumps({x: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for x, pid in children.items()}))
"""


def _default_signals() -> None:
    """Restores the signals as in a terminal; nohup and background jobs of a shell ignore them."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def test_killed_half_way(src: Path, out: Path, tmp_path: Path) -> None:
    """The command cleans up after SIGTERM, SIGHUP and SIGINT; after SIGKILL, the next run does."""
    kinds = {"term": 143, "hup": 129, "int": 130, "kill": -9}
    for name in kinds:
        convert_checkpoint(src, out / name, MOBA)
    before = snapshot(out)
    jobs = [[name, str(src), str(out / name), str(tmp_path / name)] for name in kinds]
    parent = subprocess.Popen(
        [sys.executable, "-c", STALL, json.dumps(jobs)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_default_signals,
    )
    assert parent.stdout is not None
    children = json.loads(parent.stdout.readline())
    for name, child in children.items():
        printed = tmp_path / f"{name}.1"
        for _ in range(300):
            if printed.exists() and printed.read_text() == "half-way\n":
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"{name}: not half-way after 30 seconds")
        recover_folders(out)  # running processes keep their folders
        os.kill(child, getattr(signal, f"SIG{name.upper()}"))
    ends, _ = parent.communicate(timeout=30)
    errors = {name: (tmp_path / f"{name}.2").read_text() for name in kinds}
    assert json.loads(ends) == kinds, errors
    errors.pop("kill")
    assert set(errors.values()) == {"moba-hf: interrupted\n"}
    left = sorted(set(os.listdir(out)) - set(kinds))
    assert len(left) == 1
    assert left[0].startswith(".moba-hf-")
    convert_checkpoint(src, out / "kill", MOBA, overwrite=True)
    assert sorted(os.listdir(out)) == sorted(kinds)
    assert snapshot(out) == before


def test_killed_between_the_renames(src: Path, out: Path) -> None:
    """Without an atomic exchange, the old target is restored; folders of others are left alone."""
    made = convert_checkpoint(src, out / "dst", MOBA)
    before = snapshot(out)
    work = out / ".moba-hf-dead"
    (work / "new").mkdir(parents=True)
    (work / "lock").write_bytes(b"dst")
    made.rename(work / "old")
    (out / ".moba-hf-empty").mkdir()
    (out / ".moba-hf-foreign").mkdir()
    (out / ".moba-hf-foreign" / "photo.jpg").touch()
    with pytest.raises(ValueError, match="exists already"):
        convert_checkpoint(src, made, OTHER)
    (out / ".moba-hf-foreign" / "photo.jpg").unlink()
    assert snapshot(out) == before
    assert sorted(os.listdir(out)) == [".moba-hf-foreign", "dst"]
