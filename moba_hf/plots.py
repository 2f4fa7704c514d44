"""Figures of what MoBA does: chosen blocks, recall, needles, loss against key budget, loss by position.

Each function takes results and returns a matplotlib figure (extra `plot`), in the style of `plot_style`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moba_hf.evaluate.passes import family_of, passes_bar, watch
from moba_hf.evaluate.perplexity import Perplexity
from moba_hf.evaluate.recall import Recall, chosen_mask
from moba_hf.evaluate.run import load, read_ids
from moba_hf.evaluate.tasks import TaskScore
from moba_hf.op.layer_rule import Rule
from moba_hf.op.ops import select_by_rule
from moba_hf.op.shared import unpack_blocks
from moba_hf.op.shared_rule import SharedRule
from moba_hf.plot_style import COLORS, INK, MARKERS, colorbar, legend, new_figure


def plot_routing(
    q: Tensor, k: Tensor, rule: Rule, head: int, *, title: str = "", scale: float | None = None
) -> Any:
    """The blocks that each query of one head attends to; kept, own and chosen blocks have different colours.

    Args:
        q: `(H, N, D)` of one layer, as from `moba_hf.evaluate.passes.watch`.
        k: `(HK, N, D)` of the same layer.
        rule: the rule of the layer.
        head: index of the query head.
        title: title of the figure.
        scale: factor of the scores in the softmax; None: `1 / sqrt(D)`.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    group = q.shape[0] // k.shape[0]
    one, keys = q[head : head + 1], k[head // group : head // group + 1]
    choice = select_by_rule(one.transpose(0, 1), keys.transpose(0, 1), rule, softmax_scale=scale)
    blocks = -(-k.shape[1] // rule.block_size)
    row, column = torch.arange(q.shape[1])[:, None], torch.arange(blocks)
    if isinstance(rule, SharedRule):
        chosen = unpack_blocks(choice[0].cpu(), blocks)[row[:, 0] // rule.tile]
        first = row // rule.tile * rule.tile // rule.block_size  # first block that the tile overlaps
        chosen &= column <= row // rule.block_size
    else:
        chosen = chosen_mask(choice, blocks)[0].cpu()
        first = row // rule.block_size
    kind = chosen.int()
    kind[chosen & rule.forces(column, first)] = 2
    kind[chosen & (column >= first)] = 3
    rows = max(1, q.shape[1] // 512)  # draw every `rows`-th query
    figure, ax = new_figure(6.6, 5.2)
    colors = ("#80889018", COLORS[0], COLORS[1], COLORS[2])
    extent = (-0.5, blocks - 0.5, q.shape[1], 0)
    ax.imshow(
        kind[::rows].numpy(),
        aspect="auto",
        cmap=ListedColormap(colors),
        vmin=0,
        vmax=3,
        interpolation="nearest",
        extent=extent,
    )
    ax.set_xlabel(f"block of {rule.block_size} keys")
    ax.set_ylabel("query position")
    title = title or f"Blocks attended by head {head}"
    covered = f"\n(all: {rule.topk} blocks of {rule.block_size} cover these {q.shape[1]:,} tokens)"
    if isinstance(rule, SharedRule):
        covered = f"\n(all: queries below {rule.dense_len:,} attend to every key)"
    ax.set_title(title + (covered if rule.dense_len >= q.shape[1] else ""))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlim(-0.5, blocks - 0.5)
    names = {1: "chosen by score", 2: "sink and local", 3: "own"}
    handles = [Patch(color=colors[i], label=name) for i, name in names.items() if (kind == i).any()]
    ax.legend(handles=handles, frameon=False, labelcolor=INK, loc="upper right")
    return figure


def plot_recall(result: Recall, *, title: str = "") -> Any:
    """Attention mass of the chosen blocks by layer and head, and how much less that is than the oracle's."""
    mass, oracle = torch.tensor(result.mass), torch.tensor(result.oracle)
    height = max(3.2, 0.17 * len(result.layers) + 1.2)
    figure, (left, right) = new_figure(8.4, height, columns=2)
    for ax, values, what, cmap in (
        (left, mass, "mass of the chosen blocks", "viridis"),
        (right, oracle - mass, "oracle minus chosen", "magma"),
    ):
        image = ax.imshow(values.numpy(), aspect="auto", cmap=cmap, vmin=0, vmax=1 if ax is left else None)
        ax.set_title(what)
        ax.set_xlabel("head")
        ax.set_xticks(range(values.shape[1]))
        step = max(1, len(result.layers) // 10)
        ax.set_yticks(range(0, len(result.layers), step), [str(i) for i in result.layers[::step]])
        colorbar(figure, image, ax, "attention mass")
    left.set_ylabel("layer")
    if title:
        figure.suptitle(title, color=INK, fontsize=11)
    return figure


def plot_needles(scores: Sequence[TaskScore], *, bins: int = 5, title: str = "") -> Any:
    """Scores by length and depth; cells without questions are empty."""
    lengths = sorted({s.length for s in scores})
    sums, counts = torch.zeros(bins, len(lengths)), torch.zeros(bins, len(lengths))
    for score in scores:
        for depth, mark in score.by_depth:
            row = min(bins - 1, int(depth * bins))
            sums[row, lengths.index(score.length)] += mark
            counts[row, lengths.index(score.length)] += 1
    means = sums / counts  # NaN if there are no questions
    figure, ax = new_figure(1.2 * len(lengths) + 3.2, 3.8)
    image = ax.imshow(means.numpy(), aspect="auto", cmap="RdYlGn", vmin=0, vmax=1)
    ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    ax.set_yticks(range(bins), [f"{i / bins:.0%} - {(i + 1) / bins:.0%}" for i in range(bins)])
    ax.set_xlabel("tokens")
    ax.set_ylabel("depth")
    tasks = ", ".join(sorted({s.task for s in scores}))
    ax.set_title(f"{tasks}: {title}" if title else tasks)
    for i in range(bins):
        for j in range(len(lengths)):
            if counts[i, j]:
                text = f"{float(means[i, j]):.0%}\nn={int(counts[i, j])}"
                ink = "#202428" if 0.15 < means[i, j] < 0.85 else "#f4f6f8"
                ax.text(j, i, text, ha="center", va="center", color=ink, fontsize=8)
    colorbar(figure, image, ax, "score")
    return figure


def plot_budget(curves: Mapping[str, Sequence[tuple[float, float]]], *, targets: Sequence[float] = ()) -> Any:
    """Increase of the loss against the key budget, one line per name.

    Args:
        curves: name -> `(key budget, increase in nats)`.
        targets: increases to mark with a thin line.
    """
    figure, ax = new_figure()
    _draw_budget(ax, curves, targets)
    ax.set_ylabel("increase of the loss (nats)")
    legend(ax)
    return figure


def plot_budgets(
    texts: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], *, targets: Sequence[float] = ()
) -> Any:
    """`plot_budget` for several texts side by side, with the same scale and one legend.

    Args:
        texts: text -> name -> `(key budget, increase in nats)`.
    """
    columns = min(4, len(texts))
    rows = -(-len(texts) // columns)
    figure, axes = new_figure(2.9 * columns + 0.6, 2.7 * rows + 0.5, columns, rows)
    spare = list(axes.flat) if rows * columns > 1 else [axes]
    values = [y for curves in texts.values() for points in curves.values() for _, y in points]
    for ax, (text, curves) in zip(spare, texts.items(), strict=False):
        _draw_budget(ax, curves, targets, values)
        ax.set_title(text, fontsize=10)
    for ax in spare[len(texts) :]:
        ax.set_visible(False)
    figure.supylabel("increase of the loss (nats)", color=INK, fontsize=10)
    names = {h.get_label(): h for ax in spare[: len(texts)] for h in ax.lines if h.get_label()[0] != "_"}
    figure.legend(names.values(), names, loc="outside lower center", ncols=4, frameon=False, labelcolor=INK)
    return figure


def _draw_budget(
    ax: Any,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    targets: Sequence[float],
    values: Sequence[float] = (),
) -> None:
    """Draws lines and scales of `plot_budget`; the vertical scale also covers `values`."""
    for i, (name, points) in enumerate(curves.items()):
        x, y = zip(*sorted(points), strict=True)
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        ax.plot([100 * v for v in x], y, label=name, markersize=4, **style)
    for target in targets:
        ax.axhline(target, color=INK, linewidth=0.8, linestyle=":")
        at = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "bottom", "fontsize": 7}
        ax.annotate(f"{target:g}", (0.01, target), color=INK, **at)
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=0.01)
    ticks = [5, 10, 25, 50, 100]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    values = [*values, *(y for points in curves.values() for _, y in points)]
    decades = [d * 10.0**e for e in range(-2, 6) for d in (1, 3)]
    marks = [t for t in (0.0, 0.005, *decades) if t <= 1.5 * max([*values, 0.01])]
    ax.set_yticks(marks, [f"{t:g}" for t in marks])
    ax.set_ylim(min(-0.002, *values), 1.3 * max([*values, 0.01]))
    ax.set_xlabel("key budget (%)")


def plot_tasks(scores: Sequence[tuple[str, TaskScore]]) -> Any:
    """Scores of tasks by length with their 95% intervals: one panel per task, one colour per setting.

    Args:
        scores: `(setting, score)` pairs.
    """
    tasks = list(dict.fromkeys(score.task for _, score in scores))
    names = list(dict.fromkeys(name for name, _ in scores))
    lengths = sorted({score.length for _, score in scores})
    figure, axes = new_figure(3.4 * len(tasks) + 0.6, 3.6, len(tasks))
    for ax, task in zip(axes if len(tasks) > 1 else [axes], tasks, strict=True):
        for i, name in enumerate(names):
            cells = [one for setting, one in scores if setting == name and one.task == task]
            x = [lengths.index(one.length) + 0.8 * ((i + 0.5) / len(names) - 0.5) for one in cells]
            y = [one.score for one in cells]
            low = [max(0.0, one.score - one.low) for one in cells]
            high = [max(0.0, one.high - one.score) for one in cells]
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
            ax.errorbar(x, y, [low, high], label=name, linestyle="none", capsize=3, **style)
        ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        ax.set_xlim(-0.5, len(lengths) - 0.5)
        ax.set_xlabel("tokens")
        ax.set_ylim(0, 1.02)
        ax.set_title(task, fontsize=10)
    figure.supylabel("score", color=INK, fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, labelcolor=INK)
    return figure


def plot_positions(results: Mapping[str, Perplexity]) -> Any:
    """Loss by position in the text, one line per name."""
    figure, ax = new_figure()
    for i, (name, result) in enumerate(results.items()):
        x = [(begin + end) / 2 for begin, end, _ in result.buckets]
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        ax.plot(x, [mean for *_, mean in result.buckets], label=name, **style)
    ax.set_xlabel("position (tokens)")
    ax.set_ylabel("loss (nats per token)")
    legend(ax)
    return figure


def routing_of(checkpoint: str, text: str, length: int, layer: int, head: int) -> Any:
    """`plot_routing` for one head of a checkpoint, with its own settings, on the start of a text file."""
    from moba_hf.hf.layer_plan import moba_config

    model, tokenizer = load(checkpoint)
    adapter, text_config = family_of(model)
    rule = adapter.rule(text_config, moba_config(text_config), layer)
    if rule is None:
        raise ValueError(f"layer {layer} keeps full attention")
    seen: list[tuple[Tensor, Tensor, float]] = []

    def probe(index: int, _module: Any, q: Tensor, k: Tensor, _v: Tensor, scale: float) -> None:
        if index == layer:
            seen.append((q, k, scale))

    with passes_bar(model, "reading the text", 1):
        watch(model, read_ids(tokenizer, text, length), probe)
    if not seen or not 0 <= head < seen[0][0].shape[0]:
        raise ValueError(f"this model has no layer {layer} with head {head} that uses MoBA")
    q, k, scale = seen[0]
    title = f"Blocks attended by layer {layer}, head {head}"
    return plot_routing(q, k, rule, head, title=title, scale=scale)


def from_json(kind: str, path: str, *, setting: str | None = None) -> Any:
    """The figure `kind` from a JSON file of `moba-hf eval` or `moba-hf calibrate`.

    Args:
        kind: "recall", "needles", "budget" or "positions".
        path: the file.
        setting: for recall and needles, which setting to show; None: the last one.

    Raises:
        ValueError: the kind or the setting is unknown, or the file has no such results.
    """
    if kind not in _FROM_JSON:
        raise ValueError(f"unknown kind {kind!r}; known are routing, {', '.join(_FROM_JSON)}")
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        return _FROM_JSON[kind](values, setting)
    except (KeyError, StopIteration, IndexError, TypeError, AttributeError):
        raise ValueError(f"{path} contains no results for {kind!r}") from None


def plot_calibration(values: Mapping[str, Any]) -> Any:
    """The trade-off curve of `Calibration.to_dict()`: local costs, and rises on the worst text."""
    local, measured = dict[str, list[tuple[float, float]]](), dict[str, list[tuple[float, float]]]()
    for point in values["curve"]:
        by_layer = any("threshold" in layer for layer in point["config"]["layers"].values())
        kind = ", a threshold for each layer" if by_layer else ""
        name = f"local cost{kind} (ranks settings, predicts nothing)"
        local.setdefault(name, []).append((point["keys"], point["cost"]))
        if point["rise"]:
            name = f"measured, worst text{kind}"
            measured.setdefault(name, []).append((point["keys"], max(point["rise"])))
    figure = plot_budget(local | measured)
    figure.axes[0].set_xlabel(f"{values['counts']} (%)")
    return figure


def _positions_from(values: Any, _: str | None) -> Any:
    by_setting = next(iter(values["perplexity"].values()))
    return plot_positions({name: Perplexity(**one) for name, one in by_setting.items()})


def _recall_from(values: Any, setting: str | None) -> Any:
    by_setting = next(iter(values["recall"].values()))
    name = _pick(setting, list(by_setting))
    return plot_recall(Recall(**by_setting[name]), title=name)


def _needles_from(values: Any, setting: str | None) -> Any:
    name = _pick(setting, [one["setting"] for one in values["tasks"]])
    fields = [field.name for field in dataclasses.fields(TaskScore)]
    chosen = [one for one in values["tasks"] if one["setting"] == name]
    return plot_needles([TaskScore(**{k: one[k] for k in fields}) for one in chosen], title=name)


def _pick(setting: str | None, known: Sequence[str]) -> str:
    """`setting`, which must be one of `known`; None: the last of them."""
    if setting is not None and setting not in known:
        raise ValueError(f"unknown setting {setting!r}; known are {', '.join(dict.fromkeys(known))}")
    return known[-1] if setting is None else setting


_FROM_JSON = {
    "recall": _recall_from,
    "needles": _needles_from,
    "budget": lambda values, _: plot_calibration(values),
    "positions": _positions_from,
}
