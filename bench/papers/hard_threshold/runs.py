"""One run of `bench.hard_threshold`: what a spec of its grid means. Spawned processes import this."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.data.libsvm import load_libsvm
from bench.papers.hard_threshold import tasks
from bench.simulated import logistic
from bench.simulated.training import Aggregation, CompressedMean, ExactMean, Observer, Step, simulate
from gradiveq.compressors import COMPRESSORS, Compressor
from gradiveq.exchange.critical_regimes import CriticalRegimes
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.exchange.parts import Part
from gradiveq.flatten import Layout

Spec = Mapping[str, Any]

#: Records of a run, so that it can be drawn.
POINTS = 100
#: ACCORDION detects every 10 epochs of 300, on the sum of the gradients over one (its authors' code).
DETECTIONS = 30
DETECTION_SHARE = 0.1
CHECKPOINTS = 10


def run(spec: Spec, checkpoint: Path) -> dict[str, Any]:
    """Do it; everything that matters is in the spec."""
    return _logistic(spec) if spec["part"] == "logistic" else _network(spec, checkpoint)


# --- logistic regression ---------------------------------------------------------------------------------------------


@cache
def problem_of(name: str, path: str | None) -> tuple[logistic.Problem, logistic.Optimum, str]:
    """The problem, its optimum, and what the data are. The name "generated" is madelon's generator."""
    known = "madelon" if name == "generated" else name
    features, labels, source = load_libsvm(path, known)
    problem = logistic.Problem.of(features, labels)
    return problem, logistic.optimum(problem), source


def _logistic(spec: Spec) -> dict[str, Any]:
    problem, best, source = problem_of(spec["problem"], spec["data"])
    fields = dict(spec["fields"])
    if "precision" in fields:
        fields = {"value": problem.threshold(fields["precision"])}
    setting = logistic.LogisticSetting(
        spec["algorithm"], spec["compressor"], fields, spec["workers"], spec["epochs"], spec["seed"], spec["start"]
    )
    trace = logistic.train(problem, best, setting)
    return {
        "source": source,
        "fields": fields,
        "rows": problem.num_rows,
        "length": problem.length,
        "mu": problem.mu,
        "smoothness": problem.smoothness,
        "step": problem.step,
        "optimum": {"value": best.value, "gradient_norm": best.gradient_norm, "gap": best.gap},
        "trace": trace.as_dict(),
    }


# --- networks --------------------------------------------------------------------------------------------------------


def _network(spec: Spec, checkpoint: Path) -> dict[str, Any]:
    task, source = tasks.make(spec)
    per_epoch = task.iterations_per_epoch
    iterations = max(1, round(spec["epochs"] * per_epoch))
    rate = schedule(spec, per_epoch)
    layers = [Part(block.name, block.start, block.stop, _IDENTITY, block.index) for block in Layout(task.model).blocks]
    aggregation, observers = _aggregation(spec, layers, rate, iterations)
    record_every = max(1, iterations // POINTS)
    result = simulate(
        task,
        aggregation,
        optimiser(task.model, spec),
        rate,
        workers=spec["workers"],
        iterations=iterations,
        seed=spec["seed"],
        observers=observers,
        evaluate_every=max(1, iterations // spec["evaluations"]),
        record_every=record_every,
        checkpoint=checkpoint,
        checkpoint_every=max(1, iterations // CHECKPOINTS),
    )
    steps = result["steps"]
    counts = [after - before for before, after in zip([0, *steps["iteration"]], steps["iteration"], strict=False)]
    sent = sum(count * share for count, share in zip(counts, steps["density"], strict=True))
    return {
        **result,
        "source": source,
        "iterations_per_epoch": per_epoch,
        "layers": len(layers),
        "average_density": sent / max(1, sum(counts)),
        "detections": [observer.regimes.log for observer in observers if isinstance(observer, AccordionObserver)],
    }


def schedule(spec: Spec, iterations_per_epoch: int) -> Callable[[int], float]:
    """The learning rate of an iteration: a linear warm-up, then divided by 10 at each milestone."""
    lr, start, warmup = spec["lr"], spec["lr_start"], spec["warmup_epochs"]

    def rate(iteration: int) -> float:
        epoch = iteration / iterations_per_epoch
        if epoch < warmup:
            return float(start + (lr - start) * epoch / warmup)
        return float(lr / 10 ** sum(epoch >= milestone for milestone in spec["milestones"]))

    return rate


def optimiser(model: nn.Module, spec: Spec) -> torch.optim.Optimizer:
    """The paper's code's: no weight decay of batch norm; with update compression, momentum is the workers'.

    Then the decay doesn't pass through the momentum, and is larger by the factor that this would make, 1/(1 - λ).
    """
    if spec["optimiser"] == "adam":
        return torch.optim.Adam(model.parameters(), lr=spec["lr"], betas=(0.25, 0.5))
    momentum = spec["momentum"] if spec["optimiser"] == "nesterov" else 0.0
    decay = spec["weight_decay"]
    if spec["feedback"] == "update":
        decay /= 1 - momentum
        momentum = 0.0
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in norms], "weight_decay": decay},
        {"params": [p for p in model.parameters() if id(p) in norms], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]], lr=spec["lr"], momentum=momentum, nesterov=momentum > 0
    )


