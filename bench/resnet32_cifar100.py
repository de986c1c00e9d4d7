"""Train ResNet-32 data-parallel with plain ring all-reduce, QSGD and GradiVeQ, and show where the time went.

    mpirun -n 6 python -m bench.resnet32_cifar100

Each method starts from the same weights and sees the same data in the same order. Without options: a short run on a
sample of Fashion-MNIST that ends within 10 minutes on 2 cores, with the paper's schedule scaled down.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

# Only what leaves NumPy alone: how many threads it may have is known, and has to be told, before it is imported.
from tqdm import tqdm

if TYPE_CHECKING:
    from mpi4py import MPI

    from bench.checkpoint import Checkpoints
    from bench.data import Dataset
    from bench.train import Settings, Trainer
    from gradiveq.methods import Method
    from ring.mpi import MPIRing

DEFAULTS: dict[str, Any] = {
    "methods": ["rar", "qsgd", "gradiveq"],
    "model": "resnet32",
    "data": None,
    "paper": False,
    "timing": False,
    "iterations": 200,
    "batch_size": 16,
    "lr": 0.1,
    "lr_warmup": 0,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "seed": 0,
    "warmup": None,
    "sample": None,
    "compress": None,
    "loss_threshold": None,
    "n_components": None,
    "ratio": None,
    "slice_size": None,
    "reuse": "inf",
    "fit_slices": "first",
    "sampling": "qsgd",
    "holdout_every": 50,
    "qsgd_bits": 4,
    "qsgd_bucket": 512,
    "qsgd_norm": "max",
    "qsgd_pipelined": True,
    "nonfinite": "fail",
    "device": "cpu",
    "threads": None,
    "chunk_bytes": None,
    "timeout": 300.0,
    "eval_every": None,
    "checkpoint_every": None,
    "figures": True,
    "progress": "auto",
    "out": None,
    "resume": None,
}
#: What `--paper` sets, unless an option says otherwise.
PAPER: dict[str, Any] = {
    "data": "cifar-100",
    "iterations": 45_000,
    "batch_size": 32,
    "warmup": 2_500,
    "sample": 100,
    "compress": 400,
    "loss_threshold": 0.01,
    "reuse": "inf",
}
#: What `--timing` sets, likewise: long enough to see every phase.
TIMING: dict[str, Any] = {"iterations": 60, "eval_every": 0, "checkpoint_every": 0}
#: Options that a resumed run may have otherwise than it began: the trained weights don't depend on them. Of the data,
#: the content is compared instead.
FREE = {"data", "timeout", "checkpoint_every", "figures", "progress", "out", "resume"}
#: Options of one method only.
ONLY_GRADIVEQ = {
    "warmup", "sample", "compress", "loss_threshold", "n_components", "ratio", "slice_size", "reuse", "fit_slices",
    "sampling", "holdout_every",
}  # fmt: skip

STATED = (
    "ResNet-32, CIFAR-100, 6 workers, 45,000 iterations, warm-up 2,500, Lt 100, Lc 400, loss threshold 0.01, "
    "s infinite (one compressor a layer), 4-bit QSGD in sampling iterations"
)
CHOSEN = (
    "batch size {batch_size} a worker (32 x 6 = 192 images make 45,000 iterations 173 epochs; He et al. 2016 have 164)",
    "learning rate {lr:g}, divided by 10 after 1/2 and 3/4 of the run, linear warm-up over {lr_warmup} iterations",
    "SGD with momentum {momentum:g} and weight decay {weight_decay:g}",
    "augmentation by 4 black pixels around, random crop, random flip; pixels normalised by channel",
    "slice size K = {slice_size} (the paper: a multiple of F*D)",
    "PCA fitted on {fit_slices} slice(s) of a group, so d <= Lt - 1 with 'first'",
    "QSGD with the norm '{qsgd_norm}' of buckets of {qsgd_bucket}",
    "batch norm: each worker's own statistics in training, their average on a copy for evaluation",
    "weights as in He et al. 2015, from seed {seed}, the same for all methods",
)


#: Exit status of a run that somebody stopped: 128 + SIGINT, as shells have it.
INTERRUPTED = 130


class UsageError(Exception):
    """The options of this rank can't be used; one line."""


