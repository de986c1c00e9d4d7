"""The tables of a run, from what it recorded: `python -m bench.report results/<run>`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from bench.common.command_line import description
from bench.common.files import read_json
from bench.common.texts import number
from bench.job.record import GROUPS, SUMMARY

#: Shown in seconds; measuring held-out losses is no part of training and is told in a line of its own.
SHOWN = tuple(group for group in GROUPS if group != "measure")
HEADINGS = {"exposed communication": "exposed\ncommunication"}
#: The phases, in the order in which a method may have them.
PHASES = ("plain", "qsgd", "warm-up", "sample", "compress", "compressed")
#: What a compressor sends and leaves out, in the mean.
COMPRESSION = {"density": "density", "relative_error": "relative\nerror"}


def title(summary: Mapping[str, Any]) -> str:
    """What ran on what; the data set's source is always in it."""
    return (
        f"{summary['model']} on {summary['data_source']}, {summary['ranks']} ranks x {summary['batch_size']} images, "
        f"{summary['iterations']} iterations"
    )


class Clock(NamedTuple):
    """The clock by which seconds are counted: this machine's, or that of an emulated cluster.

    Attributes:
        name: for tables and figures.
        key: in a summary, where each method and phase has this clock's seconds; None for the entry itself.
        suffix: what is appended to the names of files that show them.
    """

    name: str
    key: str | None = None
    suffix: str = ""

    def times(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        """`time_s`, `seconds` and `groups` of a method's or a phase's entry."""
        times: Mapping[str, Any] = entry if self.key is None else entry[self.key]
        return times


def clocks(summary: Mapping[str, Any]) -> list[Clock]:
    """The clocks that say something; this machine's doesn't where all ranks were threads of one process."""
    found = [] if summary.get("one_process") else [Clock("this machine")]
    cluster = summary.get("cluster")
    if cluster:
        suffix = re.sub(r"[^\w.-]+", "-", cluster["name"]).strip("-.")  # a name may be anything
        found.append(Clock(f"{cluster['name']}, {cluster['nodes']} nodes (emulated)", "virtual", f"-{suffix}"))
    return found


def methods_table(summary: Mapping[str, Any], clock: Clock) -> str:
    """A row per method: accuracy, bytes, what compressors leave out, and where the seconds went."""
    rows = []
    compressing = any(method.get("compression") for method in summary["methods"].values())
    for name, method in summary["methods"].items():
        times = clock.times(method)
        groups = [f"{times['groups'][group]:.1f}" for group in SHOWN]
        left_out = method.get("compression") or {"density": None, "relative_error": None}
        rows.append(
            [
                name,
                number(method["test_accuracy"], ".4f"),
                f"{method['bytes_per_iteration']:,.0f}",
                number(method["ratio"], ".2f"),
                *((number(left_out[key], ".3g") for key in COMPRESSION) if compressing else ()),
                *groups,
                f"{times['time_s']:.1f}",
            ]
        )
    headings = ["method", "test\naccuracy", "bytes per\niteration", "ratio"]
    headings += [*(COMPRESSION.values() if compressing else ()), *(HEADINGS.get(g, g) for g in SHOWN)]
    return str(
        tabulate(rows, [*headings, "total s"], disable_numparse=True, colalign=["left"] + ["right"] * len(rows[0][1:]))
    )


def phases_table(summary: Mapping[str, Any], clock: Clock) -> str:
    """A row per method and phase: milliseconds of an iteration."""
    rows = []
    for name, method in summary["methods"].items():
        for phase in sorted(method["phases"], key=_order):
            part = method["phases"][phase]
            times = clock.times(part)
            scale = 1e3 / part["iterations"]
            rows.append(
                [
                    name,
                    phase,
                    str(part["iterations"]),
                    f"{part['bytes_per_iteration']:,.0f}",
                    number(part["ratio"], ".2f"),
                    *(f"{scale * times['groups'][group]:.1f}" for group in SHOWN),
                    f"{scale * times['time_s']:.1f}",
                ]
            )
    headings = ["method", "phase", "iterations", "bytes per\niteration", "ratio"]
    headings += [*(HEADINGS.get(g, g) for g in SHOWN), "total ms"]
    alignment = ["left", "left"] + ["right"] * (len(headings) - 2)
    return str(tabulate(rows, headings, disable_numparse=True, colalign=alignment))


def _order(phase: str) -> int:
    return PHASES.index(phase) if phase in PHASES else len(PHASES)


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables has to know."""
    lines = []
    cluster = summary.get("cluster")
    if cluster:
        lines.append(f"Source of the cluster {cluster['name']}: {cluster.get('source') or 'none given'}.")
    methods: Mapping[str, Any] = summary["methods"]
    if cluster and cluster.get("rates") and any(method.get("compression") for method in methods.values()):
        lines.append(
            f"On {cluster['name']} QSGD in the ring and GradiVeQ encode and decode at the cluster's rates, compressors "
            "in the processor time that they took here."
        )
    ranks, cores = summary["ranks_per_machine"], summary["cores"]
    if ranks > cores and not summary.get("one_process"):
        wall = sum(method["groups"]["compute"] for method in methods.values())
        cpu = sum(method["compute_cpu_s"] for method in methods.values())
        lines.append(
            f"{ranks} ranks share {cores} cores: per rank, computing took {wall:.0f} s but {cpu:.0f} s of processor "
            "time; the rest, and part of the exposed communication, is waiting for a core."
        )
    for name, method in methods.items():
        if method["skipped"]:
            lines.append(f"{name}: {method['skipped']} iterations were skipped because of a non-finite gradient.")
        if method["ratio"] is not None and method["ratio"] < 1:
            lines.append(
                f"{name}: everybody's payloads go to everybody, which with {summary['ranks']} ranks sends more than "
                "plain ring all-reduce does."
            )
        found = method.get("threshold")
        if found:
            lines.append(f"{name}: {threshold_text(found)}.")
        window = method.get("last_window")
        if window:
            layers = list(window["layers"].values())
            held_out = [layer["held_out_loss"] for layer in layers if layer["held_out_loss"] is not None]
            text = f"{name}: in the last window in-sample loss {_span([x['in_sample_loss'] for x in layers])}"
            if held_out:
                text += f", held-out loss {_span(held_out)}"
            lines.append(f"{text}, ratio {_span([x['ratio'] for x in layers])} over {len(layers)} layers.")
    for clock in clocks(summary):
        seconds = {name: clock.times(method)["groups"]["measure"] for name, method in methods.items()}
        took = [f"{name} {value:.1f} s" for name, value in seconds.items() if value > 0.05]
        if took:
            lines.append(
                f"Measuring held-out losses and the gradients' noise took on {clock.name}: {', '.join(took)}; that is "
                "in no total, as it isn't training."
            )
    return lines


def threshold_text(entry: Mapping[str, Any]) -> str:
    """A line about hard-threshold's threshold, where it followed from a formula."""
    text = f"threshold {entry['threshold']:.3g} for {entry['num_kept']:,} elements"
    estimate = entry["estimate"]
    if estimate is None:
        return f"{text}, 1/(2√k)"
    return (
        f"{text}, from iteration {entry['iteration']} on; before it M was {estimate['multiple']:.3g}, "
        f"ζ² {estimate['heterogeneity']:.3g} and σ² {estimate['noise']:.3g}"
    )


def _span(values: list[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def text(summary: Mapping[str, Any], *, notes: bool = True) -> str:
    """The tables with titles and remarks, for the terminal; `notes` are those that the run itself began with."""
    if not summary["methods"]:
        return f"{title(summary)}: no method has ended"
    heading = title(summary)
    parts = []
    for clock in clocks(summary):
        parts += [
            f"{heading}\nOn {clock.name}: seconds of training, mean over ranks; bytes sent per rank",
            methods_table(summary, clock),
            f"{heading}\nOn {clock.name}: milliseconds per iteration by phase",
            phases_table(summary, clock),
        ]
    lines = [*remarks(summary), *(summary["notes"] if notes else [])]
    return "\n\n".join([*parts, *(["\n".join(f"* {line}" for line in lines)] if lines else [])]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=description(__doc__))
    parser.add_argument("run", type=Path, nargs="+", help="a run's folder, such as results/<run>")
    for run in parser.parse_args(arguments).run:
        try:
            print(text(read_json(run / SUMMARY)))
        except (OSError, ValueError, KeyError) as error:
            print(f"error: {run / SUMMARY}: not a run's summary ({error!r})", file=sys.stderr)
            return 2
    return 0
