"""Gradients averaged over workers, for any training loop: `loss.backward(); aggregator.aggregate(); optimizer.step()`.

All gradients travel as one vector, in one pass around the ring:

    | gradients in the order of the Layout | flag | vote |
      as the method encodes them             never compressed

`flag` counts the workers with a non-finite gradient. Such a worker contributes zeros, so nobody's numbers are spoilt,
and all workers know after the same pass; then they exchange which layers are concerned. `vote` counts the workers
that find the compression loss too large (Lc = "auto"). Both cost 8 bytes a hop and no message.

GradiVeQ's sampling iterations give every worker the same bits, QSGD's noise included, and these bits both update the
model and are PCA's samples. At the end of the sampling each worker fits its share of the bases and gets those of the
others. Everything is a mean over the workers, not a sum: gradients, samples, and µ, which is the µ/N of Eq. 3.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from gradiveq.codec import PCACodec, gradient_codec
from gradiveq.flatten import Block, Layout, Vector, slice_sizes
from gradiveq.loss import Loss
from gradiveq.methods import METHODS, GradiVeQ, Method, Plain, QSGDRing
from gradiveq.pca import Basis, Float64, Group, LayerBasis, PCASampler, is_stable
from gradiveq.schedule import LossWatch, Schedule, majority
from ring.codec import Codec, Composite, Identity
from ring.handle import Ring
from ring.plan import Planner
from ring.timeline import Timeline

FLAG, VOTE, CONTROLS = 0, 1, 2
FLOAT32 = np.dtype(np.float32)
NAMES_IN_MESSAGE = 3


class NonFiniteGradient(RuntimeError):
    """A gradient has an infinity or a NaN; raised on all ranks alike. No gradient was changed."""


class FitError(RuntimeError):
    """A layer's bases could not be found; raised on all ranks alike, with the same words. No gradient was changed."""


@dataclass(frozen=True)
class Report:
    """What one `aggregate()` did, on this rank.

    Attributes:
        iteration: from 0 on.
        phase: "plain", "qsgd", or GradiVeQ's "warm-up", "sample" and "compress".
        bytes_sent: payload bytes, those of a fit included. The first call after `load_state_dict` compares iterations;
            these 16(N-1) bytes are not counted, so that a resumed run reports what an uninterrupted one does.
        dense_bytes: what plain ring all-reduce would have sent.
        fit_bytes: sent to agree on bases, in the last iteration of a sampling phase.
        measure_bytes: sent to measure the held-out loss; not part of `bytes_sent`, as training doesn't need it.
        ratio: dense payload bytes / payload bytes of the gradients, on all ranks the same; 1 for plain.
        skipped: a gradient was not finite; all gradients are zero now, and the caller must not step.
        seconds: by kind: pack (both ways), encode, add, recode, decode, wait, fit, measure.
        virtual_seconds: the same on the cluster of a `ring.virtual.VirtualRing`, whose messages cost "overhead" as
            well; empty if the timeline has no virtual one.
        losses: relative losses that were measured in this iteration, or None:
            "local": Eq. 7 over ‖g_n‖² of this worker, in the compressed layers;
            "held_out": ‖ĝ - g‖² / ‖g‖² of the average over the workers, in all convolutions, and "layers", the same by
            layer. In a sampling iteration it is that of the last window's bases, and QSGD's noise is part of g.
    """

    iteration: int
    phase: str
    bytes_sent: int
    dense_bytes: int
    ratio: float
    fit_bytes: int = 0
    measure_bytes: int = 0
    skipped: bool = False
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    virtual_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    losses: dict[str, Any] | None = None


@dataclass
class _Exchange:
    """What the iteration under way has cost and found so far."""

    iteration: int
    timeline: Timeline
    bytes_sent: int = 0
    fit_bytes: int = 0
    measure_bytes: int = 0
    losses: dict[str, Any] = dataclasses.field(default_factory=dict)


