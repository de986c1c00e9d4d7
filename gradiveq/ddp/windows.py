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

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
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
from gradiveq.ddp.layers import NOTHING_TO_COMPRESS
from gradiveq.ddp.memory import Memories
from gradiveq.ddp.scheme import Round, Rounds, Scheme, Traffic, Work, plain_rounds
from gradiveq.flatten import Block, slice_sizes
from gradiveq.loss import Loss
from gradiveq.methods import GradiVeQ
from gradiveq.pca import Float64, LayerBasis, PCASampler
from gradiveq.projection import Projection, squares
from gradiveq.report import listed
from gradiveq.schedule import majority
from gradiveq.window_log import WindowLog, losses_on, raise_failures
from gradiveq.windows import basis_from, basis_state
from ring.algorithm import owned_segment


class WindowsScheme(Scheme):
    """Samples, bases, losses.

    Args:
        layers: what may be compressed (`gradiveq.ddp.layers`).
        min_ratio: elements / floats on the wire, below which a layer goes uncompressed in a window.
        start: iterations of warm-up at least.
    Raises:
        ValueError: there is no layer, or the method doesn't fit them.
    """

    def __init__(self, method: GradiVeQ, group: Group, layers: Sequence[Block], min_ratio: float, start: int) -> None:
        if not layers:
            raise ValueError(NOTHING_TO_COMPRESS)
        self.method, self.group, self.min_ratio = method, group, min_ratio
        self._log = WindowLog(method, max(method.warmup, start))
        self.schedule = self._log.schedule
        self._layers = {layer.name: layer for layer in layers}
        self._blocks = {layer.name: replace(layer, offset=0) for layer in layers}
        self._slice_sizes = slice_sizes(layers, method.slice_size)
        self._new_sampler().check(method.most_samples)
        self._sampler: PCASampler | None = None
        self._vector = np.zeros(layers[-1].stop, np.float32)  # a sample
        self._bases: dict[str, LayerBasis] = {}
        self._projections: dict[tuple[str, torch.device], Projection] = {}
        self._iteration = 0
        # Of the iteration under way.
        self._samples: dict[str, Later] = {}
        self._traffic, self._dense_before, self._payload_before = Traffic(), 0, 0
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
    def vote(self) -> bool:  # type: ignore[override]
        return self._log.vote

    @property
    def log(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Waits for what is still to be written."""
        if self._job is not None:
            self._job.result()
        return self._log.entries

    def begin(self, iteration: int, traffic: Traffic) -> None:
        dims = None if self._job is None else self._job.result()  # which reads what is set below
        self._job, self._iteration = None, iteration
        self._samples, self._held_out, self._local, self._votes = {}, {}, {}, None
        if self._fit_due:
            assert dims is not None
            self._fit_due = False
            with self._log.fitting():
                dims = self._agree(dims, iteration, traffic)
                if self._log.checked(dims):
                    self._share(dims, traffic)
        self._traffic, self._dense_before, self._payload_before = traffic, traffic.dense, traffic.payload

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
            self._samples[place.name] = Later(self._unscaled(place, work))

    def _after_sample(self) -> None:
        """Not collective; but for copies from a GPU, not waited for here."""
        for name, sample in self._samples.items():
            layer = self._layers[name]
            self._vector[layer.offset : layer.stop] = sample.value.numpy()
        self._samples = {}
        first = self._sampler is None
        if first:
            self._sampler = self._new_sampler()
            self._log.open(self._iteration)
        self._fit_due = self._log.sampled()
        self._job = self._thread.submit(self._absorb, self._fit_due, first)

    def _absorb(self, fit: bool, first: bool) -> Float64 | None:
        """On the thread: take the sample, and fit this rank's share of the bases if they are due."""
        assert self._sampler is not None
        if first and self._bases:
            codecs = map(PCACodec, self._bases.values())
            self._log.replaced(self._iteration, losses_on(self._vector, self._layers.values(), codecs))
            self._bases, self._projections = {}, {}
        with self._log.fitting():
            self._sampler.add(self._vector)
        return self._fit() if fit else None

    def _fit(self) -> Float64:
        """On the thread."""
        assert self._sampler is not None
        with self._log.fitting():
            return self._sampler.fit()

    def _new_sampler(self) -> PCASampler:
        return PCASampler(
            tuple(self._layers.values()),
            self._slice_sizes,
            self.method.pca,
            self.group.rank,
            self.group.size,
            self.method.most_samples,
        )

    def _agree(self, dims: Float64, iteration: int, traffic: Traffic) -> Float64:
        """Every group's d, once all ranks have fitted.

        Raises:
            FitError: some rank failed; on all ranks.
        """
        assert self._sampler is not None
        self._count(dims.nbytes, traffic)
        with self._exchange():
            dims = self.group.sum_of(dims)
        raise_failures(self._sampler, dims, f"before iteration {iteration}")
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
        with self._exchange():
            self.group.broadcast(parts)
        bases = self._sampler.rebuild(dims, buffer)
        self._sampler = None
        self._compare(bases)
        self._use(bases)
        self._log.fitted(bases, self._bases)

    def _exchange(self) -> AbstractContextManager[None]:
        what = f"the exchange of bases of {listed(list(self._layers))}, once each rank had fitted its share,"
        return self.group.exchange(what, self._iteration)

    def _compare(self, bases: Sequence[LayerBasis]) -> None:
        digests = np.array([int(basis.digest, 16) - 2**63 for basis in bases], np.int64)
        with self._exchange():
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
        self._log.sent_for_fit(num_bytes)

    # Compressing

    @property
    def _measure_due(self) -> bool:
        every = self.method.holdout_every
        return every > 0 and self.schedule.done % every == 0

    def _compressed(self, work: Work, layers: Sequence[Place]) -> Rounds:
        left = [place for place in layers if place.name not in self._bases]
        layers = [place for place in layers if place.name in self._bases]
        projections = [self._projection(place.name, work.buffer.device) for place in layers]
        coded_length = sum(projection.length for projection in projections)
        rest = _between(layers, work.plan.length)
        length = coded_length + sum(part.stop - part.start for part in rest)
        values = work.gradient()
        payload = values.new_empty(length)
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
        if measure:
            for place in left:  # nothing of them is lost, but they are part of the whole
                own = self._unscaled(place, work)
                self._held_out[place.name] = Later(squares(own, own))

    def _projection(self, name: str, device: torch.device) -> Projection:
        found = self._projections.get((name, device))
        if found is None:
            found = self._projections[name, device] = Projection(self._bases[name], device)
        return found

    def _unscaled(self, place: Place, work: Work) -> Tensor:
        """A layer's part of the mean in the buffer, `_ordered`."""
        mean = self._ordered(place, work.buffer)
        return mean if work.scale is None else mean / work.scale

    def _ordered(self, place: Place, values: Tensor) -> Tensor:
        """A layer's gradient, (length,), with neighbours that correlate (`gradiveq.flatten`); a copy."""
        out = torch.empty(place.stop - place.start, dtype=torch.float32, device=values.device)
        self._blocks[place.name].view(out).copy_(place.view(values))
        return out

    def _after_compressed(self) -> None:
        if self._held_out:
            self._log.held_out(self._iteration, self._losses(self._held_out))
        local = sum(self._losses(self._local).values(), Loss()).relative if self._local else None
        stop = self._votes is not None and majority(flaws.votes(self._votes.value), self.group.size)
        dense, payload = self._traffic.dense - self._dense_before, self._traffic.payload - self._payload_before
        self._log.compressed(dense / payload, stop, local)

    def _losses(self, seen: Mapping[str, Later]) -> dict[str, Loss]:
        """In the layers' order, whatever that of the buckets' callbacks was."""
        return {name: Loss(*seen[name].value.tolist()) for name in self._layers if name in seen}

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        if self._job is not None:
            self._job.result()
        state = {
            "windows": self._log.state_dict(),
            "sampler": None if self._sampler is None else self._sampler.state_dict(),
            "fit_due": self._fit_due,
            "bases": [basis_state(basis) for basis in self._bases.values()],
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
                self._job = self._thread.submit(self._fit)

    def load_others(self, states: Sequence[Mapping[str, Any]], memories: Memories, rank: int, size: int) -> None:
        """µ and the bases are of the mean gradient. Samples are divided among the ranks: sampling begins anew."""
        self._load_common(states[0])
        self._log.restart_sampling()

    def _load_common(self, state: Mapping[str, Any]) -> None:
        if self._job is not None:
            self._job.exception()
        self._job, self._fit_due, self._sampler = None, False, None
        self._log.load_state_dict(state["windows"])
        self._bases = {part["name"]: basis_from(_arrays(part)) for part in state["bases"]}
        for name, basis in self._bases.items():
            if name not in self._layers or basis.length != self._layers[name].length:
                raise ValueError(f"the state's basis of {name} is of {basis.length} elements, and not this model's")
        self._projections = {}


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
