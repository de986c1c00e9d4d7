"""Gradients averaged over workers, for any training loop: `loss.backward(); aggregator.aggregate(); optimizer.step()`.

    aggregator    packs gradients into one vector, finds what isn't finite, reports      (here)
    family        what the method does with a vector                                     (`gradiveq.exchange`)
    driver        carries its requests out                                               (`gradiveq.over_ring.driver`)

A worker with a non-finite gradient contributes zeros, so nobody's numbers are spoilt, and all workers know after the
same pass; then they exchange which layers are concerned.

Everything is a mean over the workers, not a sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradiveq.device.kernels import DeviceKernels
from gradiveq.exchange.families import make_family
from gradiveq.exchange.family import check_shapes
from gradiveq.exchange.flaws import NOT_FINITE, flaw
from gradiveq.exchange.kernels import HOST, Kernels
from gradiveq.exchange.requests import Call, Iteration
from gradiveq.flatten import Block, Layout, Vector
from gradiveq.methods import Method, applied
from gradiveq.over_ring.driver import CONTROLS, RingDriver
from gradiveq.over_ring.staging import Mirror
from gradiveq.report import FitError, NonFiniteGradient, Report, listed
from ring.codec import IdentityCodec
from ring.handle import Ring
from ring.plan import Planner
from ring.segments import check_chunk_bytes
from ring.timeline import Timeline

__all__ = ["CONTROLS", "Aggregator", "FitError", "NonFiniteGradient", "Report"]


class Aggregator:
    """Replaces every parameter's `.grad` by its mean over the workers.

    Every rank makes one, collectively, with the same arguments and a model of the same parameters, and calls
    `aggregate()` after each backward pass. Parameters without a gradient take part as zeros (see `Layout`).

    Args:
        model: its parameters that require a gradient now.
        ring: this worker's place among the others.
        method: what travels.
        seed: of random numbers, with the iteration's number: a resumed run draws the same.
        nonfinite: "fail" raises NonFiniteGradient on all ranks; "skip" reports the iteration as skipped on all
            ranks. Skipped iterations count for `iteration`, but for no phase of GradiVeQ's, and leave memories of error
            feedback as they were.
        chunk_bytes: the most payload in a message; None for the ring's.
        timeline: gets the same seconds as the reports.
        device: where to keep gradients and to encode and decode them, if the method can
            (`gradiveq.over_ring.staging`): the parameters' GPU. None for the host's path, which takes gradients of any
            device, one by one.
        gpu_aware: MPI reads the device's memory itself. It has to be an `ring.mpi.MPIRing` whose MPI can.
    Raises:
        TypeError, ValueError: an argument is invalid, or nothing in the model can be compressed as `method` asks.
    Memory: a vector as long as the gradient; with GradiVeQ what sampling holds (below), or while compressing twice the
        bases; and one more vector in iterations whose held-out loss is measured. With a compressor everybody's
        payloads, and with error feedback two vectors.

        With `device` the vector is there and in pinned host memory. While GradiVeQ compresses, payload, bases and µ are
        on the device besides those on the host, which tell the losses of bases at their end.

        While sampling, each rank holds 8 bytes per element of the convolutions for µ. Each group of slices costs the
        smaller of its S samples (4·S·K bytes) and their covariance (4·K·K bytes). With fit_slices="first", S = Lt and
        every rank holds the samples, as it makes the basis from them (a covariance only the group's owner holds). With
        "all", S = Lt times the slices of the group, and only the owner holds anything. For ResNet-32 with Lt = 100 on 6
        ranks, µ included, that is 23 MiB on every rank with "first", and 27 to 35 MiB with "all", where a single rank
        would hold 175 MiB. `gradiveq.pca.held_bytes` has it to the byte.

    Attributes:
        layout: where each gradient is in the vector.
        iteration: of the next `aggregate()`.
        watch: None, or called with each gradient of this worker before it is exchanged (its time is "measure"): float32
            of shape (layout.length,), with `device` a tensor there; not to be modified; zeros if it is not finite. For
            `gradiveq.running_noise`.
        window_log: GradiVeQ's windows, one dict each, of plain numbers, strings, lists and dicts:
            "window", "iteration": its number and first iteration;
            "sample", "compress": Lt and Lc, so far;
            "ended_by": "count", "vote", or None while it lasts;
            "stable", "checks": with sample="auto", whether d was found stable, and [samples, sum of d] at each check;
            "ratio": bytes of all gradients / bytes of what travels in their place, once an iteration was compressed;
            "fit_bytes", "fit_s": sent and spent on collecting samples, fitting and sharing bases, by this rank;
            "held_out": records of "iteration", "held_out" and "layers", the latter two as in `Report.losses`;
            "after": such a record of the next window's first sample;
            "layers": by name "d" (one per group), "slice_size", "ratio", "in_sample_loss" and "held_out_loss" (the
            mean of the records; None before the first).
            ACCORDION's are its decisions (`gradiveq.exchange.critical_regimes.CriticalRegimes.log`). A threshold that
            follows from a formula is told once (`gradiveq.exchange.switching.AutomaticThreshold`).
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
        device: torch.device | None = None,
        gpu_aware: bool = False,
    ) -> None:
        if nonfinite not in ("fail", "skip"):
            raise ValueError(f"`nonfinite` must be 'fail' or 'skip', got {nonfinite!r}")
        if chunk_bytes is not None:
            check_chunk_bytes(chunk_bytes)
        if gpu_aware and device is None:
            raise ValueError("`gpu_aware` is for gradients on a device, got no `device`")
        compressing = applied(method)
        self.layout = Layout(model, () if compressing is None else compressing.groups)
        if not self.layout.blocks:
            raise ValueError("`model` has no parameter that requires a gradient")
        self.method, self.seed, self.nonfinite = method, seed, nonfinite
        self.iteration = 0
        self.watch: Callable[[Vector | Tensor], None] | None = None
        self._compared = True  # the iteration with other ranks'; without a state it is 0 everywhere
        self._ring, self._timeline = ring, Timeline() if timeline is None else timeline
        self._chunk_bytes = chunk_bytes or ring.chunk_bytes
        self._mirror = None if device is None else Mirror(self.layout.length + CONTROLS, device, direct=gpu_aware)
        self._driver = RingDriver(ring, self.layout.bucket, self._chunk_bytes, seed, self._mirror)
        #: What is packed, and in the end unpacked.
        self._packed: Vector | Tensor = self._driver.gradient
        self._kernels: Kernels = HOST
        if self._mirror is not None:
            self._packed = self._mirror.values[: self.layout.length]
            self._kernels = DeviceKernels(self._mirror.device)
        vector = self._driver.vector
        plain = Planner(ring.rank, ring.size).plan(
            "all_reduce", vector, IdentityCodec(), "mean", self._chunk_bytes, None
        )
        self._dense_bytes = plain.stats.bytes_sent
        self._family = make_family(method, self.layout.blocks, rank=ring.rank, size=ring.size, seed=seed)

    @property
    def window_log(self) -> list[dict[str, Any]]:
        return list(self._family.log)

    @property
    def phase(self) -> str:
        """Phase of the next `aggregate()`."""
        return self._family.phase

    def aggregate(self, lr: float = 1.0) -> Report:
        """Average the gradients; collective.

        Args:
            lr: the learning rate of the step that follows, the same on all ranks; only ACCORDION and error feedback of
                the form "scaled" look at it.
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
        phase, timeline = self.phase, self._timeline.fork()
        now = Iteration(self.iteration, lr, timeline.span, timeline.clock)
        self._driver.timeline = timeline
        with now.span("pack"):
            self.layout.pack(self._packed)
            flawed = nonfinite_blocks(self._packed, self.layout.blocks)
            if flawed:
                self._packed[:] = 0
        if self.watch is not None:
            with now.span("measure"):
                self.watch(self._packed)
        mean, overflowed = self._exchange(now, flawed)
        skipped = self._agree_on_flaws(flawed, overflowed, mean is None, now)
        if skipped:
            self._packed[:] = 0
            self._family.skip()
            now.measures = None
        else:
            following = self._family.accept(now, mean)
            if following is not None:
                self._driver.carry(following, now)
        with now.span("pack"):
            self.layout.unpack(self._packed)
        self.iteration += 1

        self._timeline.absorb(timeline)
        return Report(
            iteration=now.number,
            phase=phase,
            bytes_sent=now.bytes_sent,
            dense_bytes=self._dense_bytes,
            ratio=now.ratio,
            fit_bytes=now.fit_bytes,
            measure_bytes=now.measure_bytes,
            skipped=skipped,
            seconds=timeline.totals(),
            virtual_seconds={} if timeline.virtual is None else timeline.virtual.totals(),
            losses=now.losses or None,
            measures=now.measures,
        )

    def _exchange(self, now: Iteration, flawed: Sequence[int]) -> tuple[Any, bool]:
        """The mean, in what is packed as well, or None if some worker's gradient is of no use; and whether this one's
        is not finite together with what error feedback remembers."""
        family, driver = self._family, self._driver
        on_device = driver.on_device(family)
        gradient: Any = self._packed if on_device else driver.gradient
        if self._mirror is not None and not on_device:
            with now.span("pack"):
                self._mirror.to_host()
        call = Call(
            self.layout.bucket,
            now,
            self._kernels if on_device else HOST,
            self._ring.rank,
            self._ring.size,
            flaw=flaw(NOT_FINITE, flawed[0]) if flawed else 0,
            out=gradient,
            measured=True,
            per_hop=True,
        )
        mean = driver.carry(family.exchange(call, gradient), now, call, family.vote)
        if self._mirror is not None and not on_device:
            with now.span("pack"):
                self._mirror.to_device()
        return mean, bool(call.flaw) and not flawed

    def _compare_iterations(self) -> None:
        """Refuse to go on from different iterations: QSGD's random numbers, or phases, would differ unnoticed."""
        table = self._ring.rows_of_all([self.iteration])[:, 0]
        if (table != self.iteration).any():
            where = ", ".join(f"{iteration:.0f} on rank {rank}" for rank, iteration in enumerate(table))
            raise ValueError(f"the states that were loaded are of different iterations: {where}")
        self._compared = True

    def _agree_on_flaws(self, flawed: Sequence[int], overflowed: bool, any_flawed: bool, now: Iteration) -> bool:
        """Whether any gradient, or the mean, is not finite, once all ranks know where.

        Args:
            flawed: the indices of this rank's non-finite blocks.
            overflowed: whether its gradient isn't finite together with what error feedback remembers.
            any_flawed: whether any rank has such blocks.
        Raises:
            NonFiniteGradient: if that is the policy.
        """
        blocks, ring = self.layout.blocks, self._ring
        iteration = f"in iteration {now.number}"
        if any_flawed:
            names = [*(block.name for block in blocks), "the sum of a gradient and what error feedback remembers"]
            table = np.zeros((ring.size, len(names)), np.float32)
            table[ring.rank, [*flawed, *([len(blocks)] if overflowed else [])]] = 1
            now.bytes_sent += ring.all_reduce(table.reshape(-1), timeline=self._driver.timeline).bytes_sent
            found = [(rank, [names[i] for i in np.flatnonzero(row)]) for rank, row in enumerate(table)]
            where = "; ".join(f"{listed(flaws)} on rank {rank}" for rank, flaws in found if flaws)
            story = f"non-finite gradient {iteration}: {where}"
        else:
            flawed = nonfinite_blocks(self._packed, blocks)  # the same bits, so the same finding on every rank
            if not flawed:
                return False
            where = listed([blocks[i].name for i in flawed])
            story = f"the sum of finite gradients overflows float32 {iteration}: {where} on all ranks"
        if self.nonfinite == "fail":
            raise NonFiniteGradient(story)
        return True

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on bit by bit, at any iteration; it differs by rank.

        Dicts and lists of tensors on the CPU, numbers, strings and None, copied: `torch.load` takes them with
        weights_only=True.
        """
        return {
            "identity": self._identity(),
            "iteration": self.iteration,
            "family": self._family.state_dict(),
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
        check_shapes(state["family"], {block.name: block.shape for block in self.layout.blocks})
        self._family.load_state_dict(state["family"])
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
            **{f"model.{block.name}": [block.start, *block.shape] for block in self.layout.blocks},
        }


def nonfinite_blocks(gradient: Vector | Tensor, blocks: Sequence[Block]) -> list[int]:
    """Indices of the blocks with an infinity or a NaN. Cost: one pass, a dot product, unless there is something; of a
    gradient on a device, waiting for that."""
    if isinstance(gradient, Tensor):
        if math.isfinite(torch.dot(gradient, gradient)):
            return []
        return [i for i, block in enumerate(blocks) if not gradient[block.where].isfinite().all()]
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(np.dot(gradient, gradient)):
            return []
    return [i for i, block in enumerate(blocks) if not np.isfinite(gradient[block.where]).all()]


def _shown(value: object) -> str:
    return "missing" if value is None else str(value)
