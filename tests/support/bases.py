"""Bases for `PCACodec`."""

from __future__ import annotations

from functools import cache

import numpy as np

from gradiveq.flatten import Block
from gradiveq.pca import LayerBasis, PCAConfig, PCASampler


@cache
def fitted(length: int, fit_slices: str) -> LayerBasis:
    """A basis by PCA of slices of 20 elements in groups of 2, the last slice shorter than the others."""
    block = Block("conv", 0, length, (1, 1, length), True)
    k = min(20, length)
    sampler = PCASampler([block], {"conv": k}, PCAConfig(k, 2, fit_slices, loss_threshold=0.3), 0, 1)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    for _ in range(12):
        sampler.add((0.5 + rng.standard_normal((1, 4)) @ rng.standard_normal((4, length))).ravel().astype(np.float32))
    dims = sampler.fit()
    (basis,) = sampler.rebuild(dims, [sampler.share(dims)[0]])
    return basis
