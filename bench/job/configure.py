"""What the options of the training job come to: methods and settings, and what has to be said about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from bench.common.files import file_name
from bench.common.workers import Workers
from bench.data import Dataset
from bench.job.emulated_cluster import note
from bench.job.options import PAPER
from bench.job.train import PAPER_COMPRESS, PAPER_ITERATIONS, PAPER_SAMPLE, PAPER_WARMUP, Settings, scaled_schedule
from bench.models import MODELS
from gradiveq.methods import GradiVeQ, Method, Plain, QSGDRing, applied
from gradiveq.specs import known_names, parse
from ring.cluster import Cluster

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


class Configuration(NamedTuple):
    """What is to be run.

    Attributes:
        methods: methods by name, in the order in which they run.
        scaled: how the paper's schedule was shortened, for people; empty if it wasn't.
    """

    methods: dict[str, Method]
    settings: Settings
    scaled: str


def configure(options: dict[str, Any]) -> Configuration:
    """Methods and settings; what the options left open is put into them.

    Raises:
        ValueError: an option can't be used; one line.
    """
    if options["model"] not in {*MODELS, "resnet8"}:
        raise ValueError(f"unknown --model {options['model']!r}, known are {', '.join(MODELS)}")
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no such device here")

    iterations = options["iterations"]
    settings = Settings(
        **{name: options[name] for name in ("iterations", "batch_size", "lr", "lr_warmup")},
        **{name: options[name] for name in ("momentum", "weight_decay", "seed")},
    )
    windows = scaled_schedule(iterations)
    left_open = [name for name in windows._fields if options[name] is None]
    for name in left_open:
        options[name] = getattr(windows, name)
    scaled = ""
    if left_open and iterations < PAPER_ITERATIONS:
        paper = dict(zip(windows._fields, (PAPER_WARMUP, PAPER_SAMPLE, PAPER_COMPRESS), strict=True))
        scaled = "; ".join(f"{name} {paper[name]:,} -> {options[name]:,}" for name in left_open)
    if options["eval_every"] is None:
        options["eval_every"] = max(1, iterations // 5)
    if options["checkpoint_every"] is None:
        options["checkpoint_every"] = min(500, max(1, iterations // 10))

    qsgd = QSGDRing(options["qsgd_bits"], options["qsgd_bucket"], options["qsgd_norm"], options["qsgd_pipelined"])
    same = ["warmup", "sample", "compress", "max_sample", "stop_multiple", "holdout_every"]
    same += ["slice_size", "fit_slices", "loss_threshold", "n_components", "ratio"]
    gradiveq = GradiVeQ(
        sampling=qsgd if options["sampling"] == "qsgd" else Plain(),
        reuse=float(options["reuse"]) if options["reuse"] == "inf" else options["reuse"],
        **{name: options[name] for name in same},
    )
    every: dict[str, Method] = {"rar": Plain(), "qsgd": qsgd, "gradiveq": gradiveq}
    every["gradiveq+ef"] = replace(gradiveq, error_feedback=True)
    methods: dict[str, Method] = {}
    for name in options["methods"]:
        method = every[name] if name in every else _parse(name, settings.momentum)
        for other, theirs in methods.items():
            if method == theirs:
                raise ValueError(f"--methods: {other!r} and {name!r} are the same method")
            if file_name(name) == file_name(other):
                raise ValueError(f"--methods: {other!r} and {name!r} would be written into the same files")
        methods[name] = method
    return Configuration(methods, settings, scaled)


def _parse(spec: str, momentum: float) -> Method:
    try:
        return parse(spec, momentum=momentum)
    except ValueError as error:
        if f"unknown method {spec!r}" in str(error):  # a word that is none at all, and no spec of one
            raise ValueError(f"unknown method {spec!r} in --methods, known are {', '.join(known_names())}") from error
        raise ValueError(f"--methods: {error}") from error


def notes(
    options: Mapping[str, Any],
    configuration: Configuration,
    dataset: Dataset,
    workers: Workers,
    cluster: Cluster | None,
) -> list[str]:
    """What has to be said beside the results."""
    size = workers.size
    lines = [f"Data: {dataset.source}."]
    if dataset.name != "CIFAR-100":
        lines.append("This is not CIFAR-100: don't compare these accuracies with published ones for it.")
    if "gradiveq" in configuration.methods:
        text = (
            f"GradiVeQ: warm-up {options['warmup']}, then windows of {options['sample']} sampling and "
            f"{options['compress']} compressed iterations"
        )
        if configuration.scaled:
            text += f"; scaled from the paper's {PAPER_ITERATIONS:,} iterations ({configuration.scaled})"
        lines.append(f"{text}.")
    found = {name: applied(method) for name, method in configuration.methods.items()}
    compressed = {name: method for name, method in found.items() if method is not None}
    if any(method.granularity == "layer" for method in compressed.values()):
        lines.append("Compressors are applied to each layer (one parameter) by itself, where a method doesn't say @.")
    for name, method in compressed.items():
        form = None if method.feedback is None else method.feedback.form
        if form == "update" and options["momentum"]:
            lines.append(
                f"{name}: momentum {options['momentum']:g} is each worker's own, in what it sends (Algorithm 3 of Sahu "
                "et al. 2021, with Nesterov's); the optimiser has none."
            )
        elif form == "scaled" and options["momentum"]:
            lines.append(
                f"{name}: Algorithm 1 of Sahu et al. 2021 is plain SGD; here SGD has momentum {options['momentum']:g}."
            )
    lines.append(
        f"Learning rate {options['lr']:g}, divided by 10 after 1/2 and 3/4 of the run, warm-up over "
        f"{options['lr_warmup']} iterations (the paper states none)."
    )
    if cluster is not None:
        lines.append(note(cluster))
    here, cores = workers.local_size, workers.cores
    if workers.one_process:
        lines.append(
            f"All {size} workers are threads of one process; this machine's clock says nothing about the methods."
        )
    elif here > cores:
        lines.append(
            f"{here} ranks share {cores} cores with {options['threads']} thread(s) each, so computing takes longer "
            "than it would on machines of their own; its share in the totals is inflated."
        )
    if options["paper"]:
        lines.append(f"The paper states: {STATED}.")
        values = {**options, "slice_size": options["slice_size"] or "F*D', at most 4,096, D' a divisor of D"}
        lines += [f"The paper leaves out, chosen here: {text.format(**values)}." for text in CHOSEN]
        changed = [
            f"--{name.replace('_', '-')} {options[name]}"
            for name in PAPER
            if options[name] != PAPER[name] and name not in ("data", "batch_size")
        ]
        changed += [f"{size} workers"] if size != 6 else []
        changed += [dataset.name] if dataset.name != "CIFAR-100" else []
        changed += [options["model"]] if options["model"] != "resnet32" else []
        if changed:
            lines.append(f"Not the paper's: {', '.join(changed)}.")
    return lines
