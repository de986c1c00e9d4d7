"""The GradiVeQ paper's time breakdown beside ours, on its clusters in virtual time: `python -m bench.paper_timing`.

Yu et al. 2018, section 4: seconds per 500 iterations of ResNet-32 on CIFAR-100 with 6 nodes, of which 100 sample and
400 are compressed at ratio 8; and seconds to converge, in 45,000 iterations of which 2,500 warm up uncompressed. Its
figures are pictures; `bench.papers.gradiveq.stated_times` has what its text states, and works out the rest.

    computation           is the preset's `iteration_s`
    RAR, QSGD             the presets' bandwidth and QSGD's speed are fitted on these cells (`fit`), so they agree
    GradiVeQ, totals      are predicted: the ring's own algorithm on the real gradient's sizes, without data

`--fit` prints the fitted numbers beside the presets'. The table, the numbers and a figure go to results/paper-timing.
"""

from __future__ import annotations

import math
import pickle
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Patch
from scipy.optimize import brentq
from tabulate import tabulate

from bench import clusters
from bench.common.command_line import Parser, UsageError, description, refused
from bench.common.environment import environment
from bench.common.files import CannotWrite, plain, read_object, write_atomically, write_json, writing
from bench.common.texts import commit_text, machine_text, sentences
from bench.drawing import page
from bench.drawing.styles import GROUP_COLORS
from bench.models import resnet32
from bench.papers.gradiveq.stated_times import COMPRESS, PAPER, SAMPLE, WARMUP_WINDOWS, WINDOW, WINDOWS, Paper
from bench.virtual.method_times import METHODS, Gradient, iteration_s
from gradiveq.methods import QSGDRing
from ring.cluster import Cluster, ClusterError
from ring.dry import Estimate
from ring.machine import usable_cores
from ring.segments import cut_segments

NODES = 6
LABELS = {"rar": "RAR", "qsgd": "QSGD", "gradiveq": "GradiVeQ"}
FITTED = ("rar", "qsgd")
#: Speeds of PCA relative to the preset's, to see how much a prediction depends on them.
PCA_SPEEDS = (0.1, 0.5, 1.0, 2.0, 10.0, math.inf)
PCA_RATES = ("pca.encode", "pca.decode")
#: Share of a bar below which a part of it isn't explained in the legend.
LEAST_VISIBLE = 0.002
#: Kinds of spans -> what the figure shows.
PARTS = {
    "encode": ("encode", "recode"),
    "add": ("add",),
    "exposed communication": ("wait", "overhead"),
    "decode": ("decode",),
}
PART_LABELS = {"encode": "encode and recode", "exposed communication": "exposed communication\n(waiting)"}


def gradient() -> Gradient:
    """The gradient of the paper's model. QSGD is its Fig. 2a's: nothing of a segment moves while it is quantised."""
    return Gradient.of(resnet32(100), qsgd=QSGDRing(pipelined=False))


# --- the fit ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """What a preset takes from the paper's cells: computation, RAR, QSGD."""

    iteration_s: float
    bandwidth_gbps: float
    qsgd_elements_per_s: float

    def preset(self, cluster: Cluster) -> Cluster:
        """The cluster with these numbers. Recoding an element takes as long as decoding and encoding it."""
        rate = self.qsgd_elements_per_s
        rates = {"qsgd.encode": rate, "qsgd.decode": rate, "qsgd.recode": rate / 2}
        return cluster.with_nodes(
            cluster.nodes,
            node={"iteration_s": self.iteration_s},
            link={"bandwidth_gbps": self.bandwidth_gbps},
            rates={**cluster.rates, **rates},
        )


def fit(cluster: Cluster, paper: Paper, vector: Gradient) -> Fitted:
    """The bandwidth with which a plain ring takes as long as the paper's, and then QSGD's speed, likewise.

    Args:
        cluster: what it assumes (latency, rates of additions, …) is left as it is.
    """

    def missed_s(phase: str, numbers: Fitted) -> float:
        return vector.aggregation(numbers.preset(cluster), phase).time_s - paper.aggregation_s(phase) / WINDOW

    computing_s = paper.computation_s / WINDOW
    speed = 1e6  # of no importance to a plain ring
    bandwidth = _root(lambda gbps: missed_s("rar", Fitted(computing_s, gbps, speed)), 1e-4, 1e2)
    speed = _root(lambda rate: missed_s("qsgd", Fitted(computing_s, bandwidth, rate)), 1e4, 1e10)
    return Fitted(computing_s, bandwidth, speed)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """The positive number at which a function is 0, to 10 digits."""
    return float(math.exp(brentq(lambda x: function(math.exp(x)), math.log(low), math.log(high), xtol=1e-10)))


