"""Figures of what was recorded; nothing is run: `python -m bench.figures results` (`bench.redraw`).

Here are the page that all figures share, and the figures of

    a run's folder (`bench.record`)        accuracy.png     test accuracy against training time (Fig. 7a) and iterations
                                           breakdown.png    where the time went (Fig. 7b), and by phase
                                           accuracy-NAME.png, breakdown-NAME.png     both by the clock of the cluster
                                                            that was emulated
                                           loss.png         training loss against iterations
                                           compression.png  GradiVeQ's last window, layer by layer
    NAME.json of `ring.bench --json`       NAME.png         bus bandwidth against size
    gradients.npz (`bench.gradients`)      fig4.png/.json   3 adjacent gradients before and after rotation (Fig. 4)
                                           fig5.png/.json   slice size against ratio and loss (Fig. 5)

Fig. 5 is there if a (3, 3, 16, 16) layer was recorded. A recording by another name has that in front of its figures'.
Their numbers are computed once: where the JSON files are, figures are drawn from these.
The same record gives the same bytes (with the same version of Matplotlib).
"""

from __future__ import annotations

import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from bench import gradients
from bench.record import ENVIRONMENT, GROUPS, SUMMARY, metrics_name, write_atomically, write_json
from bench.report import PHASES, Clock, bytes_text, clocks
from gradiveq.pca import DEFAULT_LOSS_THRESHOLD

#: Okabe and Ito's palette. A method has the same colour in every figure; others than these get one by their name, the
#: next if another method of the figure has it.
METHOD_COLORS = {"rar": "#0072B2", "qsgd": "#E69F00", "gradiveq": "#009E73"}
#: Colours and markers of other methods.
OTHER_STYLES = (
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#D55E00", "P"),
    ("#666666", "X"),
    ("#332288", "<"),
    ("#882255", ">"),
    ("#999933", "p"),
    ("#000000", "h"),
    ("#A6761D", "d"),
    ("#66A61E", "*"),
    ("#E7298A", "H"),
    ("#7570B3", "8"),
)
LINE_STYLES = ("-", "--", ":", "-.")
METHOD_LABELS = {"rar": "plain ring (rar)", "qsgd": "QSGD in the ring", "gradiveq": "GradiVeQ"}
METHOD_MARKERS = {"rar": "o", "qsgd": "s", "gradiveq": "^"}
#: Tol's light palette, for kinds of seconds.
GROUP_COLORS = {
    "compute": "#DDDDDD",
    "encode": "#77AADD",
    "add": "#EEDD88",
    "exposed communication": "#EE8866",
    "decode": "#44BB99",
    "fit": "#FFAABB",
    "other": "#FFFFFF",
}
GROUP_LABELS = {
    "compute": "compute\n(forward, backward, update)",
    "encode": "encode (and recode, pack)",
    "exposed communication": "exposed communication\n(waiting)",
    "fit": "fit (PCA)",
    "other": "other (data, control)",
}
IMPLEMENTATION_STYLES: dict[str, dict[str, Any]] = {
    "ring": {"color": "#0072B2", "marker": "o", "label": "this ring"},
    "MPI_Allreduce": {"color": "#D55E00", "marker": "s", "label": "MPI_Allreduce"},
    "limit": {"color": "#666666", "marker": "", "linestyle": "--", "label": "limit: the copies\nand adds alone"},
}
BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#888888"

#: Of methods that have no other.
ONLY_PHASES = ("plain", "qsgd", "compressed")
#: The paper's Fig. 7b is for so many iterations, one window.
BREAKDOWN_ITERATIONS = 500
#: Methods of which a figure shows the loss of every iteration; that of more hides the moving means.
MOST_FAINT = 6
#: Fig. 5's layer.
FIG5_SHAPE = (3, 3, 16, 16)
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


class FigureError(ValueError):
    """A record is missing or damaged; one line."""


# --- the page: title above, caption below, written atomically --------------------------------------------------------


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
    """Inches."""
    renderer: Any = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()  # type: ignore[no-untyped-call]
    width: float = renderer.get_text_width_height_descent(text, FontProperties(size=size, weight=weight), False)[0]
    return width / DPI


def _longest(texts: Iterable[str], size: float) -> float:
    """Inches of the longest line."""
    return max((_width(line, size, "normal") for text in texts for line in text.split("\n")), default=0.0)


