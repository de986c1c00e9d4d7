"""The picture of `bench.gantt`: Fig. 2a above Fig. 2b of Yu et al. 2018, each with one step of one rank beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from bench.common.files import read_object
from bench.common.texts import commit_text, machine_text, sentences
from bench.drawing import page
from bench.drawing.styles import GROUP_COLORS
from ring.trace import Activity, RunTrace, communication, critical_path

#: Kinds of activities -> colours; those of `bench.drawing.styles` where it has them.
COLORS = {
    "encode": GROUP_COLORS["encode"],
    "recode": "#4477AA",
    "add": GROUP_COLORS["add"],
    "decode": GROUP_COLORS["decode"],
    "wait": GROUP_COLORS["exposed communication"],
    "overhead": "#BBCC33",
}
LABELS = {
    "recode": "recode (decode, add, encode)",
    "wait": "wait (exposed communication)",
    "overhead": "overhead of messages",
}
MESSAGE, PATH = "#AAAAAA", "#222222"
#: Lanes: of a rank's computing and of its link, as (bottom, height) above the rank's own place.
COMPUTING, LINK = (0.40, 0.48), (0.10, 0.24)
TITLES = {
    "qsgd": "(a) QSGD in the ring, {chunks}: every hop decodes, adds and encodes",
    "gradiveq": "(b) GradiVeQ at ratio {ratio:g}, {chunks}: payloads are added as they are",
}
LEGEND_INCHES = 0.35
#: Bars that are at least this share of the detail's width have their kind written in them.
WIDE = 0.15


def redraw(path: Path) -> list[Path]:
    """The picture again, of the record at `path`.

    Raises:
        LookupError, TypeError, ValueError: the record isn't as it should be.
    """
    return [draw(read_object(path), path.with_suffix(".png"))]


def draw(record: Mapping[str, Any], path: Path) -> Path:
    """Write the picture of a record of `bench.gantt` to a PNG."""
    traces = [RunTrace.from_json(panel["trace"]) for panel in record["panels"]]
    ends_s = [trace.span()[1] for trace in traces]
    scale, unit = (1e3, "ms") if max(ends_s) < 10 else (1.0, "s")
    size = record["ranks"]
    cluster = record["cluster"]
    where = f"{size} nodes of the cluster {cluster['name']} (emulated)" if cluster else f"{size} ranks over MPI"
    title = f"One all-reduce of ResNet-32's gradient, who computes and what travels: {where}"
    with page.figure_style():
        figure = page.new_figure(12.5, 2 * (0.85 + 0.42 * size) + 0.5, title, _caption(record, traces))
        engine: Any = figure.get_layout_engine()
        left, bottom, width, height = engine.get()["rect"]
        legend = LEGEND_INCHES / figure.get_figheight()
        engine.set(rect=(left, bottom + legend, width, height - legend), h_pad=0.08, hspace=0.03)
        axes = figure.subplots(2, 2, width_ratios=(2.5, 1), sharex="col", squeeze=False)
        details = [_detail(trace) for trace in traces]
        length_s = max(end_s - start_s for _, start_s, end_s in details)
        for (whole, detail), panel, trace, (step, start_s, _) in zip(
            axes, record["panels"], traces, details, strict=True
        ):
            _whole(whole, trace, scale)
            chunks = f"{panel['chunks']} chunk{'' if panel['chunks'] == 1 else 's'} a segment"
            whole.set_title(
                f"{TITLES[panel['method']].format(chunks=chunks, ratio=record['ratio'])}\n", loc="left", weight="bold"
            )
            _one_step(detail, trace, step, start_s, length_s, scale)
        axes[1, 0].set_xlabel(f"time ({unit})")
        axes[1, 0].set_xlim(0, 1.01 * max(ends_s) * scale)
        axes[1, 1].set_xlabel(f"{unit} from the step's beginning")
        kinds = {activity.kind for trace in traces for activities in trace.activities for activity in activities}
        figure.legend(
            handles=_legend(kinds, traces[0].exact),
            loc="lower center",
            bbox_to_anchor=(0.5, bottom),
            ncols=7,
            fontsize=9,
            columnspacing=1.4,
            borderaxespad=0.2,
        )
        return page.write_figure(figure, path)


def _whole(axis: Axes, trace: RunTrace, scale: float) -> None:
    """All ranks, the first at the top, and the critical path through them."""
    for rank in range(trace.size):
        place = trace.size - 1 - rank
        _bars(axis, trace.activities[rank], place + COMPUTING[0], COMPUTING[1], scale)
        _messages(axis, trace.exact, _on_the_link(trace, rank), place + LINK[0], LINK[1], scale)
        if rank:
            axis.axhline(place + 1, color="#DDDDDD", linewidth=0.8, zorder=0)
    path = critical_path(trace)
    times, places = [], []
    for part in path.parts:
        bottom, height = COMPUTING if part.on == "rank" else LINK
        times += [part.start_s * scale, part.end_s * scale]
        places += 2 * [trace.size - 1 - part.rank + bottom + height / 2]
    axis.plot(
        times, places, color=PATH, linewidth=1.1, zorder=4, path_effects=[withStroke(linewidth=2.2, foreground="white")]
    )
    end_s = trace.span()[1]
    rows = communication(trace)
    exposed, hidden = (
        sum(getattr(row, name) for row in rows) / len(rows) / end_s for name in ("exposed_s", "hidden_s")
    )
    axis.annotate(
        f"{_length(end_s, scale)}; communication exposed for {exposed:.0%}, hidden for {hidden:.0%} (mean of ranks)",
        (0, 1),
        (0, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        va="bottom",
        fontsize=9.5,
        color="#444444",
    )
    axis.set_ylim(0, trace.size)
    places = [trace.size - 1 - rank + part[0] + part[1] / 2 for rank in range(trace.size) for part in (COMPUTING, LINK)]
    names = [name for rank in range(trace.size) for name in (f"rank {rank}", f"link to {(rank + 1) % trace.size}")]
    axis.set_yticks(places, names)
    for number, label in enumerate(axis.get_yticklabels()):
        label.set_fontsize(7 if number % 2 else 9)
        label.set_color("#777777" if number % 2 else "black")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)


def _length(seconds: float, scale: float) -> str:
    return f"{seconds * scale:.{3 if seconds * scale < 10 else 1}f} {'ms' if scale == 1e3 else 's'}"


def _bars(axis: Axes, activities: Sequence[Activity], bottom: float, height: float, scale: float) -> None:
    for kind in dict.fromkeys(activity.kind for activity in activities):
        spans = [(a.start_s * scale, (a.end_s - a.start_s) * scale) for a in activities if a.kind == kind]
        axis.broken_barh(
            spans, (bottom, height), facecolor=COLORS.get(kind, "#DDDDDD"), edgecolor="white", linewidth=0.25
        )


def _on_the_link(trace: RunTrace, rank: int, step: int | None = None) -> list[tuple[float, float]]:
    """When messages (of one step) held a link; by the wall clock, from posting (or finding the one before) on."""
    spans, free_s = [], 0.0
    for message in trace.transfers[rank]:
        start_s = max(message.departed_s, free_s)
        free_s = message.left_s if trace.exact else message.arrived_s
        if step is None or message.step == step:
            spans.append((start_s, free_s))
    return spans


def _messages(
    axis: Axes, exact: bool, spans: Sequence[tuple[float, float]], bottom: float, height: float, scale: float
) -> None:
    style: dict[str, Any] = {"facecolor": MESSAGE, "edgecolor": "white"}
    if not exact:
        style = {"facecolor": "white", "edgecolor": MESSAGE, "hatch": "//////"}
    places = [(start_s * scale, (end_s - start_s) * scale) for start_s, end_s in spans]
    axis.broken_barh(places, (bottom, height), linewidth=0.4, **style)


# --- one step --------------------------------------------------------------------------------------------------------


def _detail(trace: RunTrace) -> tuple[int, float, float]:
    """A step of rank 0 in the reduce-scatter: its number, and from when to when its messages and computations last."""
    step = max(1, trace.size // 2)
    spans = [(activity.start_s, activity.end_s) for activity in trace.activities[0] if activity.step == step]
    for rank, wanted in ((-1, step - 1), (0, step)):
        spans += _on_the_link(trace, rank, wanted)
    return step, min(start_s for start_s, _ in spans), max(end_s for _, end_s in spans)


def _one_step(axis: Axes, trace: RunTrace, step: int, start_s: float, length_s: float, scale: float) -> None:
    """What comes, what is computed, what goes: of rank 0 in one step, as in the paper's figure."""
    lanes = {"receives": 2.0, "computes": 1.0, "sends": 0.0}

    own = [
        activity._replace(start_s=activity.start_s - start_s, end_s=activity.end_s - start_s)
        for activity in trace.activities[0]
        if activity.step == step
    ]
    _bars(axis, own, lanes["computes"] + 0.15, 0.7, scale)
    for activity in own:
        width_s = activity.end_s - activity.start_s
        if width_s > WIDE * length_s:
            middle = (activity.start_s + activity.end_s) / 2 * scale
            axis.text(
                middle,
                lanes["computes"] + 0.5,
                activity.kind,
                ha="center",
                va="center",
                fontsize=8.5,
                color="white" if activity.kind == "recode" else "black",
            )
    for rank, lane, wanted in ((-1, "receives", step - 1), (0, "sends", step)):
        spans = [(begin_s - start_s, end_s - start_s) for begin_s, end_s in _on_the_link(trace, rank, wanted)]
        _messages(axis, trace.exact, spans, lanes[lane] + 0.25, 0.5, scale)
    axis.set_ylim(0, 3)
    axis.set_xlim(-0.02 * length_s * scale, 1.02 * length_s * scale)
    axis.set_yticks([place + 0.5 for place in lanes.values()], list(lanes))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.set_title(f"rank 0 in step {step}", loc="left", weight="bold")


