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

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy.linalg import blas

from gradiveq.checks import at_least, is_number
from gradiveq.flatten import Block
from gradiveq.float32 import LARGEST
from ring.algorithm import owned_segment

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

DEFAULT_LOSS_THRESHOLD = 0.01
EXACT_SIZE = 1024
RANK_TOLERANCE = float(np.finfo(np.float32).eps)
#: Rows that a group collects before it adds them to its covariance: enough for the matrix product to be efficient.
BLOCK_ROWS = 256
#: Why a group could not be fitted, and what `PCASampler.fit` says instead of d, so that every rank can tell.
FAILURES: dict[float, tuple[type[Exception], str]] = {
    -1.0: (FloatingPointError, "the variance of the samples is not finite in float32"),
    -2.0: (np.linalg.LinAlgError, "the eigenvalue solver did not converge"),
}
#: Of the subspace iteration: products with the matrix beyond the first, extra columns, relative gain that ends it.
MAX_PASSES = 4
OVERSAMPLING = 0.25
CONVERGED = 1e-3


@dataclass(frozen=True)
class PCAConfig:
    """How bases are fitted. At most one of `loss_threshold`, `n_components` and `ratio` may be given.

    Attributes:
        slice_size: K for all layers (`flatten.slice_sizes`); None for each layer's default.
        reuse: s, slices that share a basis; math.inf or None for one basis per layer.
        fit_slices: "first" slice of each group, as in the paper, or "all" of them.
        loss_threshold: λ in [0, 1): the least d whose in-sample loss is at most λ (Eq. 6, read >=). By default 0.01.
        n_components: d; K where a slice is smaller than that.
        ratio: wanted K/d; d = max(1, floor(K / ratio)).
    Raises:
        ValueError: a value is out of its range, or none; or several decide d.
    """

    slice_size: int | None = None
    reuse: float | None = None
    fit_slices: Literal["first", "all"] = "first"
    loss_threshold: float | None = None
    n_components: int | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("loss_threshold", "n_components", "ratio") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"only one of them can decide the number of components, got {' and '.join(given)}")
        if not given:
            object.__setattr__(self, "loss_threshold", DEFAULT_LOSS_THRESHOLD)
        for name, value in (("slice_size", self.slice_size), ("n_components", self.n_components)):
            if value is not None:
                at_least(name, value, 1)
        reuse = self.reuse
        if reuse not in (None, math.inf) and not (is_number(reuse) and reuse >= 1 and reuse == int(reuse)):
            raise ValueError(f"`reuse` must be a whole number of slices from 1 on, or inf, got {reuse!r}")
        if self.fit_slices not in ("first", "all"):
            raise ValueError(f"`fit_slices` must be 'first' or 'all', got {self.fit_slices!r}")
        share, ratio = self.loss_threshold, self.ratio
        if share is not None and not (is_number(share) and 0 <= share < 1):
            raise ValueError(f"`loss_threshold` must be in [0, 1), got {share!r}")
        if ratio is not None and not (is_number(ratio) and 1 <= ratio < math.inf):
            raise ValueError(f"`ratio` must be at least 1, got {ratio!r}")

    def wanted_components(self, slice_size: int) -> int | None:
        """d as given or from the ratio, at most K; None if the loss threshold decides."""
        if self.ratio is not None:
            return max(1, int(slice_size / self.ratio))
        return None if self.n_components is None else min(self.n_components, slice_size)


