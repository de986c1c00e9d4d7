"""One method on the side of training, layer by layer: losses, bytes, seconds (for `gradiveq.ddp.probing`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median

import torch

from gradiveq.arrays.float32 import Float32
from gradiveq.ddp.blocking import carry
from gradiveq.ddp.process_group import ProcessGroup
from gradiveq.exchange.families import make_family
from gradiveq.exchange.family import Family
from gradiveq.exchange.kernels import HOST
from gradiveq.exchange.requests import Call, Iteration
from gradiveq.exchange.windows import NOTHING_TO_COMPRESS, Windows
from gradiveq.flatten import Block, Bucket
from gradiveq.methods import Compressed, GradiVeQ, Plain
from gradiveq.pca.loss import Loss
from gradiveq.powersgd import PowerSGD

#: Iterations that no probe reaches.
NEVER = 10**9


@dataclass(frozen=True)
class LayerReport:
    """One method on one layer, or on all of them.

    Attributes:
        method: as it was given.
        layer: the parameter's name, or "all".
        elements: of the gradient.
        ratio: bytes of the gradient / bytes of one rank's payload; 1 where the method leaves the layer alone.
        held_out_loss: the mean over the held-out iterations.
        in_sample_loss: GradiVeQ's share of the samples' variance that is lost; None for others, and for "all".
        compress_s, decompress_s: the median of what it took on this machine, seconds. Of what is gathered, all ranks'
            payloads are decompressed.
        fit_s: to fit GradiVeQ's bases, by one rank; 0 for others.
    """

    method: str
    layer: str
    elements: int
    ratio: float
    held_out_loss: float
    in_sample_loss: float | None
    compress_s: float
    decompress_s: float
    fit_s: float


@dataclass
class _Seen:
    """What was measured of a layer."""

    losses: list[Loss] = field(default_factory=list)
    bytes_sent: list[int] = field(default_factory=list)
    compress_s: list[float] = field(default_factory=list)
    decompress_s: list[float] = field(default_factory=list)
    in_sample_loss: float | None = None
    fit_s: float = 0.0


class Mean:
    """Means over the ranks of a group, or of this process alone."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank, group.size)

    def __call__(self, values: Float32) -> Float32:
        if self.group is None:
            return values.copy()
        tensor = torch.from_numpy(values.copy()).to(self.group.device)
        self.group.all_reduce(tensor).wait()
        return (tensor / self.size).cpu().numpy()


