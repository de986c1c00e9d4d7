"""One run of `bench.layerwise`: what a spec of its grid means. Spawned processes import this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bench.common.learning_rate import rise_and_fall
from bench.data import Dataset, load
from bench.data.folder import ImageFiles, load_folder
from bench.models import MODELS
from bench.papers.layerwise.sizes import BASELINE, LAYER, MODEL
from bench.simulated.training import (
    Aggregation,
    CompressedMean,
    ExactMean,
    Images,
    Observer,
    SimulatedTask,
    Step,
    make_optimiser,
    simulate,
)
from gradiveq import theory
from gradiveq.compressors import COMPRESSORS
from gradiveq.exchange.parts import Part, layer_parts, model_parts
from gradiveq.flatten import Layout

#: Records and measurements of a run, so that it can be drawn.
POINTS = 25
CHECKPOINTS = 8
IMAGENET_TOP = 5


def run(spec: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Train; everything that matters is in the spec.

    Returns:
        What `bench.simulated.training.simulate` does, and "source" (what the data are), "guessing" (the accuracy of
        that), "layers" (how many), "iterations_per_epoch", and of a compressor "noise" (`theory.noise`).
    """
    task, source, guessing = _task(spec)
    per_epoch = task.iterations_per_epoch
    iterations = max(1, round(spec["epochs"] * per_epoch))
    every = max(1, iterations // POINTS)
    aggregation: Aggregation = ExactMean()
    observers: list[Observer] = []
    blocks = Layout(task.model).blocks
    about: dict[str, Any] = {
        "source": source,
        "guessing": guessing,
        "layers": len(blocks),
        "iterations_per_epoch": per_epoch,
    }
    if spec["method"] != BASELINE:
        compressor = COMPRESSORS[spec["method"]](**spec["fields"])
        parts = {LAYER: layer_parts(blocks, compressor), MODEL: model_parts(blocks, compressor)}
        aggregation = CompressedMean(parts[spec["granularity"]], spec["workers"], seed=spec["seed"])
        observers.append(BothGranularities(parts, every, spec["seed"]))
        constants = [compressor.constants(block.length) for block in blocks]
        if all(layer.omega is not None for layer in constants):
            about["noise"] = theory.noise(constants)._asdict()
    optimiser = make_optimiser(
        task.model.parameters(), spec["optimiser"], momentum=spec["momentum"], weight_decay=spec["weight_decay"]
    )
    result = simulate(
        task,
        aggregation,
        optimiser,
        rise_and_fall(spec["lr"], spec["warmup"], iterations),
        workers=spec["workers"],
        iterations=iterations,
        seed=spec["seed"],
        observers=observers,
        record_every=every,
        checkpoint=checkpoint,
        checkpoint_every=max(1, iterations // CHECKPOINTS),
    )
    return {**about, **result}


class BothGranularities(Observer):
    """Compresses the first worker's gradient layer by layer and as a whole, whichever of them trains.

    Columns, all relative to ‖g‖² and for "layer" and "model": "<…>_error", ‖g - Q(g)‖²; "<…>_moment", ‖Q(g)‖²; and
    "<…>_bound", what Assumption 5 and Lemma 1 of Dutta et al. 2020 allow for E‖Q(g)‖²: Σ_j (1 + Ω_j)‖g^j‖² by layers,
    (1 + Ω)‖g‖² of the model.

    Args:
        parts: parts by granularity.
        every: iterations.
        seed: the seed of random compressors.
    """

    def __init__(self, parts: Mapping[str, Sequence[Part]], every: int, seed: int) -> None:
        self.parts, self.every, self.seed = parts, every, seed
        self.constants = {
            granularity: [part.compressor.constants(part.length) for part in these]
            for granularity, these in parts.items()
        }

    def __call__(self, step: Step) -> Mapping[str, float]:
        gradient = step.gradients[0]
        if step.iteration % self.every or not gradient.any():
            return {}
        columns: dict[str, float] = {}
        for granularity, parts in self.parts.items():
            measured = theory.measure(parts, gradient, seed=self.seed + step.iteration)
            columns[f"{granularity}_error"] = measured.relative_error
            columns[f"{granularity}_moment"] = measured.second_moment / measured.norm
            constants = self.constants[granularity]
            if all(part.omega is not None for part in constants):
                norms = [theory.squared_norm(gradient[part.start : part.stop]) for part in parts]
                columns[f"{granularity}_bound"] = theory.lemma1(constants, norms).layer_wise / measured.norm
        return columns


@cache
def _dataset(path: str | None, folder: bool) -> Dataset | ImageFiles:
    return load_folder(str(path)) if folder else load(path)


def _task(spec: Mapping[str, Any]) -> tuple[SimulatedTask, str, float]:
    """The task, with initial weights and the order of the images by the seed; the data's source; guessing."""
    folder = spec["imagenet"]
    dataset = _dataset(spec["data"], folder)
    options = {"imagenet": True} if folder else {}
    build = MODELS[spec["network"]]
    model = build(dataset.num_classes, width=spec["width"], seed=spec["seed"], **options)
    model = model.to(spec["device"])
    top = IMAGENET_TOP if folder else 1
    task = Images(
        model,
        dataset,
        spec["batch_size"],
        spec["workers"],
        seed=spec["seed"],
        augment=spec["augment"],
        device=spec["device"],
        top=top,
    )
    return task, dataset.source, min(1.0, top / dataset.num_classes)