def fit_table(vector: Gradient) -> str:
    rows = []
    for name, paper in PAPER.items():
        preset = clusters.load(name)
        found = fit(preset, paper, vector)
        pairs = {
            "node.iteration_s": (found.iteration_s, iteration_s(preset)),
            "link.bandwidth_gbps": (found.bandwidth_gbps, preset.link.bandwidth_gbps),
            "rates.qsgd.encode, .decode": (found.qsgd_elements_per_s, preset.rates["qsgd.encode"]),
            "rates.qsgd.recode": (found.qsgd_elements_per_s / 2, preset.rates["qsgd.recode"]),
        }
        rows += [[name, key, f"{a:.6g}", f"{b:.6g}", f"{b / a - 1:+.4%}"] for key, (a, b) in pairs.items()]
        for latency_us in (0.0, 1000.0):
            other = fit(preset.with_nodes(preset.nodes, link={"latency_us": latency_us}), paper, vector)
            change = other.bandwidth_gbps / found.bandwidth_gbps - 1
            rows.append(
                [name, f"bandwidth if latency_us = {latency_us:g}", f"{other.bandwidth_gbps:.6g}", "", f"{change:+.4%}"]
            )
    return str(tabulate(rows, ["cluster", "key", "fitted", "preset", "difference"], disable_numparse=True))


# --- the prediction --------------------------------------------------------------------------------------------------


def breakdown(cluster: Cluster, vector: Gradient) -> dict[str, Any]:
    """Ours for one cluster: seconds per window by method and kind, seconds to converge, a compressed aggregation."""
    each = {phase: vector.aggregation(cluster, phase) for phase in ("rar", "qsgd", "compress")}
    mixes = {"rar": {"rar": WINDOW}, "qsgd": {"qsgd": WINDOW}, "gradiveq": {"qsgd": SAMPLE, "compress": COMPRESS}}
    computation_s = WINDOW * iteration_s(cluster)
    warmup_s = WARMUP_WINDOWS * (computation_s + WINDOW * each["rar"].time_s)
    methods = {}
    for method, mix in mixes.items():
        aggregation_s = sum(count * each[phase].time_s for phase, count in mix.items())
        kinds = {part: sum(count * _part_s(each[phase], part) for phase, count in mix.items()) for part in PARTS}
        methods[method] = {
            "computation_s": computation_s,
            "aggregation_s": aggregation_s,
            "kinds_s": kinds,
            "total_s": warmup_s + (WINDOWS - WARMUP_WINDOWS) * (computation_s + aggregation_s),
        }
    dense, payload = vector.payload_bytes("rar"), vector.payload_bytes("compress")
    speedup = each["rar"].time_s / each["compress"].time_s
    sensitivity = {}
    for factor in PCA_SPEEDS:
        rates = dict(cluster.rates) | {name: cluster.rates[name] * min(factor, 1e9) for name in PCA_RATES}
        other = vector.aggregation(cluster.with_nodes(cluster.nodes, rates=rates), "compress")
        sensitivity[str(factor)] = SAMPLE * each["qsgd"].time_s + COMPRESS * other.time_s
    return {
        "methods": methods,
        "iteration_s": {phase: estimate.time_s for phase, estimate in each.items()},
        "compressed": {"speedup": speedup, "limit": dense / payload, "quotient": speedup * payload / dense},
        "sensitivity_s": sensitivity,
        "share_s": vector.share_s(cluster),
        "basis_bytes": vector.basis_bytes,
    }


def _part_s(estimate: Estimate, part: str) -> float:
    """Mean over the workers; those that end earlier wait for the last."""
    if part != "exposed communication":
        return sum(estimate.seconds.get(kind, 0.0) for kind in PARTS[part])
    return estimate.time_s - sum(_part_s(estimate, other) for other in PARTS if other != part)


