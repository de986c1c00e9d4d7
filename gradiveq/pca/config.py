"""How bases are fitted: hyper-parameters, groups of slices, who fits which group, and what that takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from gradiveq.checks import at_least, is_number

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

DEFAULT_LOSS_THRESHOLD = 0.01
#: Size of a matrix, in rows, up to which it is decomposed exactly.
EXACT_SIZE = 1024
#: Rows that a group collects before it adds them to its covariance: enough for the matrix product to be efficient.
BLOCK_ROWS = 256


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
class SliceGroup:
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


def groups(layer: str, length: int, slice_size: int, reuse: float | None = None) -> tuple[SliceGroup, ...]:
    """The groups of `reuse` slices of a layer of `length` elements; the last may have fewer."""
    step = length if reuse is None or reuse == math.inf else int(reuse) * slice_size
    return tuple(SliceGroup(layer, start, min(start + step, length), slice_size) for start in range(0, length, step))


def rows_per_sample(group: SliceGroup, config: PCAConfig) -> int:
    return 1 if config.fit_slices == "first" else group.num_slices


def check_components(group: SliceGroup, samples: int, config: PCAConfig) -> None:
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


def held_bytes(group: SliceGroup, samples: int, config: PCAConfig, owned: bool = True) -> int:
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


def shared_floats(config: PCAConfig, components: int, slice_size: int, samples: int) -> int:
    """Floats that a group's owner shares: the variances, and the basis or the weights that make it from the samples."""
    weights = config.fit_slices == "first" and samples <= slice_size
    return 1 + components * (1 + (samples if weights else slice_size))