@dataclass(frozen=True)
class Group:
    """Consecutive slices of one layer that share a basis: elements [start, stop) of the layer."""

    layer: str
    start: int
    stop: int
    slice_size: int

    @property
    def num_slices(self) -> int:
        return -(-(self.stop - self.start) // self.slice_size)

    def slices(self, gradient: Float32) -> Float32:
        """A copy of the group's slices of a layer's gradient: (num_slices, slice_size), the last padded with zeros."""
        padded = np.zeros(self.num_slices * self.slice_size, np.float32)
        padded[: self.stop - self.start] = gradient[self.start : self.stop]
        return padded.reshape(self.num_slices, self.slice_size)


def groups(layer: str, length: int, slice_size: int, reuse: float | None = None) -> tuple[Group, ...]:
    """The groups of `reuse` slices of a layer of `length` elements; the last may have fewer."""
    step = length if reuse is None or reuse == math.inf else int(reuse) * slice_size
    return tuple(Group(layer, start, min(start + step, length), slice_size) for start in range(0, length, step))


def rows_per_sample(group: Group, config: PCAConfig) -> int:
    return 1 if config.fit_slices == "first" else group.num_slices


def check_components(group: Group, samples: int, config: PCAConfig) -> None:
    """Refuse more components than `samples` sampling iterations can show.

    Each sampled slice loses one dimension to its mean: at most (samples - 1) per slice, whatever λ asks for.

    Raises:
        ValueError: naming the bound and the layer. Depends on nothing that could differ by rank.
    """
    if samples < 2:
        raise ValueError(f"PCA needs at least 2 samples, got sample={samples}")
    wanted, per_sample = config.wanted_components(group.slice_size), rows_per_sample(group, config)
    bound = per_sample * (samples - 1)
    if wanted is None or wanted <= bound:
        return
    how = "samples - 1" if per_sample == 1 else f"{per_sample} slices x (samples - 1)"
    where = f"({how}, with sample={samples} and fit_slices='{config.fit_slices}')"
    if config.ratio is None:
        raise ValueError(f"`n_components` must be at most {bound} {where}, got {config.n_components} for {group.layer}")
    raise ValueError(
        f"`ratio` must be at least {group.slice_size / bound:.4g} (slice size {group.slice_size} / {bound} components; "
        f"{how}, with sample={samples} and fit_slices='{config.fit_slices}'), got {config.ratio:g} for {group.layer}"
    )


def assign(costs: Sequence[float], size: int) -> list[int]:
    """Owner of each group, the costliest first, each to the rank that has least so far. The same on every rank."""
    load, owners = [0.0] * size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[index] = min(range(size), key=load.__getitem__)
        load[owners[index]] += costs[index]
    return owners


def fit_cost(rows: int, slice_size: int) -> float:
    """About the flops to sample and fit a group, for balance: the smaller matrix, then its eigenvectors."""
    n = min(rows, slice_size)
    return float(rows) * slice_size * n + 10.0 * n * n * min(n, EXACT_SIZE)


def held_bytes(group: Group, samples: int, config: PCAConfig, owned: bool = True) -> int:
    """Most bytes a rank holds between `samples` sampling iterations for a group's basis, µ's sum not counted.

    µ's sum takes 8 bytes per element of the layer on every rank. While fitting, one more copy of the samples and the
    eigenvectors come on top; at the switch from samples to covariance both exist for a moment.
    """
    per_sample, k = rows_per_sample(group, config), group.slice_size
    if not owned and config.fit_slices == "all":
        return 0
    rows = per_sample * samples
    if rows <= k:
        return 4 * rows * k
    switch = k // per_sample + 1  # the sample with which the covariance becomes the smaller one
    before = 4 * (switch - 1) * per_sample * k
    if not owned:
        return before
    pending = min(k // per_sample, (BLOCK_ROWS - 1) // per_sample, samples - switch)
    return max(before, 4 * k * k + 8 * per_sample * k + 4 * pending * per_sample * k)


@dataclass(frozen=True)
class Fit:
    """What a group's owner shares.

    Attributes:
        shared: float32, (d, K) the basis itself, or (d, S) the weights that make it from the S samples.
        explained_variance: float32 of shape (d,), descending.
        total_variance: over all K directions.
    """

    shared: Float32
    explained_variance: Float32
    total_variance: float


@dataclass(frozen=True)
class Basis:
    """U of one group.

    Attributes:
        components_: float32 of shape (d, K), contiguous: Uᵀ of Eq. 3, orthonormal rows. Where the samples didn't vary
            at all, d = 1 and the row is zero: such a slice is sent as one number and decoded to its mean.
        explained_variance_: float32 of shape (d,), descending.
        total_variance_: over all K directions.
    """

    components_: Float32
    explained_variance_: Float32
    total_variance_: float

    @property
    def in_sample_loss(self) -> float:
        """Share of the samples' variance that is lost: the left side of Eq. 6, from 1. Not the held-out loss."""
        if self.total_variance_ <= 0:
            return 0.0
        return max(0.0, 1.0 - float(self.explained_variance_.sum(dtype=np.float64)) / self.total_variance_)


def count_components(eigenvalues: Float64, total: float, loss_threshold: float) -> int | None:
    """Least d with sum_{k<d} s[k] >= (1 - λ) * total (Eq. 6, read >=), at least 1; None if these don't suffice.

    Args:
        eigenvalues: s, descending, all of them or the leading ones. Those below RANK_TOLERANCE of the first count as 0.
        total: the sum over all eigenvalues.
    """
    kept = eigenvalues[eigenvalues > RANK_TOLERANCE * max(eigenvalues[0], 0.0)]
    captured = np.cumsum(kept)
    if len(kept) < len(eigenvalues):  # so these are all the directions there are
        total = captured[-1] if len(kept) else 0.0
    enough = captured >= (1.0 - loss_threshold) * total
    if not enough.any():
        return 1 if total <= 0 else None
    return int(enough.argmax()) + 1


def leading_eigenpairs(
    matrix: npt.NDArray[Any], n_components: int | None, loss_threshold: float | None, seed: int = 0
) -> tuple[Float64, npt.NDArray[Any]]:
    """Leading eigenvalues and eigenvectors of a symmetric positive semidefinite matrix.

    Exact (LAPACK, float64) up to EXACT_SIZE. Above that, subspace iteration on a random block with Rayleigh-Ritz, in
    float32. The Ritz values never exceed what the vectors capture, so a loss threshold reached by them is reached, with
    a d that may be larger than the least. For a threshold the block starts at the size below which no subspace can
    capture enough (the sum of d eigenvalues <= sqrt(d) * Frobenius norm), and at least doubles; from a quarter of the
    matrix on, LAPACK's decomposition of all of it (float32) is cheaper.

    `python -m bench.pca_refit` measures both for n = 4096 and d = 512. One 2.6 GHz core took at most 2.4 s of CPU, and
    the vectors captured 0.99999, 0.9990 and 0.989 of the exact solver's variance where the k-th eigenvalue falls as
    k^-2, k^-1 and k^-0.5 (the last is nearly noise). With a threshold, 235 components took 2.1 s, and those that end in
    the full decomposition (1072, 2681) 13 to 17 s.

    Args:
        matrix: (n, n), only the lower triangle is read; Fortran order saves a copy.
        n_components: number wanted; or
        loss_threshold: share of the trace that may be missing (`count_components`).
    Raises:
        FloatingPointError: the trace is not finite.
        numpy.linalg.LinAlgError: LAPACK did not converge.
    Returns:
        (eigenvalues of shape (d,), descending; eigenvectors of shape (n, d)); fewer than n_components where
        the rest is zero within RANK_TOLERANCE, one zero vector where the whole matrix is zero.
    Cost: exact about 9 n^3 flops; else 2 n^2 b per pass, at most MAX_PASSES of them, b = 1.25 d.
    """
    n = len(matrix)
    total = float(np.trace(matrix, dtype=np.float64))
    if not math.isfinite(total):
        raise FloatingPointError("the trace is not finite")
    if total <= 0:
        return np.zeros(1), np.zeros((n, 1), matrix.dtype)

    def cut(values: Float64, vectors: npt.NDArray[Any]) -> tuple[Float64, npt.NDArray[Any]] | None:
        if loss_threshold is None:
            d: int | None = min(n_components or n, int((values > RANK_TOLERANCE * values[0]).sum()))
        else:
            d = count_components(values, total, loss_threshold)
        return None if d is None else (values[:d], vectors[:, :d])

    if n > EXACT_SIZE:
        wanted = n_components
        if wanted is None:
            assert loss_threshold is not None
            frobenius_sq = 2 * float(np.square(scipy.linalg.norm(np.tril(matrix, -1), check_finite=False)))
            frobenius_sq += float(np.square(matrix.diagonal(), dtype=np.float64).sum())
            wanted = max(64, int(((1 - loss_threshold) * total) ** 2 / frobenius_sq))
        start: Float32 | None = None
        while 4 * wanted < n:
            values, start = _subspace_iteration(matrix, wanted, start, np.random.default_rng(seed))
            found = cut(values, start)
            if found is not None:
                return found
            assert loss_threshold is not None
            missing = (1 - loss_threshold) * total - float(values.sum())
            wanted = max(2 * wanted, wanted + int(missing / values[-1]))  # no later eigenvalue exceeds the last
        values, vectors = scipy.linalg.eigh(
            matrix.astype(np.float32), driver="evd", overwrite_a=True, check_finite=False
        )
        values = values.astype(np.float64)
    else:
        values, vectors = np.linalg.eigh(matrix.astype(np.float64), UPLO="L")
    total = min(total, float(np.cumsum(values[::-1])[-1]))  # the trace may be larger by rounding, and λ = 0 ask for it
    found = cut(values[::-1], vectors[:, ::-1])
    assert found is not None
    return found


def _subspace_iteration(
    matrix: npt.NDArray[Any], count: int, start: Float32 | None, generator: np.random.Generator
) -> tuple[Float64, Float32]:
    """Ritz pairs of the leading `count` eigenvectors, iterated from `start` and random columns.

    Ends when a pass adds less than CONVERGED to the captured variance, or after MAX_PASSES.
    """
    n = len(matrix)
    a = np.asfortranarray(matrix, np.float32)
    random = generator.standard_normal((n, min(n, int(count * (1 + OVERSAMPLING)) + 8)), np.float32)
    if start is not None:
        random[:, : start.shape[1]] = start
    block = blas.ssymm(1.0, a, np.asfortranarray(random), lower=1)
    captured = 0.0
    for step in range(MAX_PASSES):
        q, _ = scipy.linalg.qr(block, mode="economic", overwrite_a=True, check_finite=False)
        block = blas.ssymm(1.0, a, q, lower=1)
        values, rotation = np.linalg.eigh((q.T @ block).astype(np.float64))
        before, captured = captured, float(values[-count:].sum())
        if captured - before <= CONVERGED * captured or step == MAX_PASSES - 1:
            break
    leading = slice(-1, -count - 1, -1)
    return values[leading], q @ rotation[:, leading].astype(np.float32)


class GroupSamples:
    """The statistics of one group while sampling: samples, then the covariance once that is smaller.

    Args:
        owned: whether this rank fits the group. If not, samples are kept only where `rebuild` needs them.
    """

    def __init__(self, group: Group, config: PCAConfig, owned: bool = True) -> None:
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


@dataclass(frozen=True)
class LayerBasis:
    """What a layer is compressed with.

    Attributes:
        mean_: float32 of shape (length,), the mean of the worker-averaged gradient: µ/N.
        groups, bases: one Basis per group.
    """

    name: str
    length: int
    slice_size: int
    mean_: Float32
    groups: tuple[Group, ...]
    bases: tuple[Basis, ...]

    @property
    def payload_bytes(self) -> int:
        return sum(4 * g.num_slices * len(b.components_) for g, b in zip(self.groups, self.bases, strict=True))

    @property
    def ratio(self) -> float:
        """Uncompressed bytes / bytes on the wire."""
        return 4 * self.length / self.payload_bytes

    @property
    def in_sample_loss(self) -> float:
        """Variance lost / variance, over the sampled slices of all groups."""
        total = sum(basis.total_variance_ for basis in self.bases)
        return sum(b.in_sample_loss * b.total_variance_ for b in self.bases) / total if total > 0 else 0.0

    @property
    def digest(self) -> str:
        """Hash of shapes, bases and µ: equal on two ranks if and only if they encode and decode alike."""
        digest = hashlib.blake2b(f"{self.length} {self.slice_size}".encode(), digest_size=8)
        digest.update(self.mean_.tobytes())
        for group, basis in zip(self.groups, self.bases, strict=True):
            digest.update(f"{group.start} {group.stop} {len(basis.components_)}".encode())
            digest.update(basis.components_.tobytes())
        return digest.hexdigest()


class PCASampler:
    """Samples, fits and shares the bases of all compressed layers; the caller does the communication.

        sampler.add(vector)                                  # in each sampling iteration
        dims = sampler.fit()                                 # the rank's own groups
        ring.all_reduce(dims)                                # a few hundred bytes; then look at sampler.failures(dims)
        buffer, bounds = sampler.share(dims)
        ring.all_gather(buffer, bounds)
        bases = sampler.rebuild(dims, buffer)                # the same bits on every rank

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
            by_name[block.name] = gradient = vector[block.offset : block.stop]
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
        """Where each group is in the shared buffer, and the segments, each its owner's in an all-gather."""
        widths = [held.count if held.weights else held.group.slice_size for held in self.groups]
        lengths = [1 + int(d) * (1 + width) for d, width in zip(dims, widths, strict=True)]
        places, bounds, offset = [slice(0)] * len(lengths), [0], 0
        for segment in range(self.size):
            for i, owner in enumerate(self.owners):
                if owned_segment(owner, self.size) == segment:
                    places[i] = slice(offset, offset + lengths[i])
                    offset += lengths[i]
            bounds.append(offset)
        return places, bounds

    def share(self, dims: Float64) -> tuple[Float32, list[int]]:
        """The buffer to all-gather, this rank's segment filled, and the bounds of the segments.

        Args:
            dims: d of all groups.
        Bytes: 4 per float, and per group 1 + d + d·S floats of weights, or 1 + d + d·K of a basis.
        """
        places, bounds = self._places(dims)
        buffer = np.zeros(bounds[-1], np.float32)
        for i, fit in self._fits.items():
            buffer[places[i]] = np.concatenate([[fit.total_variance], fit.explained_variance, fit.shared.ravel()])
        return buffer, bounds

    def rebuild(self, dims: Float64, buffer: Float32) -> list[LayerBasis]:
        """The bases of all layers from the gathered buffer, in the layers' order."""
        places, _ = self._places(dims)
        built: dict[str, list[tuple[Group, Basis]]] = {block.name: [] for block in self.layers}
        for held, place, d in zip(self.groups, places, dims.astype(int).tolist(), strict=True):
            part = buffer[place]
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
