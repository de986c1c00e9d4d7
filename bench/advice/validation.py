"""Predicted and measured time per iteration side by side: `python -m bench.advise --validate`.

Hosts are network namespaces on this machine with shaped links (`bench.shaped.hosts`: Linux, root). Real DDP training
over Gloo runs between them, without a hook and with `gradiveq.ddp.hook` (`bench.advice.validation_ranks`), on three
models of different proportions of computing to communication, one thread per rank.

What predictions are made of: what an iteration computes and what methods cost, measured on the hosts without
communication; and a described cluster, of which few numbers are fitted to *collectives alone* (all-reduces and
all-gathers of zeros of some sizes, by time and by processor time): the share of the rate that payload gets, processor
time per collective, and per MiB; and how many times as long as its bytes an all-gather takes, for each number of hosts
(of two, Gloo's takes half as long again). No training iteration is fitted. All hosts share this machine's cores.

GradiVeQ's cells are its compressed iterations. Buckets are of 1 MB, so that small models have several, and batch norm's
buffers are not broadcast. A cell's error is predicted over measured, less 1; its spread the interquartile range of its
repeats over their median.

Writes table.md, record.json and figure.png into --out (results/advise/validation).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy.optimize import minimize
from tabulate import tabulate
from tqdm import tqdm

from bench.advice.costs import PLAIN, local_rates
from bench.advice.prediction import FittedNetwork, Situation
from bench.advice.validation_plan import METHODS, MODELS, Found
from bench.common.command_line import Parser, UsageError, description, refused
from bench.common.environment import environment
from bench.common.files import read_object, write_atomically, write_json
from bench.common.launch import for_ranks
from bench.common.statistics import Quartiles, mean_error
from bench.common.texts import commit_text, sentences
from bench.drawing import page
from bench.drawing.styles import method_color
from bench.shaped.hosts import MOST_HOSTS, Hosts, HostsError, why_not
from bench.virtual.scaling import PAYS
from ring.cluster import Cluster, Link, Node, as_table
from ring.machine import usable_cores

HOSTS, RATES_MBPS = (2, 4), (100, 1000)
BUCKET_MB = 1.0
COLLECTIVE_BYTES = (16_384, 262_144, 1_048_576)
MARKERS = ("o", "s", "^", "D")
#: Sets of parameters that the fit tries, and where it begins: share of the rate, call_us, copy_us_per_mib.
MOST_FITS, BEGIN = 120, (0.93, 300.0, 500.0)
JOB_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Job:
    """One set of hosts at one rate, and what came of it."""

    hosts: int
    rate_mbps: int
    found: Found


class ClusterFit:
    """The described cluster of shaped hosts.

    Attributes:
        parameters: share of the rate, call_us, copy_us_per_mib.
        gather_factors: gather factors by number of hosts.
    """

    NAMES = ("share of the rate", "call_us", "copy_us_per_mib")

    def __init__(self, rates: Mapping[str, float], cores: int) -> None:
        self._rates, self._cores = dict(rates), cores
        self.parameters: tuple[float, ...] = BEGIN
        self.gather_factors: dict[int, float] = {}

    def cluster(self, hosts: int, rate_mbps: int) -> Cluster:
        share, call_us, copy_us = self.parameters
        return Cluster(
            name=f"{hosts}-shaped-hosts",
            source="fitted by bench.advise --validate to collectives alone",
            nodes=hosts,
            shared_cores=self._cores,
            node=Node(call_us=call_us, copy_us_per_mib=copy_us),
            link=Link(bandwidth_gbps=rate_mbps / 1e3 * share),
            rates=self._rates,
        )

    def fit(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Fit to the collectives of all jobs.

        First the parameters to all-reduces: least mean |log(predicted / measured)| of time, and half of that of
        processor time. Then how much longer gathers take than that makes of them.

        Returns:
            A row for each collective.
        """

        def loss(logarithms: Any) -> float:
            self.parameters = tuple(np.exp(logarithms).tolist())
            if self.parameters[0] > 1:
                return math.inf
            off = [
                abs(math.log(row["fitted_s"] / row["measured_s"]))
                + abs(math.log(row["fitted_cpu_s"] / row["cpu_s"])) / 2
                for row in self._rows(jobs, "all_reduce")
            ]
            return statistics.mean(off)

        found = minimize(
            loss, np.log(BEGIN), method="Nelder-Mead", options={"maxfev": MOST_FITS, "xatol": 0.01, "fatol": 1e-4}
        )
        self.parameters = tuple(np.exp(found.x).tolist())
        for hosts in dict.fromkeys(job.hosts for job in jobs):
            gathers = self._rows([job for job in jobs if job.hosts == hosts], "all_gather")
            self.gather_factors[hosts] = statistics.geometric_mean(
                [row["measured_s"] / row["fitted_s"] for row in gathers]
            )
        return [row for collective in ("all_reduce", "all_gather") for row in self._rows(jobs, collective)]

    def _rows(self, jobs: Sequence[Job], collective: str) -> list[dict[str, Any]]:
        rows = []
        for job in jobs:
            network = FittedNetwork(self.cluster(job.hosts, job.rate_mbps), self.gather_factors.get(job.hosts, 1.0))
            for sent, times_s, cpu_s in job.found.collectives:
                if sent.collective == collective:
                    load = network.load(sent)
                    rows.append(
                        {
                            "hosts": job.hosts,
                            "rate_mbps": job.rate_mbps,
                            "collective": collective,
                            "payload_bytes": sent.num_bytes,
                            "times_s": times_s,
                            "measured_s": statistics.median(times_s),
                            "cpu_s": cpu_s,
                            "fitted_s": load.seconds,
                            "fitted_cpu_s": load.busy_s,
                        }
                    )
        return rows


