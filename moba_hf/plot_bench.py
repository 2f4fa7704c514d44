"""Figures of `moba-hf bench`; each function returns a matplotlib figure (extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moba_hf.plot_style import COLORS, INK, MARKERS, legend, new_figure

_DENSE = {
    "fa2_ms": "dense, FA2 (torch)",
    "cudnn_ms": "dense, cuDNN (torch)",
    "flash_attn_ms": "dense, flash-attn 2",
    "fa4_ms": "dense, flash-attn 4",
}


def plot_bench_rows(results: Sequence[Mapping[str, Any]]) -> Any:
    """Time of MoBA and of dense attention, one line per row of `moba-hf bench`."""
    figure, ax = new_figure(8.0, 0.42 * len(results) + 1.5)
    series = {"ms": "MoBA", **_DENSE}
    for i, (key, name) in enumerate(series.items()):
        points = [(r[key], y) for y, r in enumerate(results) if r.get(key)]
        if points:
            size = 60 if key == "ms" else 34
            ax.scatter(
                *zip(*points, strict=True), s=size, marker=MARKERS[i], color=COLORS[i], label=name, zorder=3
            )
    for y, result in enumerate(results):
        best = result.get("speedup")
        if best:
            ends = result["ms"], result["ms"] * best
            ax.plot(ends, (y, y), color=INK, linewidth=0.8, zorder=1)
            middle = (ends[0] * ends[1]) ** 0.5
            ax.text(middle, y - 0.12, f"{best:.1f} x", ha="center", va="bottom", color=INK, fontsize=8)
    names = [f"{r['tokens']:,} tokens, {r['rule']}" for r in results]
    ax.set_yticks(range(len(results)), names)
    ax.set_ylim(len(results) - 0.4, -0.8)
    ax.set_xscale("log")
    ax.set_xlabel("milliseconds (block size / topk on the left)")
    figure.legend(frameon=False, labelcolor=INK, loc="outside upper center", ncols=4)
    return figure


def plot_bench_figures(panels: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Any:
    """Time against tokens, one panel per title; open markers show dense times extrapolated from a part."""
    figure, axes = new_figure(4.9 * len(panels), 4.2, columns=len(panels))
    series = {"ms": "MoBA", "fa2_ms": _DENSE["fa2_ms"], "cudnn_ms": _DENSE["cudnn_ms"]}
    for ax, (title, lines) in zip([axes] if len(panels) == 1 else axes, panels, strict=True):
        for i, (key, name) in enumerate(series.items()):
            points = [line for line in lines if line.get(key)]
            if not points:
                continue
            x, y = [p["tokens"] for p in points], [p[key] / 1e3 for p in points]
            ax.plot(x, y, color=COLORS[i], label=name)
            whole = [key == "ms" or p.get("dense") == "whole" for p in points]
            faces = [COLORS[i] if each else "none" for each in whole]
            ax.scatter(x, y, s=34, marker=MARKERS[i], facecolors=faces, edgecolors=COLORS[i], zorder=3)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ticks = [line["tokens"] for line in lines]
        labels = [f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}K" for n in ticks]
        ax.set_xticks(ticks, labels, fontsize=9)
        ax.minorticks_off()
        scaled = any(line.get("dense", "whole") != "whole" for line in lines)
        ax.set_xlabel("tokens (open markers: extrapolated from a part)" if scaled else "tokens")
        ax.set_ylabel("seconds")
        ax.set_title(title, fontsize=10)
        if lines[-1].get("over_fa2"):
            text = f"at {labels[-1]}: {lines[-1]['over_fa2']:.1f} x over FA2"
            ax.text(0.98, 0.03, text, transform=ax.transAxes, ha="right", color=INK)
        legend(ax)
    return figure
