"""PCA of gradient slices (Yu et al. 2018): what to fit (`config`), samples (`sampling`), eigenvectors (`solvers`), bases
(`basis`), projecting on them (`projection`), and the windows of sampled and compressed iterations (`schedule`,
`window_log`)."""

from gradiveq.pca.basis import Basis, LayerBasis
from gradiveq.pca.config import (
    DEFAULT_LOSS_THRESHOLD,
    EXACT_SIZE,
    Float32,
    Float64,
    PCAConfig,
    SliceGroup,
    check_components,
    groups,
    held_bytes,
)
from gradiveq.pca.sampling import GroupSamples, PCASampler, is_stable

__all__ = [
    "DEFAULT_LOSS_THRESHOLD",
    "EXACT_SIZE",
    "Basis",
    "Float32",
    "Float64",
    "GroupSamples",
    "LayerBasis",
    "PCAConfig",
    "PCASampler",
    "SliceGroup",
    "check_components",
    "groups",
    "held_bytes",
    "is_stable",
]
