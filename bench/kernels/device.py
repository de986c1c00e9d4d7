"""How near a device comes to its limits, in a minute or two: `python -m bench.device [--device cuda] [--out FOLDER]`.

What GradiVeQ, QSGD (if Triton is there) and the half-precision compressor do with a gradient on a device
(`gradiveq.over_ring.staging`, `gradiveq.pca.projection`, `gradiveq.over_ring.qsgd_triton`, `gradiveq.device`), copies
between it and the host, and a whole exchange of one worker with itself: encode, copy to the host, a ring of one, copy
back, decode.

    limit of memory    a copy of a large vector on the device: its bytes are read and written
    limit of products  a large square product in float32, without TF32

Both are measured in the same run, in every repeat. "of the limit" is the time that an operation's bytes and flops would
take at these two rates, whichever is longer, over the time that it took. Of an exchange they are those of encoding and
of decoding (of a plain one: of a copy), so that it says what the way over the host costs; of a copy between host and
device those of the vector, once. Each cell is the median over the repeats and, after ±, half the distance between the
quartiles. On the CPU the host's memory is the device's, and all of its threads take part unless OMP_NUM_THREADS says
otherwise.

Written are `device.json` and `table.md`, by default into results/device-NAME with the device's name.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

from bench.common.command_line import description
from bench.common.environment import environment
from bench.common.files import write_atomically, write_json
from bench.common.statistics import Quartiles, half_range_text
from gradiveq.compressors.base import Draw
from gradiveq.compressors.half import Half
from gradiveq.flatten import Block
from gradiveq.over_ring.qsgd import QSGD
from gradiveq.over_ring.staging import Mirror, OnDevice, StagedLayers, staged_plain
from gradiveq.pca import Basis, LayerBasis, SliceGroup
from gradiveq.pca.coding import Bases
from gradiveq.pca.projection import Projection
from ring.handle import Ring
from ring.lockstep import run
from ring.machine import processor
from ring.plan import CHUNK_BYTES
from ring.timeline import Timeline

#: Elements of the gradient, and of the square product in each dimension, unless told.
ELEMENTS = {"cuda": 2**25, "cpu": 2**22}
SQUARE = {"cuda": 8192, "cpu": 1024}
SLICE_SIZES = (256, 1024, 4096)
RATIO = 8
#: Time at least this long, so that the clock and the wait at the end weigh nothing.
SAMPLE_S = 0.02
DRAW = Draw(seed=0, call=0, rank=0, part=0)


class TimedOperation(NamedTuple):
    """What is timed: its least traffic with memory (or with the host) in bytes, its flops, and a call of it."""

    name: str
    num_bytes: int
    flops: int
    call: Callable[[], object]


def basis(length: int, slice_size: int) -> LayerBasis:
    """An orthonormal basis of a layer, K / d = RATIO; its numbers are random, as they don't matter for the time."""
    generator = np.random.default_rng(0)
    d = slice_size // RATIO
    components = np.linalg.qr(generator.standard_normal((slice_size, d)))[0].T.astype(np.float32)
    one = Basis(np.ascontiguousarray(components), np.ones(d, np.float32), float(slice_size))
    mean = generator.standard_normal(length, dtype=np.float32)
    return LayerBasis("layer", length, slice_size, mean, (SliceGroup("layer", 0, length, slice_size),), (one,))


