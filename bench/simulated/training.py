"""Data-parallel training of one model with n workers in one process, without a ring.

    for each worker r:  gradient of the loss on its own mini-batch -> packed (`gradiveq.flatten`)
    all gradients -> Aggregation (what the ring would do: `gradiveq.exchange`) -> the mean -> one optimiser step

The weights of all workers are the same at every iteration, so there is one replica of the model; that is what lets an
experiment have dozens of workers. What n real workers would have each for themselves is kept as follows:

* Error feedback's memories, one for each worker: in the `Aggregation`.
* Dropout: torch's generator is seeded from (seed, iteration, rank) before each forward pass.
* Batch norm: each worker normalises by its own mini-batch's statistics. The *running* statistics of the replica are the
  mean over the workers of those that each would have, which is what `bench.job.train` evaluates with: an update is
  linear in them, so each worker's update begins with what the replica had before the iteration, and the mean is kept.

Everything is a function of the seed. A run that is stopped goes on from its checkpoint bit by bit.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.common.files import write_atomically
from bench.data import Batches, Dataset, evaluation_batches
from bench.data.folder import FolderBatches, ImageFiles, folder_evaluation_batches
from bench.job.checkpoint import restored, storable
from gradiveq.compressors.base import Float32
from gradiveq.exchange.compressed import Compression
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.exchange.parts import Part, check_parts
from gradiveq.flatten import Block, Bucket, Layout
from gradiveq.here import Here
from gradiveq.running_noise import RunningNoise, estimate_here

EVALUATION_BATCH = 250
#: Of `gradiveq.noise.NoiseEstimate`, what the threshold's formula needs: M, ζ² and σ².
NOISE = ("multiple", "heterogeneity", "noise")
#: Columns of which a record has the last step's value; of all others it has the mean over its steps.
RUNNING = ("total_error", *NOISE)


# --- what is trained -------------------------------------------------------------------------------------------------


class SimulatedTask(ABC):
    """A model, each worker's batches, and what to measure.

    Attributes:
        model: on the device where it is trained.
        iterations_per_epoch: for the epochs in records, and where to evaluate.
    """

    model: nn.Module
    iterations_per_epoch: int

    @abstractmethod
    def batch(self, iteration: int, rank: int) -> Any:
        """What worker `rank` trains on in an iteration, counted from 0."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """A scalar, the mean over a worker's mini-batch."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics by name, such as "accuracy". Called with the model in evaluation mode and without gradients."""

    def state_dict(self) -> dict[str, Any]:
        """What else a resumed run needs, such as hidden states that are carried from batch to batch."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """What `state_dict` returned."""


class Images(SimulatedTask):
    """Classification: cross entropy; "accuracy" (top 1) and "loss" on the test images.

    Args:
        model: from float32 images, (n, 3, 32, 32) or (n, 3, 224, 224) of a folder, to logits (n, num_classes).
        dataset: images in memory, or files that are decoded when they are needed.
        batch_size: images per worker and iteration.
        workers: how many share a global batch.
        seed: the seed of the order and the augmentation.
        augment: whether images in memory are cropped and mirrored at random; files always are.
        device: where the model is.
        top: also report "top<k>_accuracy", for k above 1; of fewer classes than k it is 1.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset | ImageFiles,
        batch_size: int,
        workers: int,
        *,
        seed: int,
        augment: bool = True,
        device: str | torch.device = "cpu",
        top: int = 1,
    ) -> None:
        self.model, self.batch_size, self.top = model, batch_size, top
        self._batches: Batches | FolderBatches
        if isinstance(dataset, ImageFiles):
            self._batches = FolderBatches(dataset, workers * batch_size, seed=seed, device=device)
            self._test = partial(folder_evaluation_batches, dataset, EVALUATION_BATCH, device=device)
        else:
            self._batches = Batches(dataset, workers * batch_size, seed=seed, device=device, augment=augment)
            self._test = partial(evaluation_batches, dataset, EVALUATION_BATCH, device=device)
        self.iterations_per_epoch = self._batches.batches_per_epoch
        self._last: tuple[int, tuple[Tensor, Tensor]] | None = None

    def batch(self, iteration: int, rank: int) -> tuple[Tensor, Tensor]:
        """The global batch is made once; a worker has its stretch of it, as `Batches` with its rank would give."""
        if self._last is None or self._last[0] != iteration:
            self._last = iteration, self._batches.batch(iteration)
        images, labels = self._last[1]
        part = slice(rank * self.batch_size, (rank + 1) * self.batch_size)
        return images[part], labels[part]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self.model(images), labels)

    def evaluate(self) -> dict[str, float]:
        count, right, among, loss = 0, 0, 0, 0.0
        for images, labels in self._test():
            logits = self.model(images)
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
            among += int((logits.topk(min(self.top, logits.shape[1])).indices == labels[:, None]).sum())
            count += len(labels)
        metrics = {"accuracy": right / count, "loss": loss / count}
        return metrics if self.top == 1 else {**metrics, f"top{self.top}_accuracy": among / count}


