"""Bandwidth of the ring beside MPI_Allreduce: `mpirun -n 2 python -m ring.bench`.

The columns are those of nccl-tests: size in bytes, count of elements, time, algbw = size / time,
busbw = algbw · 2(N-1)/N (what each link carries, comparable between numbers of ranks) and the number of wrong elements.
Both implementations are timed in turn within one run, in place on the same memory (from `MPIRing.empty`), and reported
by the median over the repeats with the quartiles beside it. The limit is what the ring's own copies and adds take on
all ranks at once, without any message.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ring.abort import end_together
from ring.codec import Array
from ring.machine import processor, usable_cores
from ring.mpi import MPIRing
from ring.plan import CHUNK_BYTES
from ring.world import MPI

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_bytes(text: str) -> int:
    """Number of bytes that a text says: '64K' -> 65536."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if unit not in UNITS or not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"a size is a positive number with K, M or G behind it, got {text!r}")
    return int(number) * UNITS[unit]


def positive(text: str) -> int:
    """Positive whole number that a text says."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ring.bench", description="Bandwidth of the ring and MPI_Allreduce."
    )
    parser.add_argument("--min-bytes", type=parse_bytes, default="4", metavar="B", help="smallest vector (4)")
    parser.add_argument("--max-bytes", type=parse_bytes, default="16M", metavar="B", help="largest vector (16M)")
    parser.add_argument("--factor", type=positive, default=4, metavar="N", help="from one size to the next (4)")
    parser.add_argument("--dtype", choices=("float16", "float32", "float64"), default="float32")
    parser.add_argument(
        "--chunk-bytes", type=parse_bytes, default=str(CHUNK_BYTES), metavar="B", help="a message at most"
    )
    parser.add_argument("--repeats", type=positive, default=15, metavar="N", help="measurements per size (15)")
    parser.add_argument("--seconds", type=float, default=0.02, help="about how long one measurement lasts (0.02)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds before a silent neighbour is an error (60)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    options = parser.parse_args(arguments)
    if options.factor < 2 or options.max_bytes < options.min_bytes:
        parser.error("--factor must be at least 2 and --max-bytes at least --min-bytes")
    if not 0 < options.seconds < math.inf or not 0 < options.timeout < math.inf:
        parser.error("--seconds and --timeout must be positive numbers of seconds")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    return options


def limit(count: int, dtype: np.dtype[Any], size: int) -> Callable[[], object]:
    """Function that does the copies and adds of one rank in one all-reduce, on memory of its own."""
    part = np.zeros(count * (size - 1) // size, dtype)
    other = np.zeros_like(part)

    def work() -> None:
        np.copyto(other, part)
        np.add(part, other, part)
        np.copyto(other, part)

    return work


def seconds_per_call(comm: MPI.Intracomm, call: Callable[[], object], calls: int) -> float:
    """This rank's mean time of a call, when all ranks begin together."""
    comm.Barrier()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def wrong(comm: MPI.Intracomm, reduce: Callable[[Array], object], vector: Array) -> int:
    """Number of wrong elements, over all ranks. The data depends on rank and index and adds up exactly."""
    index = np.arange(len(vector)) % 13
    vector[:] = index + 17 * comm.rank % 7
    reduce(vector)
    expected = comm.size * index + sum(17 * rank % 7 for rank in range(comm.size))
    return int(comm.allreduce(np.count_nonzero(vector != expected.astype(vector.dtype))))


