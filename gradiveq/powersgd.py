"""PowerSGD (Vogels, Karimireddy and Jaggi 2019): gradients of matrices as products of two thin ones.

A layer's gradient is a matrix M of n rows (outputs) and m columns (inputs; of a convolution D·H·W). One step of a power
iteration, whose subspace is kept from call to call, gives M ≈ P Qᵀ of rank r (Algorithm 1 there):

    each worker        P = M Q                      Q of the last call: (m, r), its columns made orthonormal
    all-reduce         P = mean over the workers    all layers' P in one message, with what isn't compressed
    every worker       P = orthonormalise(P)
    each worker        Q = Mᵀ P
    all-reduce         Q = mean over the workers    all layers' Q in one message
    every worker       the mean gradient is P Qᵀ

Both products are linear in M, so the means over the workers are those of the mean gradient: the result is what one
worker with all the data would get. `PowerSGDWorker` calls no collective: it is handed one, or yields what to reduce.

**The same bits on every rank.** All ranks orthonormalise the same reduced P, by loops compiled here with a fixed order
of float64 additions; a library's QR may differ in the last bits by threads, alignment or processor. The product P Qᵀ
of equal matrices is left to BLAS, as everywhere in this package.

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

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg.blas import sgemm

from gradiveq.compressors.base import Constants, Draw, Float32
from gradiveq.compressors.reductions import sum_of_squares
from gradiveq.exchange import Measures
from gradiveq.flatten import Block
from gradiveq.jit import jit

#: Replaces a float32 vector by its mean over the workers, in place, with the same bits on all.
AllReduce = Callable[[Float32], object]

#: What is left of a column of norm 1 without the columns before it, below which it counts as dependent on them.
DEPENDENT = 1e-10


@dataclass(frozen=True)
class PowerSGD:
    """Low-rank gradients of every layer that is a matrix.

    Attributes:
        rank: r, of the product; at most that of the layer's matrix.
        error_feedback: whether each worker adds what was left out to its next gradient.
        warm_start: keep Q from call to call; False draws a new one for each.
        min_compression_rate: a layer goes uncompressed unless n·m > min_compression_rate·(n + m)·r. In PyTorch's
            hook that is 2; with 0 every matrix is compressed, at full rank too.
    Raises:
        ValueError: a value is out of its range.
    """

    rank: int = 4
    error_feedback: bool = True
    warm_start: bool = True
    min_compression_rate: float = 1.0

    name: ClassVar[str] = "powersgd"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"`rank` must be a whole number of at least 1, got {self.rank!r}")
        if not 0 <= self.min_compression_rate < float("inf"):
            raise ValueError(f"`min_compression_rate` must be at least 0, got {self.min_compression_rate}")

    def rank_of(self, shape: Sequence[int]) -> int | None:
        """r of a parameter of this shape, or None if it goes uncompressed."""
        if len(shape) < 2 or 0 in shape:
            return None
        rows, columns = matrix_shape(shape)
        rank = min(self.rank, rows, columns)
        return rank if rows * columns > self.min_compression_rate * (rows + columns) * rank else None

    def payload_bytes(self, shape: Sequence[int]) -> int:
        """Bytes that a parameter of this shape takes on the wire, P and Q together."""
        rank = self.rank_of(shape)
        return 4 * (int(np.prod(shape)) if rank is None else sum(matrix_shape(shape)) * rank)

    def constants(self, shape: Sequence[int]) -> Constants:
        """What is known of C(x) = P Pᵀx, a projection, so that ‖C(x)‖² + ‖x - C(x)‖² = ‖x‖² within rounding.

        Without a warm start, Q is Gaussian and independent of x. Let x be the mean gradient, whose P this is, of
        singular values σ_1 >= ... >= σ_s, s = min(n, m). Then E‖C(x)‖² = Σ σ_i²·h_i, where h_i, how much of singular
        direction i is within the column space of P, sums to r and on average does not fall with σ_i. By Chebyshev's
        sum inequality E‖C(x)‖² >= r/s·‖x‖²: a δ-contraction with δ = r/s. (Equal singular values attain it.)

        With a warm start Q depends on the gradients before, which may be orthogonal to this one: nothing better than
        ‖x - C(x)‖² <= ‖x‖² holds. The same is true of one worker's own gradient among others. The paper proves no
        constant either.
        """
        rank = self.rank_of(shape)
        if rank is None:
            return Constants(omega=0.0, delta=1.0, variance=0.0, absolute=0.0)
        if self.warm_start:
            return Constants(omega=0.0, variance=1.0)
        delta = rank / min(matrix_shape(shape))
        return Constants(omega=0.0, delta=delta, variance=1 - delta)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(n, m) of a parameter of two or more dimensions: (outputs, inputs), of a convolution (F, D·H·W)."""
    return shape[0], int(np.prod(shape[1:]))