def compare(jobs: Sequence[Job], fit: ClusterFit) -> list[dict[str, Any]]:
    """A row per cell: what was measured, what is predicted."""
    rows = []
    for job in jobs:
        cluster = fit.cluster(job.hosts, job.rate_mbps)
        for model, measured in job.found.models.items():
            situation = Situation(
                cluster,
                measured.profile,
                measured.ready_s,
                measured.copies_s,
                measured.costs,
                gather_factor=fit.gather_factors[job.hosts],
            )
            computing_s = situation.computing_s
            plain_s = statistics.median(job.found.times_s[model][PLAIN])
            predicted_plain_s = situation.predict(PLAIN).time_s
            for method, times_s in job.found.times_s[model].items():
                middle, low, high = Quartiles.of(times_s)
                predicted_s = situation.predict(method).time_s
                speedup, predicted = plain_s / middle, predicted_plain_s / predicted_s
                rows.append(
                    {
                        "model": model,
                        "hosts": job.hosts,
                        "rate_mbps": job.rate_mbps,
                        "method": method,
                        "times_s": times_s,
                        "measured_s": middle,
                        "spread": (high - low) / middle,
                        "cpu_s": job.found.cpu_s[model][method],
                        "predicted_cpu_s": situation.processor_s(method),
                        "computing_s": computing_s,
                        "predicted_s": predicted_s,
                        "error": predicted_s / middle - 1,
                        "speedup": speedup,
                        "predicted_speedup": predicted,
                        "agrees": method == PLAIN or (speedup >= PAYS) == (predicted >= PAYS),
                    }
                )
    return rows