def compare(vector: Gradient) -> dict[str, Any]:
    """The paper's numbers and ours, as they are written to JSON."""
    found = {}
    for name, paper in PAPER.items():
        ours = breakdown(clusters.load(name), vector)
        cells = []
        for method in METHODS:
            value_s = ours["methods"][method]["aggregation_s"]
            how = "fitted" if method in FITTED else "predicted"
            cells.append(
                {
                    "method": method,
                    "what": "aggregation",
                    "stated_s": paper.stated_s(method),
                    "derived_s": paper.derived_s(method),
                    "spread_s": paper.spread_s(method),
                    "ours_s": value_s,
                    "error": value_s / paper.aggregation_s(method) - 1,
                    "how": how,
                }
            )
        for method in METHODS:
            value_s, stated_s = ours["methods"][method]["total_s"], paper.totals_s[method]
            # A total without GradiVeQ has nothing that the fit hasn't seen.
            how = "predicted" if method == "gradiveq" else "of fitted cells"
            cells.append(
                {
                    "method": method,
                    "what": "to converge",
                    "stated_s": stated_s,
                    "derived_s": None,
                    "spread_s": None,
                    "ours_s": value_s,
                    "error": value_s / stated_s - 1,
                    "how": how,
                }
            )
        rar_s, compressed_s = paper.aggregation_s("rar") / WINDOW, paper.compressed_s()
        limit = ours["compressed"]["limit"]
        found[name] = {
            "computation": {"stated_s": paper.computation_s, "ours_s": ours["methods"]["rar"]["computation_s"]},
            "cells": cells,
            "compressed": {
                "paper": {
                    "rar_s": rar_s,
                    "compressed_s": compressed_s,
                    "speedup": rar_s / compressed_s,
                    "limit": limit,
                    "quotient": rar_s / compressed_s / limit,
                },
                "ours": ours["compressed"],
            },
            "ours": ours,
        }
    return found


# --- what the paper's implementation must have done ------------------------------------------------------------------


def boxing_us(count: int = 20_000, repeats: int = 5) -> dict[str, float]:
    """Microseconds per float that ways to send a float32 array cost here, both ends together, without the wire."""
    array = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    target = np.zeros_like(array)

    def loop() -> None:
        for i in range(count):
            target[i] = array[i] + target[i]

    ways: dict[str, Callable[[], object]] = {
        "the array's memory, copied and added": lambda: np.add(np.frombuffer(array.tobytes(), np.float32), target),
        "a list of Python floats, pickled": lambda: np.array(pickle.loads(pickle.dumps(array.tolist()))),
        "a list of NumPy scalars, pickled": lambda: np.array(pickle.loads(pickle.dumps(list(array)))),
        "decimal text": lambda: np.array([float(x) for x in " ".join(map(str, array.tolist())).split()]),
        "added in a Python loop over an array": loop,
    }
    found = {}
    for name, way in ways.items():
        times = []
        for _ in range(repeats):
            start_s = time.thread_time()
            way()
            times.append(time.thread_time() - start_s)
        found[name] = 1e6 * min(times) / count
    return found