class Aggregator:
    """Replaces every parameter's `.grad` by its mean over the workers.

    Every rank makes one, collectively, with the same arguments and a model of the same parameters, and calls
    `aggregate()` after each backward pass. Parameters without a gradient take part as zeros (see `Layout`).

    Args:
        model: its parameters that require a gradient now.
        ring: this worker's place among the others.
        method: what travels.
        seed: of QSGD's random numbers, with the iteration's number: a resumed run draws the same.
        nonfinite: "fail" raises NonFiniteGradient on all ranks; "skip" reports the iteration as skipped on all
            ranks. Skipped iterations count for `iteration`, but for no phase of GradiVeQ's.
        chunk_bytes: the most payload in a message; None for the ring's.
        timeline: gets the same seconds as the reports.
    Raises:
        TypeError, ValueError: an argument is invalid, or nothing in the model can be compressed as `method` asks.
    Memory: a vector as long as the gradient; with GradiVeQ what sampling holds (below), or while compressing twice the
        bases; and one more vector in iterations whose held-out loss is measured.

        While sampling, each rank holds 8 bytes per element of the convolutions for µ. Each group of slices costs the
        smaller of its S samples (4*S*K bytes) and their covariance (4*K*K bytes). With fit_slices="first", S = Lt and
        every rank holds the samples, as it makes the basis from them (a covariance only the group's owner holds). With
        "all", S = Lt times the slices of the group, and only the owner holds anything. For ResNet-32 with Lt = 100 on 6
        ranks, µ included, that is 23 MiB on every rank with "first", and 27 to 35 MiB with "all", where a single rank
        would hold 175 MiB. `gradiveq.pca.held_bytes` has it to the byte.

    Attributes:
        layout: where each gradient is in the vector.
        iteration: of the next `aggregate()`.
        window_log: GradiVeQ's windows, one dict each, of plain numbers, strings, lists and dicts:
            "window", "iteration": its number and first iteration;
            "sample", "compress": Lt and Lc, so far;
            "ended_by": "count", "vote", or None while it lasts;
            "stable", "checks": with sample="auto", whether d was found stable, and [samples, sum of d] at each check;
            "ratio": of the whole payload;
            "fit_bytes", "fit_s": sent and spent on collecting samples, fitting and sharing bases, by this rank;
            "held_out": records of "iteration", "held_out" and "layers", the latter two as in `Report.losses`;
            "after": such a record of the next window's first sample;
            "layers": by name "d" (one per group), "slice_size", "ratio", "in_sample_loss" and "held_out_loss" (the
            mean of the records; None before the first).
    """

    def __init__(
        self,
        model: nn.Module,
        ring: Ring,
        method: Method,
        *,
        seed: int = 0,
        nonfinite: str = "fail",
        chunk_bytes: int | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        if not isinstance(method, Plain | QSGDRing | GradiVeQ):
            known = ", ".join(kind.__name__ for kind in METHODS.values())
            raise TypeError(f"`method` must be one of {known}, got {method!r}")
        if nonfinite not in ("fail", "skip"):
            raise ValueError(f"`nonfinite` must be 'fail' or 'skip', got {nonfinite!r}")
        if chunk_bytes is not None and chunk_bytes < 1:
            raise ValueError(f"`chunk_bytes` must be at least 1, got {chunk_bytes}")
        self.layout = Layout(model)
        if not self.layout.blocks:
            raise ValueError("`model` has no parameter that requires a gradient")
        self.method, self.seed, self.nonfinite = method, seed, nonfinite
        self.iteration = 0
        self._compared = True  # the iteration with other ranks'; without a state it is 0 everywhere
        self._ring, self._timeline = ring, Timeline() if timeline is None else timeline
        self._chunk_bytes = chunk_bytes or ring.chunk_bytes
        self._vector: Vector = ring.empty(self.layout.length + CONTROLS)
        self._gradient = self._vector[: self.layout.length]
        self._controls = self._vector[self.layout.length :]
        plain = Planner(ring.rank, ring.size).plan(
            "all_reduce", self._vector, Identity(), "mean", self._chunk_bytes, None
        )  # fmt: skip
        self._dense_bytes = plain.stats.bytes_sent
        self._windows = _Windows(self.layout, ring, method) if isinstance(method, GradiVeQ) else None

    @property
    def window_log(self) -> list[dict[str, Any]]:
        return [] if self._windows is None else self._windows.log

    @property
    def phase(self) -> str:
        """Of the next `aggregate()`."""
        if self._windows is not None:
            return self._windows.schedule.phase
        return "plain" if isinstance(self.method, Plain) else "qsgd"

    def aggregate(self) -> Report:
        """Average the gradients; collective.

        Returns:
            The report of this call.
        Raises:
            NonFiniteGradient: with nonfinite="fail", on all ranks.
            FitError: PCA of some layers failed, on all ranks: a variance beyond float32, or a solver that doesn't
                converge. It names layers, ranks and reason. Go on from an earlier state, if at all.
            ValueError: ranks loaded states of different iterations, on all ranks; nothing else was sent.
            RingError: see `ring.handle.Ring.all_reduce`.
        """
        if not self._compared:
            self._compare_iterations()
        phase = self.phase
        now = _Exchange(self.iteration, self._timeline.fork())
        codec, chunk_bytes = self._codec()
        with now.timeline.span("pack"):
            self.layout.pack(self._gradient)
            flawed = _nonfinite_blocks(self._gradient, self.layout.blocks)
            if flawed:
                self._gradient.fill(0)
            self._controls[FLAG] = bool(flawed)
            self._controls[VOTE] = self._windows is not None and self._windows.vote
        own = None
        if self._windows is not None and self._windows.prepare():
            with now.timeline.span("measure"):
                own = self._gradient.copy()

        with np.errstate(over="ignore", invalid="ignore"):  # looked for below, on all ranks alike
            stats = self._ring.all_reduce(
                self._vector, codec, op="mean", chunk_bytes=chunk_bytes, timeline=now.timeline
            )  # fmt: skip
        now.bytes_sent = stats.bytes_sent

        skipped = self._agree_on_flaws(flawed, now)
        if skipped:
            self._gradient.fill(0)
        elif self._windows is not None:
            votes = round(float(self._controls[VOTE]) * self._ring.size)
            self._windows.after(self._gradient, own, votes, now)
        with now.timeline.span("pack"):
            self.layout.unpack(self._gradient)
        self.iteration += 1

        self._timeline.absorb(now.timeline)
        return Report(
            iteration=now.iteration,
            phase=phase,
            bytes_sent=now.bytes_sent,
            dense_bytes=self._dense_bytes,
            ratio=_ratio(codec, len(self._vector)),
            fit_bytes=now.fit_bytes,
            measure_bytes=now.measure_bytes,
            skipped=skipped,
            seconds=now.timeline.totals(),
            virtual_seconds={} if now.timeline.virtual is None else now.timeline.virtual.totals(),
            losses=now.losses or None,
        )

    def _compare_iterations(self) -> None:
        """Refuse to go on from different iterations: QSGD's random numbers, or phases, would differ unnoticed."""
        table = self._ring.rows_of_all([self.iteration])[:, 0]
        if (table != self.iteration).any():
            where = ", ".join(f"{iteration:.0f} on rank {rank}" for rank, iteration in enumerate(table))
            raise ValueError(f"the states that were loaded are of different iterations: {where}")
        self._compared = True

    def _codec(self) -> tuple[Codec, int]:
        """What encodes this iteration's vector, and its chunk size."""
        method: Plain | QSGDRing
        if isinstance(self.method, GradiVeQ):
            assert self._windows is not None
            if self._windows.schedule.phase == "compress":
                return self._windows.codec, self._chunk_bytes
            method = Plain() if self._windows.schedule.phase == "warm-up" else self.method.sampling
        else:
            method = self.method
        if isinstance(method, Plain):
            return Identity(), self._chunk_bytes
        quantised = method.codec(self.seed, self.iteration)
        return (
            Composite([(self.layout.length, quantised), (CONTROLS, Identity())]),
            self._chunk_bytes if method.pipelined else sys.maxsize,
        )

    def _agree_on_flaws(self, flawed: Sequence[int], now: _Exchange) -> bool:
        """Whether any gradient, or the mean, is not finite, once all ranks know where.

        Args:
            flawed: the indices of this rank's non-finite blocks.
        Raises:
            NonFiniteGradient: if that is the policy.
        """
        blocks, ring = self.layout.blocks, self._ring
        iteration = f"in iteration {now.iteration}"
        if self._controls[FLAG] > 0:
            table = np.zeros((ring.size, len(blocks)), np.float32)
            table[ring.rank, flawed] = 1
            now.bytes_sent += ring.all_reduce(table.reshape(-1), timeline=now.timeline).bytes_sent
            found = [(rank, np.flatnonzero(row)) for rank, row in enumerate(table)]
            where = "; ".join(f"{_names(blocks, indices)} on rank {rank}" for rank, indices in found if len(indices))
            story = f"non-finite gradient {iteration}: {where}"
        else:
            flawed = _nonfinite_blocks(self._gradient, blocks)  # the same bits, so the same finding on every rank
            if not flawed:
                return False
            story = f"the sum of finite gradients overflows float32 {iteration}: {_names(blocks, flawed)} on all ranks"
        if self.nonfinite == "fail":
            raise NonFiniteGradient(story)
        return True

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on bit by bit, at any iteration; it differs by rank.

        Dicts and lists of NumPy arrays, numbers, strings and None, copied.
        """
        return {
            "identity": self._identity(),
            "iteration": self.iteration,
            "windows": None if self._windows is None else self._windows.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Every rank loads its own state of the same iteration, which the next `aggregate()` checks.

        Raises:
            ValueError: the state is of another model, method, seed, rank or size; nothing was changed.
        """
        theirs, ours = state["identity"], self._identity()
        for name in ours:
            if theirs.get(name) != ours[name]:
                kind, difference = ("model", name) if name.startswith("model.") else ("aggregator", name)
                raise ValueError(
                    f"the state is of another {kind}: {difference} is {_shown(theirs.get(name))} there and "
                    f"{_shown(ours[name])} here"
                )
        extra = next((name for name in theirs if name not in ours), None)
        if extra is not None:
            raise ValueError(f"the state is of another model: it has {extra}, which is missing here")
        if self._windows is not None:
            self._windows.load_state_dict(state["windows"])
        self.iteration, self._compared = state["iteration"], False

    def _identity(self) -> dict[str, Any]:
        """What has to be equal between a state and the aggregator that loads it."""
        values = {field.name: getattr(self.method, field.name) for field in dataclasses.fields(self.method)}
        return {
            "method": self.method.name,
            **{f"method.{name}": repr(value) for name, value in values.items()},
            "seed": self.seed,
            "rank": self._ring.rank,
            "size": self._ring.size,
            **{f"model.{block.name}": [block.offset, *block.shape] for block in self.layout.blocks},
        }


class _Windows:
    """GradiVeQ's state: where in which window, samples, bases, losses."""

    def __init__(self, layout: Layout, ring: Ring, method: GradiVeQ) -> None:
        self.method = method
        self.schedule = Schedule(method.warmup, method.sample, method.compress, method.max_sample)
        self.log: list[dict[str, Any]] = []
        self.vote = False
        self._layout, self._ring = layout, ring
        self._layers = tuple(block for block in layout.blocks if block.compressed)
        if not self._layers:
            raise ValueError("GradiVeQ compresses convolutions (groups=1); `model` has none: use Plain or QSGDRing")
        self._slice_sizes = slice_sizes(layout.blocks, method.slice_size)
        self._new_sampler().check(method.max_sample if method.sample == "auto" else method.sample)
        self._sampler: PCASampler | None = None
        self._bases: list[LayerBasis] = []
        self._codec: Composite | None = None
        self._codecs: dict[str, PCACodec] = {}
        self._watch = LossWatch(method.stop_multiple)

    def _new_sampler(self) -> PCASampler:
        expected = self.method.max_sample if self.method.sample == "auto" else self.method.sample
        return PCASampler(
            self._layout.blocks, self._slice_sizes, self.method.pca, self._ring.rank, self._ring.size, expected
        )  # fmt: skip

    @property
    def codec(self) -> Composite:
        assert self._codec is not None
        return self._codec

    @property
    def _measure_due(self) -> bool:
        every = self.method.holdout_every
        return self.schedule.phase == "compress" and every > 0 and self.schedule.done % every == 0

    def prepare(self) -> bool:
        """Whether `after` of this iteration needs the worker's own gradient."""
        due = self._measure_due
        for codec in self._codecs.values():
            codec.monitor = due or self.method.compress == "auto"
            codec.take_local_loss()  # of an iteration that was skipped
        return due

    def after(self, mean: Vector, own: Vector | None, votes: int, now: _Exchange) -> None:
        """Take the aggregated gradient of an iteration that was not skipped, and move on.

        Args:
            mean: the mean over the workers, the same bits on all. Not modified.
            own: this worker's gradient if `prepare` asked for it; overwritten.
            votes: of workers that want to end the window.
        """
        if self.schedule.phase == "warm-up":
            self.schedule.advance()
        elif self.schedule.phase == "sample":
            self._after_sample(mean, now)
        else:
            self._after_compressed(mean, own, votes, now)

    def _after_sample(self, mean: Vector, now: _Exchange) -> None:
        timeline = now.timeline
        if self._sampler is None:
            if self._codec is not None:
                with timeline.span("measure"):
                    self._evaluate_old_bases(mean, now)
                self._codec, self._codecs, self._bases = None, {}, []
            self._sampler = self._new_sampler()
            self.log.append(
                {
                    "window": self.schedule.window, "iteration": now.iteration, "sample": 0, "compress": 0,
                    "ended_by": None, "stable": None, "checks": [], "ratio": None, "fit_bytes": 0, "fit_s": 0.0,
                    "held_out": [], "after": None, "layers": {},
                }
            )  # fmt: skip
        window, start = self.log[-1], timeline.clock()
        with timeline.span("fit"):
            self._sampler.add(mean)
        window["sample"] += 1
        dims: Float64 | None = None
        if self.schedule.check_due:
            dims = self._fit(now)
            window["checks"].append([window["sample"], int(dims.sum())])
            window["stable"] = is_stable([d for _, d in window["checks"]])
        ended = self.schedule.advance(stable=bool(window["stable"]))
        if ended:
            self._share(self._fit(now) if dims is None else dims, now)
        window["fit_bytes"] += now.fit_bytes
        window["fit_s"] += timeline.clock() - start

    def _fit(self, now: _Exchange) -> Float64:
        """Fit this rank's share; the d of all groups.

        Raises:
            FitError: some rank failed.
        """
        assert self._sampler is not None
        with now.timeline.span("fit"):
            dims = self._sampler.fit()
        self._count(self._ring.all_reduce(dims, timeline=now.timeline).bytes_sent, now)
        failures = self._sampler.failures(dims)
        if failures:
            where = "; ".join(f"{_listed(names)} on rank {rank} ({why})" for (rank, why), names in failures.items())
            raise FitError(f"PCA failed in iteration {now.iteration}: {where}")
        return dims

    def _share(self, dims: Float64, now: _Exchange) -> None:
        """Give everybody's bases to everybody, and make the codec of the window."""
        assert self._sampler is not None
        with now.timeline.span("fit"):
            buffer, bounds = self._sampler.share(dims)
        self._count(self._ring.all_gather(buffer, bounds=bounds, timeline=now.timeline).bytes_sent, now)
        with now.timeline.span("fit"):
            self._use(self._sampler.rebuild(dims, buffer))
            self._sampler = None
        self._watch = LossWatch(self.method.stop_multiple)
        window = self.log[-1]
        window["ratio"] = _ratio(self.codec, self._layout.length + CONTROLS)
        for basis in self._bases:
            compressed = basis.name in self._codecs
            window["layers"][basis.name] = {
                "d": [len(one.components_) for one in basis.bases],
                "slice_size": basis.slice_size,
                "ratio": basis.ratio if compressed else 1.0,
                "in_sample_loss": basis.in_sample_loss if compressed else 0.0,
                "held_out_loss": None,
            }

    def _use(self, bases: list[LayerBasis]) -> None:
        self._bases = bases
        self._codec, self._codecs = gradient_codec(self._layout.blocks, bases, CONTROLS)

    def _count(self, num_bytes: int, now: _Exchange) -> None:
        now.bytes_sent += num_bytes
        now.fit_bytes += num_bytes

    def _after_compressed(self, mean: Vector, own: Vector | None, votes: int, now: _Exchange) -> None:
        window = self.log[-1]
        window["compress"] += 1
        if own is not None:
            with now.timeline.span("measure"):
                now.measure_bytes += self._ring.all_reduce(own, op="mean").bytes_sent
                parts = {block.name: slice(block.offset, block.stop) for block in self._layers}
                self._record({name: Loss.between(mean[part], own[part]) for name, part in parts.items()}, now)
                window["held_out"].append({"iteration": now.iteration, **now.losses})
                for name, layer in window["layers"].items():
                    losses = [record["layers"][name] for record in window["held_out"]]
                    layer["held_out_loss"] = sum(losses) / len(losses)
        stop = majority(votes, self._ring.size)
        self.vote = False
        if self.method.compress == "auto" or own is not None:
            local = sum((codec.take_local_loss() for codec in self._codecs.values()), Loss())
            now.losses["local"] = local.relative
            if self.method.compress == "auto":
                self.vote = self._watch.votes_to_stop(now.losses["local"])
        if self.schedule.advance(stop=stop):
            window["ended_by"] = "vote" if self.method.compress == "auto" else "count"
            self.vote = False

    def _evaluate_old_bases(self, mean: Vector, now: _Exchange) -> None:
        """The held-out loss of the bases that are about to go, on the first gradient that isn't compressed by them."""
        losses = {}
        for block in self._layers:
            gradient = mean[block.offset : block.stop]
            codec = self._codecs.get(block.name)
            losses[block.name] = Loss.between(gradient, gradient) if codec is None else codec.loss(gradient)
        self._record(losses, now)
        self.log[-1]["after"] = {"iteration": now.iteration, **now.losses}

    @staticmethod
    def _record(losses: Mapping[str, Loss], now: _Exchange) -> None:
        now.losses["held_out"] = sum(losses.values(), Loss()).relative
        now.losses["layers"] = {name: loss.relative for name, loss in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule.state_dict(),
            "sampler": None if self._sampler is None else self._sampler.state_dict(),
            "bases": [_basis_state(basis) for basis in self._bases],
            "first_loss": self._watch.first,
            "vote": self.vote,
            "log": copy.deepcopy(self.log),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.schedule.load_state_dict(state["schedule"])
        self._sampler = None
        if state["sampler"] is not None:
            self._sampler = self._new_sampler()
            self._sampler.load_state_dict(state["sampler"])
        self._bases, self._codec, self._codecs = [], None, {}
        if state["bases"]:
            self._use([_basis_from(part) for part in state["bases"]])
        self._watch = LossWatch(self.method.stop_multiple)
        self._watch.first = state["first_loss"]
        self.vote = state["vote"]
        self.log = copy.deepcopy(state["log"])


def _ratio(codec: Codec, length: int) -> float:
    """Bytes of a float32 vector / bytes of its payload."""
    return FLOAT32.itemsize * length / sum(region.num_bytes for region in codec.regions(length, FLOAT32))


def _nonfinite_blocks(gradient: Vector, blocks: Sequence[Block]) -> list[int]:
    """Indices of the blocks with an infinity or a NaN. Cost: one pass, a dot product, unless there is something."""
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(np.dot(gradient, gradient)):
            return []
    return [i for i, block in enumerate(blocks) if not np.isfinite(gradient[block.offset : block.stop]).all()]


def _names(blocks: Sequence[Block], indices: Sequence[int] | np.ndarray[Any, np.dtype[np.intp]]) -> str:
    return _listed([blocks[i].name for i in indices])


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_IN_MESSAGE
    return ", ".join(names[:NAMES_IN_MESSAGE]) + (f" and {rest} more" if rest > 0 else "")


def _shown(value: object) -> str:
    return "missing" if value is None else str(value)


def _basis_state(basis: LayerBasis) -> dict[str, Any]:
    return {
        "name": basis.name,
        "length": basis.length,
        "slice_size": basis.slice_size,
        "mean": basis.mean_.copy(),
        "groups": [
            {
                "start": group.start,
                "stop": group.stop,
                "components": one.components_.copy(),
                "explained_variance": one.explained_variance_.copy(),
                "total_variance": one.total_variance_,
            }
            for group, one in zip(basis.groups, basis.bases, strict=True)
        ],
    }


def _basis_from(state: Mapping[str, Any]) -> LayerBasis:
    return LayerBasis(
        state["name"],
        state["length"],
        state["slice_size"],
        np.array(state["mean"]),
        tuple(Group(state["name"], part["start"], part["stop"], state["slice_size"]) for part in state["groups"]),
        tuple(
            Basis(np.array(part["components"]), np.array(part["explained_variance"]), part["total_variance"])
            for part in state["groups"]
        ),
    )