class Failure(Exception):
    """The run can't begin or go on. All ranks know, so all leave, and rank 0 says why in one line."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class Interrupted(Exception):
    """Somebody asked the run to stop, all ranks agreed, and there is a checkpoint."""


# --- options ---------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that all ranks can leave together."""

    quiet = False

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def print_help(self, file: Any = None) -> None:
        if not self.quiet:
            super().print_help(file)


def length(text: str) -> int | str:
    return text if text == "auto" else int(text)


def reuse(text: str) -> int | str:
    return text if text == "inf" else int(text)


def make_parser() -> Parser:
    """Without defaults, so that what was given can be told from what was not."""
    parser = Parser(
        prog="python -m bench.resnet32_cifar100",
        description=(__doc__ or "").split("\n\n")[0],
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    def add(group: Any, name: str, text: str, **how: Any) -> None:
        default = DEFAULTS[how.get("dest", name.lstrip("-").replace("-", "_"))]
        shown = ",".join(default) if isinstance(default, list) else default
        if not isinstance(default, bool) and default is not None:
            text += f" (default: {shown})"
        group.add_argument(name, help=text.replace("%", "%%"), **how)

    run = parser.add_argument_group("the run")
    add(run, "--methods", "which, in this order", type=lambda text: text.split(","), metavar="NAME,…")
    add(run, "--iterations", "SGD steps of each method", type=int, metavar="N")
    add(
        run, "--paper",
        "the paper's values: 45,000 iterations on CIFAR-100 with its schedule; says what the paper leaves out",
        action="store_true",
    )  # fmt: skip
    add(
        run, "--timing",
        f"only what the time breakdown needs: {TIMING['iterations']} iterations, no evaluation, no checkpoint",
        action="store_true",
    )  # fmt: skip
    add(
        run, "--data",
        "CIFAR-100 or CIFAR-10 in binary form (archive or folder), a folder with Fashion-MNIST's IDX files, or "
        "'cifar-100' or 'cifar-10' to download it (default: the shipped sample of Fashion-MNIST)",
        metavar="PATH",
    )  # fmt: skip
    add(run, "--model", "one of resnet20, 32, 44, 56, 110, or resnet8 for tests", metavar="NAME")
    add(run, "--seed", "of weights, data order, augmentation and quantisation", type=int, metavar="N")
    add(run, "--out", "folder for what is recorded (default: results/ and the date, time, and what ran)", metavar="DIR")
    add(
        run, "--resume", "go on with this run from its last checkpoint; its options need not be repeated", metavar="DIR"
    )

    sgd = parser.add_argument_group("training")
    add(sgd, "--batch-size", "images per worker and iteration", type=int, metavar="N")
    add(sgd, "--lr", "learning rate, divided by 10 after 1/2 and after 3/4 of the run", type=float, metavar="X")
    add(sgd, "--lr-warmup", "iterations in which the learning rate rises to that", type=int, metavar="N")
    add(sgd, "--momentum", "of SGD", type=float, metavar="X")
    add(sgd, "--weight-decay", "of SGD", type=float, metavar="X")
    add(
        sgd, "--nonfinite", "on a gradient that is not finite: end the run, or skip the step on all ranks",
        choices=("fail", "skip"),
    )  # fmt: skip

    pca = parser.add_argument_group("GradiVeQ")
    scaled = "(default: the paper's, scaled to the iterations)"
    add(pca, "--warmup", f"iterations before the first window {scaled}", type=int, metavar="N")
    add(pca, "--sample", f"Lt, sampling iterations of a window, or 'auto' {scaled}", type=length, metavar="N")
    add(pca, "--compress", f"Lc, compressed iterations of a window, or 'auto' {scaled}", type=length, metavar="N")
    add(
        pca, "--loss-threshold",
        "lambda: the in-sample loss that PCA may have, at least 0 and below 1 (default: 0.01)",
        type=float, metavar="X",
    )  # fmt: skip
    add(pca, "--n-components", "d of every layer, instead of a loss threshold", type=int, metavar="N")
    add(pca, "--ratio", "K/d of every layer, instead of a loss threshold", type=float, metavar="X")
    add(pca, "--slice-size", "K of every layer (default: F*D' of each, at most 4,096)", type=int, metavar="K")
    add(pca, "--reuse", "s: consecutive slices that share a basis, or 'inf' for a whole layer", type=reuse, metavar="S")
    add(
        pca, "--fit-slices", "fit a basis on the first of its slices as in the paper, or on all",
        choices=("first", "all"),
    )  # fmt: skip
    add(pca, "--sampling", "how gradients travel in sampling iterations", choices=("qsgd", "plain"))
    add(pca, "--holdout-every", "compressed iterations from one held-out loss to the next; 0: none", type=int)

    qsgd = parser.add_argument_group("QSGD")
    add(qsgd, "--qsgd-bits", "bits an element", type=int, metavar="N")
    add(qsgd, "--qsgd-bucket", "elements that share a norm", type=int, metavar="N")
    add(qsgd, "--qsgd-norm", "of a bucket", choices=("max", "l2"))
    add(
        qsgd, "--qsgd-whole-segments", "one message a segment and hop, as in the paper, instead of pipelined chunks",
        dest="qsgd_pipelined", action="store_false",
    )  # fmt: skip

    machine = parser.add_argument_group("the machine")
    add(machine, "--device", "where models are trained", choices=("cpu", "cuda"))
    add(machine, "--threads", "of each rank (default: cores / ranks of this machine)", type=int, metavar="N")
    add(machine, "--chunk-bytes", "most payload in a message (default: the ring's)", type=int, metavar="N")
    add(machine, "--timeout", "seconds that a rank waits for a neighbour", type=float, metavar="S")

    output = parser.add_argument_group("output")
    add(
        output, "--eval-every", "iterations between evaluations; 0: none (default: a fifth of the run)",
        type=int, metavar="N",
    )  # fmt: skip
    add(
        output, "--checkpoint-every",
        "iterations between checkpoints; 0: none (default: a tenth of the run, at most 500)",
        type=int, metavar="N",
    )  # fmt: skip
    add(output, "--no-figures", "draw nothing", dest="figures", action="store_false")
    add(output, "--progress", "a bar, lines, or what suits the terminal", choices=("auto", "bar", "lines", "none"))
    return parser


def parse(arguments: list[str] | None, *, quiet: bool = False) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The options to use, those that were given, and what the run that is resumed recorded (empty if none is).

    Raises:
        UsageError: with one line.
    """
    parser = make_parser()
    parser.quiet = quiet
    given = vars(parser.parse_args(arguments))
    if "resume" in given:
        recorded = read_environment(Path(given["resume"]))
        options = recorded["options"]
        compare_options(given, options, given["resume"])
        return {**options, **{name: value for name, value in given.items() if name in FREE}}, given, recorded

    presets = {**(PAPER if given.get("paper") else {}), **(TIMING if given.get("timing") else {})}
    options = {**DEFAULTS, **presets, **given}
    if {"n_components", "ratio"} & given.keys() and "loss_threshold" not in given:
        options["loss_threshold"] = None
    check_options(options)
    unused = sorted(ONLY_GRADIVEQ & given.keys())
    if unused and "gradiveq" not in options["methods"] and not given.get("paper"):
        raise UsageError(f"--{unused[0].replace('_', '-')} is an option of gradiveq, which --methods leaves out")
    return options, given, {}


def check_options(options: Mapping[str, Any]) -> None:
    """Bounds that nothing else checks."""
    least = {"iterations": 1, "batch_size": 1, "eval_every": 0, "checkpoint_every": 0, "threads": 1, "chunk_bytes": 1}
    for name, bound in least.items():
        value = options[name]
        if value is not None and value < bound:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {bound}, got {value}")
    if not 0 < options["timeout"] < float("inf"):
        raise UsageError(f"--timeout must be a positive number of seconds, got {options['timeout']:g}")
    methods = options["methods"]
    if len(set(methods)) != len(methods):
        raise UsageError(f"--methods names a method twice: {','.join(methods)}")


def read_environment(folder: Path) -> dict[str, Any]:
    """What a run recorded when it began; read without NumPy, as the number of threads is in it."""
    path = folder / "environment.json"
    if not folder.is_dir():
        raise UsageError(f"--resume: there is no folder {folder}")
    if not path.is_file():
        raise UsageError(f"--resume: {folder} is not a run's folder, it has no {path.name}")
    try:
        recorded: dict[str, Any] = json.loads(path.read_text())
        unknown = DEFAULTS.keys() ^ recorded["options"].keys()
        if unknown:
            raise UsageError(f"--resume: {path} is of another version, it differs in option {min(unknown)}")
        recorded["ranks"], recorded["data_sha256"], recorded["data_source"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--resume: {path} is not a run's record ({error!r})") from error
    return recorded


def compare_options(given: Mapping[str, Any], recorded: Mapping[str, Any], folder: str) -> None:
    """Raises UsageError naming the first option that a run to be resumed had otherwise."""
    for name, value in given.items():
        if name not in FREE and value != recorded[name]:
            raise UsageError(
                f"--{name.replace('_', '-')} is {_shown(value)}, but the run in {folder} was begun with "
                f"{_shown(recorded[name])}"
            )


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


# --- the ranks together ----------------------------------------------------------------------------------------------


def agree(comm: MPI.Intracomm, error: str | None) -> None:
    """Go on only if no rank has an error; raises Failure on all ranks with the first one's. Collective.

    MPI's own collectives spin while they wait, which would slow down the rank that is waited for; so a barrier that
    sleeps comes first.
    """
    arrived = comm.Ibarrier()
    while not arrived.Test():
        time.sleep(0.002)
    errors = comm.allgather(error)
    ranks = [rank for rank, text in enumerate(errors) if text is not None]
    if ranks:
        text = errors[ranks[0]]
        raise Failure(text if len(set(errors)) == 1 else f"{text} (on rank {', '.join(map(str, ranks))})")


def attempt(comm: MPI.Intracomm, action: Callable[[], Any], *known: type[Exception], here: bool = True) -> Any:
    """What `action` returns on this rank; if it raises one of `known` on any rank, Failure on all. Collective.

    Args:
        here: whether to call it on this rank.
    """
    error, value = None, None
    try:
        if here:
            value = action()
    except known as caught:
        error = " ".join(str(caught).split())
    agree(comm, error)
    return value


def local_ranks(comm: MPI.Intracomm) -> tuple[int, int, int]:
    """This rank's number among those of its machine, how many these are, and the cores that they may use."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores: set[int] = set().union(*node.allgather(own))
    result = node.rank, node.size, len(cores)
    node.Free()
    return result


def limit_threads(threads: int) -> None:
    """For what is imported from now on: OpenMP, the BLAS libraries, Numba."""
    for library in ("OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM", "NUMBA"):
        os.environ[f"{library}_THREADS" if library == "VECLIB_MAXIMUM" else f"{library}_NUM_THREADS"] = str(threads)


class StopRequest:
    """Whether a signal asked this process to stop; a second one, a second later, ends it at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.since: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.since is None:
            self.since = now
        elif now - self.since > 1:  # a terminal and a launcher may both pass on one Ctrl-C
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __call__(self) -> bool:
        return self.since is not None


# --- progress --------------------------------------------------------------------------------------------------------


def has_terminal() -> bool:
    """Whether somebody watches: this process's own error output is a terminal, or its launcher's is."""
    if sys.stderr.isatty():
        return True
    pid, terminal = os.getppid(), False
    try:
        while re.match(r"hydra_|mpiexec|mpirun|orte|prte|prun", Path(f"/proc/{pid}/comm").read_text()):
            terminal = os.readlink(f"/proc/{pid}/fd/2").startswith(("/dev/pts/", "/dev/tty"))
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        pass
    return terminal


class Progress:
    """A bar or lines on rank 0, nothing elsewhere.

    Args:
        style: "bar", "lines" or "none".
        done: iterations that were done before.
    """

    def __init__(self, style: str, method: str, iterations: int, done: int) -> None:
        self._style, self._method, self._iterations, self._first = style, method, iterations, done
        self._every = max(1, iterations // 10)
        self._start = time.monotonic()
        self._accuracy = ""
        self._bar = None
        if style == "bar":
            self._bar = tqdm(
                total=iterations, initial=done, desc=method, ncols=110, file=sys.stderr, mininterval=0.3, unit="it"
            )

    def show(self, line: Mapping[str, Any]) -> None:
        """Take a line of the metrics."""
        if line["type"] == "evaluation":
            self._accuracy = f", test accuracy {line['test_accuracy']:.4f}"
            if self._style == "lines":
                print(f"{self._method}: after {line['iteration']} iterations{self._accuracy}", flush=True)
        elif line["type"] == "iteration":
            done = line["iteration"] + 1
            if self._bar is not None:
                self._bar.set_postfix_str(f"{line['phase']}, loss {line['loss']:.3f}{self._accuracy}", refresh=False)
                self._bar.update()
            elif self._style == "lines" and done % self._every == 0:
                elapsed = time.monotonic() - self._start
                left = elapsed / (done - self._first) * (self._iterations - done)
                print(
                    f"{self._method}: {done} of {self._iterations}, {line['phase']}, loss {line['loss']:.3f}, "
                    f"{elapsed:.0f} s, {left:.0f} s left",
                    flush=True,
                )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


# --- the run ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    warnings.filterwarnings("ignore", r"\s*suspicious MPI")  # `check_launcher` says it in one line
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    local = local_ranks(comm)
    try:
        return prepare_and_run(arguments, comm, local)
    except Failure as failure:
        if comm.rank == 0:
            print(f"{'' if failure.status == INTERRUPTED else 'error: '}{failure}", file=sys.stderr, flush=True)
        return failure.status
    except KeyboardInterrupt:  # before or after training, when there is nothing to save
        if comm.rank == 0:
            print("interrupted", file=sys.stderr, flush=True)
        comm.Abort(INTERRUPTED)
        return INTERRUPTED


def prepare_and_run(arguments: list[str] | None, comm: MPI.Intracomm, local: tuple[int, int, int]) -> int:
    options, _, recorded = attempt(
        comm, lambda: parse(arguments, quiet=comm.rank > 0), UsageError
    )  # fmt: skip
    if options["threads"] is None:
        options["threads"] = max(1, local[2] // local[1])
    limit_threads(options["threads"])

    import torch

    from ring.errors import RingError
    from ring.mpi import MPIRing, check_launcher, end_together

    try:
        check_launcher(comm)
    except RingError as error:  # every process believes to be rank 0
        first = all(os.environ.get(name, "0") == "0" for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK"))
        if first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    end_together(comm)
    said = comm.allgather(options)
    different = [(rank, name) for rank, theirs in enumerate(said) for name in DEFAULTS if theirs[name] != said[0][name]]
    if different:
        rank, name = different[0]
        raise Failure(f"ranks 0 and {rank} were given different values of --{name.replace('_', '-')}")
    torch.set_num_threads(options["threads"])
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    chunk_bytes = {} if options["chunk_bytes"] is None else {"chunk_bytes": options["chunk_bytes"]}
    ring = MPIRing(comm, timeout_s=options["timeout"], **chunk_bytes)
    return Run(comm, ring, options, recorded, local).run()


class Run:
    """All methods of one command, one after the other, on one rank."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        ring: MPIRing,
        options: dict[str, Any],
        recorded: Mapping[str, Any],
        local: tuple[int, int, int],
    ) -> None:
        self.comm, self.ring, self.options, self.recorded = comm, ring, options, recorded
        self.local_rank, self.local_size, self.cores = local
        self.lead = comm.rank == 0
        self.scaled = ""

    def run(self) -> int:
        from bench.data import DataError

        self.methods, self.settings = attempt(self.comm, self._configure, ValueError)
        # One rank first: it may have to download.
        dataset = attempt(self.comm, self._load, DataError, here=self.lead)
        self.dataset: Dataset = attempt(self.comm, self._load, DataError, here=not self.lead) or dataset
        self.digest = self._same_data()
        attempt(self.comm, self._try_out, ValueError)
        self.notes = self._notes()
        self.folder = self._open_folder()
        return self._run_methods()

    # --- before anything is written

    def _configure(self) -> tuple[dict[str, Method], Settings]:
        """The methods and settings, and in the options what was left open."""
        import torch

        from bench.models import MODELS
        from bench.train import (
            PAPER_COMPRESS,
            PAPER_ITERATIONS,
            PAPER_SAMPLE,
            PAPER_WARMUP,
            Settings,
            scaled_schedule,
        )  # fmt: skip
        from gradiveq.methods import METHODS, GradiVeQ, Plain, QSGDRing

        options = self.options
        for name in options["methods"]:
            if name not in METHODS:
                raise ValueError(f"unknown method {name!r} in --methods, known are {', '.join(METHODS)}")
        if options["model"] not in {*MODELS, "resnet8"}:
            raise ValueError(f"unknown --model {options['model']!r}, known are {', '.join(MODELS)}")
        if options["device"] == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no such device here")
        if self.recorded and self.recorded["ranks"] != self.comm.size:
            raise ValueError(
                f"the run in {options['resume']} has {self.recorded['ranks']} ranks, now there are {self.comm.size}"
            )

        iterations = options["iterations"]
        settings = Settings(
            **{name: options[name] for name in ("iterations", "batch_size", "lr", "lr_warmup")},
            **{name: options[name] for name in ("momentum", "weight_decay", "seed")},
        )
        windows = scaled_schedule(iterations)
        left_open = [name for name in windows._fields if options[name] is None]
        for name in left_open:
            options[name] = getattr(windows, name)
        if left_open and iterations < PAPER_ITERATIONS:
            paper = dict(zip(windows._fields, (PAPER_WARMUP, PAPER_SAMPLE, PAPER_COMPRESS), strict=True))
            self.scaled = "; ".join(f"{name} {paper[name]:,} -> {options[name]:,}" for name in left_open)
        if options["eval_every"] is None:
            options["eval_every"] = max(1, iterations // 5)
        if options["checkpoint_every"] is None:
            options["checkpoint_every"] = min(500, max(1, iterations // 10))

        qsgd = QSGDRing(options["qsgd_bits"], options["qsgd_bucket"], options["qsgd_norm"], options["qsgd_pipelined"])
        same = ("warmup", "sample", "compress", "slice_size", "fit_slices", "loss_threshold", "n_components", "ratio")
        gradiveq = GradiVeQ(
            sampling=qsgd if options["sampling"] == "qsgd" else Plain(),
            reuse=float(options["reuse"]) if options["reuse"] == "inf" else options["reuse"],
            holdout_every=options["holdout_every"],
            **{name: options[name] for name in same},
        )
        every: dict[str, Method] = {"rar": Plain(), "qsgd": qsgd, "gradiveq": gradiveq}
        return {name: every[name] for name in options["methods"]}, settings

    def _load(self) -> Dataset:
        from bench.data import load

        return load(self.options["data"])

    def _same_data(self) -> str:
        """The digest of the data, after all ranks and the run that is resumed agreed on it."""
        from bench.record import dataset_digest

        digest = dataset_digest(self.dataset)
        digests = self.comm.allgather(digest)
        different = [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]
        if different:
            raise Failure(f"rank {different[0]} read other data than rank 0; each has {self.dataset.source}")
        if self.recorded and self.recorded["data_sha256"] != digest:
            raise Failure(
                f"the data is {self.dataset.source}, but the run in {self.options['resume']} was begun with other "
                f"data: {self.recorded['data_source']}"
            )
        return digest

    def _trainer(self, method: Method) -> Trainer:
        import torch

        from bench.models import MODELS, resnet_cifar
        from bench.train import Trainer

        device = self.options["device"]
        if device == "cuda":
            device = f"cuda:{self.local_rank % torch.cuda.device_count()}"
        classes, seed = self.dataset.num_classes, self.settings.seed
        name = self.options["model"]
        model = resnet_cifar(8, classes, seed=seed) if name == "resnet8" else MODELS[name](classes, seed=seed)
        return Trainer(
            self.ring, model, self.dataset, method, self.settings, nonfinite=self.options["nonfinite"], device=device
        )

    def _try_out(self) -> None:
        """Find out now what a later method would only find out after the others have run."""
        for method in self.methods.values():
            self._trainer(method)

    def _notes(self) -> list[str]:
        """What has to be said beside the results."""
        from bench.train import PAPER_ITERATIONS

        options, size = self.options, self.comm.size
        notes = [f"Data: {self.dataset.source}."]
        if self.dataset.name != "CIFAR-100":
            notes.append("This is not CIFAR-100: don't compare these accuracies with published ones for it.")
        if "gradiveq" in self.methods:
            text = (
                f"GradiVeQ: warm-up {options['warmup']}, then windows of {options['sample']} sampling and "
                f"{options['compress']} compressed iterations"
            )
            if self.scaled:
                text += f"; scaled from the paper's {PAPER_ITERATIONS:,} iterations ({self.scaled})"
            notes.append(f"{text}.")
        notes.append(
            f"Learning rate {options['lr']:g}, divided by 10 after 1/2 and 3/4 of the run, warm-up over "
            f"{options['lr_warmup']} iterations (the paper states none)."
        )
        if self.local_size > self.cores:
            notes.append(
                f"{self.local_size} ranks share {self.cores} cores with {options['threads']} thread(s) each, so "
                "computing takes longer than it would on machines of their own; its share in the totals is inflated."
            )
        if options["paper"]:
            notes.append(f"The paper states: {STATED}.")
            values = {**options, "slice_size": options["slice_size"] or "F*D', at most 4,096, D' a divisor of D"}
            notes += [f"The paper leaves out, chosen here: {text.format(**values)}." for text in CHOSEN]
            changed = [
                f"--{name.replace('_', '-')} {options[name]}"
                for name in PAPER
                if options[name] != PAPER[name] and name not in ("data", "batch_size")
            ]
            changed += [f"{size} workers"] if size != 6 else []
            changed += [self.dataset.name] if self.dataset.name != "CIFAR-100" else []
            changed += [options["model"]] if options["model"] != "resnet32" else []
            if changed:
                notes.append(f"Not the paper's: {', '.join(changed)}.")
        return notes

    # --- with a folder

    def _open_folder(self) -> Path:
        """The run's folder, with its environment recorded."""
        from bench.record import ENVIRONMENT, write_json

        path = self.options["resume"] or self.options["out"]
        if path is None:
            what = re.sub(r"[^a-z0-9]+", "-", self.dataset.name.lower()).strip("-")
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{self.options['model']}-{what}-{self.comm.size}"
            path = self.comm.bcast(str(Path("results") / name))
        folder = Path(path)

        def create() -> list[Path]:
            if self.recorded:
                return []
            missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise OSError(f"{folder} exists and is not an empty folder; choose another --out, or --resume it")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / ENVIRONMENT, self._environment())
            except OSError as error:
                remove(missing)
                raise OSError(f"{folder} can't be made or written ({error.strerror or error})") from error
            return missing or [folder]

        #: What this command made, innermost first.
        self.created: list[Path] = attempt(self.comm, create, OSError, here=self.lead) or []
        if self.recorded and self.lead:
            resumed = [*self.recorded.get("resumed", []), {**self._environment(), "options": None, "resumed": None}]
            write_json(folder / ENVIRONMENT, {**self.recorded, "resumed": resumed})
        return folder

    def _environment(self) -> dict[str, Any]:
        from mpi4py import MPI

        from bench.record import environment

        launch = f"mpirun -n {self.comm.size} " if self.comm.size > 1 else ""
        return {
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": f"{launch}python -m bench.resnet32_cifar100 {shlex.join(sys.argv[1:])}".rstrip(),
            **environment(),
            "mpi": MPI.Get_library_version().splitlines()[0].strip("\0 "),
            "ranks": self.comm.size,
            "ranks_on_first_machine": self.local_size,
            "cores": self.cores,
            "threads_per_rank": self.options["threads"],
            "seed": self.options["seed"],
            "data_source": self.dataset.source,
            "data_sha256": self.digest,
            "options": {**self.options, "resume": None},
        }

    def _summary(self, finished: Mapping[str, Any]) -> dict[str, Any]:
        options = self.options
        return {
            "title": f"{options['model']} on {self.dataset.source}",
            "data_source": self.dataset.source,
            "model": options["model"],
            "ranks": self.comm.size,
            "ranks_per_machine": self.local_size,
            "cores": self.cores,
            "batch_size": options["batch_size"],
            "iterations": options["iterations"],
            "complete": all(name in finished for name in self.methods),
            "notes": self.notes,
            "options": {**options, "resume": None},
            "methods": {name: finished[name] for name in self.methods if name in finished},
        }

    def _say(self, text: str) -> None:
        if self.lead:
            print(text, flush=True)

    def _run_methods(self) -> int:
        from bench.checkpoint import FOLDER, MANIFEST, CheckpointError, Checkpoints
        from bench.record import SUMMARY, write_json
        from bench.report import text
        from gradiveq.aggregator import NonFiniteGradient

        checkpoints: Checkpoints = attempt(self.comm, lambda: Checkpoints(self.folder, self.ring), CheckpointError)
        self._say("\n".join(f"* {note}" for note in self.notes))
        self._say(f"Recording in {self.folder}" + (", resumed" if self.recorded else ""))
        with StopRequest() as stop:
            try:
                for name in self.methods:
                    if name in checkpoints.finished:
                        self._say(f"{name}: finished before")
                    else:
                        self._run_method(name, checkpoints, stop)
                    if self.lead:
                        write_json(self.folder / SUMMARY, self._summary(checkpoints.finished))
            except Interrupted as interrupted:
                raise Failure(f"{interrupted}; go on with --resume {self.folder}", INTERRUPTED) from None
            except (NonFiniteGradient, CheckpointError) as error:  # raised on all ranks alike
                resumable = (self.folder / FOLDER / MANIFEST).exists()
                self.comm.Barrier()  # all have looked
                if self.created and not resumable:
                    remove(self.created)
                rest = f"; checkpoints and metrics until then are in {self.folder}" if resumable else ""
                raise Failure(f"{error}{rest}", 1) from None

        if self.lead:
            print("\n" + text(self._summary(checkpoints.finished), notes=False))
            if self.options["figures"]:
                self._draw()
            print(f"Everything is in {self.folder}", flush=True)
        self.ring.barrier()  # leave MPI together: its own way of waiting spins
        return 0

    def _draw(self) -> None:
        try:
            figures = importlib.import_module("bench.figures")
        except ModuleNotFoundError as error:
            print(f"no figures: {error.name} is not installed", flush=True)
            return
        figures.draw(self.folder)

    def _run_method(self, name: str, checkpoints: Checkpoints, stop: StopRequest) -> None:
        from bench.checkpoint import CheckpointError
        from bench.record import Metrics, metrics_name, plain, weights_name, write_atomically
        from bench.train import train

        trainer = self._trainer(self.methods[name])
        checkpoint_s, position = 0.0, 0
        current = checkpoints.current
        if current is not None and current["method"] == name:
            state = attempt(self.comm, checkpoints.load, CheckpointError)
            trainer.load_state_dict(state["trainer"])
            checkpoint_s, position = state["checkpoint_s"], current["metrics_bytes"]
            self._say(f"{name}: resumed after {trainer.iteration} of {trainer.settings.iterations} iterations")
        metrics: Metrics | None = attempt(
            self.comm,
            lambda: Metrics(self.folder / metrics_name(name), position),
            ValueError,
            here=self.lead,
        )
        style = self.options["progress"]
        if style == "auto":
            style = "bar" if has_terminal() else "lines"
        progress = Progress(style if self.lead else "none", name, trainer.settings.iterations, trainer.iteration)

        def write(line: dict[str, Any]) -> None:
            if metrics is not None:
                metrics.write(line)
            progress.show(line)

        def save() -> None:
            nonlocal checkpoint_s
            start = time.perf_counter()
            length = metrics.sync() if metrics is not None else 0
            state = {"trainer": trainer.state_dict(), "checkpoint_s": checkpoint_s}
            checkpoints.save(name, trainer.iteration, state, {"metrics_bytes": length})
            checkpoint_s += time.perf_counter() - start

        try:
            complete = train(
                trainer, write, save,
                eval_every=self.options["eval_every"], checkpoint_every=self.options["checkpoint_every"], stop=stop,
            )  # fmt: skip
            if not complete:
                raise Interrupted(f"stopped after {trainer.iteration} of {trainer.settings.iterations} with {name}")
            result = trainer.result()
            if metrics is not None:
                metrics.sync()
                write_atomically(self.folder / weights_name(name), _weights(trainer))
            checkpoints.finish(name, plain({**result, "checkpoint_s": checkpoint_s}))
        finally:
            progress.close()
            if metrics is not None:
                metrics.close()


def remove(folders: list[Path]) -> None:
    """Remove the first with all that is in it, and those around it where nothing else is in them."""
    if folders:
        shutil.rmtree(folders[0], ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in folders[1:]:
                folder.rmdir()


def _weights(trainer: Trainer) -> bytes:
    import torch

    data = io.BytesIO()
    torch.save({name: value.detach().cpu() for name, value in trainer.model.named_parameters()}, data)
    return data.getvalue()


if __name__ == "__main__":
    sys.exit(main())
