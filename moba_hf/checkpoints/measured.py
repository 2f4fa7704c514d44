"""A table for the model card of what a setting costs, from the results of `moba-hf eval`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from moba_hf.checkpoints.safetensors_files import read_json_object
from moba_hf.config import MobaConfig

_HEAD = ("measured", "dense", "MoBA")


def measured_cost(path: Path, moba: MobaConfig, model: str | None) -> str:
    """Loss, attended pairs, agreement with dense attention and tasks, as a markdown table.

    Args:
        path: a file with the output of `moba-hf eval --json` or `--out`.
        moba: the settings to look up; `backend` is ignored.
        model: `fingerprint` of the model that the card describes.

    Raises:
        ValueError: the file is something else, or has no results for this model and these settings; the
            message names it.
    """
    results = read_json_object(path)
    try:
        settings = dict(results["settings"])
        name = next((name for name, one in settings.items() if one == moba.to_dict()), None)
        dense = next((name for name, one in settings.items() if one is None), None)
        rows = [] if name is None else [*_text_rows(results, name, dense), *_task_rows(results, name, dense)]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: is not what 'moba-hf eval --json' prints ({what})") from error
    if model is None or results.get("model") != model:
        what = "does not tell which model it measured"
        if results.get("model") is not None:
            what = "holds results of another model"
        raise ValueError(
            f"{path}: {what}; "
            "run 'moba-hf eval' on the checkpoint that is converted (if its context is extended, on a "
            "checkpoint converted with the same context)"
        )
    if name is None:
        raise ValueError(
            f"{path}: has no results for the settings to write ({moba.in_words()}), only for "
            f"{', '.join(map(str, settings))}"
        )
    if not rows:
        raise ValueError(f"{path}: has no losses, agreement or tasks for {name!r}")
    lines = [_HEAD, ("---",) * len(_HEAD), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(name: object) -> str:
    """Replaces characters of a name that are special in Markdown or on a terminal."""
    return "".join(char if char.isprintable() and char not in "<>|`" else "_" for char in str(name))


def _text_rows(results: Mapping[str, Any], name: str, dense: str | None) -> Iterator[tuple[str, str, str]]:
    losses, near = results.get("perplexity", {}), results.get("agreement", {})
    for text in {**losses, **near}:
        title = plain(PurePath(text).name)
        one, other = losses.get(text, {}).get(name), losses.get(text, {}).get(dense)
        if one is not None:
            what = f"{title}, {one['tokens']:,} tokens: loss of the last {one['trailing_tokens']:,} (nats)"
            rise = "" if other is None else f" ({one['trailing'] - other['trailing']:+.4f})"
            yield what, "-" if other is None else f"{other['trailing']:.4f}", f"{one['trailing']:.4f}{rise}"
        if text in near and name in near[text]:
            found = near[text][name]
            what = f"{title}: same most likely token as dense; KL divergence (nats)"
            yield what, "-", f"{found['top1']:.1%}; {found['kl']:.4f}"
        share = results.get("keys", {}).get(text, {}).get(name, (None, None))[1]
        if share is not None:
            yield f"{title}: attended query-key pairs", "100.0%", f"{share:.1%}"


def _task_rows(results: Mapping[str, Any], name: str, dense: str | None) -> Iterator[tuple[str, str, str]]:
    scores: dict[tuple[str, int], dict[str, str]] = {}
    for one in results.get("tasks", ()):
        score = f"{one['score']:.2f} (95 % interval {one['low']:.2f} - {one['high']:.2f})"
        scores.setdefault((plain(one["task"]), one["length"]), {})[one["setting"]] = score
    for (task, length), found in scores.items():
        if name in found:
            yield f"task {task}, {length:,} tokens: score", found.get(dense or "", "-"), found[name]