def inference(vector: Gradient, found: Mapping[str, Any], boxing: Mapping[str, float]) -> list[str]:
    """Paragraphs."""
    sent_bytes = 2 * (NODES - 1) / NODES * vector.payload_bytes("rar")
    rar = {name: paper.aggregation_s("rar") / WINDOW for name, paper in PAPER.items()}
    speeds = {name: sent_bytes / seconds / 1e6 for name, seconds in rar.items()}
    per_float = {name: seconds / (sent_bytes / 4) * 1e6 for name, seconds in rar.items()}
    cpu, gpu = "gradiveq-cpu", "gradiveq-k80"
    both = found[cpu]["compressed"]["paper"], found[gpu]["compressed"]["paper"]
    steps = 2 * (NODES - 1)
    # t = fixed + bytes' part: the share of RAR's time that compression didn't shorten, with the paper's own spread.
    fixed = []
    for name, paper in PAPER.items():
        for cell_s in paper.spread_s("gradiveq"):
            compressed_s = (cell_s - SAMPLE / WINDOW * paper.aggregation_s("qsgd")) / COMPRESS
            limit = found[name]["compressed"]["ours"]["limit"]
            fixed.append((compressed_s / rar[name] - 1 / limit) / (1 - 1 / limit))
    qsgd_us = 1e6 / clusters.load(cpu).rates["qsgd.encode"], 1e6 / clusters.load(gpu).rates["qsgd.encode"]
    ways = "; ".join(f"{name} {us:.2g}" for name, us in boxing.items())
    middle = math.sqrt(per_float[cpu] * per_float[gpu])
    alike = " and ".join(name for name, us in boxing.items() if middle / 4 < us < middle * 4) or "none of these"
    return [
        "What the paper's implementation must have done (inference, from its numbers alone):",
        f"* Its ring sends {sent_bytes / 1e6:.2f} MB per node and iteration in {rar[cpu]:.2f} s on the CPU cluster and "
        f"{rar[gpu]:.2f} s on the GPU cluster: {speeds[cpu]:.2f} and {speeds[gpu]:.2f} MB/s, {per_float[cpu]:.1f} and "
        f"{per_float[gpu]:.1f} us per float. Gigabit Ethernet carries {125 / speeds[cpu]:.0f} and "
        f"{125 / speeds[gpu]:.0f} times that, and two networks as different as a local one and Google's would hardly "
        f"differ by a factor of {speeds[gpu] / speeds[cpu]:.2f} only. So it isn't the wire.",
        f"* It isn't latency, or a cost per message, slice or layer, either: a node sends {steps} messages, one in "
        f"{1e3 * rar[cpu] / steps:.0f} ms, and compression leaves these numbers as they are. The paper's compressed "
        f"aggregation is {both[0]['speedup']:.2f} and {both[1]['speedup']:.2f} times faster where the bytes allow "
        f"{both[0]['limit']:.2f}. The share of RAR's time that doesn't depend on the bytes is {min(fixed):+.1%} to "
        f"{max(fixed):+.1%}, over the spread of the paper's statements (below 0: more is saved than the bytes allow).",
        "* What is left is a cost per element, proportional to what is sent, such as Python objects instead of memory. "
        f"Microseconds per float on this machine, both ends, no wire: {ways}. Within a factor of 4 of the paper's: "
        f"{alike}.",
        f"* QSGD's cells say the same: at that speed of the ring, an element is encoded or decoded in {qsgd_us[0]:.2g} "
        f"and {qsgd_us[1]:.2g} us, where compiled code takes nanoseconds. But its 4-bit codes were packed: sent as an "
        "object each they would have saved nothing.",
        "* So the paper's factor of 5.25 is that of a ring whose bytes are expensive. With one that moves memory, it "
        "takes a slow wire to gain as much: `python -m bench.scaling` says where.",
    ]


# --- tables and figure -----------------------------------------------------------------------------------------------


