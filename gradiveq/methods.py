"""The methods that an `Aggregator` can use, as hyper-parameters only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from gradiveq.arrays.levels import Norm, check_format
from gradiveq.checks import at_least, is_number
from gradiveq.compressors.base import Compressor
from gradiveq.compressors.threshold import Threshold
from gradiveq.exchange.critical_regimes import check as check_regimes
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.exchange.parts import Override, Part, group_parts, layer_parts, model_parts
from gradiveq.flatten import Block
from gradiveq.noise import BLOCK as NOISE_BLOCK
from gradiveq.pca.config import PCAConfig
from gradiveq.powersgd import PowerSGD


@dataclass(frozen=True)
class Plain:
    """Plain ring all-reduce: nothing is compressed."""

    name: ClassVar[str] = "rar"


@dataclass(frozen=True)
class QSGDRing:
    """QSGD at every hop of the ring (Fig. 2a of Yu et al. 2018), on the whole gradient vector.

    Attributes:
        bits, bucket, norm: see `gradiveq.over_ring.qsgd.QSGD`.
        pipelined: cut segments into chunks, so that a hop quantises one while the next arrives; False for one chunk a
            segment, as in the paper.
    Raises:
        ValueError: a value is out of its range.
    """

    bits: int = 4
    bucket: int = 512
    norm: Norm = "max"
    pipelined: bool = True

    name: ClassVar[str] = "qsgd"

    def __post_init__(self) -> None:
        check_format(self.bits, self.bucket, self.norm)


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
        error_feedback: whether each worker adds what its bases leave out to its next gradient; it is sent in the next
            sampling iteration.
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
    error_feedback: bool = False

    name: ClassVar[str] = "gradiveq"

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_threshold", self.pca.loss_threshold)
        at_least("warmup", self.warmup, 0)
        at_least("holdout_every", self.holdout_every, 0)
        at_least("max_sample", self.max_sample, 2, ", as PCA needs 2 samples")
        if self.sample != "auto":
            at_least("sample", self.sample, 2, ", as PCA needs 2 samples, or 'auto'")
        elif self.loss_threshold is None:
            fixed = "n_components" if self.ratio is None else "ratio"
            raise ValueError(f"sample='auto' waits for a stable number of components, which `{fixed}` fixes already")
        if self.compress != "auto":
            at_least("compress", self.compress, 1, " or 'auto'")
        if not isinstance(self.sampling, QSGDRing | Plain):
            raise ValueError(f"`sampling` must be QSGDRing(...) or Plain(), got {self.sampling!r}")
        if not (is_number(self.stop_multiple) and self.stop_multiple > 1):
            raise ValueError(f"`stop_multiple` must be above 1, the window's first loss, got {self.stop_multiple!r}")

    @property
    def most_samples(self) -> int:
        """Lt, or how many it may be with sample="auto"."""
        return self.max_sample if self.sample == "auto" else self.sample

    @property
    def pca(self) -> PCAConfig:
        """What the fit needs to know."""
        return PCAConfig(
            self.slice_size, self.reuse, self.fit_slices, self.loss_threshold, self.n_components, self.ratio
        )


@dataclass(frozen=True)
class Compressed:
    """A compressor of `gradiveq.compressors` at every worker, summed or gathered as it says.

    Attributes:
        compressor: Q_W.
        granularity: what it is applied to at once: each "layer", the entire "model", or groups of layers, given as
            patterns (`gradiveq.exchange.parts`); layers that are in no group are parts of their own.
        overrides: (pattern, compressor) for layers that have another one.
        feedback: error feedback, or None.
        master: Q_M, which compresses the mean on its way back (Algorithm 1 of Dutta et al. 2020), or None. It is
            applied to the same parts, those with an override included.
    Raises:
        TypeError, ValueError: a value is none, or contradicts another.
    """

    compressor: Compressor
    granularity: Literal["layer", "model"] | tuple[str, ...] = "layer"
    overrides: tuple[Override, ...] = ()
    feedback: ErrorFeedback | None = None
    master: Compressor | None = None

    name: ClassVar[str] = "compressed"

    def __post_init__(self) -> None:
        compressors = [self.compressor, *(compressor for _, compressor in self.overrides)]
        for what, value in (*(("compressor", one) for one in compressors), ("master", self.master)):
            if not isinstance(value, Compressor) and not (what == "master" and value is None):
                raise TypeError(f"`{what}` must be a Compressor, got {value!r}")
        if isinstance(self.granularity, str):
            if self.granularity not in ("layer", "model"):
                raise ValueError(
                    f"`granularity` must be 'layer', 'model' or a tuple of patterns, got {self.granularity!r}"
                )
        elif not self.granularity:
            raise ValueError("`granularity` must be 'layer', 'model' or at least one pattern, got none")
        if self.granularity == "model" and self.overrides:
            raise ValueError(
                f"`overrides` must be empty with granularity 'model', where no layer is apart; 'layer' fits, or "
                f"groups; got {self.overrides[0][0]!r}"
            )
        for compressor in compressors:
            if not takes_mean(compressor):
                vote = f"{compressor.name} makes something else than the mean of what it sends (a majority)"
                if self.feedback is not None:
                    raise ValueError(
                        f"{vote}, so what a worker leaves out isn't what the mean lacks: no `feedback` fits it. "
                        "sign:scaled and others whose results are means have one"
                    )
                if self.master is not None:
                    raise ValueError(
                        f"{vote}, which is a master's compression of its own: no `master` fits it. sign:mean^sign is "
                        "Algorithm 1 with signs both ways"
                    )

    @property
    def groups(self) -> tuple[str, ...]:
        """Layers that have to stand together in the layout."""
        return () if isinstance(self.granularity, str) else self.granularity

    def parts(self, blocks: Sequence[Block]) -> list[Part]:
        """What is compressed at once, of a layout that was made with `groups`.

        Raises:
            ValueError: a pattern doesn't fit the layers.
        """
        if self.granularity == "layer":
            return layer_parts(blocks, self.compressor, self.overrides)
        if self.granularity == "model":
            return model_parts(blocks, self.compressor)
        return group_parts(blocks, self.compressor, self.groups, self.overrides)


def takes_mean(compressor: Compressor) -> bool:
    """Whether the workers' estimates are averaged in the end, as most are, and not voted on."""
    total = np.array([2, -1, 0], np.float32)
    compressor.finish(total, 2)
    return bool((total == [1, -0.5, 0]).all())


