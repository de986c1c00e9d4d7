"""A run's folder: what was measured, how it came about, and where. Figures and tables are made from these files alone.

    results/<run>/
        environment.json         written when the run begins
        metrics-<method>.jsonl   grows while a method runs; one JSON object per line. Methods are named as by
                                 `--methods`, in names of files by `file_name`: topk-0.01-ef for topk:0.01+ef
        summary.json             written when a method ends, so it lists those that are finished
        weights-<method>.pt      the trained parameters, the same on every rank (a dict of tensors for `torch.load`)
        trace-<method>….perfetto.json.gz     with `--trace`, for ui.perfetto.dev; `bench.job.tracing`
        checkpoint/              what `--resume` needs; `bench.job.checkpoint`

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
* `losses` is there in iterations in which the aggregator measured any (`gradiveq.over_ring.aggregator.Report.losses`).
* `compression` is there if the method has a compressor, in iterations that weren't skipped: what
  `gradiveq.exchange.error_memory.Measures` says of rank 0 (norm and errors are squared), and "relative_error",
  compression_error over norm. "payload_bytes" is what the rank itself has to say; how often that travels is in
  `bytes_sent`.
* `window` is an entry of `gradiveq.over_ring.aggregator.Aggregator.window_log`: per layer d, ratio, in-sample and
  held-out loss, and so on; or what ACCORDION or a threshold's formula has decided
  (`gradiveq.exchange.critical_regimes`, `gradiveq.exchange.switching`). Its line comes when the window is complete,
  which is after the next window's first iteration.

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
        "threshold": what `gradiveq.exchange.switching.AutomaticThreshold` logs, or null,
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

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.common.files import file_name, plain

ENVIRONMENT = "environment.json"
SUMMARY = "summary.json"

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


def metrics_name(method: str) -> str:
    return METRICS.replace("*", file_name(method))


def weights_name(method: str) -> str:
    return WEIGHTS.replace("*", file_name(method))


def grouped(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by group; kinds that `GROUPS` doesn't name count as "other"."""
    groups = {group: sum(seconds.get(kind, 0.0) for kind in kinds) for group, kinds in GROUPS.items()}
    groups["other"] += sum(value for kind, value in seconds.items() if kind not in KINDS)
    return groups


class Metrics:
    """A metrics file that is appended to, from a known position on.

    Args:
        path: the path of the file; made if it is not there.
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
