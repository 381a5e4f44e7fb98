"""Draw plots: inline SVG for the page, with its text color, and PNG copies for MLflow."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from trainer.tracking.metrics_log import Line

#: One color per prompt, in order of rank; distinguishable with color blindness.
COLORS = (
    "#2f6fde", "#e0791b", "#1e9e77", "#c2418c", "#8a6fd1", "#b08a00", "#3aa6c9", "#d1495b",
)  # fmt: skip
#: Color of the prompts after these.
OTHERS = "#8a8f98"
INK = "#010203"  # placeholder for the page's text color
MOST_POINTS = 400
#: Number of prompts up to which a plot has the train and shifted curves of all, not of the best.
FEW = 3
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "promptshard",  # equal plots have equal bytes
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.parse_math": False,  # text between dollar signs is not a formula
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
#: Style of each kind of curve, by the prefix of its metric.
LINES: dict[str, dict[str, Any]] = {
    "train": {"linewidth": 0.8, "alpha": 0.35},
    "validation": {"linewidth": 1.8, "marker": "o", "markersize": 3},
    "shifted_validation": {"linewidth": 1.2, "linestyle": (0, (4, 2))},
}
#: Style of the prompts that have no color of their own: only their validation is drawn.
THIN: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.45, "zorder": 1}


#: Colors of a map of scores by depth from 0 to 1: of the worst cell, and the depth above which text
#: is white.
_BLUES, PALEST, DARK = colormaps["Blues"], 0.28, 0.6


@dataclass
class Plot:
    """A plot: ``svg`` for the page; ``png`` under a file name for MLflow."""

    name: str
    svg: str
    png: bytes


@dataclass
class Curve:
    """Metric lines of one prompt, and its color on the page."""

    label: str
    color: str
    lines: Sequence[Line]

    def points(self, metric: str, x: str) -> tuple[list[float], list[float]]:
        pairs = [
            (float(at), line.metrics[metric])
            for line in self.lines
            if metric in line.metrics
            and math.isfinite(line.metrics[metric])
            and (at := getattr(line, x)) is not None
        ]
        stride = max(1, math.ceil(len(pairs) / MOST_POINTS))
        pairs = pairs[::-stride][::-1]  # thinned from the end, to keep the last point
        return [a for a, _ in pairs], [b for _, b in pairs]


@dataclass(frozen=True)
class Grid:
    """Scores by two settings; ``texts`` and ``values`` are [row][column]; NaN means no prompt.

    Attributes:
        best: row and column of the best prompt.
        lower_is_better: the darkest cell has the lowest value, and colors follow the logarithm of
            the values, which are losses.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    row_title: str
    column_title: str
    values: Sequence[Sequence[float]]
    texts: Sequence[Sequence[str]]
    best: tuple[int, int] | None = None
    lower_is_better: bool = False


def curve_plots(
    name: str, curves: Sequence[Curve], metric: str, levels: dict[str, float], x: str, title: str
) -> list[Plot]:
    """Plot the loss and, in a second plot, the task's metric unless it is the loss.

    Args:
        levels: scores in ``validation_<metric>`` to draw as level lines, by name.
        x: ``step`` or ``useful_tokens``.
    """
    panels = {"loss": title, metric: title if metric == "loss" else metric.replace("_", " ")}
    plots = []
    for panel, panel_title in panels.items():
        with rc_context(STYLE):
            figure = Figure(figsize=(5.1, 3.0), layout="constrained")
            ax = figure.subplots()
            ax.set_title(panel_title, loc="left", fontsize=10)
            _draw_curves(ax, curves, panel, x)
            if panel == metric:
                _draw_levels(ax, levels)
            ax.set_xlim(left=0)
            _style_axes(ax, "step" if x == "step" else "useful tokens read by the prompt", 6)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
            which = "1 prompt" if len(curves) == 1 else f"{len(curves)} prompts"
            label = f"{panel_title} of {which} by {x.replace('_', ' ')}"
            plots.append(_plot(f"{name}-{panel}", figure, label, png=x == "step"))
    return plots