def make_optimiser(
    parameters: Iterable[nn.Parameter], name: str, *, momentum: float = 0.9, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """ "sgd" (without momentum), "nesterov" or "adam"; the learning rate is set at each step by `simulate`."""
    if name == "adam":
        return torch.optim.Adam(parameters, weight_decay=weight_decay)
    if name not in ("sgd", "nesterov"):
        raise ValueError(f"the optimiser must be sgd, nesterov or adam, got {name!r}")
    nesterov = name == "nesterov"
    return torch.optim.SGD(
        parameters, lr=0.1, momentum=momentum if nesterov else 0.0, nesterov=nesterov, weight_decay=weight_decay
    )


# --- how gradients are aggregated ------------------------------------------------------------------------------------


class Aggregation(ABC):
    """The gradients of all workers to the vector that every worker gets."""

    @abstractmethod
    def aggregate(self, gradients: Sequence[Float32], out: Float32, call: int, lr: float) -> dict[str, float]:
        """One aggregation.

        Args:
            gradients: gradients by rank, finite float32 of shape (length,). Not modified.
            out: array of shape (length,); overwritten with the mean.
            call: from 0 on.
            lr: the learning rate of the step that follows.
        Returns:
            Numbers to record; "payload_bytes", of one worker, is among them.
        """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """What `state_dict` returned."""


class ExactMean(Aggregation):
    """The mean without compression: the sum in the order of the ranks, over their number."""

    def aggregate(self, gradients: Sequence[Float32], out: Float32, call: int, lr: float) -> dict[str, float]:
        np.copyto(out, gradients[0])
        for gradient in gradients[1:]:
            out += gradient
        out /= np.float32(len(gradients))
        return {"payload_bytes": float(out.nbytes), "density": 1.0}


class CompressedMean(Aggregation):
    """The mean that a ring with the same compressors of the same parts would give (`gradiveq.exchange`).

    Args:
        parts: that cover the vector.
        size: number of workers.
        seed: the seed of the compressors' random numbers.
        feedback: error feedback of each worker, or None.

    Attributes:
        here: the workers.
        parts: may be replaced between calls by others with the same boundaries.
    """

    def __init__(
        self, parts: Sequence[Part], size: int, *, seed: int = 0, feedback: ErrorFeedback | None = None
    ) -> None:
        length = parts[-1].stop if parts else 0
        check_parts(parts, length)
        self.parts = parts
        bucket = Bucket((Block("gradient", 0, length, (length,), False),), length)
        self.here = Here(lambda rank: Compression(lambda call: self.parts, seed=seed, feedback=feedback), bucket, size)

    def aggregate(self, gradients: Sequence[Float32], out: Float32, call: int, lr: float) -> dict[str, float]:
        """Means over the workers of `Measures`; norms and errors are squared."""
        self.here.aggregate(gradients, out, call, lr)
        measures = [one for one in self.here.measures if one is not None]
        names = ("norm", "compression_error", "relative_error", "error", "total_error", "density", "payload_bytes")
        return {name: fmean(float(getattr(one, name)) for one in measures) for name in names}

    def state_dict(self) -> dict[str, Any]:
        return self.here.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.here.load_state_dict(state)


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What an observer sees: an iteration whose gradients are aggregated, before the optimiser's step.

    Attributes:
        iteration: from 0 on.
        epoch: iteration over iterations_per_epoch.
        lr: learning rate.
        loss: mean over the workers.
        gradients: gradients by rank. Not to be modified.
        mean: what every worker got. Not to be modified.
        aggregation: may be changed for the next call (ACCORDION).
    """

    iteration: int
    epoch: float
    lr: float
    loss: float
    gradients: Sequence[Float32]
    mean: Float32
    aggregation: Aggregation


class Observer(ABC):
    """Measures along the run, or changes the aggregation along it."""

    @abstractmethod
    def __call__(self, step: Step) -> Mapping[str, float]:
        """More columns for this step's record; they need not be there in every step."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """What `state_dict` returned."""


def simulate(
    task: SimulatedTask,
    aggregation: Aggregation,
    optimiser: torch.optim.Optimizer,
    lr: Callable[[int], float],
    *,
    workers: int,
    iterations: int,
    seed: int = 0,
    evaluate_every: int | None = None,
    record_every: int = 1,
    observers: Sequence[Observer] = (),
    checkpoint: Path | None = None,
    checkpoint_every: int = 0,
) -> dict[str, Any]:
    """Train.

    Args:
        task: what; its model is trained in place.
        aggregation: how the workers' gradients become one.
        optimiser: over the model's parameters.
        lr: learning rate of an iteration, counted from 0; set in all of the optimiser's groups.
        workers: how many.
        iterations: steps in all.
        seed: the seed of dropout.
        evaluate_every: steps; None for an epoch. The run's end is evaluated in any case.
        record_every: steps that one record is the mean of.
        observers: called at every step, in this order.
        checkpoint: a file; if it is there, the run goes on from it. Removed when the run ends.
        checkpoint_every: steps; 0 for none.
    Returns:
        JSON values:
        "steps": columns {"iteration": steps done, "loss", "lr", what the aggregation and the observers measured, and
            M, ζ² and σ² as "multiple", "heterogeneity" and "noise" (`gradiveq.running_noise`: from the 10th step on, of
            the last 100 at most)}, None where there is no value; "loss" is the mean over the workers' batches.
        "evaluations": [{"iteration": steps done, "epoch", and what the task evaluates}].
        "diverged": None, or the iteration whose loss, gradient, its sum with a memory, or mean was not finite. The run
            ends there, and is evaluated.
        "num_parameters": elements of the gradient; "payload_bytes": what one worker sent over the run.
    Raises:
        ValueError: an argument is outside its bounds, or the checkpoint is of another run.
    """
    for value, argument in ((workers, "workers"), (iterations, "iterations"), (record_every, "record_every")):
        if value < 1:
            raise ValueError(f"`{argument}` must be at least 1, got {value}")
    run = _Run(task, aggregation, optimiser, lr, workers, iterations, seed, record_every, observers)
    if checkpoint is not None and checkpoint.exists():
        run.load(checkpoint)
    every = evaluate_every if evaluate_every is not None else task.iterations_per_epoch
    with torch.random.fork_rng(run.cuda):
        while run.iteration < iterations and run.diverged is None:
            run.step()
            ended = run.iteration == iterations or run.diverged is not None
            if ended or (every and run.iteration % every == 0):
                run.evaluate()
            if checkpoint is not None and not ended and checkpoint_every and run.iteration % checkpoint_every == 0:
                run.save(checkpoint)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return run.result()


class _Run:
    """The state of `simulate`."""

    def __init__(
        self,
        task: SimulatedTask,
        aggregation: Aggregation,
        optimiser: torch.optim.Optimizer,
        lr: Callable[[int], float],
        workers: int,
        iterations: int,
        seed: int,
        record_every: int,
        observers: Sequence[Observer],
    ) -> None:
        self.task, self.aggregation, self.optimiser, self.lr = task, aggregation, optimiser, lr
        self.workers, self.iterations, self.seed = workers, iterations, seed
        self.record_every, self.observers = record_every, observers
        self.layout = Layout(task.model)
        self.gradients = [np.zeros(self.layout.length, np.float32) for _ in range(workers)]
        self.mean = np.zeros(self.layout.length, np.float32)
        self.noises = [RunningNoise(workers, seed=seed) for _ in range(workers)]
        self.statistics = [buffer for buffer in task.model.buffers() if buffer.is_floating_point()]
        self.cuda = [parameter.device for parameter in task.model.parameters() if parameter.is_cuda][:1]
        self.iteration = 0
        self.diverged: int | None = None
        self.payload_bytes = 0.0
        self.records: list[dict[str, float]] = []
        self.recent: list[dict[str, float]] = []  # steps that the next record is the mean of
        self.evaluations: list[dict[str, float]] = []

    def step(self) -> None:
        iteration = self.iteration
        lr = float(self.lr(iteration))
        losses = self._gradients(iteration)
        self.iteration += 1
        loss = fmean(losses)
        if not math.isfinite(loss) or not all(np.isfinite(gradient).all() for gradient in self.gradients):
            self.diverged = iteration
            return
        try:
            columns = self.aggregation.aggregate(self.gradients, self.mean, iteration, lr)
        except OverflowError:  # of gradient and memory together, or of the mean
            self.diverged = iteration
            return
        estimate = estimate_here(self.noises, self.gradients)
        if estimate is not None:
            columns.update({name: getattr(estimate, name) for name in NOISE})
        step = Step(
            iteration, iteration / self.task.iterations_per_epoch, lr, loss, self.gradients, self.mean, self.aggregation
        )
        for observer in self.observers:
            columns.update(observer(step))
        self.layout.unpack(self.mean)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        self.payload_bytes += columns["payload_bytes"]
        self.recent.append({"loss": loss, "lr": lr, **columns})
        if len(self.recent) == self.record_every or self.iteration == self.iterations:
            self._record()

    def evaluate(self) -> None:
        self.task.model.eval()
        with torch.no_grad():
            metrics = self.task.evaluate()
        self.evaluations.append(
            {"iteration": self.iteration, "epoch": self.iteration / self.task.iterations_per_epoch, **metrics}
        )

    def result(self) -> dict[str, Any]:
        names = dict.fromkeys(name for record in self.records for name in record)
        return {
            "steps": {name: [record.get(name) for record in self.records] for name in names},
            "evaluations": self.evaluations,
            "diverged": self.diverged,
            "num_parameters": self.layout.length,
            "payload_bytes": self.payload_bytes,
        }

    def save(self, path: Path) -> None:
        """Everything that the rest of the run depends on."""
        data = io.BytesIO()
        torch.save(storable(self._state()), data)
        write_atomically(path, data.getvalue())

    def load(self, path: Path) -> None:
        """Go on where `save` was called.

        Raises:
            ValueError: the checkpoint is of another number of workers, iterations, or another seed.
        """
        state = restored(torch.load(path, map_location="cpu", weights_only=True))
        for name in ("workers", "iterations", "seed", "record_every"):
            if state[name] != getattr(self, name):
                raise ValueError(f"{path} is of a run with {name} = {state[name]}, this one has {getattr(self, name)}")
        self.task.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.task.load_state_dict(state["task"])
        self.aggregation.load_state_dict(state["aggregation"])
        for noise, part in zip(self.noises, state["noises"], strict=True):
            noise.load_state_dict(part)
        for observer, part in zip(self.observers, state["observers"], strict=True):
            observer.load_state_dict(part)
        for name in ("iteration", "diverged", "payload_bytes", "records", "recent", "evaluations"):
            setattr(self, name, state[name])

    def _gradients(self, iteration: int) -> list[float]:
        """Each worker's gradient into `gradients`, and its loss."""
        self.task.model.train()
        before = [buffer.clone() for buffer in self.task.model.buffers()]
        sums = [torch.zeros_like(buffer) for buffer in self.statistics]
        losses = []
        for rank, vector in enumerate(self.gradients):
            for buffer, value in zip(self.task.model.buffers(), before, strict=True):
                buffer.copy_(value)
            key = np.random.SeedSequence([self.seed, iteration, rank]).generate_state(1, np.uint64)
            self._seed(int(key[0] >> np.uint64(1)))
            self.optimiser.zero_grad(set_to_none=True)
            loss = self.task.loss(self.task.batch(iteration, rank))
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()))
            self.layout.pack(vector)
            for total, buffer in zip(sums, self.statistics, strict=True):
                total += buffer
        for total, buffer in zip(sums, self.statistics, strict=True):
            buffer.copy_(total / self.workers)
        return losses

    def _seed(self, seed: int) -> None:
        """Like `torch.manual_seed`, which without a GPU remembers every call for one that might come."""
        torch.default_generator.manual_seed(seed)
        if self.cuda:
            torch.cuda.manual_seed(seed)

    def _record(self) -> None:
        names = dict.fromkeys(name for step in self.recent for name in step)
        record: dict[str, float] = {"iteration": self.iteration}
        for name in names:
            values = [step[name] for step in self.recent if name in step]
            record[name] = values[-1] if name in RUNNING else fmean(values)
        self.records.append(record)
        self.recent = []

    def _state(self) -> dict[str, Any]:
        return {
            "workers": self.workers,
            "iterations": self.iterations,
            "seed": self.seed,
            "record_every": self.record_every,
            "iteration": self.iteration,
            "diverged": self.diverged,
            "payload_bytes": self.payload_bytes,
            "records": self.records,
            "recent": self.recent,
            "evaluations": self.evaluations,
            "model": self.task.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "task": self.task.state_dict(),
            "aggregation": self.aggregation.state_dict(),
            "noises": [noise.state_dict() for noise in self.noises],
            "observers": [observer.state_dict() for observer in self.observers],
        }