def _seconds(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def cells_table(found: Mapping[str, Any], form: str = "simple") -> str:
    rows = []
    for name, part in found.items():
        computation = part["computation"]
        rows.append(
            [
                name,
                "computation",
                "all",
                _seconds(computation["stated_s"]),
                "",
                "",
                _seconds(computation["ours_s"]),
                "",
                "input",
            ]
        )
        for cell in part["cells"]:
            per_window = cell["what"] == "aggregation"
            spread = "" if cell["spread_s"] is None else " - ".join(_seconds(x) for x in cell["spread_s"])
            error = f"{cell['error']:+.1%}" if cell["how"] == "predicted" else f"({cell['error']:+.1%})"
            rows.append(
                [
                    name,
                    "aggregation" if per_window else "to converge",
                    LABELS[cell["method"]],
                    _seconds(cell["stated_s"]),
                    _seconds(cell["derived_s"]),
                    spread,
                    _seconds(cell["ours_s"], 1 if per_window else 0),
                    error,
                    cell["how"],
                ]
            )
    heads = ["cluster", "seconds", "method", "stated", "derived", "spread", "ours", "error", "ours is"]
    return str(
        tabulate(rows, heads, tablefmt=form, disable_numparse=True, colalign=("left",) * 3 + ("right",) * 5 + ("left",))
    )


def compressed_table(found: Mapping[str, Any], form: str = "simple") -> str:
    rows = []
    for name, part in found.items():
        for whose, numbers in part["compressed"].items():
            rows.append(
                [name, whose, f"{numbers['speedup']:.2f}", f"{numbers['limit']:.2f}", f"{numbers['quotient']:.3f}"]
            )
    heads = ["cluster", "whose", "speed-up of a compressed aggregation", "the bytes' limit", "quotient"]
    return str(tabulate(rows, heads, tablefmt=form, disable_numparse=True))


def remarks(vector: Gradient, found: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, part in found.items():
        ours, cluster = part["ours"], clusters.load(name)
        cells = ours["sensitivity_s"]
        listed = ", ".join(f"{seconds:.1f} ({factor})" for factor, seconds in cells.items())
        lines += [
            f"* {name}: PCA's speed is assumed ({cluster.rates['pca.encode']:.3g} multiplications/s), not fitted. With "
            f"so many times that speed GradiVeQ's cell is {listed} s: the part of PCA that isn't hidden behind "
            f"communication is {1 - cells['inf'] / cells['1.0']:.1%} of it.",
            f"* {name}: not in the cells: here each rank fits a share of the bases and gathers the others', "
            f"{ours['basis_bytes'] / 1e6:.1f} MB, {ours['share_s']:.1f} s per window; in the paper each node fits all "
            "of them, which sends nothing.",
        ]
    segments = vector.payload_bytes("compress") / NODES
    return [
        *lines,
        "* What is missing to the bytes' limit: PCA of the first and the last segment, which nothing hides, and that "
        f"segments end between slices: their mean is {segments:,.0f} bytes, the longest has {_longest(vector):,}.",
        "* derived: from the totals to converge, with 5 windows of warm-up as RAR's and 85 others. spread: the least "
        "and the most of what the paper's statements give, shares and factors included. error: against stated, or else "
        "derived; in brackets where nothing is predicted.",
    ]


def _longest(vector: Gradient) -> int:
    codec, chunk_bytes = vector.codec("compress")
    segments = cut_segments(codec.regions(vector.length, np.dtype(np.float32)), NODES, chunk_bytes)
    return max(sum(chunk.num_bytes for chunk in segment) for segment in segments)


def draw(found: Mapping[str, Any], caption: str) -> Any:
    """Stacked bars, the paper's above ours for each method."""
    with page.figure_style():
        figure = page.new_figure(
            10, 3.9, "Seconds per 500 iterations, ResNet-32 on 6 nodes: the GradiVeQ paper's and ours", caption
        )
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (name, part) in zip(axes, found.items(), strict=True):
            _bars(axis, part, PAPER[name])
            axis.set(title=f"{name}: {'CPU cluster' if name.endswith('cpu') else 'GPU cluster'}", xlabel="seconds")
        colors = GROUP_COLORS
        handles = [
            Patch(facecolor=colors["compute"], edgecolor="#444444", label="computation"),
            Patch(facecolor="#BBBBBB", edgecolor="#444444", hatch="....", label="aggregation (the paper's)"),
        ]
        handles += [
            Patch(facecolor=colors[group], edgecolor="#444444", label=PART_LABELS.get(group, group))
            for group in PARTS
            if _visible(found, group)
        ]
        axes[1].legend(
            handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0, fontsize=9, labelspacing=0.8
        )
    return figure


def _visible(found: Mapping[str, Any], group: str) -> bool:
    """Whether a group can be seen in any bar."""
    methods = [method for part in found.values() for method in part["ours"]["methods"].values()]
    return any(m["kinds_s"][group] > LEAST_VISIBLE * (m["computation_s"] + m["aggregation_s"]) for m in methods)


def _bars(axis: Any, part: Mapping[str, Any], paper: Paper) -> None:
    colors, edge = GROUP_COLORS, {"edgecolor": "#444444", "linewidth": 0.5}
    labels, place = [], 0.0
    aggregations = {cell["method"]: cell for cell in part["cells"] if cell["what"] == "aggregation"}
    for method in METHODS:
        ours, cell = part["ours"]["methods"][method], aggregations[method]
        theirs_s = paper.aggregation_s(method)
        axis.barh(place, paper.computation_s, 0.72, color=colors["compute"], **edge)
        axis.barh(place, theirs_s, 0.72, paper.computation_s, color="#BBBBBB", hatch="....", **edge)
        low, high = paper.spread_s(method)
        middle = paper.computation_s + theirs_s
        bounds = [[theirs_s - low], [high - theirs_s]]
        axis.errorbar(middle, place, xerr=bounds, color="#444444", linewidth=1, capsize=2.5)
        _end(axis, paper.computation_s + max(high, theirs_s), place, f"{middle:,.0f}")
        start_s = ours["computation_s"]
        axis.barh(place + 0.8, start_s, 0.72, color=colors["compute"], **edge)
        for group in PARTS:
            axis.barh(place + 0.8, ours["kinds_s"][group], 0.72, start_s, color=colors[group], **edge)
            start_s += ours["kinds_s"][group]
        predicted = cell["how"] == "predicted"
        note = "predicted" if predicted else "fitted"
        _end(axis, start_s, place + 0.8, f"{start_s:,.0f} ({note})")
        labels += [(place, f"{LABELS[method]}: paper"), (place + 0.8, "ours")]
        place += 2.1
    axis.set_yticks([where for where, _ in labels], [label for _, label in labels])
    axis.set_ylim(place - 0.7, -0.6)
    axis.set_xlim(0, 1.28 * (paper.computation_s + paper.spread_s("rar")[1]))
    axis.grid(axis="y", visible=False)


def _end(axis: Any, x: float, y: float, text: str) -> None:
    axis.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5)


def draw_record(record: Mapping[str, Any], folder: Path) -> Path:
    """The figure of what paper-timing.json holds."""
    about = record["environment"]
    parts = [
        f"ResNet-32, {gradient().length - 2:,} parameters; virtual time on the clusters gradiveq-cpu and gradiveq-k80, "
        "whose computation, RAR and QSGD are fitted on the paper's",
        "lines: spread of the paper's own statements",
        *([f"on {machine_text(about, about)}"] if "cores" in about else []),
        commit_text(about),
        f"command: {about['command']}",
    ]
    return page.write_figure(draw(record["clusters"], sentences(parts)), folder / "breakdown.png")


def redraw(path: Path) -> list[Path]:
    """The figure again, of the paper-timing.json at `path`.

    Raises:
        LookupError, TypeError, ValueError: the record isn't as it should be.
    """
    return [draw_record(read_object(path), path.parent)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.paper_timing", description=description(__doc__), allow_abbrev=False)
    parser.add_argument("--fit", action="store_true", help="only fit the presets again, and print the numbers")
    parser.add_argument(
        "--out", type=Path, default=Path("results/paper-timing"), metavar="DIR", help="(default: %(default)s)"
    )
    words = sys.argv[1:] if arguments is None else arguments
    vector = gradient()
    try:
        options = parser.parse_args(words)
        if options.fit:
            print(fit_table(vector))
            return 0
        found = compare(vector)
    except (UsageError, ClusterError) as error:
        return refused(error)
    command = " ".join(["python -m bench.paper_timing", *map(shlex.quote, words)])
    about = environment(("numpy", "scipy", "torch", "matplotlib")) | {"command": command, "cores": usable_cores()}
    boxing = boxing_us()
    title = "Seconds per 500 iterations (100 sampling, 400 compressed at ratio 8), and to converge (45,000 iterations)"
    lines = [*remarks(vector, found), "", *inference(vector, found, boxing)]
    wrapped = "\n".join(textwrap.fill(line, 110, subsequent_indent="  ") for line in lines)
    print(f"{title}\n\n{cells_table(found)}\n\n{compressed_table(found)}\n\n{wrapped}")
    record = plain({"environment": about, "clusters": found, "boxing_us": boxing})
    try:
        with writing(options.out):
            write_json(options.out / "paper-timing.json", record)
            table = f"# {title}\n\n{cells_table(found, 'github')}\n\n{compressed_table(found, 'github')}\n\n"
            write_atomically(options.out / "table.md", (table + "\n".join(lines) + "\n").encode())
            draw_record(record, options.out)
            print()
    except CannotWrite as error:
        return refused(error)
    return 0