def _legend_width(labels: Iterable[str]) -> float:
    """Inches that `add_legend` takes beside an axis."""
    return _longest(labels, LEGEND_SIZE) + 0.6


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


def _places(methods: Iterable[str]) -> dict[str, int]:
    """Where in `OTHER_STYLES` each method is that has no style of its own; beyond the end it begins again."""
    places: dict[str, int] = {}
    for method in dict.fromkeys(methods):
        if method not in METHOD_COLORS:
            first, count = zlib.crc32(method.encode()) % len(OTHER_STYLES), len(OTHER_STYLES)
            rounds = len(places) // count * count
            free = (rounds + (first + step) % count for step in range(count))
            places[method] = next(place for place in free if place not in places.values())
    return places


def method_color(method: str, among: Sequence[str] = ()) -> str:
    """See `method_style`."""
    color: str = method_style(method, among)["color"]
    return color


def method_marker(method: str, among: Sequence[str] = ()) -> str:
    """See `method_style`."""
    if method in METHOD_MARKERS:
        return METHOD_MARKERS[method]
    return OTHER_STYLES[_places([*among, method])[method] % len(OTHER_STYLES)][1]


def method_style(method: str, among: Sequence[str] = ()) -> dict[str, Any]:
    """How a line of a method is drawn.

    Args:
        among: all methods of the figure, in order, so that no two look alike.
    """
    label = METHOD_LABELS.get(method, method)
    if method in METHOD_COLORS:
        return {"color": METHOD_COLORS[method], "label": label}
    rounds, place = divmod(_places([*among, method])[method], len(OTHER_STYLES))
    return {"color": OTHER_STYLES[place][0], "label": label, "linestyle": LINE_STYLES[rounds % len(LINE_STYLES)]}


# --- a run -----------------------------------------------------------------------------------------------------------


class Run:
    """What a run's folder says. Reads all of it first, so that a damaged record leaves no figure.

    Attributes:
        summary, environment: as recorded.
        lines: of each finished method's metrics, by type.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.summary = read_object(folder / SUMMARY)
        self.environment = read_object(folder / ENVIRONMENT)
        try:
            self.methods: dict[str, dict[str, Any]] = dict(self.summary["methods"])
            self.data_source = str(self.summary["data_source"])
        except (KeyError, TypeError, ValueError) as error:
            raise FigureError(f"{folder / SUMMARY} is damaged ({error!r})") from error
        self.lines = {method: self._read(folder / metrics_name(method)) for method in self.methods}

    @staticmethod
    def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
        lines: dict[str, list[dict[str, Any]]] = {"iteration": [], "evaluation": [], "window": []}
        for number, text in enumerate(_read_text(path).splitlines(), 1):
            try:
                line = json.loads(text)
                lines.setdefault(line["type"], []).append(line)
            except (ValueError, KeyError, TypeError) as error:
                raise FigureError(f"{path}, line {number} is damaged ({error!r})") from error
        return lines

    def caption(self, clock: Clock | None = None) -> str:
        """How the run came about; with whose seconds they are if a figure shows any."""
        summary, environment = self.summary, self.environment
        commit = environment.get("commit")
        parts = [
            f"Data: {self.data_source}",
            f"{_ranks(summary['ranks'])} x {summary['batch_size']} images, on {machine_text(environment, summary)}",
            f"seed {environment.get('seed')}",
            f"commit {short_commit(commit) if commit else 'unknown'}",
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
        run_folder: with what `bench.record` describes.
    Returns:
        The files written. A figure for which nothing was recorded (accuracy without any evaluation) is left out.
    Raises:
        FigureError: if the record is missing or damaged; nothing is half-written.
    """
    run = Run(Path(run_folder))
    try:
        with figure_style():
            figures: dict[str, Figure | None] = {}
            for clock in clocks(run.summary):
                figures[f"accuracy{clock.suffix}.png"] = _accuracy(run, clock)
                figures[f"breakdown{clock.suffix}.png"] = _breakdown(run, clock)
            figures |= {"loss.png": _loss(run), "compression.png": _compression(run)}
            return [write_figure(figure, run.folder / name) for name, figure in figures.items() if figure is not None]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise FigureError(f"{run.folder} is damaged: its record isn't as it should be ({error!r})") from error


def _on(clock: Clock) -> str:
    """For titles."""
    return "" if clock.key is None else f" on {clock.name}"


