"""Time per iteration against the number of nodes and against bandwidth: `python -m bench.scaling`.

For each method, on a described cluster in virtual time, from the sizes of a model's gradient: where compression starts
to pay, and where it stops. GradiVeQ's time is the mean over a window, 100 sampling iterations by QSGD, gathering the
bases, and 400 compressed ones. The images per node stay the same, so an iteration computes as long on 100,000 nodes as
on one. Up to 512 nodes every message is counted (`ring.dry.all_reduce`), beyond it is the closed form; where nodes
share something there is none, and the sweep ends at 256 nodes. What an iteration computes is the cluster's own number,
whatever the model.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from tabulate import tabulate
from tqdm import tqdm

from bench import clusters
from bench.common.command_line import Parser, UsageError, description, positive, program, refused
from bench.common.environment import environment
from bench.common.files import CannotWrite, plain, read_object, write_json, writing
from bench.common.texts import commit_text, machine_text, sentences
from bench.drawing import page
from bench.drawing.styles import METHOD_LABELS, method_color, method_style
from bench.virtual.method_times import FLOAT32, METHODS, PHASES, DryRun, Gradient, build, iteration_s
from gradiveq.over_ring.aggregator import CONTROLS
from ring import dry
from ring.cluster import Cluster, ClusterError, as_table
from ring.cluster import parse as parse_cluster
from ring.machine import usable_cores

#: Nodes up to which every message is counted, and most nodes where that is the only way.
COUNTED, MOST_COUNTED = 4096, 256
MOST_NODES = 100_000
LEAST_GBPS, MOST_GBPS = 0.01, 400.0
PER_DECADE = 8
#: Compression pays where an iteration is at least so many times as fast as with plain ring all-reduce.
PAYS = 1.05
#: The relative precision to which a crossing is found.
PRECISION = 1e-3
SHOWN_NODES = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16_384, 100_000)
SHOWN_GBPS = (0.01, 0.1, 1, 10, 100, 400)


class Placed(Protocol):
    """What is found at one place of a sweep."""

    @property
    def x(self) -> float: ...


P = TypeVar("P", bound=Placed)
FoundP = TypeVar("FoundP", bound=Placed, covariant=True)


class Swept(Protocol[FoundP]):
    """What `stretches` looks through: `whole` says whether x is a whole number of nodes, or else Gbit/s."""

    @property
    def whole(self) -> bool: ...

    def at(self, x: float) -> FoundP: ...


@dataclass(frozen=True)
class Point:
    """One cluster.

    Attributes:
        x: number of nodes, or Gbit/s.
        iteration_s: seconds of an iteration by each method, computing included.
        compressed_s: seconds of GradiVeQ's compressed iterations alone.
    """

    x: float
    iteration_s: Mapping[str, float]
    compressed_s: float

    def speedup(self, method: str) -> float:
        return self.iteration_s["rar"] / self.iteration_s[method]


@dataclass(frozen=True)
class Sweep:
    """What is swept.

    Attributes:
        what: "nodes" or "bandwidth".
        base: the cluster as it is described.
        gradient: what is aggregated.
        computing_s: seconds that an iteration computes on `base`.
    """

    what: str
    base: Cluster
    gradient: Gradient
    computing_s: float

    @property
    def whole(self) -> bool:
        """Whether x is a whole number."""
        return self.what == "nodes"

    @property
    def place(self) -> float:
        return self.base.nodes if self.whole else self.base.link.bandwidth_gbps

    def grid(self) -> list[float]:
        if not self.whole:
            return _spaced(LEAST_GBPS, MOST_GBPS)
        most = MOST_NODES if self.base.homogeneous else MOST_COUNTED
        return sorted({float(round(x)) for x in _spaced(1, most)} | {float(n) for n in range(1, 9)})

    def cluster(self, x: float) -> Cluster:
        if self.whole:
            return self.base.with_nodes(int(x))
        return self.base.with_nodes(self.base.nodes, link={"bandwidth_gbps": x})

    def at(self, x: float) -> Point:
        cluster = self.cluster(x)
        run: DryRun = dry.closed_form if cluster.nodes > COUNTED and cluster.homogeneous else dry.all_reduce
        seconds = self.gradient.aggregation_s(cluster, run)
        compressed_s = self.gradient.aggregation(cluster, "compress", run).time_s
        computing_s = self.computing_s * iteration_s(cluster) / iteration_s(self.base)  # cores may be shared
        each = {method: computing_s + seconds[method] for method in METHODS}
        return Point(x, each, computing_s + compressed_s)


def _spaced(least: float, most: float) -> list[float]:
    """Both ends, and so many per decade."""
    count = max(1, round(PER_DECADE * math.log10(most / least)))
    return [least * (most / least) ** (i / count) for i in range(count + 1)]


def stretches(
    points: Sequence[P], sweep: Swept[P], holds: Callable[[P], bool]
) -> list[tuple[float | None, float | None]]:
    """The stretches in which something holds: first and last x, None where it does so to the end of the sweep.

    Between neighbouring points of which it holds at one only, the place where it changes is found by bisection.
    """
    found: list[tuple[float | None, float | None]] = []
    begin: float | None = None
    inside = holds(points[0])
    for before, after in pairwise(points):
        if holds(before) == holds(after):
            continue
        low, high = before.x, after.x
        while high - low > 1 if sweep.whole else high > low * (1 + PRECISION):
            middle = float((low + high) // 2) if sweep.whole else math.sqrt(low * high)
            low, high = (middle, high) if holds(sweep.at(middle)) == holds(before) else (low, middle)
        if inside:
            found.append((begin, low))
        else:
            begin = high
        inside = not inside
    if inside:
        found.append((begin, None))
    return found


def crossings(points: Sequence[Point], sweep: Sweep) -> dict[str, Any]:
    """Where each method pays, where it is slower than plain ring all-reduce, and where it gains most."""

    def of(method: str) -> dict[str, Any]:
        best = max(points, key=lambda point: point.speedup(method))
        return {
            "pays": stretches(points, sweep, lambda point: point.speedup(method) >= PAYS),
            "slower": stretches(points, sweep, lambda point: point.speedup(method) < 1),
            "most": {"x": best.x, "speedup": best.speedup(method)},
        }

    return {method: of(method) for method in METHODS[1:]}


# --- words and tables ------------------------------------------------------------------------------------------------


def shown(sweep: Swept[Placed], x: float) -> str:
    if sweep.whole:
        return f"{x:,.0f} node{'' if x == 1 else 's'}"
    return bandwidth_text(x)


def bandwidth_text(gbps: float) -> str:
    """ "300 Mbit/s"."""
    unit, value = ("Gbit/s", gbps) if gbps >= 1 else ("Mbit/s", 1e3 * gbps)
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def stretch_text(sweep: Swept[Placed], ends: tuple[float | None, float | None]) -> str:
    low, high = ends
    if low is None and high is None:
        return "everywhere"
    if low is None:
        assert high is not None
        return f"on {shown(sweep, high)}" if sweep.whole and high == 1 else f"up to {shown(sweep, high)}"
    return f"from {shown(sweep, low)} on" if high is None else f"from {shown(sweep, low)} to {shown(sweep, high)}"


def words(sweep: Sweep, found: Mapping[str, Any]) -> list[str]:
    lines = []
    for method, where in found.items():
        pays = ", ".join(stretch_text(sweep, ends) for ends in where["pays"]) or "nowhere"
        slower = ", ".join(stretch_text(sweep, ends) for ends in where["slower"]) or "nowhere"
        most = where["most"]
        lines.append(
            f"{METHOD_LABELS[method]} pays (an iteration {PAYS - 1:.0%} faster or more) {pays}; "
            f"most at {shown(sweep, most['x'])}, {most['speedup']:.2f} times as fast; slower than plain {slower}."
        )
    return lines


def limits(sweep: Sweep) -> list[str]:
    """What one flat ring does with many nodes, in words."""
    gradient, link, most = sweep.gradient, sweep.base.link, sweep.grid()[-1]
    dense = gradient.payload_bytes("rar")
    lines = []
    if sweep.base.homogeneous:
        lines.append(
            f"A ring has 2(N-1) steps one after the other: {most:,.0f} nodes' latency of {link.latency_us:g} us "
            f"alone takes {2e-6 * (most - 1) * link.latency_us:,.3g} s, whatever is compressed, for "
            f"{dense / most:,.0f} bytes of gradient in each step. Nobody would run one ring over so many: rings within "
            "groups, or trees, have fewer steps."
        )
    for method, phase, name in (("gradiveq", "compress", "a slice"), ("qsgd", "qsgd", "a bucket")):
        longest = max(region.unit_bytes for region in gradient.codec(phase)[0].regions(gradient.length, FLOAT32))
        lines.append(
            f"{METHOD_LABELS[method]} never cuts {name}, up to {longest:,} bytes: from "
            f"{math.ceil(dense / longest):,} nodes on its longest message is longer than plain ring all-reduce's, and "
            "every step waits for it."
        )
    return lines


def table(sweep: Sweep, points: Sequence[Point], form: str = "simple") -> str:
    places = SHOWN_NODES if sweep.whole else SHOWN_GBPS
    by_x = {point.x: point for point in points}
    wanted = sorted({float(x) for x in places if points[0].x <= x <= points[-1].x} | {float(sweep.place)})
    rows = []
    for x in wanted:
        point = by_x.get(x) or sweep.at(x)
        rows.append(
            [
                shown(sweep, x) + (" *" if x == sweep.place else ""),
                *(f"{point.iteration_s[method]:.4g}" for method in METHODS),
                *(f"{point.speedup(method):.2f}" for method in METHODS[1:]),
            ]
        )
    heads = [sweep.what, *(f"{method} s" for method in METHODS), *(f"{method} speed-up" for method in METHODS[1:])]
    return str(tabulate(rows, heads, tablefmt=form, disable_numparse=True, colalign=("right",) * len(heads)))


# --- figure ----------------------------------------------------------------------------------------------------------


def draw(sweep: Sweep, points: Sequence[Point], found: Mapping[str, Any], title: str, caption: str) -> Figure:
    """Seconds above, speed-up below; bars under it where compression pays."""
    xs = [point.x for point in points]
    with page.figure_style():
        figure = page.new_figure(9.5, 6.2, title, caption)
        above, below, bars = figure.subplots(3, 1, sharex=True, height_ratios=(1.25, 1, 0.22))
        for method in METHODS:
            above.plot(xs, [point.iteration_s[method] for point in points], **method_style(method))
        green = method_color("gradiveq")
        dashes = {"color": green, "linewidth": 1.1, "linestyle": (0, (4, 2))}
        above.plot(
            xs, [point.compressed_s for point in points], label="GradiVeQ, compressed\niterations only", **dashes
        )
        above.axhline(sweep.computing_s, color="#888888", linestyle=":", linewidth=1.2, label="computing alone")
        if sweep.whole and sweep.base.link.latency_us > 0:
            latency_s = [2e-6 * (x - 1) * sweep.base.link.latency_us for x in xs]
            above.plot(xs, latency_s, color="#444444", linestyle="-.", linewidth=1, label="latency of 2(N-1) steps")
        above.set(yscale="log", ylabel="seconds per iteration")
        low = min(sweep.computing_s, min(min(point.iteration_s.values()) for point in points))
        above.set_ylim(0.6 * low, 1.6 * max(max(point.iteration_s.values()) for point in points))
        decades = math.log10(above.get_ylim()[1] / above.get_ylim()[0])
        above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
        above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        above.yaxis.set_minor_formatter(NullFormatter())
        page.add_legend(above)
        for method in METHODS[1:]:
            below.plot(xs, [point.speedup(method) for point in points], color=method_color(method))
        below.plot(xs, [point.iteration_s["rar"] / point.compressed_s for point in points], **dashes)
        below.axhline(1, color=method_color("rar"))
        below.set(ylabel="speed-up of an iteration\nover plain ring")
        if below.get_ylim()[1] > 1.5:
            below.set_ylim(bottom=0)
        _where_it_pays(bars, sweep, found, (xs[0], xs[-1]))
        for axis in (above, below):
            axis.axvline(sweep.place, color="#BBBBBB", linewidth=1.2, zorder=0.5)
        bars.set_xscale("log")
        bars.set(xlabel="nodes" if sweep.whole else "bandwidth of a link", xlim=(xs[0] / 1.03, xs[-1] * 1.03))
        bars.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: f"{x:,.0f}" if sweep.whole else shown(sweep, float(x)))
        )
        bars.xaxis.set_minor_formatter(NullFormatter())
        above.annotate(
            f" {sweep.base.name}",
            (sweep.place, 1),
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=8.5,
            color="#666666",
        )
    return figure


def _where_it_pays(axis: Axes, sweep: Sweep, found: Mapping[str, Any], ends: tuple[float, float]) -> None:
    methods = METHODS[1:]
    for place, method in enumerate(methods):
        for low, high in found[method]["pays"]:
            left, right = low or ends[0], high or ends[1]
            axis.barh(place, right - left, 0.7, left, color=method_color(method))
        if not found[method]["pays"]:
            axis.annotate("nowhere", (ends[0], place), (8, 0), textcoords="offset points", va="center", fontsize=8.5)
    axis.set_yticks(range(len(methods)), [f"{METHOD_LABELS[method]} pays" for method in methods], fontsize=8.5)
    axis.set_ylim(len(methods) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)


# --- the command -----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=program("bench.scaling"), description=description(__doc__), allow_abbrev=False)
    parser.add_argument(
        "--cluster", default="gradiveq-k80", metavar="NAME", help="a preset or a TOML file (default: %(default)s)"
    )
    parser.add_argument("--model", default="resnet32", metavar="NAME", help="of the gradient (default: %(default)s)")
    parser.add_argument(
        "--batch",
        type=positive,
        default=1.0,
        metavar="X",
        help="images per node, times those of the cluster's iteration_s (default: %(default)g)",
    )
    parser.add_argument(
        "--iteration-s",
        type=positive,
        metavar="S",
        help="seconds that an iteration computes, instead of the cluster's",
    )
    parser.add_argument(
        "--ratio", type=positive, default=8.0, metavar="X", help="K/d of GradiVeQ (default: %(default)g)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: results/scaling/CLUSTER-MODEL)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, command: str) -> tuple[dict[str, Any], str]:
    """The record, and what is printed.

    Raises:
        ClusterError, ValueError: an option can't be used.
    """
    base = clusters.load(options.cluster)
    if base.other_nodes or base.other_links or base.stragglers.probability:
        raise ClusterError(
            f"cluster {base.name}: `override` and `stragglers` are for single nodes and moments, and scaling changes "
            "the number of nodes: leave them out, or train in virtual time (--cluster of the job)"
        )
    if options.iteration_s is not None:
        base = base.with_nodes(base.nodes, node={"iteration_s": options.iteration_s})
    gradient = Gradient.of(build(options.model), options.ratio)
    computing_s = options.batch * iteration_s(base)
    about = environment(("numpy", "scipy", "torch", "matplotlib")) | {"command": command, "cores": usable_cores()}
    record: dict[str, Any] = {
        "environment": about,
        "cluster": as_table(base),
        "model": options.model,
        "ratio": options.ratio,
        "computing_s": computing_s,
        "payload_bytes": {phase: gradient.payload_bytes(phase) for phase in PHASES},
        "basis_bytes": gradient.basis_bytes,
        "sweeps": {},
    }
    texts = []
    for what in ("nodes", "bandwidth"):
        sweep = Sweep(what, base, gradient, computing_s)
        points = [sweep.at(x) for x in tqdm(sweep.grid(), desc=what, leave=False, disable=None)]
        found = crossings(points, sweep)
        lines = words(sweep, found) + (limits(sweep) if sweep.whole else [])
        texts.append(f"{_title(sweep, options.model)}\n\n{table(sweep, points)}\n* the cluster as it is described\n")
        texts += [textwrap.fill(f"* {line}", 110, subsequent_indent="  ") for line in lines]
        texts.append("")
        record["sweeps"][what] = {
            "points": [
                {
                    "x": point.x,
                    "iteration_s": point.iteration_s,
                    "compressed_s": point.compressed_s,
                    "speedup": {method: point.speedup(method) for method in METHODS[1:]},
                }
                for point in points
            ],
            "crossings": found,
            "words": lines,
        }
    return plain(record), "\n".join(texts)


def _title(sweep: Sweep, model: str) -> str:
    title = f"Time per iteration against {'the number of nodes' if sweep.whole else 'bandwidth'}: {model} on "
    return title + sweep.base.name + ("" if sweep.whole else f", {sweep.base.nodes} nodes")


def draw_record(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Both figures of what scaling.json holds."""
    base, model = parse_cluster(record["cluster"], "the record"), record["model"]
    gradient = Gradient.of(build(model), record["ratio"])
    written = []
    for what, found in record["sweeps"].items():
        sweep = Sweep(what, base, gradient, record["computing_s"])
        points = [Point(one["x"], one["iteration_s"], one["compressed_s"]) for one in found["points"]]
        words_below = _caption(sweep, found["words"], record["environment"])
        figure = draw(sweep, points, found["crossings"], _title(sweep, model), words_below)
        written.append(page.write_figure(figure, folder / f"{what}.png"))
    return written