def operations(device: torch.device, length: int, square: int, ring: Ring) -> list[TimedOperation]:
    """The two limits first."""
    gradient = torch.randn(length, device=device)
    out = torch.empty_like(gradient)
    mirror = Mirror(length, device)
    pageable = torch.empty(length)
    left, right, product = (torch.randn(square, square, device=device) for _ in range(3))
    half, whole = Half(), 4 * length
    halved = half.compress_tensor(gradient, DRAW)
    found = [
        TimedOperation("memory: copy", 2 * whole, 0, lambda: out.copy_(gradient)),
        TimedOperation("product", 0, 2 * square**3, lambda: torch.mm(left, right, out=product)),
        TimedOperation("to the host, pinned", whole, 0, mirror.to_host),
        TimedOperation("to the host, pageable", whole, 0, lambda: pageable.copy_(gradient)),
        TimedOperation("from the host, pinned", whole, 0, mirror.to_device),
        TimedOperation("from the host, pageable", whole, 0, lambda: out.copy_(pageable)),
        TimedOperation("half: compress", whole + whole // 2, 0, lambda: half.compress_tensor(gradient, DRAW)),
        TimedOperation("half: decompress", whole // 2 + whole, 0, lambda: half.decompress_tensor(halved, out, DRAW)),
    ]
    plain = staged_plain(Mirror(length, device), length, CHUNK_BYTES)
    found.append(TimedOperation("exchange: plain", 2 * whole, 0, _exchange(plain, ring)))
    if find_spec("triton") is not None:
        found += _quantisation(device, gradient, out, ring)
    for slice_size in SLICE_SIZES:
        found += _projection(device, slice_size, gradient, out, ring)
    return found


def _quantisation(
    device: torch.device, gradient: torch.Tensor, out: torch.Tensor, ring: Ring
) -> Iterator[TimedOperation]:
    """QSGD's kernels: a hop of the ring, and its end. Nothing where the host would do it."""
    from gradiveq.over_ring.qsgd_triton import decode, recode
    from gradiveq.over_ring.staged_qsgd import StagedQSGD, pays

    codec, whole = QSGD(), gradient.nbytes
    if not pays(codec, len(gradient), device):
        return
    mirror = Mirror(len(gradient), device)
    mirror.values.copy_(gradient)
    staged = StagedQSGD.of(codec, mirror, len(gradient))
    words = torch.empty_like(staged.words)
    recode(None, gradient, 0, codec, words)
    hop = whole + 2 * words.nbytes
    last = words.nbytes + whole
    yield TimedOperation("QSGD: decode, add, encode", hop, 0, lambda: recode(words, gradient, 0, codec, words))
    yield TimedOperation("QSGD: decode", last, 0, lambda: decode(words, codec, out, 1))
    yield TimedOperation("exchange: QSGD", whole + words.nbytes + last, 0, _exchange(staged, ring))


def _projection(
    device: torch.device, slice_size: int, gradient: torch.Tensor, out: torch.Tensor, ring: Ring
) -> list[TimedOperation]:
    """GradiVeQ of the gradient as one layer."""
    length = len(gradient)
    bases = basis(length, slice_size)
    projection = Projection(bases, device)
    coded = torch.empty(projection.length, device=device)
    # The offsets Uᵀµ are as long as the payload, µ as the gradient.
    encoded = 4 * (length + 2 * projection.length) + bases.bases[0].components_.nbytes
    decoded = 4 * (2 * length + projection.length) + bases.bases[0].components_.nbytes
    flops = 2 * projection.multiplications
    mirror = Mirror(length, device)
    mirror.values.copy_(gradient)
    layers = StagedLayers(mirror, [Block("layer", 0, length, (length,), True)], Bases([bases]), 0, CHUNK_BYTES, "")
    title = f"K = {slice_size}, d = {slice_size // RATIO}"
    return [
        TimedOperation(f"encode, {title}", encoded, flops, lambda: projection.encode(gradient, coded)),
        TimedOperation(f"decode, {title}", decoded, flops, lambda: projection.decode(coded, out)),
        TimedOperation(f"exchange, {title}", encoded + decoded, 2 * flops, _exchange(layers.staged, ring)),
    ]


def _exchange(staged: OnDevice, ring: Ring) -> Callable[[], object]:
    return lambda: staged.mean_over(ring, (), CHUNK_BYTES, Timeline())


def seconds_of(found: Sequence[TimedOperation], repeats: int, settle: Callable[[], None]) -> list[list[float]]:
    """Seconds of a call, (operations, repeats). All operations follow each other in every repeat."""

    def seconds(operation: TimedOperation, calls: int) -> float:
        settle()
        start = time.perf_counter()
        for _ in range(calls):
            operation.call()
        settle()
        return (time.perf_counter() - start) / calls

    calls = []
    for operation in found:
        seconds(operation, 2)  # libraries choose their kernels, memory is touched
        calls.append(max(1, round(SAMPLE_S / seconds(operation, 2))))
    rows: list[list[float]] = [[] for _ in found]
    for _ in tqdm(range(repeats), file=sys.stderr, disable=None):
        for row, operation, count in zip(rows, found, calls, strict=True):
            row.append(seconds(operation, count))
    return rows


def rows_of(found: Sequence[TimedOperation], seconds: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """The record's rows: every operation beside the two limits, which are the first two."""
    table = np.array(seconds)
    memory, product = found[0].num_bytes / table[0], found[1].flops / table[1]  # bytes and flops a second, by repeat
    rows = []
    for operation, own in zip(found, table, strict=True):
        least = np.maximum(operation.num_bytes / memory, operation.flops / product)
        rows.append(
            {
                "operation": operation.name,
                "bytes": operation.num_bytes,
                "flops": operation.flops,
                "bound": "memory" if operation.num_bytes / memory[0] >= operation.flops / product[0] else "product",
                "seconds": Quartiles.of(own)._asdict(),
                "gbytes_per_s": Quartiles.of(operation.num_bytes / own / 1e9)._asdict(),
                "gflops_per_s": Quartiles.of(operation.flops / own / 1e9)._asdict(),
                "of_limit": Quartiles.of(least / own)._asdict(),
            }
        )
    return rows


def table(record: dict[str, Any], form: str) -> str:
    rows = [
        [
            row["operation"],
            f"{1e3 * row['seconds']['median']:.3g}",
            f"{row['gbytes_per_s']['median']:,.1f}" if row["bytes"] else "",
            f"{row['gflops_per_s']['median']:,.0f}" if row["flops"] else "",
            row["bound"],
            half_range_text(row["of_limit"], 2),
        ]
        for row in record["rows"]
    ]
    heads = ["operation", "ms", "GB/s", "GFLOP/s", "bound by", "of the limit"]
    body = tabulate(
        rows, heads, tablefmt=form, disable_numparse=True, colalign=("left", "right", "right", "right", "left", "right")
    )
    return (
        f"{record['device']}, {record['elements']:,} elements, median ± half the interquartile range of "
        f"{record['repeats']}\n\n{body}\n"
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=description(__doc__))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--elements", type=int, help="of the gradient; a multiple of 4,096")
    parser.add_argument("--square", type=int, help="rows and columns of the product that is the limit")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no such device here")
    length = ELEMENTS[options.device] if options.elements is None else options.elements
    square = SQUARE[options.device] if options.square is None else options.square
    if length < 1 or length % SLICE_SIZES[-1]:
        parser.error(f"--elements must be a positive multiple of {SLICE_SIZES[-1]}, got {length}")
    if options.repeats < 1 or square < 1:
        parser.error("--repeats and --square must be at least 1")

    device = torch.device(options.device)
    name = device_name(device)
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def measure(ring: Ring) -> list[dict[str, Any]]:
        found = operations(device, length, square, ring)
        return rows_of(found, seconds_of(found, options.repeats, settle))

    (rows,) = run(1, measure)
    record = {
        "environment": environment(("numpy", "torch")),
        "device": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "elements": length,
        "square": square,
        "repeats": options.repeats,
        "rows": rows,
    }
    print(table(record, "simple"))
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out: Path = Path("results") / f"device-{slug}" if options.out is None else options.out
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "device.json", record)
    write_atomically(out / "table.md", table(record, "github").encode())
    print(f"Recorded in {out}")
