"""Real all-reduces between shaped hosts, beside what the emulator predicts: `python -m bench.validate`.

Hosts are network namespaces (`bench.shaped.hosts`) whose links are shaped to a rate; the real ring runs between them
over TCP. Few parameters of a described cluster are fitted to *some* cells (sizes, rates and numbers of hosts in
`CALIBRATION`):

    the shares of the rate and of the token bucket's burst that payload gets, latency, processor time per call, per
    message and per MiB, and the codecs' processor time: as measured while those cells ran, times a share, because the
    kernel bills the packets that it handles meanwhile to whoever computes

Everything else is then predicted: other sizes, other rates, other numbers of hosts. All hosts share this machine's
cores, and so they do in the described cluster. The latency of links can't be shaped here: the fitted one is what the
machine needs to pass a message on, so how the emulator treats latency is *not* validated by this.

The exit status is 1 if predictions are not as good as wanted: a geometric-mean error of 5 %, less than half of what
bytes over bandwidth alone gives, and each cell within 15 % or twice the spread of its own repeats (--quick: 0 anyway).

Writes cells.json (what was measured), validate.json (with predictions and errors) and table.md.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from tabulate import tabulate
from tqdm import tqdm

from bench.common.command_line import description, refused
from bench.common.environment import environment
from bench.common.files import read_json, write_atomically, write_json
from bench.common.launch import for_ranks
from bench.common.statistics import Quartiles, mean_error
from bench.common.texts import bytes_text
from bench.shaped.codecs import METHODS
from bench.shaped.hosts import Hosts, HostsError, why_not
from ring.cluster import Cluster, Link, Node, as_table
from ring.emulator import Emulator
from ring.machine import usable_cores
from ring.plan import CHUNK_BYTES
from ring.program import Instruction, record_all
from ring.segments import cut_segments

SIZES = tuple(64 * 1024 * 4**power for power in range(6))
RATES_MBPS = (100, 300, 1000)
HOSTS = (2, 3, 4, 6)
#: What is fitted to; a cell is predicted if its size, its rate or its number of hosts is another.
CALIBRATION_SIZES, CALIBRATION_RATES, CALIBRATION_HOSTS = (SIZES[0], SIZES[2], SIZES[4]), (100, 1000), (2, 6)
#: Calls whose virtual time is averaged, after one that empties the buckets.
EMULATED_CALLS = 3
#: The sets of parameters that are tried at most.
MOST_FITS = 700
WANTED_MEAN_ERROR, WANTED_ERROR = 0.05, 0.15
#: Seconds that all ranks of a set of hosts may take.
TIMEOUT_S = 1800.0
FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Cell:
    """One measured all-reduce."""

    method: str
    size_bytes: int
    rate_mbps: int
    hosts: int
    times_s: tuple[float, ...]
    bytes_sent: float

    @property
    def time_s(self) -> float:
        return statistics.median(self.times_s)

    @property
    def spread(self) -> float:
        """The interquartile range of the repeats over their median."""
        quartiles = Quartiles.of(self.times_s)
        return (quartiles.high - quartiles.low) / self.time_s

    @property
    def calibrates(self) -> bool:
        return (
            self.size_bytes in CALIBRATION_SIZES
            and self.rate_mbps in CALIBRATION_RATES
            and self.hosts in CALIBRATION_HOSTS
        )

    @property
    def naive_s(self) -> float:
        """Bytes over bandwidth alone."""
        return self.bytes_sent * 8 / (self.rate_mbps * 1e6)


class Model:
    """The described cluster that cells are predicted with."""

    NAMES = (
        "share of the rate",
        "share of the burst",
        "share of the codecs' time",
        "latency_us",
        "call_us",
        "overhead_us",
        "copy_us_per_mib",
    )
    BEGIN = (0.94, 0.5, 0.9, 50.0, 20.0, 50.0, 400.0)

    def __init__(self, rates: Mapping[str, float], bursts: Mapping[int, int], cores: int) -> None:
        self._rates, self._bursts, self._cores = dict(rates), dict(bursts), cores
        self.parameters = self.BEGIN
        self._programs: dict[tuple[str, int, int], list[list[Instruction]]] = {}

    def cluster(self, hosts: int, rate_mbps: int) -> Cluster:
        share, burst, codecs, latency_us, call_us, overhead_us, copy_us = self.parameters
        return Cluster(
            name=f"{hosts}-shaped-hosts",
            source="fitted by bench.validate",
            nodes=hosts,
            shared_cores=self._cores,
            node=Node(call_us=call_us, overhead_us=overhead_us, copy_us_per_mib=copy_us),
            link=Link(
                latency_us=latency_us,
                bandwidth_gbps=rate_mbps / 1e3 * share,
                burst_bytes=int(self._bursts[rate_mbps] * burst),
            ),
            rates={name: rate / codecs for name, rate in self._rates.items()},
        )

    def time_s(self, cell: Cell) -> float:
        """The seconds of a call: the mean of several, after a first one."""
        programs = self._program(cell)
        emulator = Emulator(self.cluster(cell.hosts, cell.rate_mbps))
        clocks_s = [0.0] * cell.hosts
        for call in range(1 + EMULATED_CALLS):
            clocks_s = emulator.run(programs, clocks_s, [None] * cell.hosts)
            if call == 0:
                begin_s = statistics.mean(clocks_s)
        return (statistics.mean(clocks_s) - begin_s) / EMULATED_CALLS

    def _program(self, cell: Cell) -> list[list[Instruction]]:
        key = cell.method, cell.size_bytes, cell.hosts
        if key not in self._programs:
            length = cell.size_bytes // FLOAT32.itemsize
            codec = METHODS[cell.method](length)
            segments = cut_segments(codec.regions(length, FLOAT32), cell.hosts, CHUNK_BYTES)
            self._programs[key] = record_all(codec, length, FLOAT32, "all_reduce", segments, mean=True)
        return self._programs[key]

    def fit(self, cells: Sequence[Cell]) -> None:
        """Choose the parameters with the least geometric-mean error, which is what predictions are judged by."""

        def loss(logarithms: Any) -> float:
            self.parameters = tuple(np.exp(logarithms).tolist())
            return sum(abs(math.log(self.time_s(cell) / cell.time_s)) for cell in cells) / len(cells)

        found = minimize(
            loss,
            np.log(self.BEGIN),
            method="Nelder-Mead",
            options={"maxfev": MOST_FITS, "xatol": 0.01, "fatol": 1e-5, "adaptive": True},
        )
        self.parameters = tuple(np.exp(found.x).tolist())


def measure(
    hosts: Sequence[int], rates_mbps: Sequence[int], sizes: Sequence[int], repeats: int, seconds: float
) -> dict[str, Any]:
    """Run all cells; what was found, in JSON's types."""
    found: dict[str, Any] = {"cells": [], "shaping": {}}
    plan = {"methods": list(METHODS), "sizes": list(sizes), "repeats": repeats, "seconds": seconds}
    command = [sys.executable, "-m", "bench.shaped.validation_ranks", json.dumps(plan)]
    variables = for_ranks(1)
    sets = [(number, rate_mbps) for number in hosts for rate_mbps in rates_mbps]
    for number, rate_mbps in tqdm(sets, desc="hosts x rates", file=sys.stderr):
        with Hosts(number, rate_mbps) as shaped:
            where = f"the job on {number} hosts at {rate_mbps} Mbit/s"
            try:
                done = shaped.mpirun(command, timeout_s=TIMEOUT_S, environment=variables)
            except subprocess.TimeoutExpired:
                raise HostsError(f"{where} did not end within {TIMEOUT_S:g} s") from None
            found["shaping"][str(rate_mbps)] = shaped.describe()
        if done.returncode:
            raise HostsError(f"{where} failed: {done.stderr.strip()}")
        cells = json.loads(done.stdout.splitlines()[-1])
        found["cells"] += [{"hosts": number, "rate_mbps": rate_mbps, **cell} for cell in cells]
    return found