class _Matrix(NamedTuple):
    """One layer's place in the vector and in the two messages.

    A convolution's block is stored as (H·W·D, F), see `gradiveq.flatten`: the transpose of M, with columns in another
    order than PyTorch's, by which the rows of Q are permuted and nothing else changes.
    """

    block: int
    place: slice
    rows: int
    columns: int
    stored_transposed: bool
    rank: int
    p: slice
    q: slice

    def view(self, vector: Float32) -> Float32:
        """M, (rows, columns), of the vector; not a copy."""
        part = vector[self.place]
        if self.stored_transposed:
            return part.reshape(self.columns, self.rows).T
        return part.reshape(self.rows, self.columns)

    def p_of(self, message: Float32) -> Float32:
        return message[self.p].reshape(self.rows, self.rank)

    def q_of(self, message: Float32) -> Float32:
        return message[self.q].reshape(self.columns, self.rank)

    def write(self, p: Float32, q: Float32, out: Float32) -> None:
        """M of `out` becomes P Qᵀ."""
        part = out[self.place]
        if self.stored_transposed:
            np.matmul(q, p.T, out=part.reshape(self.columns, self.rows))
        else:
            np.matmul(p, q.T, out=part.reshape(self.rows, self.columns))

    def subtract(self, p: Float32, q: Float32, out: Float32) -> None:
        """M of `out` becomes M - P Qᵀ."""
        left, right = (p, q) if self.stored_transposed else (q, p)
        matrix = self.view(out)
        fortran = matrix if self.stored_transposed else matrix.T
        written = sgemm(-1.0, left, right, beta=1.0, c=fortran, trans_b=True, overwrite_c=True)
        assert np.shares_memory(written, out)


