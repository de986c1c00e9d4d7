"""The figures of `bench.hard_threshold`, from its records; one for each of the paper's (Sahu et al. 2021).

A line is the mean over the seeds, the band around it the least and the most of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bench.common.statistics import mean_and_spread
from bench.drawing import page
from bench.drawing.styles import BLUE, GREEN, VERMILION
from bench.experiments.findings import select

Runs = Mapping[str, Mapping[str, Any]]
Records = Sequence[Mapping[str, Any]]
Floats = npt.NDArray[np.float64]

#: Compressor -> how it is drawn in every figure of this experiment.
STYLES: dict[str, dict[str, Any]] = {
    "identity": {"color": "#444444", "linestyle": "--", "label": "no compression"},
    "topk": {"color": VERMILION, "label": "top-k"},
    "threshold": {"color": BLUE, "label": "hard-threshold"},
    "accordion": {"color": GREEN, "label": "ACCORDION"},
}
ORDER = tuple(STYLES)
BITS_OF_A_FLOAT = 32
#: Stands for 0 (nothing sent yet, no error yet) on a logarithmic axis.
LEAST = 1e-300
#: Columns of a network's steps, with their labels.
ERROR_AND_DENSITY = (("error", "error ‖e‖², mean of the workers"), ("density", "density"))
#: Test metrics that are shares, drawn in percent.
SHARES = ("accuracy", "hit_rate")


def _band(axis: Axes, x: Floats, lines: Floats, style: Mapping[str, Any]) -> None:
    """Mean and range of lines of shape (seeds, points)."""
    axis.plot(x, lines.mean(axis=0), **style)
    if len(lines) > 1:
        axis.fill_between(x, lines.min(axis=0), lines.max(axis=0), color=style["color"], alpha=0.2, linewidth=0)


# --- logistic regression ---------------------------------------------------------------------------------------------


def _traces(records: Records, key: str) -> Floats:
    return np.array([record["result"]["trace"][key] for record in records], np.float64)


def elements_per_iteration(trace: Mapping[str, Any]) -> Floats:
    """Elements that a worker sends, as the mean over the iterations between two points of the trace."""
    elements, iterations = np.asarray(trace["elements"], np.float64), np.asarray(trace["iteration"], np.float64)
    return np.diff(elements) / np.diff(iterations)


#: Panel -> what is on its axes: (x, y) of the traces of one method, and their labels. "bits" are 32 for an element, as
#: the paper's code counts them.
Panel = tuple[Callable[[Records], tuple[Floats, Floats]], str, str]


def _against(x: str, y: str, x_scale: float = 1.0) -> Callable[[Records], tuple[Floats, Floats]]:
    def get(records: Records) -> tuple[Floats, Floats]:
        return _traces(records, x).mean(axis=0) * x_scale, np.maximum(_traces(records, y), LEAST)

    return get


def _elements(records: Records) -> tuple[Floats, Floats]:
    traces = [record["result"]["trace"] for record in records]
    return np.asarray(traces[0]["iteration"][1:], np.float64), np.array([elements_per_iteration(t) for t in traces])


PANELS: dict[str, Panel] = {
    "epochs": (_against("epoch", "suboptimality"), "epochs", "f(x) - f(x*)"),
    "bits": (
        _against("elements", "suboptimality", BITS_OF_A_FLOAT),
        "bits sent by a worker (32 an element)",
        "f(x) - f(x*)",
    ),
    "error": (_against("epoch", "error"), "epochs", "error ‖e‖², mean of the workers"),
    "error-iterations": (_against("iteration", "error"), "iterations", "error ‖e‖², mean of the workers"),
    "corrected": (_against("epoch", "corrected"), "epochs", "error-compensated update ‖e + γg‖²"),
    "elements": (_elements, "iterations", "elements sent per iteration and worker"),
}


def logistic(runs: Runs, wanted: Mapping[str, Any], panels: Sequence[str], title: str, caption: str) -> Figure:
    """Panels beside one another, a line for each method.

    Args:
        wanted: conditions on the specs.
        panels: some of `PANELS`.
    """
    figure = page.new_figure(4.1 * len(panels) + 1.6, 3.5, title, caption)
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for axis, name in zip(axes, panels, strict=True):
        get, x_label, y_label = PANELS[name]
        for compressor in ORDER:
            records = select(runs, **wanted, compressor=compressor)
            if not records or (compressor == "identity" and y_label.startswith("error ")):
                continue
            x, y = get(records)
            style = {**STYLES[compressor], "label": _label(records)}
            if name == "bits":
                first = int(np.argmax(x > 0))
                x, y = x[first:], y[:, first:]
            elif name in ("error", "error-iterations", "corrected"):
                x, y = x[1:], y[:, 1:]
            _band(axis, x, y, style)
        axis.set(xlabel=x_label, ylabel=y_label)
        if name == "elements":
            axis.set_yscale("symlog", linthresh=1.0)
            axis.set_ylim(bottom=0)
        else:
            axis.set_yscale("log")
        if name == "bits":
            axis.set_xscale("log")
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5, steps=page.STEPS))
    page.add_legend(axes[0], axes[-1])
    return figure


def _label(records: Records) -> str:
    spec = records[0]["spec"]
    fields = records[0]["result"]["fields"]
    label: str = STYLES[spec["compressor"]]["label"]
    if "count" in fields:
        return f"top-k, k = {fields['count']}"
    if "ratio" in fields:
        return f"{label}, {fields['ratio']:.3%}"
    return f"{label}, λ = {fields['value']:.4g}" if "value" in fields else label


# --- networks --------------------------------------------------------------------------------------------------------


def metric_against_volume(runs: Runs, wanted: Sequence[Mapping[str, Any]], title: str, caption: str) -> Figure:
    """Fig. 2 and 11: the final test metric against the density averaged over the run; bars are standard deviations.

    Args:
        wanted: for each panel conditions on the specs, "title", "metric", "label", and "granularity", top-k's.
    """
    figure = page.new_figure(4.3 * len(wanted) + 1.6, 3.6, title, caption)
    axes = np.atleast_1d(figure.subplots(1, len(wanted)))
    for axis, panel in zip(axes, wanted, strict=True):
        conditions = {key: panel[key] for key in ("kind", "network", "feedback")}
        key = panel["metric"]
        scale = 100 if key in SHARES else 1
        plain = select(runs, **conditions, compressor="identity")
        if plain:
            mean, spread = mean_and_spread([scale * final(record, key) for record in plain])
            axis.axhline(mean, **STYLES["identity"])
            axis.axhspan(mean - spread, mean + spread, color="#444444", alpha=0.12, linewidth=0)
        for compressor in ("topk", "threshold"):
            granularity = panel["granularity"] if compressor == "topk" else "layer"
            found = [
                record
                for record in select(runs, **conditions, compressor=compressor, granularity=granularity)
                if "least" not in record["spec"]["fields"]  # ACCORDION's comparison is another
            ]
            points = sorted(
                (
                    mean_and_spread([100 * density(r) for r in group]),
                    mean_and_spread([scale * final(r, key) for r in group]),
                )
                for group in by_fields(found).values()
            )
            if points:
                x, y = [p[0][0] for p in points], [p[1][0] for p in points]
                x_spread, y_spread = [p[0][1] for p in points], [p[1][1] for p in points]
                axis.errorbar(x, y, y_spread, x_spread, capsize=2.5, elinewidth=1, marker="o", **STYLES[compressor])
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(xlabel="average density (%)", ylabel=panel["label"], title=panel["title"])
    page.add_legend(axes[-1])
    return figure


def along_training(
    runs: Runs,
    groups: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    metric: str,
    title: str,
    caption: str,
    label: str,
    columns: Sequence[tuple[str, str]] = ERROR_AND_DENSITY,
) -> Figure:
    """Fig. 3, 5, 6, 12, 13: the test metric, and columns of the steps, against the iterations.

    Args:
        groups: (conditions on the specs, the line's style) of each line.
        columns: names in the steps, with their labels.
    """
    panels = 1 + len(columns)
    figure = page.new_figure(4.1 * panels + 1.6, 3.5, title, caption)
    axes = np.atleast_1d(figure.subplots(1, panels))
    for conditions, style in groups:
        records = select(runs, **conditions)
        if not records:
            continue
        lines = [record["result"]["evaluations"] for record in records]
        shortest = min(len(line) for line in lines)
        x = np.array([entry["iteration"] for entry in lines[0][:shortest]], np.float64)
        scale = 100 if metric in SHARES else 1
        _band(axes[0], x, scale * np.array([[entry[metric] for entry in line[:shortest]] for line in lines]), style)
        for axis, (column, _) in zip(axes[1:], columns, strict=True):
            steps = [record["result"]["steps"] for record in records]
            if column not in steps[0]:
                continue
            shortest = min(len(step[column]) for step in steps)
            y = np.array([step[column][:shortest] for step in steps], np.float64)
            _band(axis, np.asarray(steps[0]["iteration"][:shortest], np.float64), np.maximum(y, LEAST), style)
    axes[0].set(xlabel="iterations", ylabel=label)
    for axis, (_, text) in zip(axes[1:], columns, strict=True):
        axis.set(xlabel="iterations", ylabel=text)
        axis.set_yscale("log")
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=page.STEPS))
    page.add_legend(axes[0], axes[-1])
    return figure


def final(record: Mapping[str, Any], metric: str) -> float:
    """The test metric at the end of a run (where it has diverged: there)."""
    return float(record["result"]["evaluations"][-1][metric])


def density(record: Mapping[str, Any]) -> float:
    """The share of the elements sent, as the mean over a run's steps: the paper's measure of data volume."""
    return float(record["result"]["average_density"])


def by_fields(records: Records) -> dict[str, list[Mapping[str, Any]]]:
    """Runs that differ by nothing but their seeds."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(repr(sorted(record["spec"]["fields"].items())), []).append(record)
    return groups
