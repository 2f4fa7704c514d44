"""Conversions killed at every file-system event below their output folder."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from fuzz.races import is_whole

from moba_hf import MobaConfig
from moba_hf.checkpoints import convert, folders
from moba_hf.checkpoints.convert import convert_checkpoint

OLD, NEW = MobaConfig(8, 2), MobaConfig(8, 3)


def kill_at(src: Path, target: Path, event: int, *, overwrite: bool, exchange: bool) -> bool:
    """Converts in a child process that kills itself at event `event`, from 0; False if it finished before."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(_name: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            paths = [a for a in arguments if isinstance(a, (str, bytes, os.PathLike))]
            if any(os.fsencode(path).startswith(os.fsencode(target.parent)) for path in paths):
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        code = 1
        try:
            convert.check_complete = lambda *_: None  # it builds a model but writes nothing
            if not exchange:
                folders._rename = lambda *_: False
            sys.addaudithook(hook)
            convert_checkpoint(src, target, NEW, overwrite=overwrite)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def kill_everywhere(
    src: Path, out: Path, *, overwrite: bool, exchange: bool = True, step: int = 1
) -> dict[str, int]:
    """Kills a conversion at every `step`th event and counts the faults.

    Returns:
        `kills`: number of kills; `damaged`: kills after which the target was neither the complete old one nor
        the complete new one (nor, without `overwrite`, absent); `missing`: with an exchange, kills after
        which an existing target was gone; `leftovers`: kills after which the next run left anything but the
        target.
    """
    counts = {"kills": 0, "damaged": 0, "missing": 0, "leftovers": 0}
    target = out / "dst"
    for event in range(0, 10_000, step):
        if overwrite and not target.exists():
            convert_checkpoint(src, target, OLD)
        if not kill_at(src, target, event, overwrite=overwrite, exchange=exchange):
            break
        counts["kills"] += 1
        counts["missing"] += overwrite and exchange and not target.exists()
        folders.recover_folders(out)
        counts["damaged"] += not is_whole(target, src) if target.exists() else overwrite
        counts["leftovers"] += [path.name for path in out.iterdir()] != [target.name] * target.exists()
        shutil.rmtree(target, ignore_errors=True)
    return counts
