"""Plot curves as inline SVG. Text and axes use the page's color, so dark mode works."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from trainer.tracking.metrics_log import Line

#: One color per prompt, in order of rank; distinguishable with color blindness.
COLORS = (
    "#2f6fde", "#e0791b", "#1e9e77", "#c2418c", "#8a6fd1", "#b08a00", "#3aa6c9", "#7a7a7a",
)  # fmt: skip
INK = "#010203"  # placeholder for the page's text color
MOST_POINTS = 400
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "promptshard",  # equal plots have equal bytes
    "font.family": "sans-serif",
    "font.size": 9.5,
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


def curves_svg(
    curves: Sequence[Curve], metric: str, levels: dict[str, float], x: str, title: str
) -> str:
    """Plot the loss and, in a second panel, the task's metric unless it is the loss.

    Args:
        levels: scores in ``validation_<metric>`` to draw as level lines, by name.
        x: ``step`` or ``useful_tokens``.
    """
    panels = {"loss": title, metric: title if metric == "loss" else metric.replace("_", " ")}
    with rc_context(STYLE):
        figure = Figure(figsize=(5.1 * len(panels), 3.0), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (panel, panel_title) in zip(axes, panels.items(), strict=True):
            ax.set_title(panel_title, loc="left", fontsize=10)
            for curve in curves:
                for name, style in LINES.items():
                    if name != "train" or panel == "loss":
                        points = curve.points(f"{name}_{panel}", x)
                        ax.plot(*points, color=curve.color, **style)
            if panel == "loss":
                ax.set_ylim(bottom=0)
            else:
                ax.set_ylim(0, 1.02)
                ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            if panel == metric:
                _draw_levels(ax, levels)
            _style_axes(ax, "step" if x == "step" else "useful tokens read by the prompt", 6)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        return _svg(figure)


def sparkline_svg(points: Sequence[tuple[int, float]]) -> str:
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
        return _svg(figure)


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


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