_IDENTITY = COMPRESSORS["identity"]()


def _parts(layers: Sequence[Part], compressors: Iterable[Compressor]) -> list[Part]:
    return [layer._replace(compressor=compressor) for layer, compressor in zip(layers, compressors, strict=True)]


def _aggregation(
    spec: Spec, layers: Sequence[Part], rate: Callable[[int], float], iterations: int
) -> tuple[Aggregation, list[Observer]]:
    """What the spec's method is, and what watches it."""
    name, fields, workers = spec["compressor"], dict(spec["fields"]), spec["workers"]
    length = layers[-1].stop
    if name == "identity":
        return ExactMean(), []
    feedback = None
    if spec["feedback"]:
        feedback = ErrorFeedback(spec["feedback"], spec["momentum"] if spec["feedback"] == "update" else 0.0)
    if name == "accordion":
        low, high = (COMPRESSORS["topk"](ratio=fields[key]) for key in ("most", "least"))  # type: ignore[call-arg]
        aggregation = CompressedMean(_parts(layers, [low] * len(layers)), workers, seed=spec["seed"], feedback=feedback)
        interval = max(2, iterations // DETECTIONS)
        return aggregation, [AccordionObserver(aggregation, layers, low, high, rate, interval)]
    if "least" in fields:
        fields = {"value": threshold_for(fields["least"], length)}
    compressor = COMPRESSORS[name](**fields)
    if spec["granularity"] == "model":
        parts = [Part("model", 0, length, compressor)]
    else:
        parts = _parts(layers, [compressor] * len(layers))
    return CompressedMean(parts, workers, seed=spec["seed"], feedback=feedback), []


def threshold_for(least: float, length: int) -> float:
    """λ = 1/(2·sqrt(k_min)), k_min = least·length a count (section 6 and Table 6 of Sahu et al. 2021)."""
    return 1 / (2 * math.sqrt(least * length))


class AccordionObserver(Observer):
    """Gives each layer the compressor that `gradiveq.exchange.critical_regimes` chooses for its regime.

    Args:
        aggregation: whose parts are replaced.
        layers: in order, all of the vector.
        low, high: the compressors in a critical regime and outside of it.
        rate: learning rate of an iteration, of which the next one's counts.
        interval: iterations between two detections.
    """

    def __init__(
        self,
        aggregation: CompressedMean,
        layers: Sequence[Part],
        low: Compressor,
        high: Compressor,
        rate: Callable[[int], float],
        interval: int,
    ) -> None:
        self.regimes = CriticalRegimes(layers, interval=interval, window=max(1, round(DETECTION_SHARE * interval)))
        self._aggregation, self._layers, self._low, self._high, self._rate = aggregation, layers, low, high, rate

    def __call__(self, step: Step) -> Mapping[str, float]:
        self.regimes.accept(step.mean, step.lr)
        critical = self._choose(step.iteration + 1)
        return {"critical": sum(critical) / len(critical)}

    def _choose(self, iteration: int) -> list[bool]:
        critical = self.regimes.critical_at(self._rate(iteration))
        parts = _parts(self._layers, [self._low if is_critical else self._high for is_critical in critical])
        self._aggregation.parts = parts
        return critical

    def state_dict(self) -> dict[str, Any]:
        return self.regimes.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.regimes.load_state_dict(state)
        self._choose(state["done"])
