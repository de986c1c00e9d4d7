"""The figures of a training run, drawn from its folder (`bench.job.record`).

accuracy.png     test accuracy against training time (Fig. 7a) and iterations
breakdown.png    where the time went (Fig. 7b), and by phase
accuracy-NAME.png, breakdown-NAME.png     both by the clock of the cluster that was emulated
loss.png         training loss against iterations
compression.png  GradiVeQ's last window, layer by layer
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.common.files import RecordError, read_object, read_text
from bench.common.texts import commit_text, machine_text, ranks_text, sentences
from bench.drawing import page
from bench.drawing.styles import (
    BLUE,
    GREY,
    GROUP_COLORS,
    GROUP_LABELS,
    METHOD_LABELS,
    VERMILION,
    method_color,
    method_marker,
    method_style,
)
from bench.job.record import ENVIRONMENT, GROUPS, SUMMARY, metrics_name
from bench.job.report import PHASES, Clock, clocks
from gradiveq.pca import DEFAULT_LOSS_THRESHOLD

#: Phases of methods that have no other phase.
ONLY_PHASES = ("plain", "qsgd", "compressed")
#: The iterations, one window, that the paper's Fig. 7b is for.
BREAKDOWN_ITERATIONS = 500
#: Methods of which a figure shows the loss of every iteration; that of more hides the moving means.
MOST_FAINT = 6


class RecordedRun:
    """What a run's folder says. Reads all of it first, so that a damaged record leaves no figure.

    Attributes:
        summary, environment: as recorded.
        lines: the lines of each finished method's metrics, by type.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.summary = read_object(folder / SUMMARY)
        self.environment = read_object(folder / ENVIRONMENT)
        try:
            self.methods: dict[str, dict[str, Any]] = dict(self.summary["methods"])
            self.data_source = str(self.summary["data_source"])
        except (KeyError, TypeError, ValueError) as error:
            raise RecordError(f"{folder / SUMMARY} is damaged ({error!r})") from error
        self.lines = {method: self._read(folder / metrics_name(method)) for method in self.methods}

    @staticmethod
    def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
        lines: dict[str, list[dict[str, Any]]] = {"iteration": [], "evaluation": [], "window": []}
        for number, text in enumerate(read_text(path).splitlines(), 1):
            try:
                line = json.loads(text)
                lines.setdefault(line["type"], []).append(line)
            except (ValueError, KeyError, TypeError) as error:
                raise RecordError(f"{path}, line {number} is damaged ({error!r})") from error
        return lines

    def caption(self, clock: Clock | None = None) -> str:
        """How the run came about; with whose seconds they are if a figure shows any."""
        summary, environment = self.summary, self.environment
        parts = [
            f"Data: {self.data_source}",
            f"{ranks_text(summary['ranks'])} x {summary['batch_size']} images, on {machine_text(environment, summary)}",
            f"seed {environment.get('seed')}",
            commit_text(environment),
            f"command: {environment.get('command')}",
        ]
        if clock is not None and clock.key is not None:
            about = f"Seconds are those of {clock.name}"
            source = summary["cluster"].get("source")
            parts.insert(0, f"{about}: {source}" if source else about)
            parts[2] += f", which trained for real{' in one process' if summary.get('one_process') else ''}"
        if not summary.get("complete", True):
            parts.insert(0, "Not all methods have ended")
        return sentences(parts)

    def title(self, what: str) -> str:
        return f"{what}: {self.summary['model']} on {self.data_source}"


def draw(run_folder: Path) -> list[Path]:
    """Draw a run's figures into its folder, again if they are there.

    Args:
        run_folder: with what `bench.job.record` describes.
    Returns:
        The files written. A figure for which nothing was recorded (accuracy without any evaluation) is left out.
    Raises:
        RecordError: if the record is missing or damaged; nothing is half-written.
    """
    run = RecordedRun(Path(run_folder))
    try:
        with page.figure_style():
            figures: dict[str, Figure | None] = {}
            for clock in clocks(run.summary):
                figures[f"accuracy{clock.suffix}.png"] = _accuracy(run, clock)
                figures[f"breakdown{clock.suffix}.png"] = _breakdown(run, clock)
            figures |= {"loss.png": _loss(run), "compression.png": _compression(run)}
            return [
                page.write_figure(figure, run.folder / name) for name, figure in figures.items() if figure is not None
            ]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise RecordError(f"{run.folder} is damaged: its record isn't as it should be ({error!r})") from error


def redraw(path: Path) -> list[Path]:
    """The figures of the run whose summary is at `path`. Raises as `draw`."""
    return draw(path.parent)


def _on(clock: Clock) -> str:
    """The clock in a title."""
    return "" if clock.key is None else f" on {clock.name}"