def redraw(path: Path) -> list[Path]:
    """The figures again, of the scaling.json at `path`.

    Raises:
        LookupError, TypeError, ValueError: the record isn't as it should be.
    """
    return draw_record(read_object(path), path.parent)


def _caption(sweep: Sweep, lines: Sequence[str], about: Mapping[str, Any]) -> str:
    gradient, cluster = sweep.gradient, sweep.base
    fixed = f"{cluster.link.bandwidth_gbps:g} Gbit/s" if sweep.whole else f"{cluster.nodes} nodes"
    parts = [
        f"Sizes only, of {gradient.length - CONTROLS:,} gradients; virtual time on {cluster.name} ({cluster.source}), "
        f"{fixed}, latency {cluster.link.latency_us:g} us, {sweep.computing_s:.3g} s of computing per iteration",
        f"GradiVeQ at ratio {gradient.ratio:g}, with its 100 sampling iterations of 500 and the gathering of bases",
        *([f"on {machine_text(about, about)}"] if "cores" in about else []),
        commit_text(about),
        f"command: {about['command']}",
    ]
    return "\n".join([*lines, sentences(parts)])


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m bench.scaling", *map(shlex.quote, words)])
    try:
        options = parse(words)
        record, text = run(options, command)
        print(text)
        out = options.out or Path("results/scaling") / f"{record['cluster']['name']}-{options.model}"
        with writing(out):
            write_json(out / "scaling.json", record)
            draw_record(record, out)
    except (UsageError, ClusterError, CannotWrite, ValueError) as error:
        return refused(error)
    return 0
