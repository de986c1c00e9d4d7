"""Methods on the side of training, layer by layer: losses, bytes, seconds (for `gradiveq.ddp.probing`)."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median

import numpy as np
import torch

from gradiveq.compressors.base import Draw, Float32
from gradiveq.ddp.group import Group
from gradiveq.ddp.layers import NOTHING_TO_COMPRESS
from gradiveq.flatten import Block, slice_sizes
from gradiveq.loss import Loss
from gradiveq.methods import Compressed, GradiVeQ
from gradiveq.pca import PCASampler
from gradiveq.powersgd import PowerSGD, PowerSGDWorker
from gradiveq.projection import Projection


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

    def __init__(self, group: Group | None) -> None:
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank, group.size)

    def __call__(self, values: Float32) -> Float32:
        if self.group is None:
            return values.copy()
        tensor = torch.from_numpy(values.copy()).to(self.group.device)
        self.group.all_reduce(tensor).wait()
        return (tensor / self.size).cpu().numpy()


class Trial(ABC):
    """One method on the side."""

    def __init__(self, name: str, blocks: Sequence[Block], mean: Mean) -> None:
        self.name, self.blocks, self.mean = name, blocks, mean
        self.seen = {block.name: _Seen() for block in blocks}

    def sample(self, average: Float32) -> None:  # noqa: B027
        """Take the mean gradient of an iteration that isn't measured."""

    @abstractmethod
    def measure(self, own: Float32, average: Float32, call: int) -> None:
        """Compress this rank's gradient, and compare what training would get with the mean. Collective."""

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

    def _compare(self, estimate: Float32, average: Float32) -> None:
        for block in self.blocks:
            where = slice(block.offset, block.stop)
            self.seen[block.name].losses.append(Loss.between(estimate[where], average[where]))


class CompressorTrial(Trial):
    """Each layer by itself."""

    def __init__(self, name: str, method: Compressed, blocks: Sequence[Block], mean: Mean, seed: int) -> None:
        super().__init__(name, blocks, mean)
        if method.granularity != "layer":
            raise ValueError(f"a probe is of layers: `granularity` must be 'layer', got {method.granularity!r}")
        self.parts, self.seed = method.parts(blocks), seed

    def measure(self, own: Float32, average: Float32, call: int) -> None:
        estimate = np.empty_like(own)
        for index, part in enumerate(self.parts):
            compressor, seen = part.compressor, self.seen[part.name]
            draw = Draw(self.seed, call, self.mean.rank, index)
            values, out = own[part.start : part.stop], estimate[part.start : part.stop]
            start = time.perf_counter()
            payload = compressor.compress(values, draw, values)
            middle = time.perf_counter()
            compressor.decompress(payload, out, draw)
            payloads = 1 if compressor.collective == "all_reduce" else self.mean.size
            seen.compress_s.append(middle - start)
            seen.decompress_s.append((time.perf_counter() - middle) * payloads)
            seen.bytes_sent.append(payload.nbytes)
        estimate = self.mean(estimate) * np.float32(self.mean.size)
        for part in self.parts:
            part.compressor.finish(estimate[part.start : part.stop], self.mean.size)
        self._compare(estimate, average)


class PowerSGDTrial(Trial):
    """A worker for each layer, all messages in one exchange. The warm start follows the true gradients."""

    def __init__(self, name: str, method: PowerSGD, blocks: Sequence[Block], mean: Mean, seed: int) -> None:
        super().__init__(name, blocks, mean)
        method = replace(method, error_feedback=False)
        self.workers = [PowerSGDWorker([replace(block, offset=0)], method, seed=seed) for block in blocks]

    def measure(self, own: Float32, average: Float32, call: int) -> None:
        estimate = np.empty_like(own)
        places = [slice(block.offset, block.stop) for block in self.blocks]
        rounds = [
            worker.rounds(own[place], estimate[place], call) for worker, place in zip(self.workers, places, strict=True)
        ]
        spent: list[list[float]] = [[] for _ in rounds]
        messages: list[Float32 | None] = []
        sent = [0] * len(rounds)
        while True:
            messages = []
            for index, one in enumerate(rounds):
                start = time.perf_counter()
                messages.append(next(one, None))
                spent[index].append(time.perf_counter() - start)
            present = [(i, message) for i, message in enumerate(messages) if message is not None]
            if not present:
                break
            mean = self.mean(np.concatenate([message for _, message in present]))
            taken = 0
            for index, message in present:
                sent[index] += message.nbytes
                message[:] = mean[taken : taken + len(message)]
                taken += len(message)
        for index, block in enumerate(self.blocks):
            seen = self.seen[block.name]
            seen.bytes_sent.append(sent[index])
            seen.compress_s.append(sum(spent[index][:2]))
            seen.decompress_s.append(sum(spent[index][2:]))
            self.workers[index].accept()
        self._compare(estimate, average)


class GradiVeQTrial(Trial):
    """Bases of the sampled mean gradients; every rank fits all of them by itself. Other layers are left alone."""

    def __init__(self, name: str, method: GradiVeQ, blocks: Sequence[Block], mean: Mean, samples: int) -> None:
        super().__init__(name, blocks, mean)
        layers = [block for block in blocks if block.compressed]
        if not layers:
            raise ValueError(NOTHING_TO_COMPRESS)
        sizes = slice_sizes(layers, method.slice_size)
        self.samplers = {
            block.name: PCASampler(
                [replace(block, offset=0)], {block.name: sizes[block.name]}, method.pca, 0, 1, samples
            )
            for block in layers
        }
        for sampler in self.samplers.values():
            sampler.check(samples)
        self.projections: dict[str, Projection] = {}

    def sample(self, average: Float32) -> None:
        for block in self.blocks:
            if block.name in self.samplers:
                self.samplers[block.name].add(average[block.offset : block.stop])

    def measure(self, own: Float32, average: Float32, call: int) -> None:
        if not self.projections:
            self._fit()
        for block in self.blocks:
            seen, exact = self.seen[block.name], average[block.offset : block.stop]
            if block.name not in self.projections:
                seen.losses.append(Loss.between(exact, exact))
                seen.bytes_sent.append(4 * block.length)
                seen.compress_s.append(0.0)
                seen.decompress_s.append(0.0)
                continue
            projection = self.projections[block.name]
            coded = torch.empty(projection.length, dtype=torch.float32, device="cpu")
            gradient = torch.from_numpy(own[block.offset : block.stop])
            start = time.perf_counter()
            projection.encode(gradient, coded)
            middle = time.perf_counter()
            projection.decode(coded)
            seen.compress_s.append(middle - start)
            seen.decompress_s.append(time.perf_counter() - middle)
            seen.bytes_sent.append(4 * projection.length)
            projection.encode(torch.from_numpy(exact), coded)  # the mean of all ranks' payloads, as it is linear
            seen.losses.append(Loss.between(projection.decode(coded).numpy(), exact))

    def _fit(self) -> None:
        for name, sampler in self.samplers.items():
            start = time.perf_counter()
            dims = sampler.fit()
            for _, why in sampler.failures(dims):
                raise FloatingPointError(f"PCA of {name} failed: {why}")
            buffer, _ = sampler.share(dims)
            (basis,) = sampler.rebuild(dims, buffer)
            seen = self.seen[name]
            seen.fit_s = time.perf_counter() - start
            if basis.ratio >= 1:
                seen.in_sample_loss = basis.in_sample_loss
                self.projections[name] = Projection(basis, torch.device("cpu"))
