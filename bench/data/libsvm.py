"""Points with labels -1 and 1 from LIBSVM files, for logistic regression; points like madelon's where it isn't given.

Madelon is itself made: 32 clusters at the corners of a hypercube in 5 dimensions, 16 for each class, 5 features that
are linear combinations of those, 10 that repeat one of these 10, and 480 of noise (Guyon 2003, "Design of experiments
for the NIPS 2003 variable selection benchmark"). Her generator is `sklearn.datasets.make_classification`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bench.data.files import reading
from bench.data.share import DataError

Float64 = npt.NDArray[np.float64]


class Published(NamedTuple):
    """A LIBSVM file's size as published."""

    points: int
    features: int


KNOWN = {"madelon": Published(2_000, 500), "gisette": Published(6_000, 5_000)}

#: Mean of madelon's features, and the bounds of its noise features' standard deviations: what the made one is scaled
#: to, as the paper's step 1/L depends on the raw features, above all on their mean.
MADELON_MEAN = 488
MADELON_SCALES = (0.6, 44.0)
MADELON_RANGE = (0, 999)


def load_libsvm(path: str | os.PathLike[str] | None = None, name: str = "madelon") -> tuple[Float64, Float64, str]:
    """Read points, or make such as madelon's.

    Args:
        path: of a LIBSVM file, "label index:value …" with indices from 1 on; compressed if it ends in .gz, .bz2 or
            .xz. None for points that are made here, which only "madelon" has.
        name: the name of the data set; "madelon" and "gisette" have a known number of features.
    Returns:
        Features, float64 of shape (N, d), as they are in the file; labels, float64 of shape (N,), -1 or 1; and what
        exactly they are, for people.
    Raises:
        DataError: one line, where the file is missing, damaged, or not what `name` says.
    """
    if path is None:
        if name != "madelon":
            raise DataError(f"{name}: give the path of its LIBSVM file; only madelon can be made where it isn't there")
        return make_madelon()
    path = Path(path)
    features, labels = _read(path, KNOWN[name].features if name in KNOWN else None)
    found = sorted(set(labels.tolist()))
    if found != [-1, 1]:
        raise DataError(f"{path}: labels {', '.join(f'{label:g}' for label in found[:5])}, expected -1 and 1")
    if not np.isfinite(features).all():
        row, column = np.argwhere(~np.isfinite(features))[0]
        raise DataError(f"{path}: {features[row, column]} in line {row + 1:,}, feature {column + 1:,}")
    points = f"{len(labels):,} points"
    if name in KNOWN and len(labels) != KNOWN[name].points:
        points += f", published are {KNOWN[name].points:,}"
    return features, labels, f"{name} ({points}; {features.shape[1]:,} raw features)"


def make_madelon(seed: int = 0) -> tuple[Float64, Float64, str]:
    """Points from madelon's generator with its published parameters, scaled like it; returns what `load_libsvm` does.

    Standardised features are scaled by factors between those of madelon's noise features, moved to its mean, rounded
    and cut to its range of integers. The result is not madelon: its corners, combinations and noise are drawn anew.
    """
    from sklearn.datasets import make_classification  # half a second that nothing else needs

    num_points, num_features = KNOWN["madelon"]
    features, classes = make_classification(
        n_samples=num_points,
        n_features=num_features,
        n_informative=5,
        n_redundant=5,
        n_repeated=10,
        n_classes=2,
        n_clusters_per_class=16,
        flip_y=0.01,
        class_sep=2.0,
        shift=0.0,
        scale=1.0,
        random_state=seed,
    )
    scales = np.random.RandomState(seed).uniform(*MADELON_SCALES, num_features)
    integers = np.clip(np.rint(MADELON_MEAN + scales * features), *MADELON_RANGE)
    source = f"made like madelon by its generator (seed {seed}; {num_points:,} points, {num_features} features), not it"
    return integers, np.where(classes == 1, 1.0, -1.0), source


def _read(path: Path, num_features: int | None) -> tuple[Float64, Float64]:
    from sklearn.datasets import load_svmlight_file

    if not path.is_file():
        raise DataError(f"{path}: no such file, expected one in LIBSVM form")
    with reading(path) as stream:
        try:
            matrix, labels = load_svmlight_file(stream, n_features=num_features, zero_based=False)
        except (ValueError, OverflowError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{path}: not in LIBSVM form ({reason})") from error
    if not len(labels):
        raise DataError(f"{path}: no points, expected at least 2")
    return np.ascontiguousarray(matrix.toarray(), np.float64), np.asarray(labels, np.float64)
