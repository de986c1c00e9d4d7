"""The methods that an `Aggregator` can use, as hyper-parameters only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from gradiveq.pca import PCAConfig
from gradiveq.qsgd import QSGD, Norm


@dataclass(frozen=True)
class Plain:
    """Plain ring all-reduce: nothing is compressed."""

    name: ClassVar[str] = "rar"


@dataclass(frozen=True)
class QSGDRing:
    """QSGD at every hop of the ring (Fig. 2a of Yu et al. 2018), on the whole gradient vector.

    Attributes:
        bits, bucket, norm: see `gradiveq.qsgd.QSGD`.
        pipelined: cut segments into chunks, so that a hop quantises one while the next arrives; False for one chunk a
            segment, as in the paper.
    """

    bits: int = 4
    bucket: int = 512
    norm: Norm = "max"
    pipelined: bool = True

    name: ClassVar[str] = "qsgd"

    def __post_init__(self) -> None:
        self.codec()  # which checks the values

    def codec(self, seed: int = 0, call: int = 0) -> QSGD:
        """The codec of one all-reduce; the random numbers depend on both arguments."""
        return QSGD(self.bits, self.bucket, self.norm, seed, call)


@dataclass(frozen=True)
class GradiVeQ:
    """After a warm-up, windows of sampling iterations and iterations compressed by PCA (section 3 of Yu et al. 2018).

    Defaults are the paper's, where it gives a value.

    Attributes:
        warmup: uncompressed iterations at the beginning.
        sample: Lt, sampling iterations in each window; "auto" to sample until the number of components is stable.
        compress: Lc, compressed iterations in each window; "auto" to go on until most workers find the loss too large.
        sampling: how gradients travel while sampling.
        slice_size, reuse, fit_slices, loss_threshold, n_components, ratio: see `gradiveq.pca.PCAConfig`. One of the
            last three decides; with none of them, a loss threshold of 0.01.
        holdout_every: measure the held-out loss in the first of each so many compressed iterations, by an exact
            all-reduce of the same gradients beside the compressed one; 0 for never.
        max_sample: most sampling iterations in a window with sample="auto".
        stop_multiple: with compress="auto", a worker votes to end the window when its relative local loss (Eq. 7)
            exceeds so many times that of the window's first compressed iteration.
    Raises:
        ValueError: if a value is out of its range, or contradicts another.
    """

    warmup: int = 2500
    sample: int | Literal["auto"] = 100
    compress: int | Literal["auto"] = 400
    sampling: QSGDRing | Plain = field(default_factory=QSGDRing)
    slice_size: int | None = None
    reuse: float = math.inf
    fit_slices: Literal["first", "all"] = "first"
    loss_threshold: float | None = None
    n_components: int | None = None
    ratio: float | None = None
    holdout_every: int = 50
    max_sample: int = 400
    stop_multiple: float = 2.0

    name: ClassVar[str] = "gradiveq"

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_threshold", self.pca.loss_threshold)
        _at_least("warmup", self.warmup, 0)
        _at_least("holdout_every", self.holdout_every, 0)
        _at_least("max_sample", self.max_sample, 2, ", as PCA needs 2 samples")
        if self.sample != "auto":
            _at_least("sample", self.sample, 2, ", as PCA needs 2 samples, or 'auto'")
        elif self.loss_threshold is None:
            fixed = "n_components" if self.ratio is None else "ratio"
            raise ValueError(f"sample='auto' waits for a stable number of components, which `{fixed}` fixes already")
        if self.compress != "auto":
            _at_least("compress", self.compress, 1, " or 'auto'")
        if not isinstance(self.sampling, QSGDRing | Plain):
            raise ValueError(f"`sampling` must be QSGDRing(...) or Plain(), got {self.sampling!r}")
        if not self.stop_multiple > 1:
            raise ValueError(f"`stop_multiple` must be above 1, the window's first loss, got {self.stop_multiple}")

    @property
    def pca(self) -> PCAConfig:
        """What the fit needs to know."""
        return PCAConfig(
            self.slice_size, self.reuse, self.fit_slices, self.loss_threshold, self.n_components, self.ratio
        )  # fmt: skip


Method = Plain | QSGDRing | GradiVeQ

#: name -> class.
METHODS: dict[str, type[Plain] | type[QSGDRing] | type[GradiVeQ]] = {
    method.name: method for method in (Plain, QSGDRing, GradiVeQ)
}


def _at_least(name: str, value: object, bound: int, remark: str = "") -> None:
    if not isinstance(value, int) or value < bound:
        raise ValueError(f"`{name}` must be a whole number of at least {bound}{remark}, got {value!r}")