class PowerSGDWorker:
    """One worker's side of PowerSGD on the vector of a `Layout`.

    Args:
        blocks: that cover the vector, in order. The same on every worker.
        method: its hyper-parameters.
        seed: of the first Q; the same on every worker.
        num_extra: elements to leave at the end of the first message, which are the caller's.
    Memory: a vector as long as the gradient, with error feedback two; the messages.

    Attributes:
        length: of the vector.
        measures: of the last call, on this worker's corrected gradient. PowerSGD says something of every element, so
            its density is 1.
        overflowed: the gradient of the call under way is not finite together with the memory; known from the first
            message on.
    """

    def __init__(self, blocks: Sequence[Block], method: PowerSGD, *, seed: int = 0, num_extra: int = 0) -> None:
        self.method, self.seed = method, seed
        self.length = blocks[-1].stop if blocks else 0
        self.measures: Measures | None = None
        self.overflowed = False
        self._blocks, self._num_extra = tuple(blocks), num_extra
        self._memory = np.zeros(self.length, np.float32) if method.error_feedback else None
        self._corrected = np.empty(self.length, np.float32)
        self._q: dict[int, Float32] = {}  # by index of the block: (columns, rank)
        self._accepted_error = 0.0
        self._pending: dict[int, Float32] | None = None
        self.use_ranks([method.rank] * len(blocks))

    def use_ranks(self, ranks: Sequence[int]) -> None:
        """From the next call on, each block's r, in place of the method's. The same on every worker.

        Where a rank grows, Q keeps its columns and gets new, random ones; where it falls, Q keeps its first ones.
        """
        self._ranks = [int(rank) for rank in ranks]
        self._matrices: list[_Matrix] = []
        self._plain: list[slice] = []
        num_plain = num_p = num_q = 0
        for index, (block, limit) in enumerate(zip(self._blocks, self._ranks, strict=True)):
            place = slice(block.offset, block.stop)
            rank = _with_rank(self.method, limit).rank_of(block.shape)
            if rank is None:
                num_plain += block.length
                if self._plain and self._plain[-1].stop == block.offset:
                    self._plain[-1] = slice(self._plain[-1].start, block.stop)
                else:
                    self._plain.append(place)
                continue
            rows, columns = matrix_shape(block.shape)
            p, q = slice(num_p, num_p + rows * rank), slice(num_q, num_q + columns * rank)
            self._matrices.append(_Matrix(index, place, rows, columns, block.compressed, rank, p, q))
            num_p, num_q = p.stop, q.stop
        self._first = np.empty(num_plain + num_p + self._num_extra, np.float32)
        self._first_p = self._first[num_plain : num_plain + num_p]
        self._second = np.empty(num_q, np.float32)

    @property
    def payload_bytes(self) -> int:
        """Of both messages, without the caller's elements."""
        return 4 * (len(self._first) - self._num_extra + len(self._second))

    def aggregate(self, gradient: Float32, out: Float32, call: int, all_reduce: AllReduce) -> None:
        """The mean over the workers, as far as rank r goes: the same bits on every worker. Collective.

        Args:
            gradient: finite float32 of shape (length,). Not modified, unless it is `out`.
            out: float32 of shape (length,); overwritten.
            call: the number of the aggregation, from 0 on; the same on every worker.
            all_reduce: called twice, or once if nothing is compressed.
        Raises:
            OverflowError: a sum overflows float32, on all workers alike; the worker's state is as it was before.
        Cost: 2·r·n·m flops a matrix for each of P, Q, the result and the error.
        """
        for message in self.rounds(gradient, out, call):
            all_reduce(message)
        if not np.isfinite(out).all():
            raise OverflowError(f"the mean of what {type(self).__name__} sends overflows float32 in call {call}")
        self.accept()

    def rounds(self, gradient: Float32, out: Float32, call: int) -> Iterator[Float32]:
        """What `aggregate` does, for a caller that reduces and accepts by itself.

        Yields messages; the caller replaces each by its mean over the workers, in place, and resumes. The state changes
        in `accept`; without it the call has not happened. A layer whose mean isn't finite, which can be although each
        gradient is, is NaN in `out` on all workers.
        """
        self._pending = None
        corrected = self._corrected
        with np.errstate(over="ignore", invalid="ignore"):  # of products and sums; looked for in what was reduced
            if self._memory is None:
                corrected[:] = gradient
            else:
                np.add(gradient, self._memory, out=corrected)
            norm = float(sum_of_squares(corrected))
            self.overflowed = not math.isfinite(norm)
            place = 0
            for plain in self._plain:
                num = plain.stop - plain.start
                self._first[place : place + num] = corrected[plain]
                place += num
            for matrix in self._matrices:
                q = self._start(matrix, call)
                np.matmul(matrix.view(corrected), q, out=matrix.p_of(self._first_p))
        yield self._first

        place = 0
        for plain in self._plain:
            num = plain.stop - plain.start
            out[plain] = self._first[place : place + num]
            corrected[plain] = 0  # the error: none
            place += num
        finite = bool(np.isfinite(self._first[:place]).all())
        if not self._matrices:
            if finite:
                self._finish(norm, {})
            return
        with np.errstate(over="ignore", invalid="ignore"):
            for matrix in self._matrices:
                p, q = matrix.p_of(self._first_p), matrix.q_of(self._second)
                if np.isfinite(p).all():
                    orthonormalise(p)
                    np.matmul(matrix.view(corrected).T, p, out=q)
                else:
                    q.fill(np.nan)
            own = self._second.copy()
        yield self._second

        with np.errstate(over="ignore", invalid="ignore"):
            for matrix in self._matrices:
                p, q = matrix.p_of(self._first_p), matrix.q_of(self._second)
                if not np.isfinite(q).all():
                    finite = False
                    out[matrix.place] = np.nan
                    continue
                matrix.write(p, q, out)
                matrix.subtract(p, matrix.q_of(own), corrected)
        if finite:
            self._finish(norm, {matrix.block: matrix.q_of(self._second).copy() for matrix in self._matrices})

    def accept(self) -> None:
        """The call counts: keep its Q and what was left out."""
        if self._pending is None:
            raise RuntimeError("there is no call to accept: it has not ended, or its result was not finite")
        assert self.measures is not None
        if self.method.warm_start:
            self._q = self._pending
        if self._memory is not None:
            self._memory, self._corrected = self._corrected, self._memory
        self._accepted_error = self.measures.total_error
        self._pending = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit by bit; memories differ by rank. Copies."""
        return {
            "ranks": list(self._ranks),
            "q": {index: q.copy() for index, q in self._q.items()},
            "memory": None if self._memory is None else self._memory.copy(),
            "total_error": self._accepted_error,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is of other layers, or one has error feedback and the other hasn't; nothing changed.
        """
        memory = state["memory"]
        mine = None if self._memory is None else self._memory.shape
        if (None if memory is None else memory.shape) != mine:
            raise ValueError("the state's memory is of another error feedback or vector than this worker's")
        if len(state["ranks"]) != len(self._blocks):
            raise ValueError(f"the state is of {len(state['ranks'])} layers, this worker has {len(self._blocks)}")
        for index, q in state["q"].items():
            columns = matrix_shape(self._blocks[index].shape)[1]
            if len(q) != columns:
                raise ValueError(f"the state's Q of {self._blocks[index].name} has {len(q)} rows, {columns} are due")
        self.use_ranks(state["ranks"])
        self._q = {index: np.array(q) for index, q in state["q"].items()}
        if self._memory is not None:
            self._memory[:] = memory
        self._accepted_error = state["total_error"]
        self._pending = None

    def _start(self, matrix: _Matrix, call: int) -> Float32:
        """Q to begin with, (columns, rank), its columns orthonormal."""
        kept = self._q.get(matrix.block)
        if kept is not None and kept.shape[1] >= matrix.rank:
            q = kept[:, : matrix.rank].copy()
        else:
            generator = Draw(self.seed, call, 0, matrix.block).generator(shared=True)
            q = generator.standard_normal((matrix.columns, matrix.rank), np.float32)
            if kept is not None:
                q[:, : kept.shape[1]] = kept
        orthonormalise(q)
        return q

    def _finish(self, norm: float, q: dict[int, Float32]) -> None:
        """The call has ended well; `_corrected` holds what was left out."""
        error = float(sum_of_squares(self._corrected))
        remembered = 0.0 if self._memory is None else error
        total = self._accepted_error + remembered
        density = 1.0 if self.length else 0.0
        self.measures = Measures(norm, error, remembered, total, self.length, density, self.payload_bytes)
        self._pending = q


