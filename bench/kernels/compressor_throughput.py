"""How fast one core compresses, in a few minutes: `python -m bench.compressor_throughput [--out FOLDER]`.

Every registered compressor on vectors of normally distributed numbers: `compress`, `decompress`, and where payloads are
gathered `add_to`. Then the exact selection of the k largest (`gradiveq.arrays.select.top_k`) beside `torch.topk`
of the magnitudes and the elements that it points at.

Seconds are the thread's own CPU time with one thread; what else wants the core doesn't count, though it takes caches
and memory bandwidth. So every repeat also copies the same vector, and "of a copy" is the speed over that of the copy in
the same repeat: 1 reads and writes as many bytes in a second as the vector has. With two threads it is the time that
passes, in which the machine should do nothing else: of `torch.topk` given two threads, and of two calls of each at
once, on a vector of its own.

Each cell is the median over the repeats; the file has the quartiles too.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

from bench.common.command_line import description, names
from bench.common.environment import environment
from bench.common.files import write_atomically, write_json
from bench.common.statistics import Quartiles, half_range_text
from bench.kernels.qsgd_throughput import SAMPLE_S, seconds_per_call
from gradiveq.arrays.select import top_k
from gradiveq.compressors import COMPRESSORS, Compressor, Draw
from gradiveq.compressors.base import Float32
from gradiveq.methods import Compressed
from gradiveq.specs import parse
from ring.machine import usable_cores

#: Settings with which a compressor does what it is for on a standard normal vector; the others have their defaults.
SETTINGS = {"topk": ("topk:0.001", "topk:0.01", "topk:0.1"), "threshold": ("threshold:2.576",)}
SIZES = (2**14, 2**18, 10_000_000)
RATIOS = (0.001, 0.01, 0.1, 0.5)
DRAW = Draw(seed=0, call=0, rank=0, part=0)
WARM_UP = 2

Operations = Mapping[str, Callable[[], object]]


def default_specs() -> list[str]:
    return [spec for name in COMPRESSORS for spec in SETTINGS.get(name, (name,))]


def compressor_of(spec: str) -> Compressor:
    """Raises ValueError, also if the method is no compressor."""
    method = parse(spec)
    if not isinstance(method, Compressed):
        raise ValueError(f"{spec!r} is no compressor; these are {', '.join(COMPRESSORS)}")
    return method.compressor


def measured(operations: Operations, repeats: int, *, clock: Callable[[], float] = time.thread_time) -> dict[str, Any]:
    """Seconds of a call of each operation by repeat: a list of `repeats` numbers."""

    def seconds(function: Callable[[], object], calls: int) -> float:
        if clock is time.thread_time:
            return seconds_per_call(function, calls)
        start = clock()
        for _ in range(calls):
            function()
        return (clock() - start) / calls

    calls = {}
    for name, function in operations.items():
        seconds(function, WARM_UP)  # touch the memory, fill the caches
        calls[name] = max(1, round(SAMPLE_S / max(seconds(function, WARM_UP), 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(repeats):
        for name, function in operations.items():
            found[name].append(seconds(function, calls[name]))
    return found


def compressor_rows(spec: str, values: Float32, repeats: int) -> list[dict[str, Any]]:
    """A row for each operation of one compressor."""
    compressor, length = compressor_of(spec), len(values)
    out, scratch = np.empty_like(values), np.empty_like(values)
    payload = compressor.compress(values, DRAW)
    operations: dict[str, Callable[[], object]] = {
        "copy": lambda: np.copyto(out, values),
        "compress": lambda: compressor.compress(values, DRAW),
        "decompress": lambda: compressor.decompress(payload, out, DRAW),
    }
    if compressor.collective == "all_gather":
        total = np.zeros_like(values)
        operations["add_to"] = lambda: compressor.add_to(payload, total, DRAW, scratch)
    found = measured(operations, repeats)
    copy = np.array(found.pop("copy"))
    return [
        {
            "method": spec,
            "elements": length,
            "operation": operation,
            "payload_bytes": payload.nbytes,
            "density": compressor.num_sent(payload, length) / length,
            "seconds": Quartiles.of(seconds)._asdict(),
            "melements_per_s": Quartiles.of(length / np.array(seconds) / 1e6)._asdict(),
            "gbytes_per_s": Quartiles.of(4 * length / np.array(seconds) / 1e9)._asdict(),
            "of_copy": Quartiles.of(copy / np.array(seconds))._asdict(),
        }
        for operation, seconds in found.items()
    ]


def torch_top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    indices = torch.topk(values.abs(), k, sorted=False).indices
    return indices, values[indices]


def selection_row(ratio: float, values: Float32, repeats: int) -> dict[str, Any]:
    """`top_k` beside `torch.topk`, on one thread and on two."""
    k = max(1, round(ratio * len(values)))
    tensor = torch.from_numpy(values)
    others = values.copy(), tensor.clone()
    ours, theirs = top_k(values, k)[0], np.sort(torch_top_k(tensor, k)[0].numpy())
    if not np.array_equal(ours, theirs):  # could differ in ties alone, of which normal numbers have few
        magnitudes = np.abs(values)
        assert np.array_equal(np.sort(magnitudes[ours]), np.sort(magnitudes[theirs]))
    copied = np.empty_like(values)
    alone = measured(
        {
            "top_k": lambda: top_k(values, k),
            "torch": lambda: torch_top_k(tensor, k),
            "copy": lambda: np.copyto(copied, values),
        },
        repeats,
    )
    with ThreadPoolExecutor(2) as pool:

        def both(function: Callable[..., Any], first: Any, second: Any) -> None:
            for future in [pool.submit(function, vector, k) for vector in (first, second)]:
                future.result()

        def given_two() -> None:
            torch.set_num_threads(2)
            torch_top_k(tensor, k)
            torch.set_num_threads(1)

        two = measured(
            {
                "top_k": lambda: top_k(values, k),
                "torch, two threads": given_two,
                "top_k, two at once": lambda: both(top_k, values, others[0]),
                "torch, two at once": lambda: both(torch_top_k, tensor, others[1]),
            },
            repeats,
            clock=time.perf_counter,
        )
    mine = np.array(alone["top_k"])
    return {
        "elements": len(values),
        "k": k,
        "seconds": {name: Quartiles.of(seconds)._asdict() for name, seconds in alone.items()},
        "torch_over_top_k": Quartiles.of(np.array(alone["torch"]) / mine)._asdict(),
        "of_copy": Quartiles.of(np.array(alone["copy"]) / mine)._asdict(),
        "wall_seconds": {name: Quartiles.of(seconds)._asdict() for name, seconds in two.items()},
        "torch_with_two_threads_over_top_k": Quartiles.of(
            np.array(two["torch, two threads"]) / np.array(two["top_k"])
        )._asdict(),
        "torch_over_top_k_two_at_once": Quartiles.of(
            np.array(two["torch, two at once"]) / np.array(two["top_k, two at once"])
        )._asdict(),
    }


def tables(record: Mapping[str, Any], form: str) -> str:
    rows = [
        [
            row["method"],
            f"{row['elements']:,}",
            row["operation"],
            f"{row['density']:.4g}",
            f"{8 * row['payload_bytes'] / row['elements']:.3g}",
            half_range_text(row["melements_per_s"], 0),
            f"{row['gbytes_per_s']['median']:.2f}",
            half_range_text(row["of_copy"], 2),
        ]
        for row in record["compressors"]
    ]
    heads = ["method", "elements", "operation", "density", "bits per element", "M elements/s", "GB/s", "of a copy"]
    first = tabulate(
        rows, heads, tablefmt=form, disable_numparse=True, colalign=("left", "right", "left", *["right"] * 5)
    )
    rows = [
        [
            f"{row['elements']:,}",
            f"{row['k']:,}",
            f"{1e3 * row['seconds']['top_k']['median']:.3g}",
            f"{1e3 * row['seconds']['torch']['median']:.3g}",
            half_range_text(row["torch_over_top_k"], 1),
            half_range_text(row["of_copy"], 2),
            half_range_text(row["torch_with_two_threads_over_top_k"], 1),
            half_range_text(row["torch_over_top_k_two_at_once"], 1),
        ]
        for row in record["selection"]
    ]
    heads = ["elements", "k", "top_k ms", "torch.topk ms", "torch / ours", "of a copy"]
    heads += ["torch with 2 threads / ours", "torch / ours, 2 at once"]
    return (
        f"{first}\n\n{tabulate(rows, heads, tablefmt=form, disable_numparse=True, colalign=('right',) * len(heads))}\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compressor_throughput", description=description(__doc__))
    parser.add_argument("--methods", type=names, default=default_specs(), metavar="SPEC,...")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="ELEMENTS")
    parser.add_argument("--ratios", type=float, nargs="*", default=RATIOS, help="k / elements of top_k and torch.topk")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write throughput.json and table.md there as well")
    words = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(words)
    if min(options.sizes) < 1 or options.repeats < 1:
        parser.error("--sizes and --repeats must be at least 1")
    if not all(0 < ratio <= 1 for ratio in options.ratios):
        parser.error("--ratios must be in (0, 1]")
    try:
        for spec in options.methods:
            compressor_of(spec)
    except ValueError as error:
        parser.error(str(error))

    record: dict[str, Any] = {
        "environment": environment(("numpy", "numba", "torch"))
        | {"command": shlex.join(["python", "-m", "bench.compressor_throughput", *words]), "cores": usable_cores()},
        "repeats": options.repeats,
        "compressors": [],
        "selection": [],
    }
    torch.set_num_threads(1)
    steps = len(options.sizes) * (len(options.methods) + len(options.ratios))
    with tqdm(total=steps, file=sys.stderr, disable=None) as bar:
        for size in options.sizes:
            values = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
            for spec in options.methods:
                record["compressors"] += compressor_rows(spec, values, options.repeats)
                bar.update()
            for ratio in options.ratios:
                record["selection"].append(selection_row(ratio, values, options.repeats))
                bar.update()
    print(f"# {record['environment']['cpu']}, one thread, median ± half the interquartile range of {options.repeats}\n")
    print(tables(record, "simple"))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "throughput.json", record)
        write_atomically(options.out / "table.md", tables(record, "github").encode())
