"""A run's folder: what was measured, how it came about, and where. Figures and tables are made from these files alone.

    results/<run>/
        environment.json         written when the run begins
        metrics-<method>.jsonl   grows while a method runs; one JSON object per line. Methods are named as by
                                 `--methods`, in names of files by `file_name`: topk-0.01-ef for topk:0.01+ef
        summary.json             written when a method ends, so it lists those that are finished
        weights-<method>.pt      the trained parameters, the same on every rank (a dict of tensors for `torch.load`)
        trace-<method>….perfetto.json.gz     with `--trace`, for ui.perfetto.dev; `bench.tracing`
        checkpoint/              what `--resume` needs; `bench.checkpoint`

All numbers are JSON numbers, `null` where there is none or it is not finite. Times are seconds; `time_s` is training
time only: evaluations, checkpoints, start-up and the measuring of held-out losses and noise are not in it. A resumed
run goes on counting where it was stopped.

Two clocks: `time_s` and `seconds` are this machine's. `virtual_s`, `virtual_seconds` and what is in "virtual" are those
of an emulated cluster (`ring.virtual`): the same iterations, if they had run there. This machine's clock stands still
while it emulates. Runs with `--cluster none`, and those recorded before there were two clocks, have the one only.

**metrics-<method>.jsonl** holds lines of three types, in the order in which things happened:

    {"type": "iteration", "iteration": 17, "epoch": 0.27, "phase": "compress", "loss": 2.31, "lr": 0.1,
     "bytes_sent": 412345, "dense_bytes": 3094360, "ratio": 7.5, "fit_bytes": 0, "measure_bytes": 0,
     "skipped": false,
     "seconds": {"data": …, "forward": …, "backward": …, "pack": …, "encode": …, "add": …, "recode": …, "decode": …,
                 "wait": …, "fit": …, "update": …, "control": …, "measure": …, "other": …},
     "iteration_s": 0.41, "time_s": 7.2, "noise": {…}, "virtual_seconds": {…}, "virtual_s": 12.3, "losses": …,
     "compression": {…}}
    {"type": "evaluation", "iteration": 40, "epoch": 0.65, "time_s": 16.3, "virtual_s": 28.1, "test_accuracy": 0.71,
     "test_loss": 0.83, "evaluation_s": 2.9}
    {"type": "window", "iteration": 40, "time_s": 16.3, "virtual_s": 28.1, "window": {…}}

* `iteration` counts from 0 in lines of type iteration; elsewhere it is the number of iterations that were done.
* `phase` is "plain", "qsgd", "compressed", or of GradiVeQ "warm-up", "sample" or "compress".
* `loss` is the mean over all ranks' batches; everything else in an iteration's line is rank 0's own.
* `bytes_sent` is payload that the rank sent to aggregate the gradient, `fit_bytes` (to agree on bases) included;
  `dense_bytes` what plain ring all-reduce sends; `ratio` that of the gradients' payload alone. `measure_bytes` were
  sent to measure a held-out loss or the noise and are in none of them.
* `seconds` lists only kinds that occurred, and adds up to `iteration_s`: "other" is what no kind accounts for. "wait"
  is exposed communication; "recode" is decoding, adding and encoding again at a hop; "pack" copies gradients to and
  from the flat vector; "control" is the exchange of the mean loss (and of whether somebody asked to stop); "measure" is
  the exact all-reduce that a held-out loss is measured with, and what the noise takes, which are in `iteration_s` but
  not in `time_s`.
* `noise` is the running estimate of M ("multiple"), ζ² ("heterogeneity") and σ² ("noise") over the last 100 iterations
  at most (`gradiveq.running_noise`, `gradiveq.noise.NoiseEstimate`), the same on all ranks; null in the first 10. Of a
  resumed run it goes on. Skipped iterations are not in it.
* `virtual_seconds` are an iteration's on the cluster, "measure" likewise not in `virtual_s`. "overhead" is processor
  time of messages, which only clusters have.
* `losses` is there in iterations in which the aggregator measured any (`gradiveq.aggregator.Report.losses`).
* `compression` is there if the method has a compressor, in iterations that weren't skipped: what `exchange.Measures`
  says of rank 0 (norm and errors are squared), and "relative_error", compression_error over norm. "payload_bytes" is
  what the rank itself has to say; how often that travels is in `bytes_sent`.
* `window` is an entry of `gradiveq.aggregator.Aggregator.window_log`: per layer d, ratio, in-sample and held-out loss,
  and so on; or what ACCORDION or a threshold's formula has decided (`gradiveq.accordion`, `gradiveq.switching`). Its
  line comes when the window is complete, which is after the next window's first iteration.

**summary.json**

    {"title", "data_source", "model", "ranks", "ranks_per_machine", "cores" (of the first machine), "batch_size",
     "iterations", "complete": true if all methods ended, "notes": [lines for people], "options": {…},
     "one_process": true if the ranks were threads of one process, whose clock then says little,
     "cluster": what `ring.cluster.parse` makes the emulated cluster of, or null,
     "methods": {"gradiveq": {
        "test_accuracy", "test_loss", "train_loss" (mean over the last tenth, less the skipped iterations),
        "iterations", "skipped", "time_s", "bytes_per_iteration", "dense_bytes_per_iteration",
        "ratio" (of these two), "seconds": {kind: s}, "groups": {group: s},
        "compute_cpu_s", "evaluation_s", "checkpoint_s", "weights_sha256", "windows" (how many),
        "last_window": {"window", "iteration", "layers": {name: {"d", "slice_size", "ratio", "in_sample_loss",
        "held_out_loss"}}} or null,
        "threshold": what `gradiveq.switching.AutoThresholdStrategy` logs, or null,
        "compression": {"density", "relative_error", "compression_error", "error", "payload_bytes"} or null: means over
        the iterations that weren't skipped, and over the ranks,
        "noise": the last iteration's, or null,
        "virtual": {"time_s", "seconds", "groups"} on the cluster,
        "phases": {"compress": {"iterations", "bytes_per_iteration", "ratio", "time_s", "seconds", "groups", "virtual"},
        …}}, …}}

Seconds and bytes there are means over the ranks, totals over the run unless the name says otherwise. `groups` sums the
kinds as the tables and the breakdown show them, see `GROUPS`. `compute_cpu_s` is the processor time of forward,
backward and update: where ranks share cores it is less than the seconds that passed.

**environment.json** has the versions, the processor, the ranks (and whether they are threads of
`one_process`), the command line, every option (`options`), the seed, the commit, the `cluster`, `data_source` and
`data_sha256`, and under `resumed` the same of each process that went on with the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.data import Dataset
from ring.machine import processor

ENVIRONMENT = "environment.json"
SUMMARY = "summary.json"

#: What git is asked about: recording results again doesn't change what makes them.
SOURCE = (":(top)", ":(top,exclude)results")
#: All kinds of seconds, in the order of an iteration.
KINDS = (
    "data",
    "forward",
    "backward",
    "pack",
    "encode",
    "add",
    "recode",
    "decode",
    "wait",
    "overhead",
    "fit",
    "update",
    "control",
    "measure",
    "other",
)
#: What the tables and the breakdown show -> the kinds that it sums.
GROUPS = {
    "compute": ("forward", "backward", "update"),
    "encode": ("encode", "recode", "pack"),
    "add": ("add",),
    "exposed communication": ("wait", "overhead"),
    "decode": ("decode",),
    "fit": ("fit",),
    "measure": ("measure",),
    "other": ("data", "control", "other"),
}


#: Patterns of the files of all methods.
METRICS, WEIGHTS, TRACES = "metrics-*.jsonl", "weights-*.pt", "trace-*"


def file_name(method: str) -> str:
    """A method's name as part of the name of a file; with a digest if it has patterns, as little may tell two apart."""
    name = re.sub(r"[^\w.]+", "-", method).strip("-.")
    return name if re.fullmatch(r"[\w.:+@=^-]+", method) else f"{name}-{zlib.crc32(method.encode()):08x}"


