"""The figures of `bench.layerwise`, from its records: one for each method, the paper's Fig. 2 to 8.

Colours are settings, a solid line is layer-wise, a dashed one entire-model compression; a line is the mean over the
seeds, the band around it the least and the most of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.drawing import page
from bench.drawing.styles import BLUE, GREEN, ORANGE, PURPLE, VERMILION
from bench.papers.layerwise.findings import Runs, metric_of, runs_of, settings_of
from bench.papers.layerwise.sizes import BASELINE, LAYER, MODEL, Network, Setting

#: Method -> the paper's figure, and its name there.
FIGURES = {
    "randomk": ("fig2", "Random k"),
    "terngrad": ("fig3", "TernGrad"),
    "qsgd-gather": ("fig4", "QSGD, s = 256"),
    "adaptive": ("fig5", "Adaptive threshold"),
    "threshold": ("fig6", "Threshold v"),
    "topk": ("fig7", "Top k"),
}
COLORS = (PURPLE, VERMILION, ORANGE, GREEN, BLUE)
LINES: dict[str, dict[str, Any]] = {
    LAYER: {"linestyle": "-", "marker": "o"},
    MODEL: {"linestyle": "--", "marker": "s", "markerfacecolor": "white"},
}
NAMES = {LAYER: "layer-wise", MODEL: "entire-model"}

Records = Sequence[Mapping[str, Any]]


def name_of(method: str) -> str:
    return f"{FIGURES[method][0]}-{method}.png"


def draw(runs: Runs, networks: Sequence[Network], method: str, caption: str) -> Figure | None:
    """Accuracy per epoch and compression error along the run, a row for each network and optimiser.

    Returns:
        None where nothing of the method was run.
    """
    rows = []
    for network in networks:
        settings = [setting for setting in settings_of(runs, network) if setting.method == method]
        rows += [
            (network, optimiser, [setting for setting in settings if setting.optimiser == optimiser])
            for optimiser in dict.fromkeys(setting.optimiser for setting in settings)
        ]
    if not rows:
        return None
    title = f"{FIGURES[method][1]}: layer-wise against entire-model compression"
    figure = page.new_figure(11, 3.3 * len(rows), title, caption)
    for (left, right), (network, optimiser, settings) in zip(
        np.atleast_2d(figure.subplots(len(rows), 2)), rows, strict=True
    ):
        momentum = ", Nesterov momentum" if optimiser == "nesterov" else ""
        baseline = runs_of(runs, network, Setting(BASELINE, optimiser=optimiser), None)
        if baseline:
            _accuracy(left, baseline, network, {"color": "#444444", "linestyle": ":", "label": "no compression"})
        for index, setting in enumerate(settings):
            for granularity in (LAYER, MODEL):
                these = runs_of(runs, network, setting, granularity)
                label = ", ".join(filter(None, (setting.label, NAMES[granularity])))
                style = {"color": COLORS[index % len(COLORS)], "label": label, **LINES[granularity]}
                if these:
                    _accuracy(left, these, network, style)
                same = runs_of(runs, network, setting, LAYER)
                if same:
                    _band(
                        right,
                        same[0]["result"]["steps"]["iteration"],
                        _column(same, f"{granularity}_error"),
                        {**style, "marker": ""},
                    )
        left.set(
            xlabel="epoch",
            ylabel=f"test accuracy{', top 5' if network.imagenet else ''} (%)",
            title=f"{network.label}{momentum}",
        )
        left.set_ylim(bottom=0)
        left.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=page.STEPS))
        right.set(
            xlabel="iterations",
            ylabel="‖g - Q(g)‖² / ‖g‖²",
            title="compression error, on layer-wise runs' gradients",
            yscale="log",
        )
        page.add_legend(left, right)
    return figure


def _accuracy(axis: Axes, these: Records, network: Network, style: Mapping[str, Any]) -> None:
    longest = max((run["result"]["evaluations"] for run in these), key=len)
    lines = np.full((len(these), len(longest)), np.nan)
    for line, run in zip(lines, these, strict=True):  # one that diverged stays where it was
        values = [100 * evaluation[metric_of(network)] for evaluation in run["result"]["evaluations"]]
        line[: len(values)] = values
        line[len(values) :] = values[-1]
    _band(axis, [evaluation["epoch"] for evaluation in longest], lines, {"markersize": 3.5, **style})


def _column(these: Records, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A column of all runs, by seed; NaN where nothing was measured, or the run had ended."""
    columns = [run["result"]["steps"].get(name, []) for run in these]
    lines = np.full((len(columns), len(these[0]["result"]["steps"]["iteration"])), np.nan)
    for line, column in zip(lines, columns, strict=True):
        values = [np.nan if value is None or value <= 0 else value for value in column][: len(line)]
        line[: len(values)] = values
    return lines


def _band(
    axis: Axes, x: Sequence[float], lines: np.ndarray[Any, np.dtype[np.float64]], style: Mapping[str, Any]
) -> None:
    """Mean and range over the seeds, where there is any value."""
    there = ~np.isnan(lines).all(axis=0)
    if not there.any():
        return
    places, values = np.asarray(x, np.float64)[there], lines[:, there]
    axis.plot(places, np.nanmean(values, axis=0), **style)
    if len(lines) > 1:
        low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        axis.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)
