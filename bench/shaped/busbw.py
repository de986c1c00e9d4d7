"""The ring between real hosts with slow links, beside MPI_Allreduce, Gloo and plain TCP; and GradiVeQ beside plain.

    python -m bench.shaped_busbw                     # all: 2 and 6 hosts at 100, 300 and 1000 Mbit/s
    python -m bench.shaped_busbw --hosts 6 --rates 100 --parts aggregation

The hosts are network namespaces on this machine (`bench.shaped.hosts`: Linux, root); they share its cores.

Two parts. *busbw*: all-reduce of float32 in place; busbw = bytes / time · 2(N-1)/N, what each link carries, as a
fraction of what one plain TCP stream carries from host 0 to host 1 in the same run. *aggregation*: a whole gradient by
plain ring all-reduce, by QSGD (4 bits) and by GradiVeQ's codec with K = 256 and d = 32 over all of it, so that the
bytes are an eighth; the bases are given (random and orthonormal), nothing is sampled.

Writes busbw.json and aggregation.json into --out: {"environment": {versions, system, cpu, cores, commit, mpi, command},
"links": [what `Hosts.describe` says, of each set of hosts and rate], "rows": […]}. Every row has hosts, rate_mbps,
times_s (by repeat), time_s (their median), time_quartiles_s, calls (averaged in a time), cpu_s (processor time of a
call, mean over ranks), and

    busbw        implementation, size_bytes, busbw_bytes_per_s, fraction and fraction_quartiles (of the TCP stream),
                 wrong (elements). The row of "TCP stream" has instead bytes_per_s, quartiles_bytes_per_s,
                 all_at_once_bytes_per_s (the slowest where every host sends to the next) and latency_us (of 8 bytes
                 by MPI).
    aggregation  method, size_bytes, bytes_sent and messages (mean over ranks), spans_s (seconds of a call by kind, mean
                 over ranks: "wait" is what is exposed), times_faster (than plain) and of_bytes (that, as a share of
                 what the bytes allow).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from bench.common.environment import environment
from bench.common.files import write_json
from bench.common.launch import for_ranks
from bench.common.texts import bytes_text
from bench.shaped.hosts import MOST_HOSTS, Hosts, HostsError, why_not
from ring.bench import parse_bytes, positive
from ring.machine import usable_cores

PARTS = ("busbw", "aggregation")
RATES_MBPS = {"busbw": (100, 300, 1000), "aggregation": (100, 200, 1000)}
ELEMENTS = 4 * 1024 * 1024
#: About how long one timed stretch of an aggregation lasts.
AGGREGATION_S = 0.5
#: The longest that links may take for one all-reduce: it bounds the sizes at slow rates.
MOST_LINE_S = 3.0
RANK_TIMEOUT_S = 120.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.shaped_busbw",
        description="The ring beside MPI_Allreduce, Gloo and plain TCP between hosts with slow links.",
    )
    parser.add_argument("--hosts", type=positive, nargs="+", default=[2, 6], metavar="N", help="how many (2 6)")
    parser.add_argument("--rates", type=positive, nargs="+", metavar="MBPS", help="of links, in Mbit/s")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--min-bytes", type=parse_bytes, default="64K", metavar="B", help="smallest vector (64K)")
    parser.add_argument("--max-bytes", type=parse_bytes, default="64M", metavar="B", help="largest vector (64M)")
    parser.add_argument("--repeats", type=positive, default=7, metavar="N", help="measurements of each (7)")
    parser.add_argument("--seconds", type=float, default=0.2, help="about how long one of them lasts (0.2)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one set of hosts and rate (900)")
    parser.add_argument("--out", type=Path, default=Path("results/shaped-hosts"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    if not all(2 <= number <= MOST_HOSTS for number in options.hosts):
        parser.error(f"--hosts must be 2 to {MOST_HOSTS}")
    if not 0 < options.seconds < 60 or not 0 < options.timeout < 1e6:
        parser.error("--seconds must be above 0 and below 60, --timeout above 0")
    if options.max_bytes < options.min_bytes or options.min_bytes % 4:
        parser.error("--max-bytes must be at least --min-bytes, and that a multiple of 4")
    return options


def line_s(num_bytes: float, hosts: int, rate_mbps: float) -> float:
    """Seconds that the links need for an all-reduce of so many bytes."""
    return 2 * (hosts - 1) / hosts * num_bytes * 8 / (rate_mbps * 1e6)


def sizes(options: argparse.Namespace, hosts: int, rate_mbps: float) -> list[int]:
    """The sizes of vectors, each four times the one before, up to the largest that MOST_LINE_S allows."""
    found: list[int] = []
    size = options.min_bytes
    while size <= options.max_bytes and (not found or line_s(size, hosts, rate_mbps) <= MOST_LINE_S):
        found.append(size)
        size *= 4
    return found


def measure(part: str, shaped: Hosts, options: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """(the MPI, rows) of one part on the hosts as they are shaped now."""
    plan: dict[str, Any] = {
        "part": part,
        "addresses": shaped.addresses,
        "device": "eth0",
        "rate_mbps": shaped.rate_mbps,
        "burst_bytes": shaped.burst_bytes,
        "repeats": options.repeats,
        "timeout_s": RANK_TIMEOUT_S,
    }
    if part == "busbw":
        plan |= {"sizes": sizes(options, shaped.number, shaped.rate_mbps), "seconds": options.seconds}
    else:
        plain_s = line_s(4 * ELEMENTS, shaped.number, shaped.rate_mbps)
        plain = max(1, round(AGGREGATION_S / plain_s))
        eighth = max(1, round(8 * AGGREGATION_S / plain_s))
        plan |= {"elements": ELEMENTS, "calls": {"rar": plain, "qsgd": eighth, "linear": eighth}}
    done = shaped.mpirun(
        [sys.executable, "-m", "bench.shaped.busbw_ranks", json.dumps(plan)],
        timeout_s=options.timeout,
        environment=for_ranks(1),
    )
    if done.returncode:
        raise HostsError(
            f"{part} on {shaped.number} hosts at {shaped.rate_mbps:g} Mbit/s failed: {done.stderr.strip()}"
        )
    said = json.loads(done.stdout.splitlines()[-1])
    return said["mpi"], [{"hosts": shaped.number, "rate_mbps": shaped.rate_mbps, **row} for row in said["rows"]]


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each method's row how much faster than plain it is."""
    plain = {(row["hosts"], row["rate_mbps"]): row for row in rows if row["method"] == "rar"}
    for row in rows:
        other = plain[row["hosts"], row["rate_mbps"]]
        row["times_faster"] = other["time_s"] / row["time_s"]
        row["of_bytes"] = row["times_faster"] / (other["bytes_sent"] / row["bytes_sent"])