def _accuracy(run: Run, clock: Clock) -> Figure | None:
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
    width = max(9.5, 7.2 + _legend_width(labels.values()))
    figure = new_figure(width, height, run.title(f"Test accuracy{_on(clock)}"), run.caption(clock))
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
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=STEPS))
    add_legend(axes[0], axes[1])
    return figure


def _breakdown(run: Run, clock: Clock) -> Figure | None:
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
    beside = _longest(whole_labels, TICK_SIZE) + _longest(labels, TICK_SIZE) + _legend_width(GROUP_LABELS.values())
    height = 1.5 + 0.36 * max(len(names) + 1, len(phases))
    figure = new_figure(
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
    add_legend(left, right)
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
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))


def _loss(run: Run) -> Figure | None:
    """Training loss of every iteration, faint, and its moving mean."""
    losses = {m: lines["iteration"] for m, lines in run.lines.items() if lines["iteration"]}
    if not losses:
        return None
    names = list(losses)
    width = max(8.5, 6.5 + _legend_width(METHOD_LABELS.get(name, name) for name in names))
    figure = new_figure(width, max(3.6, 0.6 + 0.25 * len(names)), run.title("Training loss"), run.caption())
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
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=STEPS))
    thick, faint = ("thick: ", "; faint: each iteration") if len(names) <= MOST_FAINT else ("", "")
    axis.set_title(f"{thick}mean of the last {_span(len(lines))} iterations{faint}", fontsize=9)
    add_legend(axis)
    return figure