def as_cell(found: Mapping[str, Any]) -> Cell:
    return Cell(
        found["method"],
        found["size_bytes"],
        found["rate_mbps"],
        found["hosts"],
        tuple(found["times_s"]),
        found["bytes_sent"],
    )


def codec_rates(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Amounts per second of processor time, over all calibrating cells."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for cell in found:
        if as_cell(cell).calibrates:
            for name, (amount, seconds) in cell["amounts_s"].items():
                totals[name][0] += amount
                totals[name][1] += seconds
    return {name: amount / seconds for name, (amount, seconds) in totals.items() if seconds}


def compare(found: Mapping[str, Any]) -> dict[str, Any]:
    """Fit, predict, and judge."""
    cells = [as_cell(cell) for cell in found["cells"]]
    bursts = {int(rate): shaping["burst_bytes"] for rate, shaping in found["shaping"].items()}
    model = Model(codec_rates(found["cells"]), bursts, found["cores"])
    model.fit([cell for cell in cells if cell.calibrates])
    rows: list[dict[str, Any]] = []
    for cell in cells:
        predicted_s = model.time_s(cell)
        error = predicted_s / cell.time_s - 1
        bound = max(WANTED_ERROR, 2 * cell.spread)
        rows.append(
            {
                "method": cell.method,
                "hosts": cell.hosts,
                "rate_mbps": cell.rate_mbps,
                "size_bytes": cell.size_bytes,
                "fitted": cell.calibrates,
                "measured_s": cell.time_s,
                "spread": cell.spread,
                "predicted_s": predicted_s,
                "error": error,
                "bound": bound,
                "within": abs(error) <= bound,
                "naive_s": cell.naive_s,
                "naive_error": cell.naive_s / cell.time_s - 1,
            }
        )
    predicted = [row for row in rows if not row["fitted"]]
    error = mean_error([row["error"] for row in predicted])
    naive = mean_error([row["naive_error"] for row in predicted])
    beyond = sum(not row["within"] for row in predicted)
    largest = max(found["shaping"], key=int)
    return {
        "parameters": dict(zip(Model.NAMES, model.parameters, strict=True)),
        "cluster": as_table(model.cluster(max(cell.hosts for cell in cells), int(largest))),
        "rows": rows,
        "mean_error": error,
        "naive_mean_error": naive,
        "by_method": {
            name: mean_error([row["error"] for row in predicted if row["method"] == name]) for name in METHODS
        },
        "within": len(predicted) - beyond,
        "predicted": len(predicted),
        "met": error <= WANTED_MEAN_ERROR and error < naive / 2 and not beyond,
    }


def report(result: Mapping[str, Any]) -> str:
    """The table and what it comes to, as Markdown."""
    lines = [
        [
            row["method"],
            row["hosts"],
            row["rate_mbps"],
            bytes_text(row["size_bytes"]),
            f"{row['measured_s'] * 1e3:.2f}",
            f"{row['spread']:.0%}",
            f"{row['predicted_s'] * 1e3:.2f}",
            f"{row['error']:+.1%}",
            f"{row['naive_error']:+.1%}",
            "fitted" if row["fitted"] else "" if row["within"] else f"beyond {row['bound']:.0%}",
        ]
        for row in result["rows"]
    ]
    headings = [
        "method",
        "hosts",
        "Mbit/s",
        "size",
        "measured ms",
        "spread",
        "predicted ms",
        "error",
        "bytes / rate",
        "",
    ]
    table = tabulate(
        lines, headings, tablefmt="github", disable_numparse=True, colalign=["left"] + ["right"] * 8 + ["left"]
    )
    parameters = ", ".join(f"{name} {value:.4g}" for name, value in result["parameters"].items())
    methods = ", ".join(f"{name} {error:.1%}" for name, error in result["by_method"].items())
    return (
        f"{table}\n\n"
        f"Predicted, not fitted: {result['predicted']} cells. Geometric-mean error {result['mean_error']:.1%} "
        f"({methods}); bytes over bandwidth alone {result['naive_mean_error']:.1%}. Within {WANTED_ERROR:.0%} or twice "
        f"the repeats' spread: {result['within']} of {result['predicted']}. "
        f"Wanted: an error of at most {WANTED_MEAN_ERROR:.0%}, less than half of bytes over bandwidth's, and every "
        f"cell within its bound: {'met' if result['met'] else 'not met'}.\nFitted: {parameters}.\n"
        "The latency of links is not shaped here, so how the emulator treats it is not validated.\n"
    )


def redraw(path: Path) -> list[Path]:
    """The table again, of the validate.json at `path`.

    Raises:
        LookupError, TypeError, ValueError: the record isn't as it should be.
    """
    table = path.with_name("table.md")
    write_atomically(table, report(read_json(path)).encode())
    return [table]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.validate", description=description(__doc__))
    parser.add_argument("--out", type=Path, default=Path("results/validate"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="few cells, within a minute: checks that all of it works")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="measurements of each cell (5)")
    parser.add_argument("--seconds", type=float, default=0.3, help="about how long one lasts (0.3)")
    parser.add_argument("--again", action="store_true", help="measure nothing, predict what FOLDER/cells.json has")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or not 0 < options.seconds < 60:
        parser.error("--repeats must be at least 1, and --seconds above 0 and below 60")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    cells_path = options.out / "cells.json"
    reason = None if options.again else why_not()
    if reason is not None:
        print(f"validate is skipped: {reason}")
        return 0
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if options.again:
            found = json.loads(cells_path.read_text())
        else:
            found = _measure(options)
            write_json(cells_path, found)
        result = compare(found)
        text = report(result)
        about = {key: value for key, value in found.items() if key not in ("cells", "shaping")}
        write_json(options.out / "validate.json", {**about, **result})
        write_atomically(options.out / "table.md", text.encode())
    except (HostsError, OSError) as error:
        return refused(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if not options.again:
            raise
        print(f"error: {cells_path}: not what a validation has measured ({error!r})", file=sys.stderr)
        return 2
    print(text)
    return 0 if result["met"] or options.quick else 1


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cells that the options ask for, and where they were measured."""
    if options.quick:
        found = measure((2, 3), (100, 300), SIZES[:3], 2, 0.05)
    else:
        found = measure(HOSTS, RATES_MBPS, SIZES, options.repeats, options.seconds)
    return found | {
        "cores": usable_cores(),
        "chunk_bytes": CHUNK_BYTES,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": f"python -m bench.validate {shlex.join(sys.argv[1:])}".rstrip(),
        **environment(),
    }
