"""Measure the network and the processors that this runs on, and describe them as a cluster for the emulator.

    mpirun -n 2 python -m ring.calibrate --out results/this-machine.toml

Four things are timed between each rank and its successor (`ring.probe`): round trips, streams of messages in one
direction and in both at once, and after a rest; and on each rank, alone and all at once, adding, copying and scaling.
From them come the numbers of the model that `ring.emulator` computes with, in this order:

    call_us                         processor time of a collective beside that of its messages
    overhead_us, copy_us_per_mib    processor time of a message at each end = overhead + copy * bytes, a line through
                                    what streams in both directions took, of all sizes that the ring sends (and through
                                    half of each way, if processors limit it); plus, for each message, what the ring
                                    itself computes
    bandwidth_gbps                  where the ends of a stream mostly wait for the link, the rate of that stream; else
                                    what half a round trip = A + B * bytes leaves: 1 / (B - 2 * copy)
    latency_us                      A - 2 * overhead
    full_duplex                     whether streams in both directions take about as long as one, if the link limits
    burst_bytes                     what passes at once after a rest, where the link limits and it can be told from the
                                    spread; messages that the round trips time are sent right behind others then, which
                                    have emptied the token bucket
    add, copy, scale                bytes per second with all ranks at work, over vectors of 64 KiB to 16 MiB

Lines are fitted to medians by relative errors (`ring.fit`). The table of residuals says where a message does not take
what the model says; over shared memory that is where MPI changes its protocol. Not measured, and written as the
defaults: jitter, packet loss, stragglers, and computing that is slowed down by sending.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from ring.abort import check_launcher, end_together
from ring.bench import parse_bytes, positive
from ring.cluster import Cluster, Link, Node, write
from ring.fit import Line, Samples, fit_line, flag, quartiles, relative_errors, rounded, table
from ring.machine import core_quota, cores_allowed, cores_together, processor
from ring.probe import RATES, CalibrationProbe, LinkTimes
from ring.world import MPI

MIB = 1 << 20
#: Ratio of the time of streams in both directions to that of one, from which on a port counts as half duplex. Without
#: noise it would be 2.
HALF_DUPLEX = 1.5
#: Least share of a byte's time that is left for the link if both ends' copies take more: they overlap then.
LEAST_WIRE = 0.1
#: A link is written separately if it differs from the median by more than its own spread and this share.
NOTABLE = 0.1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m ring.calibrate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/this-machine.toml"),
        metavar="FILE",
        help="written anew (results/this-machine.toml)",
    )
    parser.add_argument("--max-bytes", type=parse_bytes, default="4M", metavar="B", help="largest message (4M)")
    parser.add_argument(
        "--repeats", type=positive, default=21, metavar="N", help="measurements of each kind at most (21)"
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="about how long each kind of measurement lasts for a link (2)"
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds before a silent neighbour is an error (60)"
    )
    options = parser.parse_args(arguments)
    if not 0 < options.seconds < math.inf or not 0 < options.timeout < math.inf:
        parser.error("--seconds and --timeout must be positive numbers of seconds")
    if options.max_bytes < LEAST_MAX_BYTES:
        parser.error(f"--max-bytes must be at least {LEAST_MAX_BYTES}, or there is no bandwidth to see")
    if problem := unwritable(options.out):
        parser.error(f"--out: {problem}")
    return options


#: Smallest size of the largest message.
LEAST_MAX_BYTES = 64 * 1024


def message_sizes(most: int) -> list[int]:
    """Sizes of messages: 0 and powers of 2 up to `most`; of small ones each eighth, as they all take the same time."""
    sizes = [0, *(1 << power for power in (6, 9, 12)), *(1 << power for power in range(14, most.bit_length()))]
    return sizes if sizes[-1] == most else [*sizes, most]


def unwritable(path: Path) -> str:
    """The reason why a file can't be written there, found before an hour of work; empty if it can."""
    if path.is_dir():
        return f"{path} is a folder"
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return ""
    except OSError as error:
        return f"{path} can't be written ({error.strerror or error})"


# From timings to a model