def grid_plot(name: str, grid: Grid) -> Plot:
    """Draw scores by two settings as a map; the best one has a frame."""
    height = 1.1 + 0.36 * len(grid.rows)
    width = min(10.0, max(3.6, 1.6 + 0.85 * len(grid.columns)))
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        ax = figure.subplots()
        ax.set_title(grid.title, loc="left", fontsize=10)
        for i, (depths, texts) in enumerate(zip(_depths(grid), grid.texts, strict=True)):
            for j, (depth, text) in enumerate(zip(depths, texts, strict=True)):
                if math.isfinite(depth):
                    ax.add_patch(
                        Rectangle((j + 0.02, i + 0.03), 0.96, 0.94, color=_BLUES(depth), lw=0)
                    )
                    color = "#ffffff" if depth > DARK else "#10151c"
                    ax.text(j + 0.5, i + 0.5, text, ha="center", va="center",
                            fontsize=8.5, color=color)  # fmt: skip
        ax.set_xlim(0, len(grid.columns))
        ax.set_ylim(0, len(grid.rows))
        ax.spines[:].set_visible(False)
        if grid.best is not None:
            i, j = grid.best
            xs, ys = (j, j + 1, j + 1, j, j), (i, i, i + 1, i + 1, i)
            ax.plot(xs, ys, color=COLORS[1], linewidth=2, clip_on=False)
        ax.set_xticks([j + 0.5 for j in range(len(grid.columns))], grid.columns)
        ax.set_yticks([i + 0.5 for i in range(len(grid.rows))], grid.rows)
        ax.tick_params(length=0)
        ax.set_xlabel(grid.column_title)
        ax.set_ylabel(grid.row_title)
        return _plot(name, figure, f"{grid.title} by {grid.row_title} and {grid.column_title}")


def _depths(grid: Grid) -> list[list[float]]:
    """Return the depth of the color of every cell, the best one 1; NaN without a value."""
    values = [list(row) for row in grid.values]
    if grid.lower_is_better:
        values = [[-math.log(max(value, 1e-12)) for value in row] for row in values]
    finite = [value for row in values for value in row if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if low == high:
        return [[PALEST if math.isfinite(value) else math.nan for value in row] for row in values]
    scale = (1 - PALEST) / (high - low)
    return [[PALEST + scale * (value - low) for value in row] for row in values]


def similarity_plot(name: str, labels: Sequence[str], values: Sequence[Sequence[float]]) -> Plot:
    """Draw the cosines between prompts as a map."""
    side = min(9.6, 3.0 + (0.34 if len(labels) <= 16 else 0.2) * len(labels))
    with rc_context(STYLE | {"font.size": 9.5 if len(labels) <= 24 else 7}):
        figure = Figure(figsize=(side, side * 0.86), layout="constrained")
        ax = figure.subplots()
        image = ax.pcolormesh([list(row) for row in values], cmap="RdBu_r", vmin=-1, vmax=1, lw=0)
        shown = [text if len(text) <= 24 else f"{text[:11]}…{text[-12:]}" for text in labels]
        places = [i + 0.5 for i in range(len(labels))]
        ax.set_xticks(places, shown, rotation=90)
        ax.set_yticks(places, shown)
        ax.invert_yaxis()
        ax.tick_params(length=0)
        figure.colorbar(image, ax=ax, shrink=0.7, label="cosine")
        return _plot(name, figure, f"cosines between {len(labels)} prompts")


def speed_plot(points: Sequence[tuple[int, float]]) -> Plot:
    """Plot useful tokens per second by step."""
    points = points[:: max(1, math.ceil(len(points) / MOST_POINTS))]
    with rc_context(STYLE):
        figure = Figure(figsize=(10.2, 1.6), layout="constrained")
        ax = figure.subplots()
        ax.plot([a for a, _ in points], [b for _, b in points], color=COLORS[0], linewidth=1.1)
        ax.set_ylim(0, 1.15 * max(b for _, b in points))
        ax.yaxis.set_major_locator(MaxNLocator(3))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        _style_axes(ax, "step", 8)
        return _plot("useful_tokens_per_second", figure, "useful tokens per second by step")


def _draw_curves(ax: Axes, curves: Sequence[Curve], panel: str, x: str) -> None:
    """Draw all kinds of curves of a few prompts; of many, only the validation of the others."""
    for i, curve in enumerate(curves):
        for name, style in LINES.items():
            if name != "validation" and i > 0 and len(curves) > FEW:
                continue
            if name == "train" and panel != "loss":
                continue
            drawn = THIN if curve.color == OTHERS else style
            ax.plot(*curve.points(f"{name}_{panel}", x), color=curve.color, **drawn)
    if panel == "loss":
        ax.set_ylim(bottom=0)
    else:
        ax.set_ylim(0, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _style_axes(ax: Axes, label: str, ticks: int) -> None:
    ax.set_xlabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    ax.grid(axis="y", color=INK, alpha=0.10, linewidth=0.6)


def _draw_levels(ax: Axes, levels: dict[str, float]) -> None:
    for name, value in levels.items():
        ax.axhline(value, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), alpha=0.7)
        ax.annotate(
            name,
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
            alpha=0.8,
        )


def _short(value: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def _plot(name: str, figure: Figure, label: str, *, png: bool = True) -> Plot:
    """Render a figure; ``label`` describes it to screen readers."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    image = io.BytesIO()
    if png:
        figure.savefig(image, format="png", dpi=130, metadata={"Software": None})
    return Plot(name, svg, image.getvalue())
