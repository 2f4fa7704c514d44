"""Conversions that fail or are killed half-way: the old target stays, and nothing is left beside it."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import MOBA, save_tiny, snapshot

from moba_hf import MobaConfig
from moba_hf.checkpoints import convert, folders
from moba_hf.checkpoints.convert import convert_checkpoint
from moba_hf.checkpoints.folders import recover_folder

OTHER = MobaConfig(block_size=16, topk=3)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """A sharded llama."""
    return save_tiny(tmp_path / "src", max_shard_size="20KB")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder that targets are made in: what is left behind would be here."""
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
    def fail(source: Path, target: Path, link: bool) -> None:
        assert target.parent != out / "dst"
        target.write_text("half")
        raise error

    made = convert_checkpoint(src, out / "dst", MOBA)
    before = snapshot(out)
    monkeypatch.setattr(convert, "copy_file", fail)
    with pytest.raises(type(error)):
        convert_checkpoint(src, made, OTHER, overwrite=True)
    assert snapshot(out) == before
    with pytest.raises(type(error)):
        convert_checkpoint(src, out / "new" / "parents" / "dst", OTHER)
    assert os.listdir(out) == ["dst"]


def test_an_error_while_renaming_restores_the_old_target(
    src: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = convert_checkpoint(src, out / "dst", MOBA)
    before = snapshot(out)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        convert_checkpoint(src, made, OTHER, overwrite=True)
    assert snapshot(out) == before


@pytest.fixture
def heard() -> Iterator[None]:
    """Hangups end a process, also where the tests run under nohup, which ignores them."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_leaves_nothing(name: str, src: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(signal, name)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]

    def interrupt(*_: object, **__: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr(convert, "copy_file", interrupt)
    with pytest.raises(KeyboardInterrupt if name == "SIGINT" else SystemExit):
        convert_checkpoint(src, out / "dst", MOBA)
    assert os.listdir(out) == []
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]


def test_a_signal_while_renaming_waits(src: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = convert_checkpoint(src, out / "dst", MOBA)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        signal.raise_signal(signal.SIGTERM)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(SystemExit):
        convert_checkpoint(src, made, OTHER, overwrite=True)
    assert json.loads((made / "config.json").read_text())["moba"] == OTHER.to_dict()
    assert os.listdir(out) == ["dst"]


STALL = """
import sys, time
from moba_hf import MobaConfig
from moba_hf.checkpoints import convert
copy = convert.copy_file
def stall(*args, **kwargs):
    copy(*args, **kwargs)
    print("half-way", flush=True)
    time.sleep(60)
convert.copy_file = stall
convert.convert_checkpoint(sys.argv[1], sys.argv[2], MobaConfig(8, 2), overwrite=True)
"""


def test_killed_half_way(src: Path, out: Path) -> None:
    names = ("term", "kill")
    for name in names:
        convert_checkpoint(src, out / name, MOBA)
    before = snapshot(out)
    children = {
        name: subprocess.Popen(
            [sys.executable, "-c", STALL, str(src), str(out / name)], stdout=subprocess.PIPE, text=True
        )
        for name in names
    }
    for name, child in children.items():
        assert child.stdout is not None
        assert child.stdout.readline() == "half-way\n"
        recover_folder(out / name)  # a living process keeps its folder
        child.send_signal(getattr(signal, f"SIG{name.upper()}"))
        code = child.wait(timeout=30)
        child.stdout.close()
        assert code == (-signal.SIGKILL if name == "kill" else 128 + getattr(signal, f"SIG{name.upper()}"))
    left = sorted(set(os.listdir(out)) - set(names))
    assert len(left) == 1
    assert left[0].startswith(".kill.moba-hf-")
    convert_checkpoint(src, out / "kill", MOBA, overwrite=True)
    assert sorted(os.listdir(out)) == sorted(names)
    assert snapshot(out) == before


def test_killed_between_the_renames(src: Path, out: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    made = convert_checkpoint(src, out / "dst", MOBA)
    before = snapshot(out)
    stale = f".dst.moba-hf-{folders._host()}-{dead.pid}"
    made.rename(out / f"{stale}.old")
    (out / f"{stale}.new").mkdir()
    foreign = [
        ".dst.moba-hf-elsewhere-1.new",
        f".dst2{stale[4:]}.new",
        f".dst.moba-hf-{folders._host()}-1.new",
    ]
    for name in foreign:
        (out / name).mkdir()
    with pytest.raises(ValueError, match="exists already"):
        convert_checkpoint(src, made, OTHER)
    assert snapshot(out) == before
    assert sorted(os.listdir(out)) == sorted([*foreign, "dst"])
