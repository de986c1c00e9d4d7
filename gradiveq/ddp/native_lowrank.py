"""PowerSGD on buckets as torch operations: on a GPU nothing waits for the device between iterations.

The two messages, the sums and what is kept are those of `gradiveq.ddp.lowrank`, so that a state of one is one of the
other. Two things differ:

* Columns are made orthonormal by the library's QR decomposition (Householder's, in float64, all matrices of one shape
  at once), which has no step that depends on what it finds: column after column, as the host does it, would take about
  20 operations on the device for each. Signs may differ from the host's, and so may what replaces a column that depends
  on others; P Qᵀ differs by rounding. The same operation on the same kind of device gives all ranks the same bits, as
  P Qᵀ takes anyway; so the ranks of one group must be alike.
* The second message follows also where a rank's code says that the first one is of no use: that is looked at later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradiveq.compressors.base import Draw
from gradiveq.ddp.bucket import Place
from gradiveq.ddp.memory import Memories, Memory, summed
from gradiveq.ddp.native_bits import constant, copied
from gradiveq.ddp.native_rounds import corrected
from gradiveq.ddp.scheme import Round, Rounds, Scheme, Traffic, Work
from gradiveq.ddp.wire import from_wire, to_wire
from gradiveq.powersgd import PowerSGD, matrix_shape


class _Matrix(NamedTuple):
    """A parameter that is compressed, and its place in the bucket, by number."""

    place: Place
    number: int
    rows: int
    columns: int
    rank: int

    def view(self, values: Tensor) -> Tensor:
        return values[self.place.start : self.place.stop].view(self.rows, self.columns)


class NativePowerSGDScheme(Scheme):
    """PowerSGD for a model on a GPU. Memory there: with error feedback a vector as long as the gradient; Q."""

    def __init__(self, method: PowerSGD, seed: int) -> None:
        self.method, self.seed = method, seed
        self._memory = Memory() if method.error_feedback else None
        self._q: dict[str, Tensor] = {}
        self._next_q: dict[str, Tensor] = {}  # of this iteration

    def begin(self, iteration: int, traffic: Traffic) -> None:
        self._next_q = {}
        if self._memory is not None:
            self._memory.forget()

    def rounds(self, work: Work) -> Rounds:
        values = work.gradient()
        if self._memory is not None:
            values = corrected(work, values, self._memory)
        matrices, plain = self._split(work)
        starts = orthonormal([self._start(matrix, work) for matrix in matrices])
        products = [matrix.view(values) @ start for matrix, start in zip(matrices, starts, strict=True)]
        parts = [*(values[place.start : place.stop] for place in plain), *products]
        lengths = [part.numel() for part in parts]
        payload = torch.cat([part.reshape(-1) for part in parts])
        first = work.message(len(payload))
        first[: len(payload)].copy_(to_wire(payload, work))
        yield Round([work.all_reduce(first)], last=not matrices)

        work.hear(first, len(payload))
        means = _mean(first[: len(payload)], work).split_with_sizes(lengths)
        sums = [mean.view(m.rows, m.rank) for m, mean in zip(matrices, means[len(plain) :], strict=True)]
        finite = [p.isfinite().all() for p in sums]
        ps = orthonormal([torch.where(good, p, 0) for good, p in zip(finite, sums, strict=True)])
        own = [matrix.view(values).T @ p for matrix, p in zip(matrices, ps, strict=True)]
        if self._memory is not None:
            left = torch.zeros_like(values)
            for matrix, p, q in zip(matrices, ps, own, strict=True):
                torch.sub(matrix.view(values), p @ q.T, out=matrix.view(left))
            self._memory.stage(work.plan, left)
        if matrices:
            second = to_wire(torch.cat([q.reshape(-1) for q in own]), work)
            work.kept += [second, *means, *finite, *ps]
            yield Round([work.all_reduce(second)], last=True)
            qs = _mean(second, work).split_with_sizes([q.numel() for q in own])
            for matrix, p, flat, good in zip(matrices, ps, qs, finite, strict=True):
                q = flat.view(matrix.columns, matrix.rank)
                self._next_q[matrix.place.name] = q
                work.write(torch.where(good, p @ q.T, torch.nan), matrix.view(work.buffer))
        for place, mean in zip(plain, means[: len(plain)], strict=True):
            work.write(mean, work.buffer[place.start : place.stop])

    def end(self, compressed: bool) -> None:
        if compressed:
            if self._memory is not None:
                self._memory.commit()
            if self.method.warm_start:
                self._q.update(self._next_q)

    def state_dict(self) -> dict[str, Any]:
        memory = {} if self._memory is None else self._memory.state_dict()
        return {"memory": memory, "q": {name: q.cpu().clone() for name, q in self._q.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._load(state["memory"], state["q"])

    def load_others(self, states: Sequence[Mapping[str, Any]], memories: Memories, rank: int, size: int) -> None:
        """Q is the same on all workers."""
        self._load(summed([state["memory"] for state in states], rank, size, memories), states[0]["q"])

    def _load(self, memory: Mapping[str, Tensor], q: Mapping[str, Tensor]) -> None:
        self._q, self._next_q = {name: one.clone() for name, one in q.items()}, {}
        if self._memory is not None:
            self._memory.load_state_dict(memory)

    def _split(self, work: Work) -> tuple[list[_Matrix], list[Place]]:
        """What is compressed in a bucket, and what goes as it is."""
        matrices, plain = [], []
        for number, place in enumerate(work.plan.places):
            rank = self.method.rank_of(place.shape)
            if rank is None:
                plain.append(place)
            else:
                matrices.append(_Matrix(place, number, *matrix_shape(place.shape), rank))
        return matrices, plain

    def _start(self, matrix: _Matrix, work: Work) -> Tensor:
        """Q to begin with; drawn as on the host where there is none, whose columns are in another order then."""
        name, device = matrix.place.name, work.buffer.device
        if name not in self._q:
            generator = Draw(self.seed, work.iteration, 0, matrix.number).generator(shared=True)
            return copied(generator.standard_normal((matrix.columns, matrix.rank), np.float32), device)
        self._q[name] = self._q[name].to(device)
        return self._q[name]


def orthonormal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Orthonormal columns that span at least those of each matrix, which are at most as many as its rows."""
    found: dict[int, Tensor] = {}
    shapes: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        shapes.setdefault(matrix.shape, []).append(i)
    for chosen in shapes.values():
        basis, _ = torch.linalg.qr(torch.stack([matrices[i] for i in chosen]).double())
        found.update(zip(chosen, basis.float().unbind(), strict=True))
    return [found[i] for i in range(len(matrices))]


def _mean(total: Tensor, work: Work) -> Tensor:
    total = from_wire(total, torch.float32, work)
    return total / constant(work.group.size, total)