def measure(
    comm: MPI.Intracomm, ring: MPIRing, options: argparse.Namespace, memory: Array, size_bytes: int
) -> list[dict[str, Any]]:
    """Check and time an all-reduce of one size; a row for each implementation."""
    dtype = np.dtype(options.dtype)
    count = max(1, size_bytes // dtype.itemsize)
    vector = memory[: count * dtype.itemsize].view(dtype)
    reducers: dict[str, Callable[[Array], object]] = {"ring": ring.all_reduce}
    if dtype != np.float16:  # MPI has no half precision
        reducers["MPI_Allreduce"] = lambda values: comm.Allreduce(MPI.IN_PLACE, values)
    errors = {name: wrong(comm, reduce, vector) for name, reduce in reducers.items()}
    calls: dict[str, Callable[[], object]] = {
        name: lambda reduce=reduce: reduce(vector)  # type: ignore[misc]
        for name, reduce in reducers.items()
    }
    vector[:] = 0
    calls["limit"] = limit(count, dtype, comm.size)
    times: dict[str, list[float]] = {name: [] for name in calls}
    first = {name: seconds_per_call(comm, call, 3) for name, call in calls.items()}
    number = {name: max(1, min(2000, int(options.seconds / comm.allreduce(first[name], MPI.MAX)))) for name in calls}
    for _ in range(options.repeats):
        for name, call in calls.items():
            times[name].append(comm.allreduce(seconds_per_call(comm, call, number[name]), MPI.MAX))
    rows = []
    for name, samples in times.items():
        time_s = statistics.median(samples)
        low, high = np.percentile(samples, (25, 75))
        rows.append(
            {
                "implementation": name,
                "ranks": comm.size,
                "size_bytes": count * dtype.itemsize,
                "count": count,
                "dtype": dtype.name,
                "time_s": time_s,
                "time_quartiles_s": [float(low), float(high)],
                "algbw_gb_per_s": count * dtype.itemsize / time_s / 1e9,
                "busbw_gb_per_s": 2 * (comm.size - 1) / comm.size * count * dtype.itemsize / time_s / 1e9,
                "wrong": errors.get(name),
                "repeats": options.repeats,
            }
        )
    return rows


HEAD = (
    f"{'size':>12} {'count':>10}  {'implementation':<14}{'time':>11}{'quartiles':>20}{'algbw':>9}{'busbw':>9}  wrong\n"
    f"{'(B)':>12} {'(elements)':>10}  {'':<14}{'(us)':>11}{'(us)':>20}{'(GB/s)':>9}{'(GB/s)':>9}"
)


def format_row(row: dict[str, Any]) -> str:
    low, high = row["time_quartiles_s"]
    errors = "-" if row["wrong"] is None else row["wrong"]
    return (
        f"{row['size_bytes']:>12} {row['count']:>10}  {row['implementation']:<14}{row['time_s'] * 1e6:>11.1f}"
        f"{f'{low * 1e6:.1f}-{high * 1e6:.1f}':>20}{row['algbw_gb_per_s']:>9.2f}{row['busbw_gb_per_s']:>9.2f}"
        f"{errors:>7}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    comm = MPI.COMM_WORLD
    end_together(comm)
    try:
        options = parse(arguments) if comm.rank == 0 else None
    except SystemExit as stop:
        comm.bcast((None, stop.code))
        raise
    options, status = comm.bcast((options, None)) if comm.rank == 0 else comm.bcast(None)
    if options is None:
        return int(status or 0)
    ring = MPIRing(comm, chunk_bytes=options.chunk_bytes, timeout_s=options.timeout)
    environment = {
        "mpi": " ".join(MPI.Get_library_version().split("\n")[0].strip("\0 ").split()),
        "ranks": comm.size,
        "cores": usable_cores(comm.Split_type(MPI.COMM_TYPE_SHARED)),  # of rank 0's host
        "cpu": processor(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "chunk_bytes": options.chunk_bytes,
        "command": " ".join(["mpirun", "-n", str(comm.size), "python", "-m", "ring.bench", *sys.argv[1:]]),
    }
    if comm.rank == 0:
        print(", ".join(f"{key}: {value}" for key, value in environment.items()))
        print(HEAD)
    memory = ring.empty(max(8, options.max_bytes), np.uint8)
    rows = []
    size_bytes = options.min_bytes
    while size_bytes <= options.max_bytes:
        for row in measure(comm, ring, options, memory, size_bytes):
            rows.append(row)
            if comm.rank == 0:
                print(format_row(row), flush=True)
        size_bytes *= options.factor
    if comm.rank == 0 and options.json:
        text = json.dumps({"environment": environment, "rows": rows}, indent=1)
        partial = options.json.with_name(options.json.name + ".partial")
        partial.write_text(text + "\n")
        os.replace(partial, options.json)
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
