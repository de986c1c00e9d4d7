"""Data-parallel training with one aggregation method: what happens in an iteration, and in which order.

    batch of the rank -> forward -> backward -> aggregate: the mean gradient of all ranks -> SGD step -> mean loss

Everything that depends on chance depends on (seed, iteration) alone, so runs with different methods see the same
initial weights and the same data, and a run that is stopped and resumed computes the same bits as one that is not.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from bench.data import Batches, Dataset, evaluation_batches
from bench.job.record import KINDS, grouped
from gradiveq.exchange.error_memory import Measures
from gradiveq.flatten import Vector
from gradiveq.methods import Method, applied
from gradiveq.over_ring.aggregator import Aggregator
from gradiveq.running_noise import RunningNoise
from ring.cluster import Cluster
from ring.handle import Ring
from ring.timeline import Timeline
from ring.trace import keeping
from ring.virtual import VirtualRing

#: The paper's schedule (section 4 of Yu et al. 2018).
PAPER_ITERATIONS = 45_000
PAPER_WARMUP, PAPER_SAMPLE, PAPER_COMPRESS = 2_500, 100, 400
#: A scaled schedule has at least so many warm-up and sampling iterations (or a tenth of the run, if that is less):
#: PCA finds at most Lt - 1 components in Lt samples.
LEAST = 20
EVALUATION_BATCH = 50
#: How a cluster's `iteration_s` is divided: a backward pass computes twice what a forward pass does.
FORWARD, BACKWARD, UPDATE = 1 / 3, 2 / 3, 0.0
#: The phases whose last iteration is kept for a trace: one of each method.
TRACED = ("plain", "qsgd", "compress", "compressed")


class WindowLengths(NamedTuple):
    """The lengths of GradiVeQ's phases, in iterations."""

    warmup: int
    sample: int
    compress: int