def busbw_table(rows: Sequence[dict[str, Any]]) -> str:
    table = []
    for row in rows:
        if row["implementation"] == "TCP stream":
            at_once = row["all_at_once_bytes_per_s"] / row["bytes_per_s"]
            note = f"all at once {at_once:.3f}, {row['latency_us']:.0f} us"
            table.append(
                [row["hosts"], row["rate_mbps"], "", "TCP stream", "", row["bytes_per_s"] / 1e6, 1, "", "", note]
            )
            continue
        low, high = row["fraction_quartiles"]
        table.append(
            [
                row["hosts"],
                row["rate_mbps"],
                bytes_text(row["size_bytes"]),
                row["implementation"],
                row["time_s"] * 1e3,
                row["busbw_bytes_per_s"] / 1e6,
                row["fraction"],
                f"{low:.3f}-{high:.3f}",
                row["cpu_s"] * 1e3,
                f"{row['wrong']} wrong" if row["wrong"] else "",
            ]
        )
    head = ["hosts", "Mbit/s", "size", "", "ms", "busbw MB/s", "of TCP", "quartiles", "cpu ms", ""]
    formats = ("g", "g", "", "", ".2f", ".2f", ".3f", "", ".2f", "")
    return str(tabulate(table, head, floatfmt=formats, disable_numparse=[7]))


def aggregation_table(rows: Sequence[dict[str, Any]]) -> str:
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["spans_s"]))
    table = [
        [
            row["hosts"],
            row["rate_mbps"],
            row["method"],
            row["bytes_sent"],
            row["time_s"] * 1e3,
            "-".join(f"{time_s * 1e3:.1f}" for time_s in row["time_quartiles_s"]),
            row["times_faster"],
            row["of_bytes"],
            *(row["spans_s"].get(kind, 0.0) * 1e3 for kind in kinds),
            row["cpu_s"] * 1e3,
        ]
        for row in rows
    ]
    head = ["hosts", "Mbit/s", "method", "bytes", "ms", "quartiles", "x faster", "of bytes", *kinds, "cpu ms"]
    formats = ("g", "g", "", ".0f", ".1f", "", ".2f", ".3f", *[".1f"] * (len(kinds) + 1))
    return str(tabulate(table, head, floatfmt=formats, disable_numparse=[5]))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    refused = why_not()
    if refused is not None:
        print(f"skipped: {refused}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    about = environment() | {"cores": usable_cores()}  # of the source as it is now: measuring takes a while
    about["command"] = shlex.join(["python", "-m", "bench.shaped_busbw", *(arguments or sys.argv[1:])])
    for part in options.parts:
        rows: list[dict[str, Any]] = []
        links = []
        mpi = ""
        rates = options.rates or RATES_MBPS[part]
        with tqdm(total=len(options.hosts) * len(rates), desc=part, file=sys.stderr) as bar:
            for number in options.hosts:
                with Hosts(number, rates[0]) as shaped:
                    for rate_mbps in rates:
                        shaped.reshape(rate_mbps)
                        links.append(shaped.describe())
                        try:
                            mpi, found = measure(part, shaped, options)
                        except (HostsError, subprocess.TimeoutExpired) as error:
                            print(f"error: {error}", file=sys.stderr)
                            return 1
                        rows += found
                        bar.update()
        if part == "aggregation":
            compare(rows)
        print(f"\n{busbw_table(rows) if part == 'busbw' else aggregation_table(rows)}\n", flush=True)
        found_by = about | {"mpi": mpi}
        write_json(options.out / f"{part}.json", {"environment": found_by, "links": links, "rows": rows})
    return 0
