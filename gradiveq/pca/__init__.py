"""PCA of gradient slices (Yu et al. 2018).

config        what to fit, and groups of slices          projection    projecting a layer on its bases
sampling      samples, fits, what is shared of them      coding        a vector of which layers are projected
solvers       leading eigenvectors                       schedule      when to sample and when to compress
basis         what a fit finds                           window_log    what is known of each window
loss          ‖ĝ - g‖² / ‖g‖²
"""

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
