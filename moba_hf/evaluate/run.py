"""Everything that `moba-hf eval` measures, as one JSON-ready result; an interrupted run can be resumed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from moba_hf.checkpoints.fingerprint import fingerprint
from moba_hf.checkpoints.inspection import inspect_config
from moba_hf.checkpoints.load import load_checkpoint
from moba_hf.config import MobaConfig
from moba_hf.evaluate.agreement import agreement
from moba_hf.evaluate.attended import count_pairs
from moba_hf.evaluate.code_lookup import CODE_LOOKUP, QUESTIONS, run_code_lookup
from moba_hf.evaluate.passes import check_ids, family_of, identity_of, passes_bar
from moba_hf.evaluate.perplexity import by_position, perplexity, token_losses
from moba_hf.evaluate.recall import recall
from moba_hf.evaluate.repositories import Repository
from moba_hf.evaluate.results import Store, format_table, percent
from moba_hf.evaluate.tasks import TASKS, SampleSize, run_task
from moba_hf.hf.layer_plan import moba_config
from moba_hf.hf.parallel import launched_ranks
from moba_hf.hf.prefill import DENSE_TAIL
from moba_hf.op.shared_rule import SharedRule

MEASURES = ("perplexity", "positions", "agreement", "recall")
logger = logging.get_logger(__name__)
_DENSE_TOO = ("perplexity", "positions")
_PASSES = {"agreement": 2}  # of a measure over its text; of others one


def load(
    path: str, device: str | None = None, *, trust_remote_code: bool = False, spread: bool = False
) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint, by `load_checkpoint`: fp32 on a CPU, else the stored dtype."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "float32" if device == "cpu" else "auto"
    return load_checkpoint(path, dtype, device=device, trust_remote_code=trust_remote_code, spread=spread)


def check_ranks(measures: Sequence[str], store: str | os.PathLike[str] | None) -> None:
    """Raises ValueError for options that do not work with a model sharded over the ranks of `torchrun`."""
    ranks = launched_ranks()
    if ranks > 1 and "recall" in measures:
        raise ValueError(
            f"recall needs all heads of a layer, but each of the {ranks} ranks holds only some of them: "
            f"run it without torchrun"
        )
    if ranks > 1 and store is not None:
        raise ValueError(f"a store works with one process only, but there are {ranks} ranks: omit --store")


def presets_of(presets: Sequence[str], given: MobaConfig | None) -> dict[str, MobaConfig]:
    """Settings by name: the presets, and `given` under the name "given".

    Raises:
        ValueError: an unknown preset.
    """
    named = {name: MobaConfig.from_preset(name) for name in presets}
    return named if given is None else {**named, "given": given}


def settings_of(model: Any, named: Mapping[str, MobaConfig]) -> dict[str, MobaConfig | None]:
    """The settings to measure: dense and `named`, or dense and the model's own if `named` is empty."""
    return {"dense": None, **(named or {"moba": moba_config(family_of(model)[1])})}