def _span(iterations: int) -> int:
    """Iterations that a moving mean covers."""
    return min(iterations, max(5, iterations // 40))


def _compression(run: Run) -> Figure | None:
    """Ratio, components and losses of every layer in the last window that has bases, per method that has windows."""
    found = {method: entry["last_window"] for method, entry in run.methods.items() if entry.get("last_window")}
    if not found:
        return None
    method, window = next(iter(found.items()))
    layers: dict[str, Any] = window["layers"]
    names = [name.removesuffix(".weight") for name in layers]
    places = np.arange(len(layers))
    title = run.title(f"{METHOD_LABELS.get(method, method)} by layer, window {window['window'] + 1}")
    figure = new_figure(max(7.5, 3.2 + 0.27 * len(layers)), 5.2, title, run.caption())
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
    add_legend(lower)
    return figure


def _total(components: Any) -> str:
    """d of a layer; one number per group, of which most layers have one."""
    if not isinstance(components, list):
        return str(components)
    return str(components[0]) if len(components) == 1 else f"{min(components)}-{max(components)}"


# --- bandwidth -------------------------------------------------------------------------------------------------------


def draw_bandwidth(path: Path) -> list[Path]:
    """Bus bandwidth against size from a file of `ring.bench --json`: the median, and the quartiles as bars.

    Raises:
        FigureError: if the file is damaged.
    """
    record = read_object(path)
    try:
        rows, environment = record["rows"], record["environment"]
        ranks, cores = rows[0]["ranks"], environment["cores"]
        names = list(dict.fromkeys(row["implementation"] for row in rows))
        parts = [
            f"{_ranks(ranks)} on {cores} core{'' if cores == 1 else 's'} ({environment['cpu']})",
            environment["mpi"],
            f"median of {rows[0]['repeats']} measurements in turn, bars are quartiles",
            f"command: {environment['command']}",
        ]
        if any(row["wrong"] for row in rows):
            parts.insert(0, "SOME RESULTS WERE WRONG")
        caption = sentences(parts)
        with figure_style():
            title = f"All-reduce of {rows[0]['dtype']}, {_ranks(ranks)}, {_mpi_name(environment['mpi'])}"
            figure = new_figure(8.5, 3.9, title, caption)
            axis = figure.subplots()
            for name in names:
                _bandwidth_line(axis, name, [row for row in rows if row["implementation"] == name])
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set(xlabel="size of the vector", ylabel="busbw = size/time · 2(N-1)/N  (GB/s)")
            add_legend(axis)
            return [write_figure(figure, path.with_suffix(".png"))]
    except (KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise FigureError(f"{path} is damaged, its rows or environment aren't ring.bench's ({error!r})") from error


def _mpi_name(text: str) -> str:
    """ "MPICH 5.0.2", of what the library says about itself."""
    return re.sub(r"(?: Version:)?\s+v?(?=\d)", " ", text.partition(",")[0], count=1)


def _bandwidth_line(axis: Axes, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    speed = np.array([row["busbw_gb_per_s"] for row in rows])
    time_s = np.array([row["time_s"] for row in rows])
    low, high = (np.array([row["time_quartiles_s"][i] for row in rows]) for i in (0, 1))
    bars = np.maximum([speed - speed * time_s / high, speed * time_s / low - speed], 0)
    style = IMPLEMENTATION_STYLES.get(name, {"color": PURPLE, "marker": "D", "label": name})
    axis.errorbar([row["size_bytes"] for row in rows], speed, bars, capsize=2.5, elinewidth=1, **style)


# --- gradients -------------------------------------------------------------------------------------------------------


def draw_gradients(path: Path) -> list[Path]:
    """Fig. 4 of the first layer in a recording, Fig. 5 of its first (3, 3, 16, 16) one.

    Their numbers are computed and written as JSON, unless that is there already.

    Returns:
        The files written.
    Raises:
        FigureError: if the recording or its numbers are damaged, or it is too short.
    """
    prefix = "" if path.stem == "gradients" else f"{path.stem}-"
    names = [path.with_name(f"{prefix}{name}.json") for name in ("fig4", "fig5")]
    if any(name.exists() for name in names):
        recorded = {name: read_object(name) for name in names if name.exists()}
        written = []
    else:
        recorded = _numbers(path, *names)
        for name, numbers in recorded.items():
            write_json(name, numbers)
        written = list(recorded)
    try:
        with figure_style():
            for name, numbers in recorded.items():
                drawing = _fig4 if numbers["figure"] == "4" else _fig5
                written.append(write_figure(drawing(numbers), name.with_suffix(".png")))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise FigureError(f"{name} is damaged: it isn't as it should be ({error!r})") from error
    return written


def _numbers(path: Path, fig4: Path, fig5: Path) -> dict[Path, dict[str, Any]]:
    """What the figures of a recording show, by the file that it belongs in."""
    try:
        recording = gradients.load(path)
        found = {fig4: gradients.adjacent(recording, next(iter(recording.shapes)))}
        layer = next((name for name, shape in recording.shapes.items() if shape == FIG5_SHAPE), None)
        if layer:
            found[fig5] = gradients.slice_sweep(recording, layer)
    except (OSError, ValueError) as error:
        raise FigureError(str(error)) from error
    return found


def findings(path: Path) -> list[str]:
    """What fig4.json or fig5.json say about the paper's statements, in a line or more."""
    numbers = read_object(path)
    return _fig4_findings(numbers) if numbers["figure"] == "4" else _fig5_findings(numbers)


def _gradients_caption(numbers: Mapping[str, Any], lines: Sequence[str], how: str) -> str:
    """What was found, a line each, and how it came about."""
    about = numbers["about"]
    model = f"model {about['model']}, " if about.get("model") else ""
    parts = [
        how,
        f"Data: {about['data']}",
        f"{model}{_ranks(about['ranks'])} x {about['batch_size']} images, seed {about['seed']}",
    ]
    if about.get("cpu"):
        parts.append(machine_text(about, about))
    if about.get("commit"):
        parts.append(f"commit {short_commit(about['commit'])}")
    parts.append(f"command: {about['command']}")
    lines = [line.partition(", " if line.startswith("Fig. 5, ") else ": ")[2] for line in lines]
    found = [line[0].upper() + line[1:] for line in lines]
    return "\n".join([*found, sentences(parts)])


def _iterations(numbers: Mapping[str, Any], count: int) -> str:
    first = numbers["about"]["first_iteration"]
    return f"iterations {first} to {first + count - 1}"


def _fig4_findings(numbers: Mapping[str, Any]) -> list[str]:
    shares, scaled, later = numbers["variance_shares"], numbers["standardised"], numbers["loss_held_out"]
    held_out = "" if later is None else f" in these iterations, {later:.3f} in later ones"
    return [
        f"Fig. 4: 2 of 3 axes (ratio 1.5) lose {shares[2]:.1%} of the variance of the first 3 gradients of "
        f"{numbers['layer']}; relative loss {numbers['loss_in_sample']:.3f}{held_out}.",
        f"Fig. 4: scaled to unit variance each, these 3 lose {scaled['these']:.1%}, the median of all 3 adjacent ones "
        f"{scaled['adjacent'][1]:.1%}, of 3 at random in the layer {scaled['random'][1]:.1%}; independent ones would "
        f"lose {scaled['independent']:.1%}.",
    ]


def _fig5_findings(numbers: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, which in (("dips", "same iterations"), ("dips_later", "later iterations")):
        dips = numbers[key]
        if dips["median_left"] is not None:
            left = ", ".join(f"{m['slice_size']}: {m['loss']:.3f} / {m['neighbours']:.3f}" for m in dips["multiples"])
            seen = "seen" if dips["median_left"] < 0.95 else "not seen"
            lines.append(
                f"Fig. 5, {which}: dips at multiples of F*D = {numbers['collocated']} {seen}; loss there / around: "
                f"{left}; median quotient {dips['median_left']:.3f}."
            )
    return lines


def _fig4(numbers: Mapping[str, Any]) -> Figure:
    values, mean = np.array(numbers["values"]), np.array(numbers["mean"])
    rotated = (values - mean) @ np.array(numbers["axes"]).T
    shares, count = numbers["variance_shares"], numbers["iterations"]
    first = numbers["first_gradient"]
    title = (
        f"Gradients {first + 1} to {first + 3} of {numbers['layer']} over {count} iterations, "
        f"{numbers['about']['data']}"
    )
    caption = _gradients_caption(numbers, _fig4_findings(numbers), _iterations(numbers, count).capitalize())
    figure = new_figure(10.5, 4.9, title, caption)
    engine = figure.get_layout_engine()
    rect = engine.get()["rect"] if engine is not None else (0, 0, 1, 1)
    figure.set_layout_engine("none")  # it doesn't know how far labels of 3-D axes reach
    exponent = int(np.floor(np.log10(max(np.abs(values).max(), np.abs(rotated).max(), 1e-30))))
    unit = rf"($\times 10^{{{exponent}}}$)"
    reach = 1.1 * max(float(np.ptp(values, axis=0).max()) / 2, float(np.abs(rotated).max()), 1e-30) / 10**exponent
    middle = (values.max(axis=0) + values.min(axis=0)) / 2 / 10**exponent
    panels = (
        ("(a) as they are", values, middle, [f"gradient {first + i + 1} {unit}" for i in range(3)]),
        (
            "(b) centred and rotated (PCA)",
            rotated,
            np.zeros(3),
            [f"axis {i + 1}′ {unit}\n{shares[i]:.1%} of variance" for i in range(3)],
        ),
    )
    for index, (name, points, centre, labels) in enumerate(panels):
        box = (0.01 + 0.49 * index, rect[1] + 0.1 * rect[3], 0.47, 0.95 * rect[3])
        axis: Any = figure.add_axes(box, projection="3d")
        _scatter3d(axis, points / 10**exponent, centre, reach, labels)
        figure.text(box[0] + box[2] / 2, rect[1] + rect[3] - 0.005, name, ha="center", va="top", fontsize=11)
    handles, names = axis.get_legend_handles_labels()
    order = (2, 0, 1)
    figure.legend(
        [handles[i] for i in order],
        [names[i] for i in order],
        loc="lower center",
        bbox_to_anchor=(0.5, rect[1]),
        ncols=3,
        markerscale=1.8,
    )
    return figure


def _scatter3d(axis: Any, points: Any, centre: Any, reach: float, labels: Sequence[str]) -> None:
    """Points, and their projections on the floor and on the two walls behind; all axes have the same scale."""
    axis.view_init(elev=22, azim=-55)
    low, high = centre - reach, centre + reach
    x, y, z = points.T
    flat = {"s": 5, "depthshade": False, "linewidths": 0}
    axis.scatter(x, y, np.full_like(z, low[2]), color=GREEN, label="projection on the plane of 1 and 2", **flat)
    axis.scatter(np.full_like(x, low[0]), y, z, color="#AAAAAA", label="on the other planes", **flat)
    axis.scatter(x, np.full_like(y, high[1]), z, color="#AAAAAA", **flat)
    axis.scatter(x, y, z, color=BLUE, s=13, depthshade=False, linewidths=0, label="an iteration")
    axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
    axis.set_box_aspect((1, 1, 1), zoom=0.93)
    for direction, label in zip((axis.xaxis, axis.yaxis, axis.zaxis), labels, strict=True):
        direction.set_label_text(label, fontsize=9)
        direction.labelpad = 8
        direction.set_major_locator(MaxNLocator(5, steps=STEPS))
        direction.set_tick_params(labelsize=8)


def _fig5(numbers: Mapping[str, Any]) -> Figure:
    rows, collocated, filters = numbers["rows"], numbers["collocated"], numbers["shape_hwdf"][-1]
    sizes = [row["slice_size"] for row in rows]
    shape = tuple(numbers["shape_hwdf"])
    samples, later = numbers["samples"], numbers["later_iterations"]
    first = numbers["about"]["first_iteration"]
    how = (
        f"Compressor of the first slice, fitted on iterations {first} to {first + samples - 1} with loss threshold "
        f"{numbers['loss_threshold']:g}, so d ≤ {samples - 1}; later: the {later} that follow; losses are means over "
        "iterations"
    )
    title = f"Slice size, {numbers['layer']} {shape} = (H, W, D, F), {numbers['about']['data']}"
    figure = new_figure(10, 5.6, title, _gradients_caption(numbers, _fig5_findings(numbers), how))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.9))
    upper.plot(sizes, [row["ratio"] for row in rows], color=BLUE, label="ratio K/d")
    upper.set(ylabel="compression ratio K/d")
    upper.set_ylim(bottom=0)
    aligned = [row for row in rows if row["slice_size"] % filters == 0 and row["slice_size"] % collocated]
    multiples = [row for row in rows if row["slice_size"] % collocated == 0]
    between = [row for row in rows if row["slice_size"] % filters]
    keys = ("random_basis", "other_slices_later", "other_slices", "first_slice_later", "first_slice")
    _curve(
        lower, rows, keys[0], color=GREY, ls=":", label="other slices, same iterations,\nd random directions instead"
    )
    for key, color, which in (
        (keys[1], VERMILION, "later iterations"),
        (keys[2], BLUE, "same iterations (the paper's)"),
    ):
        _curve(lower, between, key, color=color, label=f"other slices, {which}")
        _curve(
            lower, aligned, key, color=color, label=f"  K a multiple of F = {filters}", linewidth=0.6, marker=".", ms=4
        )
        _curve(
            lower, multiples, key, color=color, label=f"  K a multiple of F·D = {collocated}", ls="", marker="o", ms=7
        )
    _curve(lower, rows, keys[3], color=ORANGE, ls="--", label="first slice, later iterations")
    _curve(
        lower, rows, keys[4], color=GREEN, ls="-.", label="first slice, same iterations\n(what the threshold bounds)"
    )
    lower.set(xlabel="slice size K (gradients)", ylabel="compression loss ‖ĝ-g‖² / ‖g‖²", xlim=(0, sizes[-1] + 4))
    lower.set_ylim(0, 1.05 * max(row[key] for row in rows for key in keys))
    for axis in (upper, lower):
        for row in multiples:
            axis.axvline(row["slice_size"], color="#BBBBBB", linewidth=5, alpha=0.45, zorder=0.5)
        axis.grid(axis="x", visible=False)
    lower.set_xticks(range(0, sizes[-1] + 1, max(1, collocated // 2)))
    add_legend(lower)
    return figure


def _curve(axis: Axes, rows: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
    axis.plot([row["slice_size"] for row in rows], [row[key] for row in rows], **{"linewidth": 1.4, **style})


# --- reading and writing ---------------------------------------------------------------------------------------------


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


def sentences(parts: Sequence[str]) -> str:
    return ". ".join(part[0].upper() + part[1:] for part in parts) + "."


def machine_text(environment: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    cores = environment.get("cores") or summary.get("cores")
    return f"{environment.get('cpu') or 'an unknown processor'}, {cores or '?'} cores"


def _ranks(number: int) -> str:
    return f"{number} rank{'' if number == 1 else 's'}"


def short_commit(commit: str) -> str:
    """12 digits of a commit, and whether files differed from it."""
    digits, plus, changes = commit.partition("+")
    return digits[:12] + plus + changes


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FigureError(f"{path} can't be read ({error.strerror or error})") from error
    except ValueError as error:
        raise FigureError(f"{path} is damaged ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except FigureError:
        raise
    except ValueError as error:
        raise FigureError(f"{path} is damaged ({error})") from error
    if not isinstance(value, dict):
        raise FigureError(f"{path} is damaged, it should hold a JSON object")
    return value


if __name__ == "__main__":
    from bench.redraw import main  # which draws the figures of experiments too, and so imports this

    sys.exit(main())