@dataclass(frozen=True)
class LinkFit:
    """The model of a link, and the processor time of a message at its ends, by MPI alone.

    Attributes:
        link: latency, bandwidth, burst and whether it is full duplex.
        overhead_s: processor seconds of a message at each end.
        copy_s: processor seconds of a byte at each end.
        spread_us, spread_gbps: latency and bandwidth by single repeats: distance between the quartiles.
        limited_by: "link" or "processor": what a stream of the largest messages waits for.
    """

    link: Link
    overhead_s: float
    copy_s: float
    spread_us: float
    spread_gbps: float
    limited_by: str

    def one_way_s(self, num_bytes: int) -> float:
        """Seconds from the sender's call until the receiver has the message; the token bucket is empty."""
        wire_s = num_bytes / self.link.bytes_per_s
        return self.link.latency_us * 1e-6 + wire_s + 2 * self.end_s(num_bytes)

    def stream_s(self, num_bytes: int, both_ways: bool) -> float:
        """Seconds of a message in a long stream: those of what is slowest, an end or the link."""
        ways = 2 if both_ways else 1
        wire_s = num_bytes / self.link.bytes_per_s * (1 if self.link.full_duplex else ways)
        return max(ways * self.end_s(num_bytes), wire_s)

    def end_s(self, num_bytes: int) -> float:
        """Processor seconds of a message at either end."""
        return self.overhead_s + self.copy_s * num_bytes


def fit_link(times: LinkTimes) -> LinkFit:
    """Fit the model of one link, as the module's text says."""
    stream_sizes = np.array(times.stream_sizes)
    busy = np.median(times.busy, axis=0)
    one_way = np.median(times.one_way, axis=0)
    limited = times.link_limited
    if limited:
        handling = fit_line(stream_sizes, np.maximum(busy, 1e-9))
    else:  # half of the way is what each end needs, measured once more: with memory that is in the caches
        handling = fit_line([*stream_sizes, *times.sizes], [*np.maximum(busy, 1e-9), *one_way / 2])
    median = fit_line(times.sizes, one_way)

    def model(line: Line) -> tuple[float, float]:
        """Latency in microseconds and bandwidth in Gbit/s, from a line through half round trips."""
        wire_s = 1 / times.bytes_per_s if limited else max(line.slope - 2 * handling.slope, LEAST_WIRE * line.slope)
        return max(0.0, line.intercept - 2 * handling.intercept) * 1e6, 8e-9 / wire_s

    latency_us, bandwidth_gbps = model(median)
    single = [model(fit_line(times.sizes, row)) for row in times.one_way]
    spread_us = _spread([latency for latency, _ in single])
    spread_gbps = _spread(
        8e-9 * stream_sizes[-1] / times.streams["one way"][:, -1] if limited else [rate for _, rate in single]
    )
    link = Link(latency_us=rounded(latency_us), bandwidth_gbps=rounded(bandwidth_gbps), burst_bytes=times.burst_bytes)
    fit = LinkFit(link, handling.intercept, handling.slope, spread_us, spread_gbps, "link" if limited else "processor")
    one_s, both_s = (float(np.median(times.streams[name][:, -1])) for name in ("one way", "both ways"))
    if limited and both_s > HALF_DUPLEX * one_s:
        fit = replace(fit, link=replace(link, full_duplex=False))
    return fit


def _spread(samples: Samples) -> float:
    low, _, high = quartiles(samples)
    return high - low


def common_link(fits: Sequence[LinkFit]) -> tuple[LinkFit, dict[int, Link]]:
    """The link that most ranks have, and by rank those that differ from it."""

    def median(values: Sequence[float]) -> float:
        return rounded(statistics.median(values))

    full_duplex = sum(fit.link.full_duplex for fit in fits) * 2 >= len(fits)
    link = Link(
        latency_us=median([fit.link.latency_us for fit in fits]),
        bandwidth_gbps=median([fit.link.bandwidth_gbps for fit in fits]),
        burst_bytes=int(statistics.median(fit.link.burst_bytes for fit in fits)),
        full_duplex=full_duplex,
    )
    others = {}
    for rank, fit in enumerate(fits):
        # What a small message takes is its latency and both ends' work.
        handling_us = 2e6 * fit.overhead_s
        apart = (
            (fit.link.latency_us + handling_us, link.latency_us + handling_us, fit.spread_us),
            (fit.link.bandwidth_gbps, link.bandwidth_gbps, fit.spread_gbps),
        )
        if any(abs(own - common) > max(spread, NOTABLE * common) for own, common, spread in apart):
            others[rank] = replace(link, latency_us=fit.link.latency_us, bandwidth_gbps=fit.link.bandwidth_gbps)
    base = replace(
        fits[0],
        link=link,
        overhead_s=statistics.median(fit.overhead_s for fit in fits),
        copy_s=statistics.median(fit.copy_s for fit in fits),
    )
    return base, others


# The report