def metrics_name(method: str) -> str:
    return METRICS.replace("*", file_name(method))


def weights_name(method: str) -> str:
    return WEIGHTS.replace("*", file_name(method))


def grouped(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by group; kinds that `GROUPS` doesn't name count as "other"."""
    groups = {group: sum(seconds.get(kind, 0.0) for kind in kinds) for group, kinds in GROUPS.items()}
    groups["other"] += sum(value for kind, value in seconds.items() if kind not in KINDS)
    return groups


def plain(value: Any) -> Any:
    """The same in JSON's types: arrays as lists, other numbers as int or float, None for what isn't finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy's and torch's arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def write_atomically(path: Path, data: bytes) -> None:
    """The file has all of `data`, or is as it was, whenever the process or the machine stops."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


class CannotWrite(OSError):
    """A folder for results can't be written; one line."""


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Around what a command writes into a folder of its own: it is made before, and named on stdout when all is there.

    Raises:
        CannotWrite: where anything raised OSError.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise CannotWrite(f"{out} can't be written ({error.strerror or error})") from error
    print(f"written to {out}", flush=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last (where the system can open a folder)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Atomically, see `write_atomically`."""
    write_atomically(path, (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


class Metrics:
    """A metrics file that is appended to, from a known position on.

    Args:
        path: of the file; made if it is not there.
        position: bytes to keep; what lies behind them was written after the checkpoint and is cut off.
    """

    def __init__(self, path: Path, position: int = 0) -> None:
        self._file = path.open("ab", buffering=0)
        length = os.fstat(self._file.fileno()).st_size
        if length < position:
            self._file.close()
            raise ValueError(f"{path} has {length:,} bytes, but the checkpoint was written after {position:,}")
        self._file.truncate(position)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, or raise OSError and append nothing."""
        data = json.dumps(plain(line), allow_nan=False).encode() + b"\n"
        length, written = os.fstat(self._file.fileno()).st_size, 0
        try:
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError:
            self._file.truncate(length)
            raise

    def sync(self) -> int:
        """Bring everything to the disk; return how many bytes that is."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


def dataset_digest(dataset: Dataset) -> str:
    """SHA-256 of all images and labels."""
    digest = hashlib.sha256()
    for array in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels):
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def environment(packages: tuple[str, ...] = ("numpy", "scipy", "torch", "numba", "mpi4py")) -> dict[str, Any]:
    """What this machine and installation are; the caller adds MPI, the command and the data."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": processor(),
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of this source, with "+changes" if files but results differ from it; None where git can't say."""
    try:
        texts = [
            subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", *SOURCE])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return texts[0] + ("+changes" if texts[1] else "")
