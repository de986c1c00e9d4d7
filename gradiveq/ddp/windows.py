"""GradiVeQ's windows on buckets (section 3 of Yu et al. 2018).

    warm-up, sample    buckets travel as they are; while sampling, the mean gradient of each layer is collected
    compress           | Uᵀ(g - µ) of the bucket's layers | the rest of the bucket | codes |        one all-reduce

What follows a sampled iteration, adding it to PCA's statistics and at last the fit, runs on a thread of its own while
the optimiser steps and the next forward and backward pass run; the first bucket of the next iteration waits for it, and
there the bases are shared. That is when it is needed, so the result is the same as without the thread.

As on the ring (`gradiveq.windows`) each basis has one owner, what it shares is small where possible, and all ranks
rebuild the same bits, which a digest confirms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradiveq.codec import PCACodec
from gradiveq.ddp import flaws
from gradiveq.ddp.bucket import Place
from gradiveq.ddp.group import Group
from gradiveq.ddp.later import Later
from gradiveq.ddp.memory import Memories
from gradiveq.ddp.scheme import Round, Rounds, Scheme, Traffic, Work, plain_rounds
from gradiveq.flatten import Block, slice_sizes
from gradiveq.loss import Loss
from gradiveq.methods import GradiVeQ
from gradiveq.pca import Float64, LayerBasis, PCASampler, is_stable
from gradiveq.projection import Projection, squares
from gradiveq.report import FitError, listed
from gradiveq.schedule import LossWatch, Schedule, majority
from gradiveq.windows import basis_from, basis_state, layer_entry
from ring.algorithm import owned_segment


class WindowsScheme(Scheme):
    """Where in which window, samples, bases, losses.

    Args:
        layers: what may be compressed (`gradiveq.ddp.layers`).
        min_ratio: elements / floats on the wire, below which a layer goes uncompressed in a window.
        start: iterations of warm-up at least.
    Raises:
        ValueError: there is no layer, or the method doesn't fit them.
    """

    def __init__(self, method: GradiVeQ, group: Group, layers: Sequence[Block], min_ratio: float, start: int) -> None:
        if not layers:
            raise ValueError(
                "GradiVeQ compresses the weights of convolutions (groups=1); `model` has none that requires a "
                "gradient. Name others with `also`, as in also=('*.weight',), or use another method"
            )
        self.method, self.group, self.min_ratio = method, group, min_ratio
        self.schedule = Schedule(max(method.warmup, start), method.sample, method.compress, method.max_sample)
        self._log: list[dict[str, Any]] = []
        self._layers = {layer.name: layer for layer in layers}
        self._blocks = {layer.name: replace(layer, offset=0) for layer in layers}
        self._slice_sizes = slice_sizes(layers, method.slice_size)
        self._new_sampler().check(method.max_sample if method.sample == "auto" else method.sample)
        self._sampler: PCASampler | None = None
        self._vector = np.zeros(layers[-1].stop, np.float32)  # a sample
        self._bases: dict[str, LayerBasis] = {}
        self._projections: dict[tuple[str, torch.device], Projection] = {}
        self._watch = LossWatch(method.stop_multiple)
        self._iteration = 0
        # Of the iteration under way.
        self._samples: dict[str, Later] = {}
        # Looked at when it is over: on a GPU nothing waits for them in between.
        self._held_out: dict[str, Later] = {}
        self._local: dict[str, Later] = {}
        self._votes: Later | None = None
        # What follows a sample: on its thread, and whether the bases are due in the next iteration.
        self._thread = ThreadPoolExecutor(1, "gradiveq-fit")
        self._job: Future[Float64 | None] | None = None
        self._fit_due = False

    @property
    def phase(self) -> str:  # type: ignore[override]
        return self.schedule.phase

    @property
    def log(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Waits for what is still to be written."""
        if self._job is not None:
            self._job.result()
        return self._log

    def begin(self, iteration: int, traffic: Traffic) -> None:
        dims = None if self._job is None else self._job.result()  # which reads what is set below
        self._job, self._iteration = None, iteration
        self._samples, self._held_out, self._local, self._votes = {}, {}, {}, None
        if not self._fit_due:
            return
        assert self._sampler is not None
        assert dims is not None
        self._fit_due = False
        window = self._log[-1]
        dims = self._agree(dims, iteration, traffic)
        if self.method.sample == "auto":
            window["checks"].append([window["sample"], int(dims.sum())])
            window["stable"] = is_stable([d for _, d in window["checks"]])
        if self.schedule.advance(stable=bool(window["stable"])):
            self._share(dims, traffic)

    def rounds(self, work: Work) -> Rounds:
        layers = [place for place in work.plan.places if place.name in self._layers]
        if self.schedule.phase == "sample":
            return self._sampled(work, layers)
        if self.schedule.phase == "compress":
            return self._compressed(work, layers)
        return plain_rounds(work)

    def end(self, compressed: bool) -> None:
        if not compressed or self.schedule.phase == "warm-up":
            self.schedule.advance()
        elif self.schedule.phase == "sample":
            self._after_sample()
        else:
            self._after_compressed()

    # Sampling

    def _sampled(self, work: Work, layers: Sequence[Place]) -> Rounds:
        yield from plain_rounds(work)
        for place in layers:
            mean = self._ordered(place, work.buffer)
            self._samples[place.name] = Later(mean if work.scale is None else mean / work.scale)

    def _after_sample(self) -> None:
        """Not collective; but for copies from a GPU, not waited for here."""
        for name, sample in self._samples.items():
            layer = self._layers[name]
            self._vector[layer.offset : layer.stop] = sample.value.numpy()
        self._samples = {}
        first = self._sampler is None
        if first:
            self._sampler = self._new_sampler()
            self._log.append(
                {
                    "window": self.schedule.window, "iteration": self._iteration, "sample": 0, "compress": 0,
                    "ended_by": None, "stable": None, "checks": [], "ratio": None, "fit_bytes": 0, "held_out": [],
                    "after": None, "layers": {},
                }
            )  # fmt: skip
        self._log[-1]["sample"] += 1
        enough = self.method.max_sample if self.method.sample == "auto" else self.method.sample
        self._fit_due = self.schedule.check_due or self.schedule.done + 1 >= enough
        if not self._fit_due:
            self.schedule.advance()
        self._job = self._thread.submit(self._absorb, self._fit_due, first)

    def _absorb(self, fit: bool, first: bool) -> Float64 | None:
        """On the thread: take the sample, and fit this rank's share of the bases if they are due."""
        assert self._sampler is not None
        if first and self._bases:
            losses = {name: self._old_loss(name) for name in self._layers}
            self._log[-2]["after"] = self._record(losses)
            self._bases, self._projections = {}, {}
        self._sampler.add(self._vector)
        return self._sampler.fit() if fit else None

    def _old_loss(self, name: str) -> Loss:
        """The held-out loss of a basis that is about to go, on the first gradient that isn't compressed by it."""
        layer = self._layers[name]
        gradient = self._vector[layer.offset : layer.stop]
        basis = self._bases.get(name)
        return Loss.between(gradient, gradient) if basis is None else PCACodec(basis).loss(gradient)

    def _new_sampler(self) -> PCASampler:
        expected = self.method.max_sample if self.method.sample == "auto" else self.method.sample
        return PCASampler(
            tuple(self._layers.values()), self._slice_sizes, self.method.pca, self.group.rank, self.group.size, expected
        )

    def _agree(self, dims: Float64, iteration: int, traffic: Traffic) -> Float64:
        """Every group's d, once all ranks have fitted.

        Raises:
            FitError: some rank failed; on all ranks.
        """
        assert self._sampler is not None
        self._count(dims.nbytes, traffic)
        dims = self.group.sum_of(dims)
        failures = self._sampler.failures(dims)
        if failures:
            where = "; ".join(f"{listed(names)} on rank {rank} ({why})" for (rank, why), names in failures.items())
            raise FitError(f"PCA failed before iteration {iteration}: {where}")
        return dims

    def _share(self, dims: Float64, traffic: Traffic) -> None:
        """Give everybody's bases to everybody.

        Raises:
            RuntimeError: the ranks did not arrive at the same bits; on all ranks.
        """
        assert self._sampler is not None
        buffer, bounds = self._sampler.share(dims)
        segments = [owned_segment(rank, self.group.size) for rank in range(self.group.size)]
        parts = [buffer[bounds[segment] : bounds[segment + 1]] for segment in segments]
        self._count(buffer.nbytes, traffic)
        self.group.broadcast(parts)
        bases = self._sampler.rebuild(dims, buffer)
        self._sampler = None
        self._compare(bases)
        self._use(bases)
        self._watch, self.vote = LossWatch(self.method.stop_multiple), False
        window = self._log[-1]
        sent = sum(basis.payload_bytes for basis in self._bases.values())
        left = sum(4 * layer.length for name, layer in self._layers.items() if name not in self._bases)
        window["ratio"] = 4 * len(self._vector) / (sent + left)
        for basis in bases:
            window["layers"][basis.name] = layer_entry(basis, basis.name in self._bases)

    def _compare(self, bases: Sequence[LayerBasis]) -> None:
        digests = np.array([int(basis.digest, 16) - 2**63 for basis in bases], np.int64)
        table = self.group.rows_of(digests)
        for index, basis in enumerate(bases):
            others = np.flatnonzero(table[:, index] != table[0, index]).tolist()
            if others:
                raise RuntimeError(
                    f"the bases of {basis.name} are not the same bits on rank 0 and on ranks {others}: with "
                    "fit_slices='first' each rank multiplies for itself, which takes the same samples, library and "
                    "kind of processor everywhere; fit_slices='all' shares the bases themselves"
                )

    def _use(self, bases: Sequence[LayerBasis]) -> None:
        self._bases = {basis.name: basis for basis in bases if basis.ratio >= self.min_ratio}
        self._projections = {}

    def _count(self, num_bytes: int, traffic: Traffic) -> None:
        traffic.payload += num_bytes
        traffic.fit += num_bytes
        self._log[-1]["fit_bytes"] += num_bytes

    # Compressing

    @property
    def _measure_due(self) -> bool:
        every = self.method.holdout_every
        return every > 0 and self.schedule.done % every == 0

    def _compressed(self, work: Work, layers: Sequence[Place]) -> Rounds:
        layers = [place for place in layers if place.name in self._bases]
        projections = [self._projection(place.name, work.buffer.device) for place in layers]
        coded_length = sum(projection.length for projection in projections)
        rest = _between(layers, work.plan.length)
        length = coded_length + sum(part.stop - part.start for part in rest)
        values, payload = work.gradient(), torch.empty(length, device=work.buffer.device)
        measure = self._measure_due
        exact: list[Tensor] = []
        coded = _cut(payload, projections)
        for place, projection, part in zip(layers, projections, coded, strict=True):
            own = self._ordered(place, values)
            projection.encode(own, part)
            if measure or self.method.compress == "auto":
                self._local[place.name] = Later(squares(projection.decode(part), own))
            if measure:
                exact.append(own.div_(work.group.size))
                work.kept.append(own)
        start = coded_length
        for where in rest:
            stop = start + where.stop - where.start
            payload[start:stop] = values[where]
            start = stop

        message = work.message(length)
        message[:length] = work.to_wire(payload) if work.half else payload
        futures = [work.all_reduce(message), *(work.group.all_reduce(vector) for vector in exact)]
        yield Round(futures, last=True)

        work.hear(message, length)
        if self.method.compress == "auto":
            assert work.heard is not None
            self._votes = Later(work.heard)
        total = work.from_wire(message[:length]) if work.half else message[:length]
        mean = total / work.group.size
        for i, (place, projection, part) in enumerate(zip(layers, projections, _cut(mean, projections), strict=True)):
            estimate = projection.decode(part)
            if measure:
                self._held_out[place.name] = Later(squares(estimate, exact[i]))
            work.write(self._blocks[place.name].view(estimate), place.view(work.buffer))
        start = coded_length
        for where in rest:
            stop = start + where.stop - where.start
            work.write(mean[start:stop], work.buffer[where])
            start = stop

    def _projection(self, name: str, device: torch.device) -> Projection:
        found = self._projections.get((name, device))
        if found is None:
            found = self._projections[name, device] = Projection(self._bases[name], device)
        return found

    def _ordered(self, place: Place, values: Tensor) -> Tensor:
        """A layer's gradient, (length,), with neighbours that correlate (`gradiveq.flatten`); a copy."""
        out = torch.empty(place.stop - place.start, device=values.device)
        self._blocks[place.name].view(out).copy_(place.view(values))
        return out

    def _after_compressed(self) -> None:
        window = self._log[-1]
        window["compress"] += 1
        if self._held_out:
            window["held_out"].append(self._record(_losses(self._held_out)))
            for name, layer in window["layers"].items():
                losses = [record["layers"].get(name, 0.0) for record in window["held_out"]]
                layer["held_out_loss"] = sum(losses) / len(losses)
        stop = self._votes is not None and majority(flaws.votes(self._votes.value), self.group.size)
        self.vote = False
        if self.method.compress == "auto":
            self.vote = self._watch.votes_to_stop(sum(_losses(self._local).values(), Loss()).relative)
        if self.schedule.advance(stop=stop):
            window["ended_by"] = "vote" if self.method.compress == "auto" else "count"
            self.vote = False

    def _record(self, losses: Mapping[str, Loss]) -> dict[str, Any]:
        return {
            "iteration": self._iteration,
            "held_out": sum(losses.values(), Loss()).relative,
            "layers": {name: loss.relative for name, loss in losses.items()},
        }

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        log = copy.deepcopy(self.log)
        state = {
            "schedule": self.schedule.state_dict(),
            "sampler": None if self._sampler is None else self._sampler.state_dict(),
            "fit_due": self._fit_due,
            "bases": [basis_state(basis) for basis in self._bases.values()],
            "first_loss": self._watch.first,
            "vote": self.vote,
            "log": log,
        }
        tensors: dict[str, Any] = _converted(state, np.ndarray, lambda array: torch.from_numpy(array.copy()))
        return tensors

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._load_common(state)
        self._fit_due = state["fit_due"]
        if state["sampler"] is not None:
            self._sampler = self._new_sampler()
            self._sampler.load_state_dict(_arrays(state["sampler"]))
            if self._fit_due:
                self._job = self._thread.submit(self._sampler.fit)

    def load_others(self, states: Sequence[Mapping[str, Any]], memories: Memories, rank: int, size: int) -> None:
        """µ and the bases are of the mean gradient. Samples are divided among the ranks: sampling begins anew."""
        state = states[0]
        self._load_common(state)
        if state["schedule"]["phase"] == "sample":
            self.schedule.load_state_dict({**state["schedule"], "done": 0})
            if state["sampler"] is not None:
                self._log.pop()

    def _load_common(self, state: Mapping[str, Any]) -> None:
        if self._job is not None:
            self._job.exception()
        self._job, self._fit_due, self._sampler = None, False, None
        self.schedule.load_state_dict(state["schedule"])
        self._bases = {part["name"]: basis_from(_arrays(part)) for part in state["bases"]}
        self._projections = {}
        self._watch = LossWatch(self.method.stop_multiple)
        self._watch.first = state["first_loss"]
        self.vote = state["vote"]
        self._log = copy.deepcopy(state["log"])


def _converted(tree: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """The same dicts and lists with each leaf of one type converted."""
    if isinstance(tree, kind):
        return convert(tree)
    if isinstance(tree, Mapping):
        return {key: _converted(value, kind, convert) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_converted(value, kind, convert) for value in tree]
    return tree


def _arrays(tree: Any) -> Any:
    """Of a state with tensors, that with NumPy arrays."""
    return _converted(tree, Tensor, lambda tensor: tensor.numpy())


def _losses(seen: Mapping[str, Later]) -> dict[str, Loss]:
    return {name: Loss(*later.value.tolist()) for name, later in seen.items()}


def _between(layers: Sequence[Place], length: int) -> list[slice]:
    """What of a bucket is in none of the layers."""
    found, start = [], 0
    for place in layers:
        if start < place.start:
            found.append(slice(start, place.start))
        start = place.stop
    if start < length:
        found.append(slice(start, length))
    return found


def _cut(coded: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """Each projection's part of what is coded."""
    parts, start = [], 0
    for projection in projections:
        parts.append(coded[start : start + projection.length])
        start += projection.length
    return parts