def judge(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the rows come to."""

    def of(key: str) -> dict[str, float]:
        names = dict.fromkeys(row[key] for row in rows)
        return {str(name): mean_error([row["error"] for row in rows if row[key] == name]) for name in names}

    hooked = [row for row in rows if row["method"] != PLAIN]
    settings: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        settings.setdefault((row["model"], row["hosts"], row["rate_mbps"]), []).append(row)
    costs = []  # what following the advice costs over the best choice
    for cells in settings.values():
        advised = min(cells, key=lambda row: row["predicted_s"])
        costs.append(advised["measured_s"] / min(row["measured_s"] for row in cells) - 1)
    errors = [row["error"] for row in rows]
    return {
        "mean_error": mean_error(errors),
        "median_error": float(np.median(np.abs(errors))),
        "worst": max(rows, key=lambda row: abs(math.log1p(row["error"]))),
        "of_speedups": mean_error([row["predicted_speedup"] / row["speedup"] - 1 for row in hooked]),
        "by_model": of("model"),
        "by_method": of("method"),
        "by_hosts": of("hosts"),
        "by_rate": of("rate_mbps"),
        "agreeing": sum(row["agrees"] for row in hooked),
        "judged": len(hooked),
        "advised_costs": costs,
    }


def report(
    rows: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any], fit: ClusterFit, about: Mapping[str, Any]
) -> str:
    """The table and what it comes to, as Markdown."""
    lines = [
        [
            row["model"],
            row["hosts"],
            row["rate_mbps"],
            row["method"],
            f"{1e3 * row['computing_s']:.1f}",
            f"{1e3 * row['measured_s']:.1f}",
            f"{row['spread']:.0%}",
            f"{1e3 * row['predicted_s']:.1f}",
            f"{row['error']:+.0%}",
            f"{1e3 * row['cpu_s']:.1f}",
            f"{1e3 * row['predicted_cpu_s']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['predicted_speedup']:.2f}",
            "" if row["agrees"] else "another verdict",
        ]
        for row in rows
    ]
    heads = [
        "model",
        "hosts",
        "Mbit/s",
        "method",
        "computing ms",
        "measured ms",
        "spread",
        "predicted ms",
        "error",
        "processor ms",
        "predicted",
        "speed-up",
        "predicted",
        "",
    ]
    align = ["left", "right", "right", "left"] + ["right"] * 9 + ["left"]
    table = tabulate(lines, heads, tablefmt="github", disable_numparse=True, colalign=align)
    worst, costs = verdict["worst"], verdict["advised_costs"]
    by = {
        name: ", ".join(f"{key} {error:.0%}" for key, error in verdict[f"by_{name}"].items())
        for name in ("model", "method", "hosts", "rate")
    }
    factors = " and ".join(f"{factor:.2f} ({hosts} hosts)" for hosts, factor in fit.gather_factors.items())
    parameters = ", ".join(f"{name} {value:.4g}" for name, value in zip(fit.NAMES, fit.parameters, strict=True))
    return (
        "# Predicted and measured time per iteration under DDP\n\n"
        f"{table}\n\n"
        f"{len(rows)} cells, none of them fitted: geometric-mean error {verdict['mean_error']:.1%}, median "
        f"{verdict['median_error']:.1%}; of speed-ups over plain DDP {verdict['of_speedups']:.1%}. By model: "
        f"{by['model']}. By method: {by['method']}. By hosts: {by['hosts']}. By Mbit/s: {by['rate']}. The worst: "
        f"{worst['method']} of {worst['model']} on {worst['hosts']} hosts at {worst['rate_mbps']} "
        f"Mbit/s, {worst['error']:+.0%}.\n\n"
        f"Whether a method pays (an iteration {PAYS - 1:.0%} faster or more) is predicted right in "
        f"{verdict['agreeing']} of {verdict['judged']} cells. The method that is predicted to be the fastest takes, in "
        f"the median of {len(costs)} settings, {statistics.median(costs):.1%} longer than the one that is; at most "
        f"{max(costs):.0%}.\n\n"
        f"Fitted to collectives alone: {parameters}; all-gathers take {factors} times as long as their bytes. "
        "Latency is not shaped, and so not validated.\n\n"
        f"On {about['cpu']}, {about['cores']} cores for all hosts; load average before: {about['load_before']:.1f} "
        f"(what others compute meanwhile is in what was measured). Command: `{about['command']}`.\n"
    )


def draw(rows: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any], about: Mapping[str, Any]) -> Figure:
    """Predicted against measured."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    hosts = sorted({row["hosts"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != PLAIN))
    caption = sentences(
        [
            f"geometric-mean error {verdict['mean_error']:.0%} over {len(rows)} cells, none of them fitted; "
            "grey: within 20 %",
            f"real DDP training over Gloo between hosts with shaped links, all on {about['cpu']}, {about['cores']} "
            "cores",
            commit_text(about),
            f"command: {about['command']}",
        ]
    )
    with page.figure_style():
        figure = page.new_figure(8.2, 5.2, "Time per iteration under DDP, predicted and measured", caption)
        axis = figure.subplots()
        ends = np.array([f([row[key] for row in rows for key in ("measured_s", "predicted_s")]) for f in (min, max)])
        ends *= (0.8, 1.25)
        axis.fill_between(ends, ends / 1.2, ends * 1.2, color="#EEEEEE", linewidth=0)
        axis.plot(ends, ends, color="#888888", linewidth=1)
        colors = {PLAIN: method_color("rar")} | {one: method_color(one, methods) for one in methods}
        for row in rows:
            color = colors[row["method"]]
            axis.plot(
                row["measured_s"],
                row["predicted_s"],
                linestyle="none",
                markersize=6,
                color=color,
                marker=MARKERS[models.index(row["model"]) % len(MARKERS)],
                markerfacecolor=color if row["hosts"] == hosts[0] else "white",
            )
        dot: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": "#444444"}
        groups = {
            "method": [(name, dot | {"color": color}) for name, color in colors.items()],
            "model": [(name, dot | {"marker": marker}) for name, marker in zip(models, MARKERS, strict=False)],
            "hosts": [
                (str(number), dot | {"markerfacecolor": "#444444" if number == hosts[0] else "white"})
                for number in hosts
            ],
        }
        for group, entries in groups.items():
            axis.plot([], [], linestyle="none", label=f"{group}:")
            for label, style in entries:
                axis.plot([], [], label=label, **style)
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured s", ylabel="predicted s")
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_locator(LogLocator(subs=(1, 2, 5)))
            one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            one.set_minor_formatter(NullFormatter())
        page.add_legend(axis)
    return figure


def redraw(path: Path) -> list[Path]:
    """The figure again, of the record.json at `path`.

    Raises:
        LookupError, TypeError, ValueError: the record isn't as it should be.
    """
    record = read_object(path)
    figure = draw(record["cells"], record["verdict"], record["environment"])
    return [page.write_figure(figure, path.with_name("figure.png"))]


def measure(options: argparse.Namespace) -> tuple[list[Job], list[dict[str, Any]]]:
    """Run all jobs; (jobs, what the hosts were).

    Raises:
        HostsError: a job fails, or takes too long.
    """
    jobs, links = [], []
    variables = for_ranks(1)
    sets = [(number, rate) for number in options.hosts for rate in options.rates]
    with tempfile.TemporaryDirectory(prefix="advise-") as folder:
        for number, rate_mbps in tqdm(sets, desc="hosts x rates", file=sys.stderr):
            plan_path, found_path = Path(folder) / "plan.json", Path(folder) / "found.pickle"
            with Hosts(number, rate_mbps) as shaped:
                plan = {
                    "address": shaped.addresses[0],
                    "device": "eth0",
                    "models": options.models,
                    "methods": options.methods,
                    "repeats": options.repeats,
                    "iterations": options.iterations,
                    "bucket_mb": BUCKET_MB,
                    "collective_bytes": COLLECTIVE_BYTES,
                    "collective_s": 0.2,
                }
                plan_path.write_text(json.dumps(plan))
                where = f"training on {number} hosts at {rate_mbps} Mbit/s"
                command = [sys.executable, "-m", "bench.advice.validation_ranks", str(plan_path), str(found_path)]
                try:
                    done = shaped.mpirun(command, timeout_s=JOB_TIMEOUT_S, environment=variables)
                except subprocess.TimeoutExpired:
                    raise HostsError(f"{where} did not end within {JOB_TIMEOUT_S:g} s") from None
                links.append(shaped.describe())
            if done.returncode:
                raise HostsError(f"{where} failed: {done.stderr.strip()}")
            jobs.append(Job(number, rate_mbps, pickle.loads(found_path.read_bytes())))
    return jobs, links


def _numbers(least: int, most: float, what: str) -> Any:
    def read(text: str) -> list[int]:
        parts = text.split(",")
        if not all(part.isascii() and part.isdigit() and least <= int(part) <= most for part in parts):
            raise argparse.ArgumentTypeError(f"must be {what} from {least:,} to {most:,}, got {text}")
        return [int(part) for part in parts]

    return read


def _names(known: Sequence[str]) -> Any:
    def read(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {name}")
        return text.split(",")

    return read


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises UsageError."""
    parser = Parser(prog="python -m bench.advise --validate", description=description(__doc__), allow_abbrev=False)

    def add(name: str, read: Any, default: Any, text: str) -> None:
        parser.add_argument(name, type=read, default=default, metavar="N,…", help=text)

    add("--hosts", _numbers(2, MOST_HOSTS, "numbers of hosts"), list(HOSTS), "how many hosts (default: 2,4)")
    add("--rates", _numbers(1, 100_000, "rates in Mbit/s"), list(RATES_MBPS), "Mbit/s (default: 100,1000)")
    add("--models", _names(list(MODELS)), list(MODELS), f"of {', '.join(MODELS)}")
    add("--methods", _names(list(METHODS)), list(METHODS), f"of {', '.join(METHODS)}")
    parser.add_argument("--repeats", type=int, default=4, metavar="N", help="of each cell (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=2, metavar="N", help="in a repeat (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/advise/validation"), metavar="DIR")
    options = parser.parse_args(arguments)
    for name in ("repeats", "iterations"):
        if getattr(options, name) < 1:
            raise UsageError(f"argument --{name}: must be at least 1, got {getattr(options, name)}")
    return options


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(arguments)
        reason = why_not()
        if reason is not None:
            print(f"validation of the advice is skipped: {reason}")
            return 0
        about = environment(("numpy", "scipy", "torch", "numba", "matplotlib")) | {
            "cores": usable_cores(),
            "load_before": os.getloadavg()[0],
            "data": "random inputs and labels",
            "seed": 0,
            "command": shlex.join(["python", "-m", "bench.advise", "--validate", *arguments]),
        }
        jobs, links = measure(options)
        fit = ClusterFit(local_rates(), about["cores"])
        collectives = fit.fit(jobs)
        rows = compare(jobs, fit)
        verdict = judge(rows)
        text = report(rows, verdict, fit, about)
        most = max(options.hosts)
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(
            options.out / "record.json",
            {
                "environment": about,
                "links": links,
                "parameters": dict(zip(fit.NAMES, fit.parameters, strict=True)),
                "gather_factors": fit.gather_factors,
                "cluster": as_table(fit.cluster(most, max(options.rates))),
                "collectives": collectives,
                "cells": rows,
                "verdict": verdict,
            },
        )
        write_atomically(options.out / "table.md", text.encode())
        page.write_figure(draw(rows, verdict, about), options.out / "figure.png")
    except UsageError as error:
        return refused(error)
    except (HostsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{text}\nwritten to {options.out}")
    return 0