def residual_row(label: str, samples: Samples, fitted_s: float) -> list[str]:
    """Row of a table: a size, its quartiles in microseconds, what the model says, and the relative error."""
    low, median, high = quartiles(samples)
    error = float(relative_errors(median, fitted_s)) if median > 0 else 0.0
    return [
        label,
        f"{median * 1e6:.2f}",
        f"{low * 1e6:.2f}-{high * 1e6:.2f}",
        f"{fitted_s * 1e6:.2f}",
        f"{error:+.1%}",
        flag(error),
    ]


COLUMNS = ("bytes", "measured", "quartiles", "fitted", "error")


def residuals(times: LinkTimes, fit: LinkFit) -> str:
    """Tables of what was measured and what the model says, for every size."""
    behind = ", each behind messages that emptied the token bucket" if times.burst_bytes else ""
    parts = [f"one way, half a round trip{behind} (us)"]
    sizes, stream_sizes = list(enumerate(times.sizes)), list(enumerate(times.stream_sizes))
    rows = [residual_row(str(size), times.one_way[:, i], fit.one_way_s(size)) for i, size in sizes]
    parts.append(table(COLUMNS, rows))
    for name, measured in times.streams.items():
        rows = [
            residual_row(str(size), measured[:, i], fit.stream_s(size, name == "both ways")) for i, size in stream_sizes
        ]
        parts += [f"\na stream, {name}, per message (us)", table(COLUMNS, rows)]
    rows = [residual_row(str(size), times.busy[:, i], fit.end_s(size)) for i, size in stream_sizes]
    parts += ["\nprocessor time at each end, per message (us)", table(COLUMNS, rows)]
    return "\n".join(parts)


def rate_rows(alone: Sequence[Rates], together: Sequence[Rates], written: Mapping[str, float]) -> str:
    """Table of GB per second of CPU time, by vector size.

    Medians over ranks and repeats, quartiles, and the error if the one rate of the file is taken for all sizes.
    """
    rows = []
    for name in RATES:
        for size in together[0][name]:
            cells = [name, str(size)]
            for ranks in (alone, together):
                low, median, high = quartiles([rate for rank in ranks for rate in rank[name][size]])
                cells += [f"{median / 1e9:.2f}", f"{low / 1e9:.2f}-{high / 1e9:.2f}"]
            error = median / written[name] - 1  # of the time
            rows.append([*cells, f"{error:+.1%}", flag(error)])
    return table(("rate", "vector", "one rank", "quartiles", "all ranks", "quartiles", "error"), rows)


Rates = Mapping[str, Mapping[int, Sequence[float]]]