def powersgd_here(workers: Sequence[PowerSGDWorker], gradients: Sequence[Float32], out: Float32, call: int) -> None:
    """One aggregation of workers that are all in this process; what a ring does, without one.

    Args:
        workers, gradients: by rank.
        out: float32 of shape (length,): what every worker would have; overwritten.
    Raises:
        OverflowError: a sum overflows float32; no worker's state has changed.
    """
    rounds = [worker.rounds(gradient, out, call) for worker, gradient in zip(workers, gradients, strict=True)]
    for messages in zip(*rounds, strict=True):
        mean = messages[0].copy()
        with np.errstate(over="ignore", invalid="ignore"):
            for message in messages[1:]:
                mean += message
            mean /= np.float32(len(messages))
        for message in messages:
            message[:] = mean
    if not np.isfinite(out).all():
        raise OverflowError(f"the mean of what the workers send overflows float32 in call {call}")
    for worker in workers:
        worker.accept()


def orthonormalise(matrix: Float32) -> None:
    """Replace the columns by orthonormal ones that span at least their space, in place.

    Gram-Schmidt in float64, each column twice against those before it, which leaves rounding errors only. A column
    that depends on those before it is replaced by the unit vector farthest from their span, so that a power iteration
    that has lost a direction finds another.

    Args:
        matrix: contiguous float32 of shape (rows, columns) with columns <= rows, finite.
    Cost: 4·rows·columns² flops in a fixed order, so the same bits on every IEEE machine.
    """
    work = np.ascontiguousarray(matrix.T, np.float64)
    _orthonormalise_rows(work)
    matrix[:] = work.T


@jit(cache=True)
def _orthonormalise_rows(work: npt.NDArray[np.float64]) -> None:
    """The rows of `work`, one after the other. No fast-math: additions stay in order, nothing is fused."""
    num, length = work.shape
    for j in range(num):
        row = work[j]
        left = 0.0
        if _normalise(row) > 0.0:
            _project(work, j)
            left = _normalise(row)
        if left < DEPENDENT:
            best, least = 0, np.inf
            for i in range(length):
                covered = 0.0
                for other in range(j):
                    covered += work[other, i] * work[other, i]
                if covered < least:
                    best, least = i, covered
            row[:] = 0.0
            row[best] = 1.0
            _project(work, j)
            _normalise(row)
        _project(work, j)
        _normalise(row)


@jit(cache=True)
def _project(work: npt.NDArray[np.float64], j: int) -> None:
    """Take what the rows before it span out of row j."""
    length = work.shape[1]
    for other in range(j):
        along = 0.0
        for i in range(length):
            along += work[other, i] * work[j, i]
        for i in range(length):
            work[j, i] -= along * work[other, i]


@jit(cache=True)
def _normalise(row: npt.NDArray[np.float64]) -> float:
    """Divide by the norm unless it is 0, and return it."""
    total = 0.0
    for i in range(len(row)):
        total += row[i] * row[i]
    norm = np.sqrt(total)
    if norm > 0.0:
        for i in range(len(row)):
            row[i] /= norm
    return float(norm)


def _with_rank(method: PowerSGD, rank: int) -> PowerSGD:
    return PowerSGD(rank, method.error_feedback, method.warm_start, method.min_compression_rate)
