"""What is trained on the shaped hosts to see whether `bench.advise` is right, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bench.advice.costs import MeasuredCosts, SentBytes
from bench.advice.model import Task, language_task, tensor_task
from bench.models import lstm, resnet18, resnet32
from gradiveq.methods import GradiVeQ, Method, Plain
from gradiveq.specs import parse

#: Compared with plain DDP: two sums, two gathers, two rounds, and PCA.
METHODS: dict[str, Method] = {
    "half": parse("half"),
    "topk:0.01+ef": parse("topk:0.01+ef"),
    "qsgd-gather": parse("qsgd-gather"),
    "powersgd:4": parse("powersgd:4"),
    # Few samples, and so small slices: only compressed iterations are timed.
    "gradiveq": GradiVeQ(
        warmup=0,
        sample=12,
        compress=10_000,
        slice_size=256,
        ratio=16,
        fit_slices="all",
        sampling=Plain(),
        holdout_every=0,
    ),
}
#: Name -> how the model is made, and examples per rank.
MODELS: dict[str, tuple[Callable[[], Task], int]] = {
    "resnet32": (lambda: tensor_task("resnet32", resnet32(100, seed=0), (3, 32, 32)), 8),
    "resnet18-narrow": (lambda: tensor_task("resnet18-narrow", resnet18(100, width=0.375, seed=0), (3, 32, 32)), 4),
    "lstm-200": (lambda: language_task("lstm-200", lstm(2000, units=200, num_layers=2, seed=0)), 4),
}


@dataclass
class Found:
    """What rank 0 has found.

    Attributes:
        collectives: (what, seconds per call by repeat, seconds of processor time per call).
        times_s: seconds by model and method, per iteration by repeat.
        cpu_s: processor time of one rank per iteration, the mean over ranks and repeats.
    """

    models: dict[str, MeasuredCosts] = field(default_factory=dict)
    collectives: list[tuple[SentBytes, list[float], float]] = field(default_factory=list)
    times_s: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    cpu_s: dict[str, dict[str, float]] = field(default_factory=dict)