def shared_cores(comm: MPI.Intracomm) -> tuple[int | None, str]:
    """The cores that all ranks share if they are on one machine, and a sentence about it. Collective."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()  # the same in all of its name spaces
    except OSError:
        machine = MPI.Get_processor_name()
    known: list[tuple[str, set[int], float]] = comm.allgather((machine, cores_allowed(), core_quota()))
    machines = {name for name, _, _ in known}
    cores = {
        name: cores_together([(allowed, quota) for at, allowed, quota in known if at == name]) for name in machines
    }
    if len(machines) == 1:
        text = f"{comm.size} ranks on one machine share {cores[machine]} cores"
        return cores[machine], text + (", so they disturb each other" if comm.size > cores[machine] else "")
    most = max(sum(at == name for at, _, _ in known) for name in machines)
    text = f"{comm.size} ranks on {len(machines)} machines"
    return None, text + (f", up to {most} on one, which a cluster's file can't say" if most > 1 else "")


def calibrate(comm: MPI.Intracomm, options: argparse.Namespace) -> tuple[Cluster, str] | None:
    """Measure the links and the processors of all ranks. Collective.

    Returns:
        The cluster and the report, on rank 0; None on the others.
    Cost: for each link about 3 * `options.seconds` and two more; for each rank two.
    """
    sizes = message_sizes(options.max_bytes)
    probe = CalibrationProbe(comm, sizes, options.timeout)
    cores, sharing = shared_cores(comm)
    own_links: dict[int, LinkTimes] = {}
    for rank in range(comm.size):
        times = probe.link(rank, options.repeats, options.seconds)
        if times is not None:
            own_links[rank] = times
    repeats = min(options.repeats, 11)
    own = probe.rates(repeats, False), probe.rates(repeats, True), probe.bookkeeping_s(repeats)
    everything = comm.gather((own_links, *own))
    if comm.rank > 0 or everything is None:
        return None
    links = [everything[rank][0][rank] for rank in range(comm.size)]
    alone, together = [[entry[column] for entry in everything] for column in (1, 2)]
    fits = [fit_link(times) for times in links]
    base, others = common_link(fits)
    # What MPI does for such small messages is counted once, as part of the line through all sizes. The least of both,
    # as they are measured at different times and other processes cost them caches.
    call_s, by_ring_s = (min(entry[3][part] for entry in everything) for part in (0, 1))
    tiny = np.array(links[0].stream_sizes) <= 512
    by_mpi_s = min(float(times.busy[:, tiny].min()) for times in links)
    bookkeeping_s = max(0.0, by_ring_s - by_mpi_s)
    rates = {
        name: rounded(statistics.median(float(np.median(rank[name][size])) for rank in together for size in rank[name]))
        for name in RATES
    }
    command = f"mpirun -n {comm.size} python -m ring.calibrate {shlex.join(sys.argv[1:])}".strip()
    library = " ".join(MPI.Get_library_version().split("\n")[0].strip("\0 ").split())
    today = datetime.datetime.now(datetime.UTC).date()
    about = (
        f"measured {today} by `{command}` on {processor()} ({os.cpu_count()} cores, {sharing}), {library}, "
        f"Python {platform.python_version()}, NumPy {np.__version__}"
    )
    cluster = Cluster(
        name=options.out.stem,
        source=about,
        nodes=comm.size,
        shared_cores=cores,
        node=Node(
            call_us=rounded(call_s * 1e6),
            overhead_us=rounded((base.overhead_s + bookkeeping_s) * 1e6),
            copy_us_per_mib=rounded(base.copy_s * MIB * 1e6),
        ),
        link=base.link,
        rates=rates,
        other_links=others,
    )
    return cluster, report(cluster, links, fits, base, bookkeeping_s, rate_rows(alone, together, rates))


def report(
    cluster: Cluster,
    links: Sequence[LinkTimes],
    fits: Sequence[LinkFit],
    base: LinkFit,
    bookkeeping_s: float,
    rates: str,
) -> str:
    """Text with all that was found."""
    parts = [cluster.source, "\nlinks, with the distance between the quartiles of single repeats"]
    rows = []
    for rank, (times, fit) in enumerate(zip(links, fits, strict=True)):
        errors = relative_errors(np.median(times.one_way, axis=0), [fit.one_way_s(size) for size in times.sizes])
        rows.append(
            [
                f"{rank}->{(rank + 1) % len(links)}",
                f"{fit.link.latency_us:.2f}",
                f"{fit.spread_us:.2f}",
                f"{fit.link.bandwidth_gbps:.4g}",
                f"{fit.spread_gbps:.3g}",
                fit.limited_by,
                str(fit.link.burst_bytes),
                "full" if fit.link.full_duplex else "half",
                f"{np.abs(errors).max():.1%}",
                "  written apart" if rank in cluster.other_links else "",
            ]
        )
    head = ("link", "latency us", "+-", "Gbit/s", "+-", "limited by", "burst", "duplex", "largest error")
    parts.append(table(head, rows))
    parts.append(
        f"\na message costs each end {base.overhead_s * 1e6:.2f} us in MPI, {bookkeeping_s * 1e6:.2f} us in the "
        f"ring, and {cluster.node.copy_us_per_mib:.1f} us per MiB; a collective {cluster.node.call_us:.2f} us more"
    )
    if not cluster.link.burst_bytes:
        parts.append("no token bucket was found, so `burst_bytes` is 0")
    for rank, (times, fit) in enumerate(zip(links, fits, strict=True)):
        if rank == 0 or rank in cluster.other_links:
            parts += [f"\nlink {rank}->{(rank + 1) % len(links)}", residuals(times, fit)]
    parts += ["\ncomputing, GB per second of processor time, and what the one rate that is written misses", rates]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    comm = MPI.COMM_WORLD
    end_together(comm)
    check_launcher(comm)
    status = 0
    options = None
    if comm.rank == 0:
        try:
            options = parse(arguments)
            if comm.size < 2:
                print("error: a network needs 2 ranks at least: mpirun -n 2 python -m ring.calibrate", file=sys.stderr)
                options, status = None, 2
        except SystemExit as stop:
            status = int(stop.code or 0)
    options, status = comm.bcast((options, status))
    if options is None:
        return int(status)
    measured = calibrate(comm, options)
    if measured is not None:
        cluster, text = measured
        print(text, flush=True)
        try:
            write(cluster, options.out)
            print(f"\nwritten to {options.out}", flush=True)
        except OSError as error:
            print(f"error: {options.out} can't be written ({error.strerror or error})", file=sys.stderr, flush=True)
            status = 2
    return int(comm.bcast(status))


if __name__ == "__main__":
    sys.exit(main())