def _legend(kinds: set[str], exact: bool) -> list[Any]:
    handles: list[Any] = [
        Patch(facecolor=color, label=LABELS.get(kind, kind)) for kind, color in COLORS.items() if kind in kinds
    ]
    handles.append(
        Patch(facecolor=MESSAGE, label="message on the link")
        if exact
        else Patch(facecolor="white", edgecolor=MESSAGE, hatch="//////", label="message, from posting to finding")
    )
    handles.append(Line2D([], [], color=PATH, linewidth=1.1, label="critical path"))
    return handles


def _caption(record: Mapping[str, Any], traces: Sequence[RunTrace]) -> str:
    environment, cluster = record["environment"], record["cluster"]
    found = [f"({letter}) {critical_path(trace).describe()}" for letter, trace in zip("ab", traces, strict=True)]
    machine = machine_text(environment, record)
    if cluster:
        clock = f"Time is that of the emulated cluster {cluster['name']} ({cluster['source']}), run"
        clock += f" for real on {machine}"
    else:
        clock = f"On {machine}, {environment['mpi']}; by this clock a message is seen when the receiver looks"
        if record["ranks"] > environment["cores"]:
            clock += "; more ranks than cores, so that ranks also wait for a core"
    parts = [
        clock,
        f"of {len(record['panels'][0]['lengths_s'])} all-reduces each, the one of median length",
        f"Data: {record['data_source']}, {record['batch_size']} images a rank",
        f"bases of K = {record['slice_size']}, seed {environment['seed']}",
        commit_text(environment),
        f"command: {environment['command']}",
    ]
    return "\n".join([*found, sentences(parts)])
