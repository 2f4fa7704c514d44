"""Results on disk and on screen: a JSON store from which a run can resume, and tables."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from moba_hf.files import replacing

T = TypeVar("T")


class Store:
    """A JSON file that keeps each result as soon as it is computed, so that an interrupted run can resume.

    Several processes may use the same file; each keeps the results that the others have written. If two
    write at the same moment, the file lacks a result of the first until that process writes again. If it
    does not, a later run computes the result again.

    Args:
        path: the file; None: keep results in memory only.
        settings: JSON-ready values on which the results depend, in addition to the keys.

    Raises:
        ValueError: the file exists but is not a store, was changed or damaged, or has other settings.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: dict[str, Any]):
        self.path = None if path is None else Path(path)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.answers: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            self.answers = self._read(self.path)

    def _read(self, path: Path) -> dict[str, Any]:
        """The results in the file. Raises ValueError if it is not a store with these settings."""
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            settings, answers = known["settings"], dict(known["answers"])
            whole = known["check"] == _check(settings, answers)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path} is not a file of earlier results") from None
        if not whole:
            raise ValueError(f"{path} was changed or damaged; remove it or name another file")
        if settings != self.settings:
            raise ValueError(f"{path} was made with other settings; remove it or name another file")
        return answers

    def get(self, key: str, compute: Callable[[], T]) -> T:
        """The result for `key` after a JSON round trip; computed and saved if it is not in the store."""
        if key not in self.answers:
            self.answers[key] = json.loads(json.dumps(compute()))
            self.write()
        answer: T = self.answers[key]
        return answer

    def __contains__(self, key: str) -> bool:
        """Whether the answer for `key` is known."""
        return key in self.answers

    def write(self) -> None:
        """Replaces the file atomically, through a temporary file, so that it is never half written.

        Raises:
            ValueError: the file is no longer a store with these settings.
        """
        if self.path is None:
            return
        if self.path.exists():
            self.answers = {**self._read(self.path), **self.answers}
        check = _check(self.settings, self.answers)
        text = json.dumps({"settings": self.settings, "answers": self.answers, "check": check}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as beside:
            beside.write_text(text + "\n", encoding="utf-8")
            if self.path.exists():
                shutil.copymode(self.path, beside)


def _check(settings: Any, answers: Any) -> str:
    """A hash that detects changes to a store."""
    return hashlib.sha256(json.dumps([settings, answers], sort_keys=True).encode()).hexdigest()[:16]


def percent(share: float) -> str:
    """A share with one decimal, such as "12.5 %"."""
    return f"{100 * share:.1f} %"


def format_table(rows: Sequence[Sequence[object]]) -> str:
    """Rows as a Markdown table whose header is the first row; floats get four decimals."""

    def cell(value: object) -> str:
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    head, *body = [[cell(value) for value in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
