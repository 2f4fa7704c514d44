"""Names and values of the presets, read from their files without importing moba_hf."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Default values of settings that a preset may omit.
_DEFAULTS: dict[str, Any] = {
    "topk": None,
    "sink_blocks": 0,
    "local_blocks": 0,
    "gate": "mean",
    "tile": 1,
    "threshold": None,
    "sample": 1,
    "dense_below": 0,
    "full_attention_layers": [],
}


def preset_files() -> dict[str, Path]:
    """The file of every preset, by name.

    Raises:
        ImportError: moba_hf is not installed as a folder.
    """
    found = find_spec("moba_hf")  # finds the package without running it
    folders = [Path(place) / "configs" for place in (found and found.submodule_search_locations) or ()]
    found_files = [path for folder in folders for path in folder.glob("*.json")]
    files = {path.stem: path for path in sorted(found_files, key=lambda path: path.stem)}
    if not files:
        raise ImportError("the presets of moba_hf are missing; install moba-hf again")
    return files


def check_preset(name: str) -> None:
    """Raises ValueError unless `name` is a preset."""
    names = preset_files()
    if name not in names:
        raise ValueError(f"unknown preset {name!r}; valid presets are {', '.join(names)}")


def presets_as_json() -> dict[str, dict[str, Any]]:
    """All presets by name: `description`, `sources` and `moba`, the settings including defaults."""
    read = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in preset_files().items()}
    return {name: {**values, "moba": {**_DEFAULTS, **values["moba"]}} for name, values in read.items()}


def preset_rows() -> list[tuple[str, ...]]:
    """The presets as rows of a table, with the header first."""
    header = (
        *("PRESET", "BLOCK_SIZE", "TOPK", "TILE", "THRESHOLD", "SINK", "LOCAL", "GATE", "FULL LAYERS"),
        "DESCRIPTION",
    )
    rows: list[tuple[str, ...]] = [header]
    for name, values in presets_as_json().items():
        moba = values["moba"]
        numbers = [
            moba[key] for key in ("block_size", "topk", "tile", "threshold", "sink_blocks", "local_blocks")
        ]
        shown = ["-" if number is None else str(number) for number in numbers]
        full = ",".join(map(str, moba["full_attention_layers"])) or "-"
        rows.append((name, *shown, moba["gate"], full, values["description"]))
    return rows


def table_lines(rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