def read_ids(tokenizer: Any, path: str | os.PathLike[str], length: int, *, most: int | None = None) -> Tensor:
    """The first token ids of a text file, `(1, length)`, or up to `(1, most)` if the file has more.

    If the file is not UTF-8, a warning says how many characters are replaced.

    Args:
        length: tokens that the file must have.
        most: tokens that are read at most; None: `length`.

    Raises:
        ValueError: the file has fewer tokens.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(16 * (most or length))  # bounded, since a device file never ends
    if replaced := text.count("\ufffd"):
        logger.warning(
            f"{path}: {replaced:,} of the first {len(text):,} characters are the replacement character: the "
            "file may not be UTF-8, and its losses then mean little; convert it first"
        )
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[:, : most or length]
    if ids.shape[1] < length:
        raise ValueError(f"{path}: has {ids.shape[1]} tokens, but {length} are needed; lower --length")
    return ids


@dataclass(frozen=True)
class Tasks:
    """The tasks of an evaluation.

    Attributes:
        names: from `TASKS`, or "code-lookup".
        lengths: lengths of their contexts, in tokens.
        contexts: number of contexts per task and length.
        depths: where in the context the answers lie, from 0 to 1; None: spread out. "code-lookup" ignores
            them and always spreads its answers.
        sources: repositories in which "code-lookup" hides definitions.
    """

    names: Sequence[str] = ()
    lengths: Sequence[int] = ()
    contexts: int = 4
    depths: Sequence[float] | None = None
    sources: Sequence[Repository] = ()


def evaluate(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Tensor],
    settings: Mapping[str, MobaConfig | None],
    *,
    measures: Sequence[str] = ("perplexity",),
    tasks: Tasks | None = None,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    source: str | Path | None = None,
) -> dict[str, Any]:
    """Measures every setting on every text and task.

    Args:
        texts: name -> `(1, length)` token ids.
        settings: name -> MoBA settings; None: dense.
        measures: names from `MEASURES`; "agreement" and "recall" apply to MoBA settings only.
        tasks: what to ask; None: nothing.
        seed: seed of the tasks and of the queries that recall samples.
        store: a JSON file that keeps finished results, for the same model, texts, settings and seed.
        source: the checkpoint that `model` was loaded from. The result then tells which model it is of, which
            `moba_hf.checkpoints.convert` asks for; None: not known.

    Raises:
        ValueError: nothing to measure, unknown names, texts of another shape, or a store made for something
            else.
        TypeError: a text is not a tensor.

    Returns:
        `{"perplexity": {text: {setting: ...}}, "positions": ..., "agreement": ..., "recall": ...,
        "tasks": [...], "settings": {setting: values of its MobaConfig; None: dense}, "keys": {text: {setting:
        [key budget, share of dense pairs]}}, "attended": {text: {setting: {"share": ..., "heads": {layer:
        [share of dense pairs by head]}}}}, "model": fingerprint of `source` or None}`. If the number of
        attended keys depends on the text, the key budget is None, and the share of pairs is counted in the
        perplexity or agreement passes (None without either).
    """
    tasks = tasks or Tasks()
    _check(texts, measures, tasks)
    for ids in texts.values():
        check_ids(ids)
    configs = {name: None if c is None else c.to_dict() for name, c in settings.items()}
    made_of: dict[str, Any] = {}
    if store is not None:
        made_of = {
            "model": identity_of(model),
            "texts": {name: identity_of(ids) for name, ids in texts.items()},
        }
    known = Store(store, {**made_of, "settings": configs, "seed": seed, "dense_tail": DENSE_TAIL})
    result: dict[str, Any] = {measure: {name: {} for name in texts} for measure in measures}
    result |= {"settings": configs, "keys": {}, "attended": {}}
    result["model"] = None if source is None else fingerprint(source)
    runs = [
        (text, name, measure)
        for text in texts
        for name, config in settings.items()
        for measure in measures
        if config is not None or measure in _DENSE_TOO
    ]
    new = sum(
        _PASSES.get(measure, 1) for text, name, measure in runs if _key(text, name, measure) not in known
    )
    with passes_bar(model, "passes", new) as bar:
        for text, name, measure in runs:
            bar.set_description(f"{measure} of {Path(text).name}, {name}")
            passed = partial(_one, model, measure, texts[text], settings[name], seed)
            one = dict(known.get(_key(text, name, measure), passed))
            if "attended" in one:
                result["attended"].setdefault(text, {})[name] = one.pop("attended")
            result[measure][text][name] = one
    for text, ids in texts.items():
        for name, config in settings.items():
            if config is not None:
                row = inspect_config(model.config, config, (ids.shape[1],)).lengths[0]
                keys: list[float | None] = [row.key_budget, row.pair_share]
                if _follows_text(model, config):
                    keys = [None, result["attended"].get(text, {}).get(name, {"share": None})["share"]]
                result["keys"].setdefault(text, {})[name] = keys

    jobs = [(name, n, setting) for name in tasks.names for n in tasks.lengths for setting in settings]

    def task(number: int, name: str, n: int, setting: str) -> dict[str, Any]:
        what = f"{name}, {n:,} tokens, {setting} ({number} of {len(jobs)})"
        config = settings[setting]
        given: dict[str, Any] = {"store": known, "what": what}
        size = SampleSize(tasks.contexts, seed=seed, depths=tasks.depths)
        if name == CODE_LOOKUP:
            size = replace(size, questions=QUESTIONS)
            return run_code_lookup(model, tokenizer, tasks.sources, n, config, size, **given).to_dict()
        return run_task(model, tokenizer, name, n, config, size, **given).to_dict()

    result["tasks"] = [{"setting": job[2], **task(i, *job)} for i, job in enumerate(jobs, 1)]
    return result


def _key(text: str, setting: str, measure: str) -> str:
    """What a store knows the numbers of one measure by."""
    return f"{measure}/{text}/{setting}"


def _check(
    texts: Mapping[str, Tensor],
    measures: Sequence[str],
    tasks: Tasks,
) -> None:
    """Raises ValueError at once for requests that would otherwise fail after hours of work."""
    for what, names, known in (("measure", measures, MEASURES), ("task", tasks.names, (*TASKS, CODE_LOOKUP))):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"unknown {what} {unknown[0]!r}; known are {', '.join(known)}")
    if tasks.contexts < 1:
        raise ValueError(f"contexts must be at least 1, got {tasks.contexts}")
    if tasks.names and not tasks.lengths:
        raise ValueError("tasks need lengths")
    if CODE_LOOKUP in tasks.names and not tasks.sources:
        raise ValueError(f"task {CODE_LOOKUP!r} needs source files: pass --sources FOLDER")
    if not tasks.names and not (texts and measures):
        raise ValueError("there is nothing to measure: pass texts (--text FILE) or tasks (--task NAME)")


def _follows_text(model: Any, config: MobaConfig) -> bool:
    """Whether the number of attended blocks depends on the text in some layer."""
    adapter, text_config = family_of(model)
    num_layers = adapter.num_layers(text_config)
    return any(isinstance(config.for_layer(i, num_layers), SharedRule) for i in range(num_layers))


def _one(model: Any, measure: str, ids: Tensor, config: MobaConfig | None, seed: int) -> dict[str, Any]:
    """The numbers of one measure; perplexity and agreement under MoBA add those of `Attended`."""
    if measure == "positions":
        return by_position(token_losses(model, ids, config)).to_dict()
    if config is None:
        return perplexity(model, ids, None).to_dict()
    if measure == "recall":
        return recall(model, ids, config, seed=seed).to_dict()
    with count_pairs(model, config, ids.shape[1]) as attended:
        if measure == "perplexity":
            found = perplexity(model, ids, config).to_dict()
        else:
            found = agreement(model, ids, config).to_dict()
    return {**found, "attended": attended.to_dict()}


def tables(result: Mapping[str, Any]) -> str:
    """The result of `evaluate` as Markdown tables."""
    texts = {**result.get("perplexity", {}), **result.get("agreement", {})}
    parts = [f"{text}\n{format_table(_loss_rows(result, text))}" for text in texts]
    for text, by_setting in result.get("positions", {}).items():
        ranges = next(iter(by_setting.values()))["ranges"]
        columns = [f"{begin}-{end - 1}" for begin, end, _ in ranges]
        lines = [[name, *(loss for *_, loss in one["ranges"])] for name, one in by_setting.items()]
        parts.append(f"{text}, loss by position\n{format_table([['setting', *columns], *lines])}")
    for text, by_setting in result.get("attended", {}).items():
        rows = [list[object](["setting", "of dense pairs", "by layer", "heads from", "to"])]
        for name, one in by_setting.items():
            heads = [share for shares in one["heads"].values() for share in shares]
            layers = " ".join(f"{sum(shares) / len(shares):.2f}" for shares in one["heads"].values())
            if len({round(share, 6) for share in heads}) > 1:
                ends = [percent(min(heads)), percent(max(heads))]
                rows.append([name, percent(one["share"]), layers, *ends])
        if len(rows) > 1:
            parts.append(f"{text}, pairs attended by layers and heads\n{format_table(rows)}")
    for text, by_setting in result.get("recall", {}).items():
        rows = [list[object](["setting", "block recall", "mass", "oracle mass"])]
        for name, one in by_setting.items():
            rows.append([name, *(float(torch.tensor(one[k]).mean()) for k in ("block", "mass", "oracle"))])
        parts.append(f"{text}, mean over layers and heads\n{format_table(rows)}")
    if result.get("tasks"):
        rows = [list[object](["task", "tokens", "setting", "score", "95 % interval", "questions"])]
        for one in result["tasks"]:
            interval = f"{one['low']:.2f} - {one['high']:.2f}"
            score = f"{one['score']:.2f}"
            rows.append([one["task"], one["length"], one["setting"], score, interval, one["samples"]])
        parts.append(format_table(rows))
    return "\n\n".join(parts)


def _loss_rows(result: Mapping[str, Any], text: str) -> list[list[object]]:
    """A row per setting: the keys and pairs it attends, its losses on `text`, its agreement with dense."""
    losses = result.get("perplexity", {}).get(text, {})
    near = result.get("agreement", {}).get(text, {})
    head = ["setting", "keys", "of dense pairs", "loss", "trailing loss", "rise", "KL", "top-1"]
    rows: list[list[object]] = [list(head)]
    for name in {**losses, **near}:
        shares = result["keys"].get(text, {}).get(name)
        row: list[object] = [name]
        row += ["-" if x is None else percent(x) for x in shares or (1.0, 1.0)]
        one, dense, other = losses.get(name), losses.get("dense"), near.get(name)
        row += ["-", "-"] if one is None else [one["loss"], one["trailing"]]
        known = one is not None and dense is not None and name != "dense"
        row.append(f"{one['trailing'] - dense['trailing']:+.4f}" if known else "-")
        row += ["-", "-"] if other is None else [other["kl"], f"{100 * other['top1']:.1f} %"]
        rows.append(row)
    return rows
