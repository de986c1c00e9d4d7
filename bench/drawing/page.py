"""The page that all figures share: its title above, how it came about below, written atomically.

The same record gives the same bytes (with the same version of Matplotlib).
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from bench.common.files import write_atomically

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
DPI = 150
STEPS = (1, 2, 2.5, 5, 10)
TITLE_SIZE, CAPTION_SIZE, LEGEND_SIZE, TICK_SIZE = 11.5, 7.5, 9.0, 10.0


def new_figure(width: float, height: float, title: str, caption: str) -> Figure:
    """A figure with its title, and with how it came about under the plot; constrained layout fills what is between."""
    lines = _wrap(title, width - 0.3, TITLE_SIZE, "bold")
    notes = [line for part in caption.split("\n") for line in _wrap(part, width - 0.2, CAPTION_SIZE)]
    above, below = 0.12 + 0.21 * len(lines), 0.12 + 0.15 * len(notes)
    height += above + below
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", rect=(0, below / height, 1, 1 - (above + below) / height))
    figure.text(0.5, 1 - 0.08 / height, "\n".join(lines), ha="center", va="top", fontsize=TITLE_SIZE, weight="bold")
    figure.text(
        0.08 / width, 0.06 / height, "\n".join(notes), ha="left", va="bottom", fontsize=CAPTION_SIZE, color="#555555"
    )
    return figure


@cache
def _width(text: str, size: float, weight: str) -> float:
    """The width of a text, in inches."""
    renderer: Any = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()  # type: ignore[no-untyped-call]
    width: float = renderer.get_text_width_height_descent(text, FontProperties(size=size, weight=weight), False)[0]
    return width / DPI


def longest(texts: Iterable[str], size: float) -> float:
    """The width of the longest line, in inches."""
    return max((_width(line, size, "normal") for text in texts for line in text.split("\n")), default=0.0)


def legend_width(labels: Iterable[str]) -> float:
    """The width that `add_legend` takes beside an axis, in inches."""
    return longest(labels, LEGEND_SIZE) + 0.6


def _wrap(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """Lines of at most `width` inches, broken at spaces, and within what is longer than a line by itself."""
    space = _width("n n", size, weight) - _width("nn", size, weight)
    lines: list[str] = []
    left = 0.0
    for word in text.split():
        needed = _width(word, size, weight)
        if lines and needed + space <= left:
            lines[-1] += f" {word}"
            left -= needed + space
            continue
        while needed > width:
            count = max(1, int(0.9 * len(word) * width / needed))
            lines.append(word[:count])
            word = word[count:]
            needed = _width(word, size, weight)
        lines.append(word)
        left = width - needed
    return lines


def write_figure(figure: Figure, path: Path) -> Path:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None})
    write_atomically(path, data.getvalue())
    return path


def figure_style() -> Any:
    """Matplotlib's defaults and ours, whatever the user's settings are."""
    return matplotlib.style.context(["default", STYLE])


def add_legend(axis: Axes, beside: Axes | None = None) -> None:
    """What is drawn on an axis, explained to the right of it, or beside another one."""
    handles, labels = axis.get_legend_handles_labels()
    (beside or axis).legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        borderaxespad=0,
        fontsize=LEGEND_SIZE,
        labelspacing=0.8,
    )