def _accuracy(run: RecordedRun, clock: Clock) -> Figure | None:
    """Fig. 7a: against seconds of training; and against iterations, which doesn't depend on the machine."""
    evaluations = {method: lines["evaluation"] for method, lines in run.lines.items() if lines["evaluation"]}
    if not evaluations:
        return None
    time = "time_s" if clock.key is None else "virtual_s"
    names = list(evaluations)
    labels = {
        method: f"{METHOD_LABELS.get(method, method)}\n{100 * lines[-1]['test_accuracy']:.2f} % in "
        f"{lines[-1][time]:,.0f} s"
        for method, lines in evaluations.items()
    }
    height = max(3.6, 0.6 + 0.43 * len(names))  # of the legend
    width = max(9.5, 7.2 + page.legend_width(labels.values()))
    figure = page.new_figure(width, height, run.title(f"Test accuracy{_on(clock)}"), run.caption(clock))
    axes = figure.subplots(1, 2, sharey=True)
    for method, lines in evaluations.items():
        accuracy = [100 * line["test_accuracy"] for line in lines]
        style = {**method_style(method, names), "marker": method_marker(method, names), "label": labels[method]}
        axes[0].plot([line[time] for line in lines], accuracy, **style)
        axes[1].plot([line["iteration"] for line in lines], accuracy, **{**style, "label": None})
    where = "" if clock.key is None else " on the cluster"
    axes[0].set(xlabel=f"training time{where} (s)", ylabel="test accuracy (%)")
    axes[1].set(xlabel="iterations")
    for axis in axes:
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=page.STEPS))
    page.add_legend(axes[0], axes[1])
    return figure


def _breakdown(run: RecordedRun, clock: Clock) -> Figure | None:
    """Fig. 7b: seconds per 500 iterations (or of all, if there are less); and of an iteration, by phase."""
    if not run.methods:
        return None
    names = list(run.methods)
    phases = [
        (name, phase)
        for name in names
        for phase in sorted(run.methods[name]["phases"], key=lambda p: PHASES.index(p) if p in PHASES else len(PHASES))
    ]
    iterations = min(method["iterations"] for method in run.methods.values())
    per = BREAKDOWN_ITERATIONS if iterations >= BREAKDOWN_ITERATIONS else iterations
    whole_labels = [METHOD_LABELS.get(name, name) for name in names]
    labels = [
        f"{METHOD_LABELS.get(name, name)}{'' if phase in ONLY_PHASES else f', {phase}'}" for name, phase in phases
    ]
    beside = (
        page.longest(whole_labels, page.TICK_SIZE)
        + page.longest(labels, page.TICK_SIZE)
        + page.legend_width(GROUP_LABELS.values())
    )
    height = 1.5 + 0.36 * max(len(names) + 1, len(phases))
    figure = page.new_figure(
        max(10.5, 5.2 + beside), height, run.title(f"Time for {per} iterations{_on(clock)}"), run.caption(clock)
    )
    left, right = figure.subplots(1, 2)
    whole = [_shown(clock.times(run.methods[name])["groups"], per / run.methods[name]["iterations"]) for name in names]
    _stack(left, whole_labels, whole, "{:,.0f}" if per >= 100 else "{:,.1f}")
    left.set(xlabel=f"seconds per {per} iterations", title="all phases")
    parts = [run.methods[name]["phases"][phase] for name, phase in phases]
    each = [_shown(clock.times(part)["groups"], 1e3 / part["iterations"]) for part in parts]
    _stack(right, labels, each, "{:,.0f}")
    right.set(xlabel="milliseconds per iteration", title="by phase")
    page.add_legend(left, right)
    return figure


def _shown(groups: Mapping[str, float], scale: float) -> dict[str, float]:
    """The groups that are part of training, scaled, in the order in which they are stacked."""
    return {group: scale * groups.get(group, 0.0) for group in GROUPS if group != "measure"}


def _stack(axis: Axes, labels: Sequence[str], bars: Sequence[Mapping[str, float]], form: str) -> None:
    """Horizontal stacked bars, the first at the top, with totals behind them."""
    places = np.arange(len(bars))
    start = np.zeros(len(bars))
    for group in bars[0]:
        widths = np.array([bar[group] for bar in bars])
        axis.barh(
            places,
            widths,
            0.66,
            start,
            color=GROUP_COLORS.get(group, "#BBCC33"),
            edgecolor="#444444",
            linewidth=0.5,
            hatch="////" if group == "other" else None,
            label=GROUP_LABELS.get(group, group),
        )
        start += widths
    for place, total in zip(places, start, strict=True):
        axis.annotate(form.format(total), (total, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_yticks(places, labels)
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.set_xlim(0, 1.22 * max(start.max(), 1e-9))
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=page.STEPS))


