"""What the three methods cost on a described cluster, from a model's sizes alone (`ring.dry`)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from bench.models import MODELS
from gradiveq.flatten import Block, Layout, slice_sizes
from gradiveq.methods import QSGDRing
from gradiveq.over_ring.aggregator import CONTROLS
from gradiveq.over_ring.pca_codec import gradient_sizes
from gradiveq.over_ring.qsgd import QSGD
from gradiveq.pca import PCAConfig
from ring import dry
from ring.cluster import Cluster, ClusterError
from ring.codec import Codec, Composite, IdentityCodec
from ring.plan import CHUNK_BYTES

#: Kinds of all-reduces of the gradient: plain, quantised, compressed by PCA.
PHASES = ("rar", "qsgd", "compress")
METHODS = ("rar", "qsgd", "gradiveq")
FLOAT32 = np.dtype(np.float32)

DryRun = Callable[..., dry.Estimate]


@dataclass(frozen=True)
class Gradient:
    """A model's gradient as an `Aggregator` sends it.

    Attributes:
        blocks: blocks of the model's layout.
        ratio: K/d of GradiVeQ's compressed iterations.
        sample, compress: Lt and Lc.
        qsgd: how QSGD, and GradiVeQ while sampling, send it.
    """

    blocks: Sequence[Block]
    ratio: float = 8.0
    sample: int = 100
    compress: int = 400
    qsgd: QSGDRing = field(default_factory=QSGDRing)

    @classmethod
    def of(cls, model: nn.Module, ratio: float = 8.0, qsgd: QSGDRing | None = None) -> Gradient:
        return cls(Layout(model).blocks, ratio, qsgd=qsgd or QSGDRing())

    @property
    def length(self) -> int:
        """Elements of the vector, control values included."""
        return self.blocks[-1].stop + CONTROLS

    def codec(self, phase: str) -> tuple[Codec, int]:
        """What encodes it, and the most bytes of a message; as in `Aggregator`."""
        if phase == "rar":
            return IdentityCodec(), CHUNK_BYTES
        if phase == "compress":
            return gradient_sizes(self.blocks, PCAConfig(ratio=self.ratio), CONTROLS), CHUNK_BYTES
        quantised = Composite([(self.length - CONTROLS, QSGD.of(self.qsgd)), (CONTROLS, IdentityCodec())])
        return quantised, CHUNK_BYTES if self.qsgd.pipelined else sys.maxsize

    def payload_bytes(self, phase: str) -> int:
        """The payload of the whole vector, in bytes; each rank sends 2(N-1)/N times as much."""
        return sum(region.num_bytes for region in self.codec(phase)[0].regions(self.length, FLOAT32))

    @property
    def basis_bytes(self) -> int:
        """What the ranks gather once per window if each fits a share of the bases (`gradiveq.pca.PCASampler.share`)."""
        floats = 0
        for name, k in slice_sizes(self.blocks).items():
            d = PCAConfig(ratio=self.ratio).wanted_components(k)
            assert d is not None, name
            floats += 1 + d + d * k
        return 4 * floats

    def aggregation(self, cluster: Cluster, phase: str, run: DryRun = dry.all_reduce) -> dry.Estimate:
        """One all-reduce of it.

        Args:
            run: `ring.dry.all_reduce`, or its closed form.
        Raises:
            ClusterError: the cluster has no rate for something that is computed.
        """
        codec, chunk_bytes = self.codec(phase)
        return run(cluster, codec, self.length, op="mean", chunk_bytes=chunk_bytes)

    def share_s(self, cluster: Cluster, run: DryRun = dry.all_reduce) -> float:
        """Seconds to gather the bases, once per window: half of an all-reduce of as many bytes without its adds."""
        gathering = dataclasses.replace(cluster, rates={**cluster.rates, "add": sys.float_info.max})
        return run(gathering, IdentityCodec(), self.basis_bytes // 4).time_s / 2

    def aggregation_s(self, cluster: Cluster, run: DryRun = dry.all_reduce, *, share: bool = True) -> dict[str, float]:
        """Seconds per iteration that each method takes to aggregate, GradiVeQ's as the mean over a window.

        Args:
            share: count the gathering of the bases. The processor time of their fit is not in it: clusters have no rate
                for that.
        """
        each = {phase: self.aggregation(cluster, phase, run).time_s for phase in PHASES}
        window = self.sample * each["qsgd"] + self.compress * each["compress"]
        if share:
            window += self.share_s(cluster, run)
        return {"rar": each["rar"], "qsgd": each["qsgd"], "gradiveq": window / (self.sample + self.compress)}


def iteration_s(cluster: Cluster) -> float:
    """Seconds of forward, backward and update; longer where nodes share cores, as all compute at the same time.

    Raises:
        ClusterError: the cluster doesn't say.
    """
    if cluster.node.iteration_s is None:
        raise ClusterError(
            f"cluster {cluster.name} doesn't say what an iteration computes: `node.iteration_s` is missing"
        )
    crowd = max(1.0, cluster.nodes / (cluster.shared_cores or cluster.nodes))
    return cluster.node.iteration_s * cluster.node.slowdown * crowd


def build(model: str, num_classes: int = 100) -> nn.Module:
    """One of `bench.models`.

    Raises:
        ValueError: there is none of that name.
    """
    if model not in MODELS:
        raise ValueError(f"`model` must be one of {', '.join(MODELS)}, got {model!r}")
    return MODELS[model](num_classes)