def scaled_schedule(iterations: int) -> WindowLengths:
    """The paper's schedule for a run of another length.

    Warm-up and Lt shrink with the run, down to `LEAST`; Lc remains four times Lt. A run that is longer than the
    paper's has the paper's.
    """
    share = min(1.0, iterations / PAPER_ITERATIONS)
    least = min(LEAST, max(2, iterations // 10))
    sample = max(round(PAPER_SAMPLE * share), least)
    return WindowLengths(max(round(PAPER_WARMUP * share), least), sample, sample * PAPER_COMPRESS // PAPER_SAMPLE)


@dataclass(frozen=True)
class Settings:
    """What is the same for every method of a run.

    Attributes:
        iterations: SGD steps.
        batch_size: images per rank and iteration.
        lr: the learning rate; divided by 10 after half and again after three quarters of the run.
        lr_warmup: iterations in which it first rises linearly to `lr`.
        momentum, weight_decay: of SGD.
        seed: the seed of initial weights, data order, augmentation and quantisation.
    """

    iterations: int
    batch_size: int
    lr: float = 0.1
    lr_warmup: int = 0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"`iterations` must be at least 1, got {self.iterations}")
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"`lr` must be a positive number, got {self.lr}")
        if not 0 <= self.lr_warmup <= self.iterations:
            raise ValueError(f"`lr_warmup` must be 0 to {self.iterations} (the iterations), got {self.lr_warmup}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` must be at least 0 and below 1, got {self.momentum}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"`weight_decay` must be at least 0, got {self.weight_decay}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` must be 0 to 2**63 - 1, got {self.seed}")


def learning_rate(iteration: int, settings: Settings) -> float:
    """The learning rate of an iteration, counted from 0."""
    if iteration < settings.lr_warmup:
        return settings.lr * (iteration + 1) / settings.lr_warmup
    drops = (2 * iteration >= settings.iterations) + (4 * iteration >= 3 * settings.iterations)
    return settings.lr * 0.1**drops


class Stopwatch:
    """Tells where one iteration's seconds went, by one clock."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._before = timeline.totals()
        self._start_s = timeline.clock()

    def stop(self) -> dict[str, float]:
        """Seconds by kind since it was made; with "other", which no kind accounts for, they are all seconds."""
        elapsed_s = self._timeline.clock() - self._start_s
        after, before = self._timeline.totals(), self._before
        seconds = {kind: after[kind] - before.get(kind, 0.0) for kind in after if after[kind] != before.get(kind, 0.0)}
        seconds["other"] = seconds.get("other", 0.0) + elapsed_s - sum(seconds.values())
        return seconds


def training_s(seconds: Mapping[str, float]) -> float:
    """The seconds of an iteration that training takes; measuring (held-out losses, noise) is no part of it."""
    return sum(seconds.values()) - seconds.get("measure", 0.0)


class Totals:
    """Sums over the iterations of one phase; seconds by this machine's clock and by the cluster's."""

    def __init__(self) -> None:
        self.iterations = self.bytes_sent = self.dense_bytes = 0
        self.time_s = self.virtual_s = 0.0
        self.seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self.virtual_seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)

    def add(self, line: Mapping[str, Any]) -> None:
        self.iterations += 1
        self.bytes_sent += line["bytes_sent"]
        self.dense_bytes += line["dense_bytes"]
        virtual_seconds = line.get("virtual_seconds", {})
        self.time_s += training_s(line["seconds"])
        self.virtual_s += training_s(virtual_seconds)
        for totals, seconds in ((self.seconds, line["seconds"]), (self.virtual_seconds, virtual_seconds)):
            for kind, value in seconds.items():
                totals[kind if kind in totals else "other"] += value


def optimizer_momentum(method: Method, settings: Settings) -> float:
    """SGD's momentum: 0 with update compression, where it is in what each worker sends (`gradiveq.exchange`)."""
    compressing = applied(method)
    feedback = None if compressing is None else compressing.feedback
    return 0.0 if feedback is not None and feedback.form == "update" else settings.momentum


#: Fields of `gradiveq.exchange.error_memory.Measures` that are summed over a run.
SUMMED = ("density", "relative_error", "compression_error", "error", "payload_bytes")


def measured(measures: Measures) -> dict[str, Any]:
    """What a line of the metrics has of the measures."""
    return {**dataclasses.asdict(measures), "relative_error": measures.relative_error}


class Trainer:
    """One rank's side of a run with one method. All ranks call `step`, `evaluate` and `result` together.

    Args:
        ring: the ring of all ranks.
        model: with the same weights on every rank; trained in place.
        dataset: the same on every rank.
        method: how gradients are aggregated.
        nonfinite: "fail", or "skip" to leave out a step to which some rank has no finite gradient: then weights and
            batch norm's statistics are as before it on all ranks.
        device: where the model is; if it is a GPU, gradients are encoded and decoded there
            (`gradiveq.over_ring.staging`).
        gpu_aware: MPI reads and writes the GPU's memory itself.
        trace: keep what happened in the last iteration of the phase in `TRACED` in the timeline, for `ring.trace`.
        cluster: of as many nodes as there are ranks; its clock runs beside this machine's, within `step` only. What is
            computed doesn't depend on it.

    Attributes:
        iteration: how many are done.
        time_s: seconds that they took on this rank, less those spent to measure held-out losses and noise.
        virtual_s: the same on the cluster.
    """

    def __init__(
        self,
        ring: Ring,
        model: nn.Module,
        dataset: Dataset,
        method: Method,
        settings: Settings,
        *,
        nonfinite: str = "fail",
        device: str | torch.device = "cpu",
        gpu_aware: bool = False,
        cluster: Cluster | None = None,
        trace: bool = False,
    ) -> None:
        self.ring, self.dataset, self.settings, self.trace = ring, dataset, settings, trace
        self.device = torch.device(device)
        self.model = model.to(self.device)
        # What is no part of training goes over `ring`, so that the cluster hears nothing of it.
        self.training_ring = ring
        self.virtual: VirtualRing | None = None
        self.timeline = Timeline()
        if cluster is not None:
            self.training_ring = self.virtual = VirtualRing(ring, cluster)
            self._cluster_state = self.virtual.state_dict()
            self.timeline = Timeline(self._wall_clock(), virtual=Timeline(self.virtual.clock))
        self.aggregator = Aggregator(
            self.model,
            self.training_ring,
            method,
            seed=settings.seed,
            nonfinite=nonfinite,
            timeline=self.timeline,
            device=None if self.device.type == "cpu" else self.device,
            gpu_aware=gpu_aware,
        )
        self.noise = RunningNoise(ring.size, seed=settings.seed)
        self.aggregator.watch = self._see
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.lr,
            momentum=optimizer_momentum(method, settings),
            weight_decay=settings.weight_decay,
        )
        self.batches = Batches(
            dataset, settings.batch_size, ring.rank, ring.size, seed=settings.seed, device=self.device
        )
        self.iteration = self.skipped = self.windows = 0
        self.time_s = self.virtual_s = self.evaluation_s = self.compute_cpu_s = 0.0
        # A worker that is a thread shares the process with others.
        alone = threading.current_thread() is threading.main_thread()
        self._processor_time = time.process_time if alone else time.thread_time
        # Of the last tenth of the run, less the iterations that were skipped: sum of the losses, and how many.
        self.late_loss, self.late_iterations = 0.0, 0
        self.totals: dict[str, Totals] = defaultdict(Totals)
        self.compression = dict.fromkeys(("iterations", *SUMMED), 0.0)
        self.last_evaluation: dict[str, Any] = {}

    @property
    def epoch(self) -> float:
        return self.iteration / self.batches.batches_per_epoch

    @property
    def late(self) -> int:
        """The first iteration of the last tenth."""
        return self.settings.iterations - max(1, self.settings.iterations // 10)

    def step(self, stop: bool = False) -> tuple[dict[str, Any], bool]:
        """One iteration.

        Args:
            stop: whether this rank was asked to stop.
        Returns:
            The line for the metrics (`bench.job.record`), and whether any rank was asked to stop.
        """
        kept = self.trace and self.aggregator.phase in TRACED
        with keeping(self.timeline) if kept else nullcontext():
            return self._step(stop)

    def _step(self, stop: bool) -> tuple[dict[str, Any], bool]:
        watches = [Stopwatch(timeline) for timeline in self._start_clocks()]
        span = self.timeline.span
        lr = learning_rate(self.iteration, self.settings)

        with span("data"):
            images, labels = self.batches.batch(self.iteration)
        kept = self._statistics() if self.aggregator.nonfinite == "skip" else []
        cpu = self._processor_time()
        with span("forward"), self._taking(FORWARD):
            self.model.train()
            loss = functional.cross_entropy(self.model(images), labels)
            local_loss = loss.item()
        with span("backward"), self._taking(BACKWARD):
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self._synchronise()
        self.compute_cpu_s += self._processor_time() - cpu

        report = self.aggregator.aggregate(lr)

        cpu = self._processor_time()
        with span("update"), self._taking(UPDATE):
            if not report.skipped:
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                self.optimizer.step()
            else:  # the forward pass has put them into the running means already, for good
                for buffer, value in zip(self.model.buffers(), kept, strict=True):
                    buffer.copy_(value)
            self._synchronise()
        self.compute_cpu_s += self._processor_time() - cpu

        with span("control"):
            said = np.array([local_loss, stop], np.float64)
            self.training_ring.all_reduce(said)
        mean_loss = float(said[0]) / self.ring.size
        with span("measure"), self._unheard():
            noise_bytes = 0 if report.skipped else self._estimate_noise()

        seconds, *virtual_seconds = [watch.stop() for watch in watches]
        self.time_s += training_s(seconds)
        line = {
            "type": "iteration",
            "iteration": self.iteration,
            "epoch": self.epoch,
            "phase": report.phase,
            "loss": mean_loss,
            "lr": lr,
            "bytes_sent": report.bytes_sent,
            "dense_bytes": report.dense_bytes,
            "ratio": report.ratio,
            "fit_bytes": report.fit_bytes,
            "measure_bytes": report.measure_bytes + noise_bytes,
            "skipped": report.skipped,
            "seconds": seconds,
            "iteration_s": sum(seconds.values()),
            "time_s": self.time_s,
            "noise": None if self.noise.estimate is None else self.noise.estimate.as_dict(),
        }
        if self.virtual is not None:
            self._cluster_state = self.virtual.state_dict()
            self.virtual_s += training_s(virtual_seconds[0])
            line |= {"virtual_seconds": virtual_seconds[0], "virtual_s": self.virtual_s}
        if report.losses:
            line["losses"] = report.losses
        if report.measures:
            line["compression"] = said_of = measured(report.measures)
            self.compression["iterations"] += 1
            for name in SUMMED:
                self.compression[name] += said_of[name]
        self.totals[report.phase].add(line)
        self.skipped += report.skipped
        if self.iteration >= self.late and not report.skipped:
            self.late_loss += mean_loss
            self.late_iterations += 1
        self.iteration += 1
        return line, bool(said[1] > 0)

    def _see(self, gradient: Vector | torch.Tensor) -> None:
        with self._unheard():
            self.noise.see(gradient)

    def _estimate_noise(self) -> int:
        """The iteration counts for the noise's estimates; how many bytes that has sent. Collective."""
        message = self.noise.accept()
        if message is None:
            return 0
        sent = self.ring.all_reduce(message, op="mean").bytes_sent
        self.noise.take(message)
        return sent

    def _wall_clock(self) -> Callable[[], float]:
        """This machine's, which stands still while the cluster is emulated; unless clocks of ranks are compared."""
        virtual = self.virtual
        if virtual is None or self.trace:
            return time.perf_counter
        return lambda: time.perf_counter() - virtual.emulating_s

    def _start_clocks(self) -> list[Timeline]:
        """This machine's timeline and the cluster's, whose clock goes on from the end of the last iteration."""
        if self.virtual is None:
            return [self.timeline]
        assert self.timeline.virtual is not None
        self.virtual.load_state_dict(self._cluster_state)
        return [self.timeline, self.timeline.virtual]

    def _taking(self, share: float) -> AbstractContextManager[None]:
        """What is computed within takes a share of the cluster's `iteration_s`, if it has one."""
        if self.virtual is None:
            return nullcontext()
        iteration_s = self.virtual.cluster.node_at(self.ring.rank).iteration_s
        return nullcontext() if iteration_s is None else self.virtual.taking(share * iteration_s)

    def _unheard(self) -> AbstractContextManager[None]:
        """What is computed within takes the cluster no time."""
        return nullcontext() if self.virtual is None else self.virtual.taking(0.0)

    def _times(self) -> dict[str, float]:
        """The seconds of training until now, as a line of the metrics has them."""
        return {"time_s": self.time_s} | ({} if self.virtual is None else {"virtual_s": self.virtual_s})

    def new_windows(self) -> list[dict[str, Any]]:
        """Lines for the metrics about windows that are complete since the last call.

        The first sample of a window belongs to the record of the one before; at the end of the run nothing follows.
        """
        log = self.aggregator.window_log
        complete = len(log) if self.iteration == self.settings.iterations else max(0, len(log) - 1)
        lines = [
            {"type": "window", "iteration": self.iteration, **self._times(), "window": entry}
            for entry in log[self.windows : complete]
        ]
        self.windows = complete
        return lines

    def evaluate(self) -> dict[str, Any]:
        """Accuracy and mean loss on all test images, of a copy with the batch norm statistics averaged over ranks.

        Returns:
            The line for the metrics; the same numbers on every rank.
        """
        start = time.perf_counter()
        model = copy.deepcopy(self.model)
        average_statistics(model, self.ring)
        model.eval()
        sums = np.zeros(3, np.float64)  # images, right ones, loss
        with torch.no_grad():
            for images, labels in evaluation_batches(
                self.dataset, EVALUATION_BATCH, self.ring.rank, self.ring.size, device=self.device
            ):
                logits = model(images)
                right = int((logits.argmax(1) == labels).sum())
                sums += [len(labels), right, functional.cross_entropy(logits, labels, reduction="sum").item()]
        self.ring.all_reduce(sums)
        evaluation_s = time.perf_counter() - start
        self.evaluation_s += evaluation_s
        self.last_evaluation = {
            "type": "evaluation",
            "iteration": self.iteration,
            "epoch": self.epoch,
            **self._times(),
            "test_accuracy": sums[1] / sums[0],
            "test_loss": sums[2] / sums[0],
            "evaluation_s": evaluation_s,
        }
        return self.last_evaluation

    def result(self) -> dict[str, Any]:
        """The method's entry in the summary: means over the ranks. The same on every rank.

        Raises:
            RuntimeError: on all ranks, if their weights are not the same bits.
        """
        phases = sorted(self.totals)  # all ranks go through the same ones
        own: list[float] = [self.time_s, self.virtual_s, self.compute_cpu_s, self.evaluation_s]
        own += self.compression.values()
        for phase in phases:
            total = self.totals[phase]
            own += [total.bytes_sent, total.dense_bytes, total.time_s, *total.seconds.values()]
            own += [total.virtual_s, *total.virtual_seconds.values()]
        vector = np.array(own, np.float64)
        self.ring.all_reduce(vector, op="mean")
        means = iter(vector.tolist())

        def times(time_s: float) -> dict[str, Any]:
            seconds = dict(zip(KINDS, means, strict=False))
            return {"time_s": time_s, "seconds": seconds, "groups": grouped(seconds)}

        time_s, virtual_s, compute_cpu_s, evaluation_s = (next(means) for _ in range(4))
        iterations, *sums = (next(means) for _ in self.compression)
        compression = dict(zip(SUMMED, (value / iterations for value in sums), strict=True)) if iterations else None
        by_phase = {}
        bytes_sent = dense_bytes = 0.0
        for phase in phases:
            count, sent, dense = self.totals[phase].iterations, next(means), next(means)
            bytes_sent, dense_bytes = bytes_sent + sent, dense_bytes + dense
            by_phase[phase] = {
                "iterations": count,
                "bytes_per_iteration": sent / count,
                "ratio": dense / sent if sent else None,
                **times(next(means)),
            }
            virtual = times(next(means))
            if self.virtual is not None:
                by_phase[phase]["virtual"] = virtual
        result = {
            "test_accuracy": self.last_evaluation.get("test_accuracy"),
            "test_loss": self.last_evaluation.get("test_loss"),
            "train_loss": self.late_loss / self.late_iterations if self.late_iterations else None,
            "iterations": self.iteration,
            "skipped": self.skipped,
            **_sum(time_s, by_phase.values()),
            "bytes_per_iteration": bytes_sent / self.iteration,
            "dense_bytes_per_iteration": dense_bytes / self.iteration,
            "ratio": dense_bytes / bytes_sent if bytes_sent else None,
            "compute_cpu_s": compute_cpu_s,
            "evaluation_s": evaluation_s,
            "weights_sha256": self._agreed_digest(),
            "windows": self.windows,
            "last_window": self._last_window(),
            "threshold": next((entry for entry in self.aggregator.window_log if "threshold" in entry), None),
            "compression": compression,
            "noise": None if self.noise.estimate is None else self.noise.estimate.as_dict(),
            "phases": by_phase,
        }
        if self.virtual is not None:
            result["virtual"] = _sum(virtual_s, [part["virtual"] for part in by_phase.values()])
        return result

    def state_dict(self) -> dict[str, Any]:
        """All that this rank needs to go on; it differs by rank (batch norm, what the aggregator holds, times)."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "aggregator": self.aggregator.state_dict(),
            "noise": self.noise.state_dict(),
            "totals": {phase: dict(vars(total)) for phase, total in self.totals.items()},
            "cluster": None if self.virtual is None else self._cluster_state,
            **{name: getattr(self, name) for name in _COUNTERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.aggregator.load_state_dict(state["aggregator"])
        self.noise.load_state_dict(state["noise"])
        self.totals.clear()
        for phase, total in state["totals"].items():
            vars(self.totals[phase]).update(total)
        if self.virtual is not None:
            self._cluster_state = state["cluster"]
        for name in _COUNTERS:
            setattr(self, name, state[name])

    def _last_window(self) -> dict[str, Any] | None:
        """The last one that has bases."""
        fitted = [entry for entry in self.aggregator.window_log if entry.get("layers")]
        return {key: fitted[-1][key] for key in ("window", "iteration", "layers")} if fitted else None

    def _statistics(self) -> list[torch.Tensor]:
        """Copies of batch norm's buffers: a few KB."""
        return [buffer.clone() for buffer in self.model.buffers()]

    def _synchronise(self) -> None:
        """Make spans on an accelerator last as long as the work that they started."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _agreed_digest(self) -> str:
        digest = weights_digest(self.model)
        said = self.ring.rows_of_all(list(bytes.fromhex(digest)))
        differing = [rank for rank in range(self.ring.size) if (said[rank] != said[0]).any()]
        if differing:
            raise RuntimeError(f"the weights of ranks {differing} differ from those of rank 0")
        return digest


_COUNTERS = (
    "iteration",
    "skipped",
    "windows",
    "time_s",
    "virtual_s",
    "evaluation_s",
    "compute_cpu_s",
    "late_loss",
    "late_iterations",
    "last_evaluation",
    "compression",
)


def _sum(time_s: float, phases: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What all phases together took by one clock."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for part in phases:
        for kind, value in part["seconds"].items():
            seconds[kind] += value
    return {"time_s": time_s, "seconds": seconds, "groups": grouped(seconds)}


def train(
    trainer: Trainer,
    write: Callable[[dict[str, Any]], None],
    save: Callable[[], None],
    *,
    eval_every: int,
    checkpoint_every: int,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Run until the last iteration, or until a rank is asked to stop.

    Args:
        write: takes the lines for the metrics, in order.
        save: makes a checkpoint; called between iterations, on all ranks in the same ones.
        eval_every: iterations from one evaluation to the next, and one at the end; 0 for none at all.
        checkpoint_every: iterations from one checkpoint to the next; 0 for none.
        stop: whether this rank is asked to stop; looked at once an iteration.
    Returns:
        Whether the run is complete. If not, a checkpoint was made.
    """
    iterations = trainer.settings.iterations
    while trainer.iteration < iterations:
        line, stopping = trainer.step(stop())
        write(line)
        for window in trainer.new_windows():
            write(window)
        last = trainer.iteration == iterations
        if eval_every and (last or trainer.iteration % eval_every == 0):
            write(trainer.evaluate())
        if stopping and not last:
            save()
            return False
        if checkpoint_every and trainer.iteration % checkpoint_every == 0 and not last:
            save()
    return True


@torch.no_grad()
def average_statistics(model: nn.Module, ring: Ring) -> None:
    """Replace batch norm's running means and variances by their means over all ranks, in place."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    vector = torch.cat([buffer.reshape(-1).cpu().double() for buffer in buffers]).numpy()
    ring.all_reduce(vector, op="mean")
    offset = 0
    for buffer in buffers:
        part = torch.from_numpy(vector[offset : offset + buffer.numel()])
        buffer.copy_(part.view(buffer.shape))
        offset += buffer.numel()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters; batch norm's statistics are not among them, as they differ by rank."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
