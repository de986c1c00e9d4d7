"""How fast one core quantises: `python -m bench.qsgd_throughput [--json FILE]`.

M elements/s of `encode`, `reduce` and `decode`, of encode and decode together (n / (t_encode + t_decode)), and of
copying the same float32 vector, which is the limit. Each cell is the median over the repeats and, after ±, half the
distance between the quartiles. The seconds are the thread's own CPU time: what else wants the core does not count,
though it does take caches and memory bandwidth, so where the machine is busy compare the ratio to the copy.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np

from bench.common.command_line import description
from bench.common.statistics import Quartiles
from gradiveq.over_ring.qsgd import QSGD
from ring.codec import Hop

COLUMNS = ("encode", "reduce", "decode", "encode+decode", "copy")
SAMPLE_S = 2e-3  # time at least this long, so that the clock and the call weigh nothing


def seconds_per_call(function: Callable[[], object], calls: int) -> float:
    start = time.thread_time()
    for _ in range(calls):
        function()
    return (time.thread_time() - start) / calls


def throughput(codec: QSGD, length: int, repeats: int) -> dict[str, list[float]]:
    """M elements/s of every column, one number per repeat."""
    values = np.random.default_rng(0).standard_normal(length, dtype=np.float32)
    result = np.empty_like(values)
    num_bytes = sum(region.num_bytes for region in codec.regions(length, values.dtype))
    payload, combined = np.empty(num_bytes, np.uint8), np.empty(num_bytes, np.uint8)
    operations: dict[str, Callable[[], object]] = {
        "encode": lambda: codec.encode(values, 0, payload, Hop(0, 2, 0)),
        "reduce": lambda: codec.reduce(payload, values, 0, combined, Hop(1, 2, 1)),
        "decode": lambda: codec.decode(combined, 0, result, 2),
        "copy": lambda: np.copyto(result, values),
    }
    for call in operations.values():
        seconds_per_call(call, 10)  # touch the memory, fill the caches
    calls = {name: max(1, round(SAMPLE_S / seconds_per_call(call, 10))) for name, call in operations.items()}
    rates: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for _ in range(repeats):
        times = {name: seconds_per_call(call, calls[name]) for name, call in operations.items()}
        times["encode+decode"] = times["encode"] + times["decode"]
        for name in COLUMNS:
            rates[name].append(length / times[name] / 1e6)
    return rates


def processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.qsgd_throughput", description=description(__doc__))
    parser.add_argument("--sizes", type=int, nargs="+", default=[2**12, 2**14, 2**16, 2**18, 2**20, 2**22])
    parser.add_argument("--bits", type=int, default=4, choices=(2, 4, 8))
    parser.add_argument("--bucket", type=int, default=512)
    parser.add_argument("--norm", default="max", choices=("max", "l2"))
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args(arguments)
    if min(options.sizes) < 1 or options.repeats < 1:
        parser.error("--sizes and --repeats must be at least 1")
    try:
        codec = QSGD(bits=options.bits, bucket=options.bucket, norm=options.norm)
    except ValueError as error:
        parser.error(str(error))

    environment = {
        "processor": processor(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
    }
    print(f"# {codec.describe(np.dtype(np.float32))}, one core, {options.repeats} repeats, M elements/s")
    print("# " + ", ".join(f"{name} {value}" for name, value in environment.items()))
    print(f"{'elements':>9}" + "".join(f"{name:>16}" for name in COLUMNS))
    rows = []
    for length in options.sizes:
        cells = []
        for name, rates in throughput(codec, length, options.repeats).items():
            median, low, high = Quartiles.of(rates)
            cells.append(f"{median:10.0f} ±{(high - low) / 2:4.0f}")
            rows.append({"operation": name, "elements": length, "melements_per_s": median, "quartiles": [low, high]})
        print(f"{length:>9}" + "".join(f"{cell:>16}" for cell in cells))
        sys.stdout.flush()
    if options.json:
        report = {
            "codec": codec.describe(np.dtype(np.float32)),
            "repeats": options.repeats,
            **environment,
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
