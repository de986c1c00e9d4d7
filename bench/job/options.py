"""The options of the training job: what they are, what they default to, and which can't go together.

Nothing here imports NumPy: how many threads that may have is one of the options, and has to be told before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.common.command_line import Parser, UsageError, methods_help, names, program

#: What `--cluster` says for this machine's clock alone.
NO_CLUSTER = "none"
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
    "max_sample": 400,
    "stop_multiple": 2.0,
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
    "cluster": None,
    "device": "cpu",
    "gpu_aware": False,
    "threads": None,
    "chunk_bytes": None,
    "timeout": 300.0,
    "eval_every": None,
    "checkpoint_every": None,
    "trace": False,
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
FREE = {"data", "timeout", "checkpoint_every", "trace", "figures", "progress", "out", "resume"}
#: Options of one method only.
ONLY_GRADIVEQ = {
    "warmup",
    "sample",
    "compress",
    "max_sample",
    "stop_multiple",
    "loss_threshold",
    "n_components",
    "ratio",
    "slice_size",
    "reuse",
    "fit_slices",
    "sampling",
    "holdout_every",
}


def length(text: str) -> int | str:
    return text if text == "auto" else int(text)


def reuse(text: str) -> int | str:
    return text if text == "inf" else int(text)


def make_parser() -> Parser:
    """The parser, without defaults, so that what was given can be told from what was not."""
    parser = Parser(
        prog=program("bench.resnet32_cifar100"),
        closing=lambda: methods_help(
            "rar (plain ring all-reduce), qsgd (in the ring) and gradiveq, with the options above"
        ),
        description="Train ResNet-32 data-parallel with plain ring all-reduce, QSGD, GradiVeQ and other methods of "
        "compression, and show where the time went.",
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
    add(
        run,
        "--methods",
        "which, in this order; below is what else there is",
        type=names,
        metavar="NAME,…",
    )
    add(run, "--iterations", "SGD steps of each method", type=int, metavar="N")
    add(
        run,
        "--paper",
        "the paper's values: 45,000 iterations on CIFAR-100 with its schedule; says what the paper leaves out",
        action="store_true",
    )
    add(
        run,
        "--timing",
        f"only what the time breakdown needs: {TIMING['iterations']} iterations, no evaluation, no checkpoint",
        action="store_true",
    )
    add(
        run,
        "--data",
        "CIFAR-100 or CIFAR-10 in binary form (archive or folder), a folder with Fashion-MNIST's IDX files, or "
        "'cifar-100' or 'cifar-10' to download it (default: the shipped sample of Fashion-MNIST)",
        metavar="PATH",
    )
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
        sgd,
        "--nonfinite",
        "on a gradient that is not finite: end the run, or skip the step on all ranks",
        choices=("fail", "skip"),
    )

    pca = parser.add_argument_group("GradiVeQ")
    scaled = "(default: the paper's, scaled to the iterations)"
    add(pca, "--warmup", f"iterations before the first window {scaled}", type=int, metavar="N")
    add(pca, "--sample", f"Lt, sampling iterations of a window, or 'auto' {scaled}", type=length, metavar="N")
    add(pca, "--compress", f"Lc, compressed iterations of a window, or 'auto' {scaled}", type=length, metavar="N")
    add(pca, "--max-sample", "most sampling iterations of a window with --sample auto", type=int, metavar="N")
    add(
        pca,
        "--stop-multiple",
        "with --compress auto: a worker votes to end a window when its loss is above so many times the window's first",
        type=float,
        metavar="X",
    )
    add(
        pca,
        "--loss-threshold",
        "lambda: the in-sample loss that PCA may have, at least 0 and below 1 (default: 0.01)",
        type=float,
        metavar="X",
    )
    add(pca, "--n-components", "d of every layer, instead of a loss threshold", type=int, metavar="N")
    add(pca, "--ratio", "K/d of every layer, instead of a loss threshold", type=float, metavar="X")
    add(pca, "--slice-size", "K of every layer (default: F*D' of each, at most 4,096)", type=int, metavar="K")
    add(pca, "--reuse", "s: consecutive slices that share a basis, or 'inf' for a whole layer", type=reuse, metavar="S")
    add(
        pca,
        "--fit-slices",
        "fit a basis on the first of its slices as in the paper, or on all",
        choices=("first", "all"),
    )
    add(pca, "--sampling", "how gradients travel in sampling iterations", choices=("qsgd", "plain"))
    add(pca, "--holdout-every", "compressed iterations from one held-out loss to the next; 0: none", type=int)

    qsgd = parser.add_argument_group("QSGD")
    add(qsgd, "--qsgd-bits", "bits an element", type=int, metavar="N")
    add(qsgd, "--qsgd-bucket", "elements that share a norm", type=int, metavar="N")
    add(qsgd, "--qsgd-norm", "of a bucket", choices=("max", "l2"))
    add(
        qsgd,
        "--qsgd-whole-segments",
        "one message a segment and hop, as in the paper, instead of pipelined chunks",
        dest="qsgd_pipelined",
        action="store_false",
    )

    cluster = parser.add_argument_group("emulation")
    add(
        cluster,
        "--cluster",
        "whose clock runs beside this machine's: a preset of bench/clusters, a TOML file as in ring/cluster.py, or "
        f"'{NO_CLUSTER}' (default: gradiveq-cpu, with a node for each rank). Given without mpirun: all "
        "nodes of the cluster are threads of one process",
        metavar="NAME",
    )

    machine = parser.add_argument_group("the machine")
    add(machine, "--device", "where models are trained, and gradients encoded and decoded", choices=("cpu", "cuda"))
    add(
        machine,
        "--gpu-aware",
        "MPI can read and write the GPU's memory, and adds what is sent by its own all-reduce; with --device cuda",
        action="store_true",
    )
    add(
        machine,
        "--threads",
        "of each rank (default: cores / ranks of this machine; 1 where all ranks are in one process)",
        type=int,
        metavar="N",
    )
    add(machine, "--chunk-bytes", "most payload in a message (default: the ring's)", type=int, metavar="N")
    add(machine, "--timeout", "seconds that a rank waits for a neighbour", type=float, metavar="S")

    output = parser.add_argument_group("output")
    add(
        output,
        "--eval-every",
        "iterations between evaluations; 0: none (default: a fifth of the run)",
        type=int,
        metavar="N",
    )
    add(
        output,
        "--checkpoint-every",
        "iterations between checkpoints; 0: none (default: a tenth of the run, at most 500)",
        type=int,
        metavar="N",
    )
    add(
        output,
        "--trace",
        "the last compressed iteration of each method (the last one, if it has none) as a file for ui.perfetto.dev",
        action="store_true",
    )
    add(output, "--no-figures", "draw nothing", dest="figures", action="store_false")
    add(output, "--progress", "a bar, lines, or what suits the terminal", choices=("auto", "bar", "lines", "none"))
    return parser


def parse(arguments: list[str] | None, *, quiet: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options to use, and what the run that is resumed recorded (empty if none is).

    Raises:
        UsageError: with one line.
    """
    parser = make_parser()
    parser.quiet = quiet
    given = vars(parser.parse_args(arguments))
    if "resume" in given:
        recorded = read_environment(Path(given["resume"]))
        compare_options(given, recorded["options"], given["resume"])
        options = {**recorded["options"], **{name: value for name, value in given.items() if name in FREE}}
        check_options(options)
        return options, recorded

    presets = {**(PAPER if given.get("paper") else {}), **(TIMING if given.get("timing") else {})}
    options = {**DEFAULTS, **presets, **given}
    if {"n_components", "ratio"} & given.keys() and "loss_threshold" not in given:
        options["loss_threshold"] = None
    check_options(options)
    unused = sorted(ONLY_GRADIVEQ & given.keys())
    if unused and "gradiveq" not in options["methods"] and not given.get("paper"):
        raise UsageError(f"--{unused[0].replace('_', '-')} is an option of gradiveq, which --methods leaves out")
    for name, length_of in (("max_sample", "sample"), ("stop_multiple", "compress")):
        if name in given and options[length_of] != "auto":
            raise UsageError(f"--{name.replace('_', '-')} is for --{length_of} auto")
    return options, {}


def check_options(options: Mapping[str, Any]) -> None:
    """Bounds that nothing else checks."""
    least = {"eval_every": 0, "checkpoint_every": 0, "threads": 1, "chunk_bytes": 1}
    for name, bound in least.items():
        value = options[name]
        if value is not None and value < bound:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {bound}, got {value}")
    if not 0 < options["timeout"] < float("inf"):
        raise UsageError(f"--timeout must be a positive number of seconds, got {options['timeout']:g}")
    if options["gpu_aware"] and options["device"] != "cuda":
        raise UsageError(f"--gpu-aware is for --device cuda, got --device {options['device']}")
    if options["gpu_aware"] and options["cluster"] != NO_CLUSTER:
        raise UsageError(f"--gpu-aware: MPI's own all-reduce can't be emulated, add --cluster {NO_CLUSTER}")
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
        check_options(recorded["options"])
        for name in ("ranks", "one_process", "cluster", "data_sha256", "data_source"):
            recorded[name]
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
