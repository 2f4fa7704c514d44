"""Stores settings in a checkpoint folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from moba_hf.checkpoints.model_card import config_call, with_settings
from moba_hf.checkpoints.model_config import check_config, read_model_config, with_moba
from moba_hf.config import MobaConfig


def write_settings(folder: str | Path, config: MobaConfig) -> None:
    """Stores `config` in the config.json of a checkpoint folder, and turns MoBA on in it.

    The model card of a converted checkpoint is updated too.

    Raises:
        ValueError: the folder is not a checkpoint, or the settings do not fit its model.
    """
    place = Path(folder)
    values, model_config = read_model_config(place)
    adapter = check_config(model_config, config)
    new = with_moba(values, config, adapter.nested_key(model_config))
    texts = {place / "config.json": json.dumps(new, indent=2, ensure_ascii=False) + "\n"}
    texts |= with_settings(place, config, f"write_settings(folder, {config_call(config)})")
    for path, text in texts.items():
        replace_text(path, text)


def replace_text(path: Path, text: str) -> None:
    """Replaces the contents of a file in one step, keeping its mode; after an error the file is unchanged.

    Raises:
        OSError: the file cannot be written.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, name)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