def _loss(run: RecordedRun) -> Figure | None:
    """Training loss of every iteration, faint, and its moving mean."""
    losses = {m: lines["iteration"] for m, lines in run.lines.items() if lines["iteration"]}
    if not losses:
        return None
    names = list(losses)
    width = max(8.5, 6.5 + page.legend_width(METHOD_LABELS.get(name, name) for name in names))
    figure = page.new_figure(width, max(3.6, 0.6 + 0.25 * len(names)), run.title("Training loss"), run.caption())
    axis = figure.subplots()
    smooth_top = 0.0
    for method, lines in losses.items():
        iterations = np.array([line["iteration"] for line in lines])
        loss = np.array([np.nan if line["loss"] is None else line["loss"] for line in lines], np.float64)
        span = _span(len(loss))
        known, window = np.isfinite(loss), np.ones(span)
        number = np.convolve(known, window, "valid")
        smooth = np.convolve(np.where(known, loss, 0.0), window, "valid") / np.where(number > 0, number, np.nan)
        style = method_style(method, names)
        if len(names) <= MOST_FAINT:
            axis.plot(iterations, loss, color=style["color"], alpha=0.22, linewidth=0.7)
        axis.plot(iterations[span - 1 :], smooth, **style)
        smooth_top = max(smooth_top, float(np.nan_to_num(smooth).max()))
    lines = next(iter(losses.values()))
    drops = [b["iteration"] for a, b in pairwise(lines) if b["lr"] < 0.5 * a["lr"]]
    for index, drop in enumerate(drops):
        axis.axvline(drop, color=GREY, linewidth=1, linestyle=":", label=None if index else "learning rate / 10")
    axis.set(xlabel="iteration", ylabel="cross-entropy (mean over all ranks)", xlim=(0, None))
    axis.set_ylim(0, 1.1 * smooth_top or 1)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=page.STEPS))
    thick, faint = ("thick: ", "; faint: each iteration") if len(names) <= MOST_FAINT else ("", "")
    axis.set_title(f"{thick}mean of the last {_span(len(lines))} iterations{faint}", fontsize=9)
    page.add_legend(axis)
    return figure


def _span(iterations: int) -> int:
    """Iterations that a moving mean covers."""
    return min(iterations, max(5, iterations // 40))


def _compression(run: RecordedRun) -> Figure | None:
    """Ratio, components and losses of every layer in the last window that has bases, per method that has windows."""
    found = {method: entry["last_window"] for method, entry in run.methods.items() if entry.get("last_window")}
    if not found:
        return None
    method, window = next(iter(found.items()))
    layers: dict[str, Any] = window["layers"]
    names = [name.removesuffix(".weight") for name in layers]
    places = np.arange(len(layers))
    title = run.title(f"{METHOD_LABELS.get(method, method)} by layer, window {window['window'] + 1}")
    figure = page.new_figure(max(7.5, 3.2 + 0.27 * len(layers)), 5.2, title, run.caption())
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.bar(places, [layer["ratio"] for layer in layers.values()], 0.7, color=method_color(method))
    tops = [(place, layer["ratio"], _total(layer["d"])) for place, layer in zip(places, layers.values(), strict=True)]
    for place, top, components in tops:
        upper.annotate(components, (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    upper.set(ylabel="compression ratio", title="ratio (on the bars: d, the components kept)")
    upper.set_ylim(0, 1.2 * max(top for _, top, _ in tops))
    kinds = (("held_out_loss", "held-out", VERMILION, "o"), ("in_sample_loss", "in-sample", BLUE, "s"))
    options = run.summary.get("options", {})
    threshold = options.get("loss_threshold")
    if threshold is None and options.get("ratio") is None and options.get("n_components") is None:
        threshold = DEFAULT_LOSS_THRESHOLD
    largest = 0.0
    for kind, label, color, marker in kinds:
        known = [(p, layer[kind]) for p, layer in zip(places, layers.values(), strict=True) if layer[kind] is not None]
        if known:
            largest = max(largest, *(value for _, value in known))
            lower.plot(
                *zip(*known, strict=True),
                color=color,
                marker=marker,
                linestyle="",
                clip_on=False,
                label=f"{label} loss",
            )
    if threshold is not None:
        lower.axhline(threshold, color=GREY, linewidth=1.2, linestyle="--", label=f"threshold {threshold:g}")
    lower.set(ylabel="‖ĝ-g‖² / ‖g‖²", title="loss")
    lower.set_ylim(0, 1.1 * max(largest, threshold or 0.0, 1e-6))
    lower.set_xticks(places, names, rotation=90, fontsize=7.5)
    lower.set_xlim(-0.7, len(layers) - 0.3)
    for axis in (upper, lower):
        axis.grid(axis="x", visible=False)
    page.add_legend(lower)
    return figure


def _total(components: Any) -> str:
    """d of a layer; one number per group, of which most layers have one."""
    if not isinstance(components, list):
        return str(components)
    return str(components[0]) if len(components) == 1 else f"{min(components)}-{max(components)}"