class Trial:
    """One method on the side: a family for each layer, whose exchanges share their collectives.

    GradiVeQ's bases are of the sampled mean gradients, and it is linear: what training would get is what they make of
    the mean. So every rank does that by itself. PowerSGD's warm start follows the true gradients.

    Args:
        samples: mean gradients that GradiVeQ gets.
    Raises:
        ValueError: the method doesn't fit the layers.
    """

    def __init__(
        self,
        name: str,
        method: Compressed | PowerSGD | GradiVeQ,
        blocks: Sequence[Block],
        mean: Mean,
        seed: int,
        samples: int,
    ) -> None:
        self.name, self.blocks, self.mean = name, blocks, mean
        self.seen = {block.name: _Seen() for block in blocks}
        self._alone = isinstance(method, GradiVeQ)
        self._group = None if self._alone else mean.group
        self._rank, self._size = (0, 1) if self._group is None else (self._group.rank, self._group.size)
        self._buckets = [Bucket((replace(block, start=0),), block.length) for block in blocks]
        self._families: list[Family | None]  # None for layers that go as they are
        match method:
            case GradiVeQ():
                if not any(block.compressed for block in blocks):
                    raise ValueError(NOTHING_TO_COMPRESS)
                method = replace(
                    method,
                    warmup=0,
                    sample=samples,
                    compress=NEVER,
                    sampling=Plain(),
                    holdout_every=0,
                    max_sample=samples,
                    error_feedback=False,
                )
                self._families = [Windows(method, [block], 0, 1) if block.compressed else None for block in blocks]
            case Compressed():
                if method.granularity != "layer":
                    raise ValueError(f"a probe is of layers: `granularity` must be 'layer', got {method.granularity!r}")
                method = replace(method, feedback=None, master=None)
                parts = {part.name: part.compressor for part in method.parts(blocks)}
                self._families = [
                    make_family(
                        parts[block.name], [replace(block, start=0)], rank=self._rank, size=self._size, seed=seed
                    )
                    for block in blocks
                ]
            case PowerSGD():
                method = replace(method, error_feedback=False)
                self._families = [make_family(method, (), rank=0, size=1, seed=seed) for _ in blocks]

    def sample(self, average: Float32, number: int) -> None:
        """Take the mean gradient of an iteration that isn't measured."""
        if self._alone:
            self._exchange(average, number)

    def measure(self, own: Float32, average: Float32, number: int) -> None:
        """Compress this rank's gradient, and compare what training would get with the mean. Collective."""
        estimate = self._exchange(average if self._alone else own, number)
        for block in self.blocks:
            self.seen[block.name].losses.append(Loss.between(estimate[block.where], average[block.where]))

    def _exchange(self, gradient: Float32, number: int) -> Float32:
        """What training would get of it."""
        estimate = gradient.copy()
        chosen = [i for i, family in enumerate(self._families) if family is not None]
        calls = [
            Call(
                self._buckets[i],
                Iteration(number),
                HOST,
                self._rank,
                self._size,
                index=i,
                out=estimate[self.blocks[i].where],
            )
            for i in chosen
        ]
        families = [family for family in self._families if family is not None]
        gradients = [gradient[self.blocks[i].where] for i in chosen]
        exchanges = [one.exchange(call, own) for one, call, own in zip(families, calls, gradients, strict=True)]
        sampling = self._alone and families[0].phase == "sample"
        found = carry(exchanges, self._group, f"the probe of {self.name}", calls=calls, number=number)
        for place, (i, family, call) in enumerate(zip(chosen, families, calls, strict=True)):
            mean = found.means[place]
            if mean is not call.out:
                call.out[:] = mean
            following = family.accept(call.now)
            if following is not None:
                carry([following], self._group, f"the fit of {self.blocks[i].name}", number=number)
            if sampling:
                continue
            seen = self.seen[self.blocks[i].name]
            seen.compress_s.append(found.before_s[place])
            seen.decompress_s.append(found.after_s[place])
            seen.bytes_sent.append(found.sent[place])
            if isinstance(family, Windows):
                entry = family.log[-1]
                layer = entry["layers"][self.blocks[i].name]
                seen.fit_s, seen.in_sample_loss = (
                    entry["fit_s"],
                    layer["in_sample_loss"] if layer["ratio"] > 1 else None,
                )
        for block, used in zip(self.blocks, self._families, strict=True):
            if used is None and not sampling:
                seen = self.seen[block.name]
                seen.bytes_sent.append(4 * block.length)
                seen.compress_s.append(0.0)
                seen.decompress_s.append(0.0)
        return estimate

    def rows(self) -> list[LayerReport]:
        found = []
        for block in self.blocks:
            seen = self.seen[block.name]
            found.append(
                LayerReport(
                    self.name,
                    block.name,
                    block.length,
                    4 * block.length / fmean(seen.bytes_sent),
                    fmean(loss.relative for loss in seen.losses),
                    seen.in_sample_loss,
                    median(seen.compress_s),
                    median(seen.decompress_s),
                    seen.fit_s,
                )
            )
        calls = zip(*(seen.losses for seen in self.seen.values()), strict=True)
        total = sum(block.length for block in self.blocks)
        sent = sum(fmean(seen.bytes_sent) for seen in self.seen.values())
        everything = LayerReport(
            self.name,
            "all",
            total,
            4 * total / sent,
            fmean(sum(losses, Loss()).relative for losses in calls),
            None,
            sum(row.compress_s for row in found),
            sum(row.decompress_s for row in found),
            sum(row.fit_s for row in found),
        )
        return [everything, *found]
