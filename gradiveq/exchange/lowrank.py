"""PowerSGD (Vogels, Karimireddy and Jaggi 2019): gradients of matrices as products of two thin ones.

A layer's gradient is a matrix M of n rows (outputs) and m columns (inputs; of a convolution D·H·W). One step of a power
iteration, whose subspace is kept from call to call, gives M ≈ P Qᵀ of rank r (Algorithm 1 there):

    each worker        P = M Q                      Q of the last call: (m, r), its columns made orthonormal
    sum                P = mean over the workers    all layers' P in one message, with what isn't compressed
    every worker       P = orthonormalise(P)
    each worker        Q = Mᵀ P
    sum                Q = mean over the workers    all layers' Q in one message
    every worker       the mean gradient is P Qᵀ

Both products are linear in M, so the means over the workers are those of the mean gradient: the result is what one
worker with all the data would get.

**The same bits on every rank.** All ranks orthonormalise the same reduced P (`gradiveq.arrays.orthonormal`). The
product P Qᵀ of equal matrices is left to BLAS, as everywhere in this package.

**Error feedback** (Algorithm 2 there, and in Sahu et al. 2021): a worker compresses x = g + e and keeps e = x - P Pᵀx,
what its *own* matrices lose, in units of the gradient. The authors' released code and PyTorch's hook keep
x - P Qᵀ with the mean's Q. The two differ by the worker and have the same mean over the workers, on which alone all
that follows depends, so training is the same up to rounding; here the error measured is the worker's own.

Differences from the paper: Q is made orthonormal before use, which changes its scale and not its subspace, so that
products of tiny or huge gradients stay within float32 (PyTorch's hook does it too); a layer whose P and Q would not be
smaller goes uncompressed, as do vectors; columns of P that depend on others are replaced by unit vectors, where
dividing by their norm would give NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradiveq.arrays.counter_random import Draw
from gradiveq.exchange.error_memory import ErrorFeedback, Memories
from gradiveq.exchange.family import Family
from gradiveq.exchange.kernels import overflows_allowed
from gradiveq.exchange.requests import Call, Exchange, Iteration, Round, Sum
from gradiveq.flatten import Block, Bucket, matrix_shape
from gradiveq.powersgd import PowerSGD


class _Matrix(NamedTuple):
    """A layer that is compressed; its number in the vector keys its first Q."""

    block: Block
    number: int
    rank: int


class _Split(NamedTuple):
    """What of a vector is compressed, and what goes as it is: stretches, and the names of their layers."""

    matrices: list[_Matrix]
    plain: list[slice]
    plain_names: list[str]


class LowRank(Family):
    """One worker's side of PowerSGD. Memory: Q, and with error feedback a vector as long as the gradient.

    PowerSGD says something of every element, so its density is 1.

    Attributes:
        ranks: r of layers by name, in place of the method's; may be replaced between calls, on every worker alike.
            Where a rank grows, Q keeps its columns and gets new, random ones; where it falls, Q keeps its first ones.
            No part of the state: whoever replaces them does so again after a state was loaded.
    """

    def __init__(self, method: PowerSGD, *, seed: int = 0) -> None:
        super().__init__(ErrorFeedback() if method.error_feedback else None)
        self.method, self.seed = method, seed
        self.ranks: dict[str, int] = {}
        self._q: dict[str, Tensor] = {}  # (columns, rank)
        self._next_q: dict[str, Tensor | None] = {}  # of this iteration; None of what isn't compressed
        self._splits: dict[tuple[Bucket, tuple[int, ...]], _Split] = {}

    def rounds(self, call: Call, x: Any, latest: Any) -> Exchange:
        kernels, now = call.kernels, call.now
        with now.span("encode"), overflows_allowed():
            matrices, plain, plain_names = self._split(call.bucket)
            starts = kernels.orthonormal([self._start(matrix, call) for matrix in matrices])
            products = [one.block.matrix(x) @ q for one, q in zip(matrices, starts, strict=True)]
        first = [*(x[where] for where in plain), *products]
        (means,) = yield Round([Sum(first, mean=True)], last=not matrices)

        with now.span("encode"), overflows_allowed():
            ps = means[len(plain) :]
            finite = [kernels.all_finite(p) for p in ps]  # the same on all workers
            ps = kernels.orthonormal([kernels.choose(good, p, 0.0) for good, p in zip(finite, ps, strict=True)])
            own = [one.block.matrix(x).T @ p for one, p in zip(matrices, ps, strict=True)]
            self._keep(call, x, matrices, ps, own, sum(payload.nbytes for payload in [*first, *own]))
        call.kept += [means, ps, finite]
        qs: Sequence[Any] = ()
        if matrices:
            (qs,) = yield Round([Sum(own, mean=True)])

        with now.span("decode"), overflows_allowed():
            self._next_q.update(dict.fromkeys(plain_names))
            for one, p, q, good in zip(matrices, ps, qs, finite, strict=True):
                self._next_q[one.block.name] = kernels.tensor(q)
                if call.wanted:
                    target = one.block.matrix(call.out)
                    kernels.write_product(p, q, target)
                    if good is not True:  # on a device it isn't known
                        target[:] = kernels.choose(good, target, np.nan)
            for where, mean in zip(plain, means, strict=False):
                if call.wanted:
                    call.out[where] = mean
        return call.out

    def _keep(
        self, call: Call, x: Any, matrices: Sequence[_Matrix], ps: Sequence[Any], own: Sequence[Any], num_bytes: int
    ) -> None:
        if not self.memory.wants(call):
            return
        left = call.kernels.zeros(call.bucket.length)  # what goes as it is leaves nothing
        for one, p, q in zip(matrices, ps, own, strict=True):
            left[one.block.where] = x[one.block.where]
            call.kernels.subtract_product(p, q, one.block.matrix(left))
        self.memory.keep(call, x, left, call.bucket.length, num_bytes)

    def _split(self, bucket: Bucket) -> _Split:
        limits = tuple(self.ranks.get(block.name, self.method.rank) for block in bucket.blocks)
        found = self._splits.get((bucket, limits))
        if found is None:
            found = self._splits[bucket, limits] = _Split([], [], [])
            for number, (block, limit) in enumerate(zip(bucket.blocks, limits, strict=True)):
                rank = replace(self.method, rank=limit).rank_of(block.shape)
                if rank is not None:
                    found.matrices.append(_Matrix(block, number, rank))
                    continue
                found.plain_names.append(block.name)
                if found.plain and found.plain[-1].stop == block.start:
                    found.plain[-1] = slice(found.plain[-1].start, block.stop)
                else:
                    found.plain.append(block.where)
        return found

    def _start(self, matrix: _Matrix, call: Call) -> Any:
        """Q to begin with, (columns, rank), its columns not yet orthonormal."""
        kept, columns = self._q.get(matrix.block.name), matrix_shape(matrix.block.shape)[1]
        if kept is not None and kept.shape[1] >= matrix.rank:
            return call.kernels.array(kept[:, : matrix.rank])
        draw = Draw(self.seed, call.now.number, 0, matrix.number)
        q = call.kernels.normal(draw, (columns, matrix.rank))
        if kept is not None:
            q[:, : kept.shape[1]] = call.kernels.array(kept)
        return q

    def stays_on_device(self) -> bool:
        return True

    def accept(self, now: Iteration, mean: Any = None) -> Exchange | None:
        if self.method.warm_start:
            for name, q in self._next_q.items():
                if q is None:
                    self._q.pop(name, None)
                else:
                    self._q[name] = q
        self._next_q = {}
        return super().accept(now, mean)

    def skip(self) -> None:
        self._next_q = {}
        super().skip()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "q": {name: q.cpu().clone() for name, q in self._q.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._load_q(state)

    def load_others(self, states: Sequence[Mapping[str, Any]], memories: Memories, rank: int, size: int) -> None:
        """Q is the same on all workers."""
        super().load_others(states, memories, rank, size)
        self._load_q(states[0])

    def _load_q(self, state: Mapping[str, Any]) -> None:
        self._q = {name: torch.as_tensor(q).clone() for name, q in state["q"].items()}
        self._next_q = {}
