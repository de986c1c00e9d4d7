"""The comparison of `bench.ddp` from its records: a row for each method, tables, and what they are of."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

from bench.common.statistics import Quartiles, spread_text
from bench.common.texts import number
from bench.experiments.findings import select
from bench.hooks.equal_bytes import PLAIN, Entry
from bench.hooks.runs import SAMPLING, TIME, TRAIN
from gradiveq.sizes import Handed

Runs = Mapping[str, Mapping[str, Any]]
#: An accuracy counts as reached at plain DDP's mean less so much.
BELOW_PLAIN = 0.03


@dataclass(frozen=True)
class Row:
    """A method.

    Attributes:
        method: as a text.
        ratio: ratio of the group in which it is compared at equal bytes, or None.
        bytes_per_iteration: handed to the process group in a compressed iteration, in the mean over the seeds.
        sent_per_iteration: that a rank sends in the mean over the run's iterations, uncompressed ones included.
        share: `sent_per_iteration` over plain DDP's.
        off: how much more of it than the group has; None without a group.
        accuracies: at the end, by seed; fractions.
        diverged: seeds of which the loss at the end wasn't finite.
        reached_bytes: handed over until the accuracy is reached that the table names, by seed; None where it isn't.
        times: seconds per iteration over plain DDP's of the same round, by where; of GradiVeQ of compressed ones.
        sampling: the same of iterations in which GradiVeQ samples; else empty.
        defaults: the same with DDP's default buckets, over plain DDP's with one; empty if these are one as well.
        wire_bytes: bytes per iteration by the network device's own count, by where.
    """

    method: str
    ratio: float | None
    bytes_per_iteration: float
    sent_per_iteration: float
    share: float
    off: float | None
    accuracies: tuple[float, ...]
    diverged: int
    reached_bytes: tuple[float | None, ...]
    times: dict[str, Quartiles] = field(default_factory=dict)
    sampling: dict[str, Quartiles] = field(default_factory=dict)
    defaults: dict[str, Quartiles] = field(default_factory=dict)
    wire_bytes: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), **{key: _spreads(getattr(self, key)) for key in ("times", "sampling", "defaults")}}


def _spreads(found: Mapping[str, Quartiles]) -> dict[str, Any]:
    return {where: spread._asdict() for where, spread in found.items()}


def where_of(run: Mapping[str, Any]) -> str:
    """Between which ranks times were taken, for tables."""
    rate = run["spec"]["rate_mbps"]
    return "loopback" if rate is None else f"{rate:g} Mbit/s"


def reached_accuracy(runs: Runs) -> float:
    """The accuracy whose bytes are told."""
    finals = [run["result"]["evaluations"][-1]["accuracy"] for run in select(runs, kind=TRAIN, method=PLAIN)]
    return statistics.fmean(finals) - BELOW_PLAIN


def rows(runs: Runs, entries: Sequence[Entry], ranks: int) -> list[Row]:
    """A row for each method, in the order of what is sent, the most first."""
    goal = reached_accuracy(runs)
    plain = statistics.fmean(_sent(run, ranks) for run in select(runs, kind=TRAIN, method=PLAIN))
    return sorted((_row(runs, entry, ranks, goal, plain) for entry in entries), key=lambda row: -row.share)


def _sent(run: Mapping[str, Any], ranks: int) -> float:
    return Handed(**run["result"]["handed"]).sent(ranks)


def _row(runs: Runs, entry: Entry, ranks: int, goal: float, plain: float) -> Row:
    these = select(runs, kind=TRAIN, method=entry.text)
    results = [run["result"] for run in these]
    sent = statistics.fmean(_sent(run, ranks) for run in these)
    reached = []
    for result in results:
        there = (one["handed"] for one in result["evaluations"] if one["accuracy"] >= goal)
        reached.append(next(there, None))
    found: dict[str, dict[str, Any]] = {"times": {}, "sampling": {}, "defaults": {}, "wire_bytes": {}}
    for run in select_times(runs):
        where, result = where_of(run), run["result"]
        base = result["times_s"][PLAIN]
        series = {
            "times": result["times_s"].get(entry.text),
            "sampling": result["times_s"].get(entry.text + SAMPLING),
            "defaults": result["defaults_s"].get(entry.text),
        }
        for key, times in series.items():
            if times is not None:
                found[key][where] = Quartiles.of([a / b for a, b in zip(times, base, strict=True)])
        if entry.text in result["wire"]:
            found["wire_bytes"][where] = result["wire"][entry.text]
    return Row(
        entry.text,
        entry.ratio,
        statistics.fmean(sum(result["compressed"].values()) for result in results),
        sent,
        sent / plain,
        None if entry.ratio is None else sent / plain * entry.ratio - 1,
        tuple(result["evaluations"][-1]["accuracy"] for result in results),
        sum(result["diverged"] for result in results),
        tuple(reached),
        **found,
    )


def select_times(runs: Runs) -> list[Mapping[str, Any]]:
    """Loopback first, then rates."""
    found = [run for run in runs.values() if run["spec"]["kind"] == TIME]
    return sorted(found, key=lambda run: run["spec"]["rate_mbps"] or 0)


# --- tables ----------------------------------------------------------------------------------------------------------


def methods_table(found: Sequence[Row], goal: float, form: str = "github") -> str:
    """The table of all methods."""
    places = list(dict.fromkeys(where for row in found for where in row.times))
    head = ["method", "bytes handed over per compressed iteration", "bytes sent over the run, 1/x of plain's"]
    head += ["test accuracy (%)", f"MB until {100 * goal:.1f} %", *(f"time over plain DDP's, {p}" for p in places)]
    table = []
    for row in found:
        accuracy = spread_text([100 * value for value in row.accuracies], ".1f")
        table.append(
            [
                row.method,
                f"{row.bytes_per_iteration:,.0f}",
                f"{1 / row.share:.1f}",
                accuracy + _diverged(row),
                _reached(row),
                *(row.times[p].text() if p in row.times else "-" for p in places),
            ]
        )
    return str(tabulate(table, head, tablefmt=form, disable_numparse=True))


def group_table(found: Sequence[Row], ratio: float, form: str = "github") -> str:
    """The methods that are compared at equal bytes, the most accurate first."""
    group = [row for row in found if row.ratio == ratio]
    table = []
    for row in sorted(group, key=lambda row: -statistics.fmean(row.accuracies)):
        percent = [100 * value for value in row.accuracies]
        table.append(
            [
                row.method,
                f"{row.sent_per_iteration:,.0f}",
                f"{100 * (row.off or 0):+.1f} %",
                spread_text(percent, ".1f"),
                f"{min(percent):.1f}-{max(percent):.1f}{_diverged(row)}",
            ]
        )
    head = ["method", "bytes sent per iteration, mean over the run", "than the group", "test accuracy (%)", "range"]
    return str(tabulate(table, head, tablefmt=form, disable_numparse=True))


def _diverged(row: Row) -> str:
    return f"; {row.diverged} of {len(row.accuracies)} diverged" if row.diverged else ""


def _reached(row: Row) -> str:
    """The median over the seeds, if all of them got there."""
    values = [value for value in row.reached_bytes if value is not None]
    missing = len(row.reached_bytes) - len(values)
    if not missing:
        return number(statistics.median(values) / 1e6, ".1f")
    return f"- ({missing} of {len(row.reached_bytes)} never)"


def times_table(runs: Runs, form: str = "github") -> str:
    """Plain DDP's own times, of which all others are multiples."""
    table = []
    for run in select_times(runs):
        times = Quartiles.of([1e3 * value for value in run["result"]["times_s"][PLAIN]])
        table.append([where_of(run), times.text(".1f"), run["spec"]["rounds"]])
    return str(tabulate(table, ["ranks are joined by", "plain DDP, ms per iteration", "rounds"], tablefmt=form))


def extras_table(found: Sequence[Row], form: str = "github") -> str:
    """Times of iterations in which GradiVeQ samples, times with DDP's default buckets, and what the network device
    counted, as far as there is any of them; empty if there is none."""
    columns = {
        "time over plain DDP's, sampling": [_texts(row.sampling) for row in found],
        "time over plain DDP's, default buckets": [_texts(row.defaults) for row in found],
        "bytes through the link's device": [
            {where: f"{value:,.0f}" for where, value in row.wire_bytes.items()} for row in found
        ],
    }
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    table = []
    for place, row in enumerate(found):
        for where in row.times:
            texts = [cells[place].get(where, "-") for cells in columns.values()]
            if any(text != "-" for text in texts):
                table.append([row.method, where, *texts])
    head = ["method", "ranks are joined by", *columns]
    return str(tabulate(table, head, tablefmt=form, disable_numparse=True)) if table else ""


def _texts(found: Mapping[str, Quartiles]) -> dict[str, str]:
    return {where: spread.text() for where, spread in found.items()}
