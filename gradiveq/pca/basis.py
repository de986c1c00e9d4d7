"""What a fit finds: the basis of a group of slices, and the bases of a layer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradiveq.pca.config import Float32, SliceGroup


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
    groups: tuple[SliceGroup, ...]
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


def basis_state(basis: LayerBasis) -> dict[str, Any]:
    """The basis as dicts, lists, numbers and NumPy arrays; copies."""
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


def basis_from(state: Mapping[str, Any]) -> LayerBasis:
    """The basis of which `basis_state` told."""
    return LayerBasis(
        state["name"],
        state["length"],
        state["slice_size"],
        np.array(state["mean"]),
        tuple(SliceGroup(state["name"], part["start"], part["stop"], state["slice_size"]) for part in state["groups"]),
        tuple(
            Basis(np.array(part["components"]), np.array(part["explained_variance"]), part["total_variance"])
            for part in state["groups"]
        ),
    )
