"""Pairs of threads that convert to the same target."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from moba_hf import MobaConfig
from moba_hf.checkpoints.convert import convert_checkpoint
from moba_hf.checkpoints.verify import _check_files, _check_settings, _check_weights


def race_threads(src: Path, out: Path, pairs: int) -> dict[str, int]:
    """Runs pairs of threads, every second pair with `overwrite`, and counts the faults.

    Returns:
        `pairs`: number of pairs; `incomplete`: pairs in which a conversion reported success but the target
        was incomplete; `leftovers`: pairs that left anything but the target.
    """
    counts = {"pairs": 0, "incomplete": 0, "leftovers": 0}
    for number in range(pairs):
        target, done = out / f"t{number}", []
        start = threading.Barrier(2)

        def run(topk: int, overwrite: bool, target: Path = target, done: list[int] = done) -> None:
            start.wait()  # noqa: B023
            try:
                convert_checkpoint(src, target, MobaConfig(8, topk), overwrite=overwrite)
            except ValueError:
                return
            done.append(topk)

        threads = [threading.Thread(target=run, args=(topk, bool(number % 2))) for topk in (2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts["pairs"] += 1
        counts["incomplete"] += not done or not is_whole(target, src)
        counts["leftovers"] += [path.name for path in out.iterdir()] != [target.name]
        shutil.rmtree(target, ignore_errors=True)
    return counts


def is_whole(target: Path, src: Path) -> bool:
    """Whether every byte of a conversion is right; no model is loaded."""
    try:
        checked, _ = _check_settings(target, src)
        _check_weights(checked, src)
        _check_files(checked, src)
    except (ValueError, OSError):
        return False
    return True
