"""What travels on the shaped hosts: a vector of float32 as it is, quantised, or projected onto a basis."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gradiveq.over_ring.pca_codec import PCACodec
from gradiveq.over_ring.qsgd import QSGD
from gradiveq.pca import Basis, LayerBasis, SliceGroup
from ring.codec import Codec, IdentityCodec

#: K and d of the linear codec: ratio 8.
SLICE_SIZE, COMPONENTS = 256, 32


def linear(length: int) -> PCACodec:
    """GradiVeQ's codec for a whole vector as one layer; its axes are random, as its cost doesn't depend on them."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((SLICE_SIZE, COMPONENTS)))[0].T
    basis = Basis(np.ascontiguousarray(axes, np.float32), np.ones(COMPONENTS, np.float32), float(COMPONENTS))
    group = SliceGroup("vector", 0, length, SLICE_SIZE)
    return PCACodec(LayerBasis("vector", length, SLICE_SIZE, np.zeros(length, np.float32), (group,), (basis,)))


METHODS: dict[str, Callable[[int], Codec]] = {
    "rar": lambda length: IdentityCodec(),
    "qsgd": lambda length: QSGD(),
    "linear": linear,
}
