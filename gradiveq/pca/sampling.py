"""PCA bases of gradient slices: sampling, fitting, sharing (section 2 and 3 of Yu et al. 2018).

A layer's gradient is cut into slices of K elements, the last one padded with zeros after centring. Groups of s
consecutive slices (the reuse factor) share one basis U of d orthonormal rows, found from the samples of the group's
first slice (`fit_slices="first"`, the paper's) or from those of all its slices, each centred by its own mean ("all").

    sampling iterations          fit, once per window                      every rank
    ------------------          --------------------------------------    ------------------
    first: every rank keeps     owner: eigenvectors of the Gram matrix    rebuilds U = V X,
           X, S x K             (S x S), shares V, d x S                  X its own samples
    all:   the owner keeps      owner: eigenvectors of the smaller of     takes U as it is
           X or the covariance  Gram matrix and covariance, shares U

No two ranks' eigen-solvers are trusted to agree: each group has one owner, and what it shares is what all use. With
"first" that is V, small beside U as long as S < K, and the rank's own product makes U; that needs the same samples
on every rank (a ring all-reduce gives that) and the same matrix product (the same library on the same kind of CPU);
`LayerBasis.digest` is there to compare.

**Samples or covariance.** A group holds its S samples (4·S·K bytes) until S > K and the K x K covariance (4·K·K) from
then on; see `held_bytes`. The covariance is accumulated over blocks of iterations, each centred by its own mean, and
the change of mean is added as further rows (Chan, Golub, LeVeque 1979): a sum of squares throughout, so that nothing
cancels, whatever the size of the mean.

**Solver.** Up to EXACT_SIZE the matrix is decomposed exactly in float64. Above, a randomised block subspace iteration
finds the leading eigenvectors in float32 (see `leading_eigenpairs` for its measured accuracy). Directions whose
variance is below RANK_TOLERANCE of the largest are rounding and are dropped: λ = 0 keeps the rest.

**µ** is the mean over the iterations of what `add` is given, which is the gradient *averaged over workers*: the µ/N of
Eq. 3. So it stays valid when N changes, and is free: all slices are aggregated while sampling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import blas

from gradiveq.arrays.float32 import LARGEST
from gradiveq.flatten import Block
from gradiveq.pca.basis import Basis, Fit, LayerBasis
from gradiveq.pca.config import (
    BLOCK_ROWS,
    EXACT_SIZE,
    Float32,
    Float64,
    PCAConfig,
    SliceGroup,
    assign,
    check_components,
    fit_cost,
    groups,
    rows_per_sample,
    shared_floats,
)
from gradiveq.pca.solvers import leading_eigenpairs

#: Why a group could not be fitted, and what `PCASampler.fit` says instead of d, so that every rank can tell.
FAILURES: dict[float, tuple[type[Exception], str]] = {
    -1.0: (FloatingPointError, "the variance of the samples is not finite in float32"),
    -2.0: (np.linalg.LinAlgError, "the eigenvalue solver did not converge"),
}


class GroupSamples:
    """The statistics of one group while sampling: samples, then the covariance once that is smaller.

    Args:
        owned: whether this rank fits the group. If not, samples are kept only where `rebuild` needs them.
    """

    def __init__(self, group: SliceGroup, config: PCAConfig, owned: bool = True) -> None:
        self.group, self.config, self.owned = group, config, owned
        self.rows = rows_per_sample(group, config)
        self.count = 0
        self._pending: list[Float32] = []  # each (rows, K): all samples, or those not yet in the scatter matrix
        self._scatter: Float32 | None = None  # (K, K), lower triangle, Fortran order: count - 1 times the covariance
        self._mean: Float64 = np.zeros((self.rows, group.slice_size))
        self._merged = 0  # samples in _scatter and _mean

    @property
    def weights(self) -> bool:
        """Whether weights of the samples are shared, rather than the basis."""
        return self.config.fit_slices == "first" and self.count * self.rows <= self.group.slice_size

    @property
    def num_bytes(self) -> int:
        scatter = 0 if self._scatter is None else self._scatter.nbytes + self._mean.nbytes
        return scatter + sum(sample.nbytes for sample in self._pending)

    def add(self, gradient: Float32) -> None:
        """Take one sampling iteration's gradient of the layer, float32 of shape (length,). Not modified.

        Cost: a copy of the sampled slices; with the covariance about 2·rows·K·K flops.
        """
        self.count += 1
        if not self.owned and not self.weights:
            self._pending.clear()
            return
        first = self.rows < self.group.num_slices
        sampled = replace(self.group, stop=self.group.start + self.group.slice_size) if first else self.group
        self._pending.append(sampled.slices(gradient))
        rows = len(self._pending) * self.rows
        if rows > self.group.slice_size or (self._scatter is not None and rows >= BLOCK_ROWS):
            self._merge()

    def _merge(self) -> None:
        """Add the pending samples to the scatter matrix: their own scatter, and that of the two means."""
        k, new, old = self.group.slice_size, len(self._pending), self._merged
        if not new:
            return
        if self._scatter is None:
            self._scatter = np.zeros((k, k), np.float32, order="F")
        block = np.stack(self._pending)
        mean = block.mean(axis=0, dtype=np.float64)
        block -= mean.astype(np.float32)
        shift = mean - self._mean
        rows = [block.reshape(new * self.rows, k)] if new > 1 else []
        if old:
            rows.append((math.sqrt(old * new / (old + new)) * shift).astype(np.float32))
        for x in rows:
            self._scatter = blas.ssyrk(1.0, x.T, beta=1.0, c=self._scatter, lower=1, overwrite_c=1)
        self._mean += shift * (new / (old + new))
        self._merged = old + new
        self._pending.clear()

    def centred(self) -> Float32:
        """The samples held, each minus its slice's mean: (S, K)."""
        samples = np.stack(self._pending)
        samples -= samples.mean(axis=0, dtype=np.float64).astype(np.float32)
        return samples.reshape(-1, self.group.slice_size)

    def fit(self) -> Fit:
        """Leading components of the samples so far; more may be added afterwards. On the owner.

        The row signs are such that the entry of largest magnitude in each row of `shared` is positive.

        Raises: as `check_components` and `leading_eigenpairs`; FloatingPointError also for a variance beyond float32.
        Cost: the Gram matrix, S·S·K flops, unless the covariance is held; `leading_eigenpairs`; 2·d·S·K for a basis.
        """
        check_components(self.group, self.count, self.config)
        config, k = self.config, self.group.slice_size
        dof = self.rows * (self.count - 1)
        samples: Float32 | None = None
        if self._scatter is None:
            samples = self.centred()
            x = samples if len(samples) > EXACT_SIZE else samples.astype(np.float64)
            matrix: npt.NDArray[Any] = x @ x.T
        else:
            self._merge()
            matrix = self._scatter
        total = float(np.trace(matrix, dtype=np.float64))
        if not total / dof <= LARGEST:  # variances are shared as float32
            raise FloatingPointError(f"the variance of the samples of {self.group.layer} is not finite in float32")
        values, vectors = leading_eigenpairs(matrix, config.wanted_components(k), config.loss_threshold)
        if samples is not None:  # U = Vᵀ X, V = eigenvectors / sqrt(eigenvalues): rows of unit length
            with np.errstate(divide="ignore"):
                vectors = vectors * np.where(values > 0, 1 / np.sqrt(values), 0.0)
        shared = np.ascontiguousarray(vectors.T, np.float32)
        if samples is not None and not self.weights:
            shared = shared @ samples
        largest = np.abs(shared).argmax(axis=1)
        shared *= np.where(shared[np.arange(len(shared)), largest] < 0, np.float32(-1), np.float32(1))[:, None]
        return Fit(shared, (values / dof).astype(np.float32), total / dof)

    def rebuild(self, fit: Fit) -> Basis:
        """The basis from what the owner shared: the same bits on every rank that has the same samples.

        Cost: 2·d·S·K flops from weights, none from a basis.
        """
        components = fit.shared @ self.centred() if self.weights else fit.shared
        return Basis(np.ascontiguousarray(components), fit.explained_variance, fit.total_variance)

    def state_dict(self) -> dict[str, Any]:
        pending = np.stack(self._pending) if self._pending else None
        scatter = None if self._scatter is None else self._scatter.copy(order="F")
        return {
            "count": self.count,
            "merged": self._merged,
            "mean": self._mean.copy(),
            "pending": pending,
            "scatter": scatter,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self._merged, self._mean = state["count"], state["merged"], np.array(state["mean"])
        self._pending = [] if state["pending"] is None else [np.array(sample) for sample in state["pending"]]
        self._scatter = None if state["scatter"] is None else np.array(state["scatter"], order="F")


class PCASampler:
    """Samples, fits and shares the bases of all compressed layers; the caller does the communication.

        sampler.add(vector)                                  # in each sampling iteration
        dims = sampler.fit()                                 # the rank's own groups
        all_reduce(dims)                                     # a few hundred bytes; then look at sampler.failures(dims)
        share, lengths = sampler.share(dims)
        shares = all_gather(share, lengths)                  # a list, by rank
        bases = sampler.rebuild(dims, shares)                # the same bits on every rank

    `fit` loses nothing, so that it can be called between samples to see whether d is stable (`is_stable`).

    Args:
        blocks: of the layout; the compressed ones are sampled.
        slice_sizes: K by name (`flatten.slice_sizes`).
        rank, size: this worker, and the workers among which the fit is divided.
        expected_samples: Lt, about; to balance the ranks.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        slice_sizes: Mapping[str, int],
        config: PCAConfig,
        rank: int,
        size: int,
        expected_samples: int = 100,
    ) -> None:
        self.layers = tuple(block for block in blocks if block.compressed)
        self.config, self.rank, self.size, self.samples = config, rank, size, 0
        self._slice_sizes = dict(slice_sizes)
        cut = [group for b in self.layers for group in groups(b.name, b.length, slice_sizes[b.name], config.reuse)]
        costs = [fit_cost(expected_samples * rows_per_sample(group, config), group.slice_size) for group in cut]
        self.owners = assign(costs, size)
        self.groups = [GroupSamples(g, config, owner == rank) for g, owner in zip(cut, self.owners, strict=True)]
        self._sums: list[Float64] = [np.zeros(block.length) for block in self.layers]
        self._fits: dict[int, Fit] = {}
        if config.n_components is not None and all(g.slice_size <= config.n_components for g in cut) and cut:
            largest = max(cut, key=lambda group: group.slice_size)
            raise ValueError(
                f"`n_components` must be below {largest.slice_size} (the largest slice size, of {largest.layer}), "
                f"got {config.n_components}"
            )

    def check(self, samples: int) -> None:
        """Refuse before sampling what `samples` iterations can't give (`check_components`)."""
        for held in self.groups:
            check_components(held.group, samples, self.config)

    @property
    def num_bytes(self) -> int:
        """Bytes held on this rank."""
        return sum(total.nbytes for total in self._sums) + sum(held.num_bytes for held in self.groups)

    def add(self, vector: Float32) -> None:
        """Take the gradient, averaged over workers, of a sampling iteration: float32, the layout's. Not modified."""
        self.samples += 1
        by_name = {}
        for block, total in zip(self.layers, self._sums, strict=True):
            by_name[block.name] = gradient = vector[block.where]
            total += gradient
        for held in self.groups:
            held.add(by_name[held.group.layer])

    def fit(self) -> Float64:
        """Fit this rank's groups.

        Returns:
            float64 of shape (num_groups,): d of those, 0 for others' groups, so that the ranks' sum has them all. Where
            a fit failed a key of FAILURES; look for such in the sum (`failures`) before `share`.
        Raises:
            ValueError: as `check`, on all ranks alike.
        """
        self.check(self.samples)
        self._fits = {}
        dims = np.zeros(len(self.groups))
        for i, held in enumerate(self.groups):
            if not held.owned:
                continue
            try:
                self._fits[i] = held.fit()
                dims[i] = len(self._fits[i].explained_variance)
            except tuple(kind for kind, _ in FAILURES.values()) as error:
                dims[i] = next(code for code, (kind, _) in FAILURES.items() if isinstance(error, kind))
        return dims

    def failures(self, dims: Float64) -> dict[tuple[int, str], list[str]]:
        """The layers that could not be fitted, by (rank, reason); the same on all ranks.

        Args:
            dims: of all groups.
        """
        found: dict[tuple[int, str], list[str]] = {}
        for i in np.flatnonzero(dims < 0):
            layers = found.setdefault((self.owners[i], FAILURES[float(dims[i])][1]), [])
            if self.groups[i].group.layer not in layers:
                layers.append(self.groups[i].group.layer)
        return found

    def _places(self, dims: Float64) -> tuple[list[slice], list[int]]:
        """The place of each group among all that is shared, and the beginning of each rank's share, by rank."""
        lengths = [
            shared_floats(self.config, int(d), held.group.slice_size, held.count)
            for d, held in zip(dims, self.groups, strict=True)
        ]
        places, bounds, offset = [slice(0)] * len(lengths), [0], 0
        for rank in range(self.size):
            for i, owner in enumerate(self.owners):
                if owner == rank:
                    places[i] = slice(offset, offset + lengths[i])
                    offset += lengths[i]
            bounds.append(offset)
        return places, bounds

    def share(self, dims: Float64) -> tuple[Float32, list[int]]:
        """What this rank contributes to an all-gather, and how many floats each rank does, by rank.

        Args:
            dims: d of all groups.
        Bytes: 4 per float, and per group 1 + d + d·S floats of weights, or 1 + d + d·K of a basis.
        """
        places, bounds = self._places(dims)
        share = np.zeros(bounds[self.rank + 1] - bounds[self.rank], np.float32)
        for i, fit in self._fits.items():
            place = slice(places[i].start - bounds[self.rank], places[i].stop - bounds[self.rank])
            share[place] = np.concatenate([[fit.total_variance], fit.explained_variance, fit.shared.ravel()])
        return share, np.diff(bounds).tolist()

    def rebuild(self, dims: Float64, shares: Sequence[Float32]) -> list[LayerBasis]:
        """The bases of all layers from every rank's share, by rank; in the layers' order."""
        places, _ = self._places(dims)
        everything = np.concatenate(shares)
        built: dict[str, list[tuple[SliceGroup, Basis]]] = {block.name: [] for block in self.layers}
        for held, place, d in zip(self.groups, places, dims.astype(int).tolist(), strict=True):
            part = everything[place]
            fit = Fit(part[1 + d :].reshape(d, -1).copy(), part[1 : 1 + d].copy(), float(part[0]))
            built[held.group.layer].append((held.group, held.rebuild(fit)))
        return [
            LayerBasis(
                block.name,
                block.length,
                self._slice_sizes[block.name],
                (total / self.samples).astype(np.float32),
                tuple(group for group, _ in built[block.name]),
                tuple(basis for _, basis in built[block.name]),
            )
            for block, total in zip(self.layers, self._sums, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on sampling; it differs by rank."""
        return {
            "samples": self.samples,
            "sums": [total.copy() for total in self._sums],
            "groups": [held.state_dict() for held in self.groups],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["groups"]) != len(self.groups):
            raise ValueError(f"the state has {len(state['groups'])} groups of slices, this model {len(self.groups)}")
        self.samples = state["samples"]
        self._sums = [np.array(total) for total in state["sums"]]
        for held, part in zip(self.groups, state["groups"], strict=True):
            held.load_state_dict(part)


def is_stable(history: Sequence[float], tolerance: float = 0.02, checks: int = 3) -> bool:
    """Whether d has settled: none of the `checks` values before the last is off the last by more than the tolerance.

    Section 3 of the paper finds Lt this way. With several groups, hand in the sum of their d's: what is sent.

    Args:
        history: d after each check, oldest first.
        tolerance: largest relative change.
    """
    if len(history) <= checks:
        return False
    last = history[-1]
    return all(abs(d - last) <= tolerance * last for d in history[-1 - checks :])