@dataclass(frozen=True)
class Accordion:
    """Two settings of a method, and each layer by the one or the other (`gradiveq.exchange.critical_regimes`).

    Attributes:
        low: the low compression, for critical regimes.
        high: the high compression, for the others.
        interval, window, eta: of `gradiveq.exchange.critical_regimes.CriticalRegimes`. In the paper an interval is 10
            epochs and its window 1; the default is as many iterations of CIFAR at a batch of 2,048, as in Sahu et al.
            2021. A window of None is a tenth of the interval.
    Raises:
        TypeError, ValueError: a value is out of its range, or the settings differ in more than the compression.
    """

    low: Compressed | PowerSGD
    high: Compressed | PowerSGD
    interval: int = 244
    window: int | None = None
    eta: float = 0.5

    name: ClassVar[str] = "accordion"

    def __post_init__(self) -> None:
        check_regimes(self.interval, self.window, self.eta)
        if self.window is None:
            object.__setattr__(self, "window", max(1, self.interval // 10))
        common: tuple[str, ...]
        match self.low, self.high:
            case PowerSGD() as low, PowerSGD() as high:
                common = ("error_feedback", "warm_start", "min_compression_rate")
                if low.rank <= high.rank:
                    raise ValueError(f"`low` must have the larger rank, got {low.rank} and {high.rank}")
            case Compressed(), Compressed():
                common = ("granularity", "feedback", "master")
            case _:
                raise TypeError(f"`low` and `high` must both be Compressed or both PowerSGD, got {self.low, self.high}")
        for field_name in common:
            values = getattr(self.low, field_name), getattr(self.high, field_name)
            if values[0] != values[1]:
                raise ValueError(
                    f"`{field_name}` must be the same in both settings, got {values[0]!r} and {values[1]!r}"
                )


@dataclass(frozen=True)
class AutoThreshold:
    """Hard-threshold whose threshold follows from a number of elements, as if top-k had to be beaten.

    Attributes:
        formula: "auto": λ ~ 2/√k·sqrt((2d/k + M)ζ² + σ²), after a warm-up without compression whose noise is measured
            (`gradiveq.noise`); "simple": 1/(2√k), at once. k is of the whole model: one λ for all layers.
        ratio, count: k/d or k, one of them; by default a ratio of 0.001, as in the paper's comparison.
        warmup: uncompressed iterations with "auto"; at least 20, of which 30 or more to tell M.
        applied: how; its compressor gives way to hard-threshold with λ.
    Raises:
        ValueError: a value is out of its range, or contradicts another.
    """

    formula: Literal["auto", "simple"] = "auto"
    ratio: float | None = None
    count: int | None = None
    warmup: int = 100
    applied: Compressed = field(default_factory=lambda: Compressed(Threshold()))

    name: ClassVar[str] = "auto-threshold"

    def __post_init__(self) -> None:
        if self.formula not in ("auto", "simple"):
            raise ValueError(f"`formula` must be 'auto' or 'simple', got {self.formula!r}")
        if self.ratio is not None and self.count is not None:
            raise ValueError(f"k is said by `ratio` or `count`, not both, got {self.ratio} and {self.count}")
        if self.ratio is None and self.count is None:
            object.__setattr__(self, "ratio", 0.001)
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"`ratio` must be above 0 and at most 1, got {self.ratio}")
        if self.count is not None:
            at_least("count", self.count, 1)
        at_least("warmup", self.warmup, 2 * NOISE_BLOCK, f" (two blocks of {NOISE_BLOCK})")
        if not isinstance(self.applied, Compressed):
            raise TypeError(f"`applied` must be Compressed, got {self.applied!r}")

    def num_kept(self, length: int) -> int:
        """k of a vector of `length` elements.

        Raises:
            ValueError: it has not as many.
        """
        if self.count is None:
            assert self.ratio is not None
            return max(1, round(self.ratio * length))
        if self.count > length:
            raise ValueError(f"`count` must be at most {length} (the elements of the gradient), got {self.count}")
        return self.count

    def compressed(self, threshold: float) -> Compressed:
        """The method with λ, once it is known."""
        return replace(self.applied, compressor=Threshold(threshold))


Method = Plain | QSGDRing | GradiVeQ | Compressed | PowerSGD | Accordion | AutoThreshold


def applied(method: Method) -> Compressed | None:
    """How a method applies compressors (where, with which feedback), if it does."""
    match method:
        case Compressed():
            return method
        case Accordion(low=Compressed() as low):
            return low
        case AutoThreshold():
            return method.applied
    return None


#: name -> class, of those that are no compressor and no policy for one.
METHODS: dict[str, type[Plain] | type[QSGDRing] | type[GradiVeQ] | type[PowerSGD]] = {
    method.name: method for method in (Plain, QSGDRing, GradiVeQ, PowerSGD)
}
