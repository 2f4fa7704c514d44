"""The style of all figures: transparent background and mid-tone colours, for light and dark pages."""

from __future__ import annotations

from typing import Any

INK = "#808890"  # text and axes: contrast of about 4 on white and 5 on near-black
COLORS = ("#3b8fd4", "#e07b39", "#3fa66a", "#b565c9", "#c9a227", "#d1495b")
MARKERS = ("o", "s", "^", "D", "v", "P")


def new_figure(width: float = 7.0, height: float = 4.2, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "moba-hf[plot]"') from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    with matplotlib.rc_context(style | {"axes.edgecolor": INK, "font.size": 10}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns)
    figure.patch.set_alpha(0)
    for ax in figure.axes:
        ax.patch.set_alpha(0)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        ax.title.set_color(INK)
    return figure, axes


def legend(ax: Any) -> None:
    ax.legend(frameon=False, labelcolor=INK)


def colorbar(figure: Any, image: Any, ax: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=ax)
    bar.set_label(label, color=INK)
    bar.ax.tick_params(colors=INK)
    bar.outline.set_visible(False)
