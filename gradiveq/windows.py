"""GradiVeQ as an aggregator's strategy: windows of sampling and compressed iterations (section 3 of Yu et al. 2018).

Sampling iterations give every worker the same bits, QSGD's noise included, and these bits both update the model and
are PCA's samples. At the end of the sampling each worker fits its share of the bases and gets those of the others.
Everything is a mean over the workers, not a sum: gradients, samples, and µ, which is the µ/N of Eq. 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradiveq.codec import PCACodec, gradient_codec
from gradiveq.device import Mirror, Piece, Staged, StagedLayers
from gradiveq.flatten import Layout, Vector, slice_sizes
from gradiveq.loss import Loss
from gradiveq.methods import GradiVeQ, Plain
from gradiveq.pca import Basis, Float64, Group, LayerBasis, PCASampler
from gradiveq.projection import squares
from gradiveq.report import Ongoing
from gradiveq.schedule import majority
from gradiveq.strategy import CONTROLS, FLOAT32, VOTE, CodecStrategy
from gradiveq.window_log import WindowLog, losses_on, raise_failures
from ring.codec import Codec, Composite
from ring.handle import Ring
from ring.timeline import Timeline


class Windows(CodecStrategy):
    """Samples, bases, losses."""

    def __init__(
        self,
        method: GradiVeQ,
        ring: Ring,
        layout: Layout,
        seed: int,
        chunk_bytes: int,
        mirror: Mirror | None = None,
    ) -> None:
        super().__init__(ring, layout.length, seed, chunk_bytes, mirror)
        self.method = method
        self._log = WindowLog(method)
        self.schedule = self._log.schedule
        self._layout = layout
        self._layers = tuple(block for block in layout.blocks if block.compressed)
        if not self._layers:
            raise ValueError("GradiVeQ compresses convolutions (groups=1); `model` has none: use Plain or QSGDRing")
        self._slice_sizes = slice_sizes(layout.blocks, method.slice_size)
        self._new_sampler().check(method.most_samples)
        self._sampler: PCASampler | None = None
        self._bases: list[LayerBasis] = []
        self._codec: Composite | None = None
        self._codecs: dict[str, PCACodec] = {}
        self._staged: StagedLayers | None = None  # in the place of the codec, with a mirror
        # Of the iteration under way: this worker's gradient if its loss is measured, and the votes.
        self._own: Vector | Tensor | None = None
        self._votes = 0

    @property
    def phase(self) -> str:
        return self.schedule.phase

    @property
    def log(self) -> list[dict[str, Any]]:
        return self._log.entries

    @property
    def vote(self) -> bool:
        return self._log.vote

    def _new_sampler(self) -> PCASampler:
        return PCASampler(
            self._layout.blocks,
            self._slice_sizes,
            self.method.pca,
            self.ring.rank,
            self.ring.size,
            self.method.most_samples,
        )

    @property
    def _fitted(self) -> Composite:
        assert self._codec is not None
        return self._codec

    @property
    def on_device(self) -> bool:
        by_host = self.schedule.phase == "sample" and not isinstance(self.method.sampling, Plain)
        return self.mirror is not None and not by_host

    def codec(self, iteration: int) -> tuple[Codec, int]:
        if self.schedule.phase == "compress":
            return self._fitted if self._staged is None else self._staged.staged, self.chunk_bytes
        return self.codec_of(Plain() if self.schedule.phase == "warm-up" else self.method.sampling, iteration)

    @property
    def _measure_due(self) -> bool:
        every = self.method.holdout_every
        return self.schedule.phase == "compress" and every > 0 and self.schedule.done % every == 0

    @property
    def _encoding(self) -> Sequence[PCACodec | StagedLayers]:
        """What encodes, and measures Eq. 7 while it does."""
        return list(self._codecs.values()) if self._staged is None else [self._staged]

    def exchange(self, vector: Vector, flawed: bool, now: Ongoing) -> bool:
        due = self._measure_due
        for one in self._encoding:
            one.monitor = due or self.method.compress == "auto"
            one.take_local_loss()  # of an iteration that was skipped
        self._own = None
        if due:
            with now.timeline.span("measure"):
                if self.mirror is None:
                    self._own = vector[: self.length].copy()
                else:
                    self._own = self.mirror.values[: self.length].clone()
        any_flawed = super().exchange(vector, flawed, now)
        self._votes = round(float(vector[self.length + VOTE]) * self.ring.size)
        return any_flawed

    def accept(self, mean: Vector, now: Ongoing) -> None:
        if self.schedule.phase == "warm-up":
            self.schedule.advance()
        elif self.schedule.phase == "sample":
            self._after_sample(mean, now)
        else:
            self._after_compressed(mean, now)

    def _after_sample(self, mean: Vector, now: Ongoing) -> None:
        timeline = now.timeline
        if self.on_device and self.mirror is not None and self.mirror.direct:
            with timeline.span("pack"):
                self.mirror.to_host()  # the memory of `mean`, by which nothing has passed
        if self._sampler is None:
            self._log.open(now.iteration)
            if self._codec is not None:
                with timeline.span("measure"):
                    losses = losses_on(mean, self._layers, self._codecs.values())
                    _report(self._log.replaced(now.iteration, losses), now)
                self._codec, self._codecs, self._staged, self._bases = None, {}, None, []
            self._sampler = self._new_sampler()
        with self._log.fitting(timeline.clock):
            with timeline.span("fit"):
                self._sampler.add(mean)
            if self._log.sampled():
                dims = self._fit(now)
                if self._log.checked(dims):
                    self._share(dims, now)

    def _fit(self, now: Ongoing) -> Float64:
        """Fit this rank's share; the d of all groups.

        Raises:
            FitError: some rank failed.
        """
        assert self._sampler is not None
        with now.timeline.span("fit"):
            dims = self._sampler.fit()
        self._count(self.ring.all_reduce(dims, timeline=now.timeline).bytes_sent, now)
        raise_failures(self._sampler, dims, f"in iteration {now.iteration}")
        return dims

    def _share(self, dims: Float64, now: Ongoing) -> None:
        """Give everybody's bases to everybody, and make the codec of the window."""
        assert self._sampler is not None
        with now.timeline.span("fit"):
            buffer, bounds = self._sampler.share(dims)
        self._count(self.ring.all_gather(buffer, bounds=bounds, timeline=now.timeline).bytes_sent, now)
        with now.timeline.span("fit"):
            self._use(self._sampler.rebuild(dims, buffer))
            self._sampler = None
        self._log.fitted(self._bases, self._codecs)

    def _use(self, bases: list[LayerBasis]) -> None:
        self._bases = bases
        self._codec, self._codecs = gradient_codec(self._layout.blocks, bases, CONTROLS)
        if self.mirror is not None:
            compressed = {basis.name: basis for basis in bases if basis.name in self._codecs}
            self._staged = StagedLayers(
                self.mirror, self._layout.blocks, compressed, CONTROLS, self.chunk_bytes, self._codec.describe(FLOAT32)
            )

    def _count(self, num_bytes: int, now: Ongoing) -> None:
        now.bytes_sent += num_bytes
        now.fit_bytes += num_bytes
        self._log.sent_for_fit(num_bytes)

    def _after_compressed(self, mean: Vector, now: Ongoing) -> None:
        own, self._own = self._own, None
        if own is not None:
            with now.timeline.span("measure"):
                _report(self._log.held_out(now.iteration, self._held_out(mean, own, now)), now)
        if self.method.compress == "auto" or own is not None:
            now.losses["local"] = sum((one.take_local_loss() for one in self._encoding), Loss()).relative
        self._log.compressed(now.ratio, majority(self._votes, self.ring.size), now.losses.get("local"))

    def _held_out(self, mean: Vector, own: Vector | Tensor, now: Ongoing) -> dict[str, Loss]:
        """By layer, after the exact all-reduce of the same gradients."""
        parts = {block.name: slice(block.offset, block.stop) for block in self._layers}
        if isinstance(own, np.ndarray):
            now.measure_bytes += self.ring.all_reduce(own, op="mean").bytes_sent
            return {name: Loss.between(mean[part], own[part]) for name, part in parts.items()}
        assert self.mirror is not None
        exact = Staged(self.mirror, own, [Piece(0, self.length)], "identity")
        now.measure_bytes += exact.mean_over(self.ring, (), None, Timeline())[0].bytes_sent
        pairs = torch.stack([squares(self.mirror.values[part], own[part]) for part in parts.values()]).tolist()
        return {name: Loss(*pair) for name, pair in zip(parts, pairs, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "windows": self._log.state_dict(),
            "sampler": None if self._sampler is None else self._sampler.state_dict(),
            "bases": [basis_state(basis) for basis in self._bases],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._log.load_state_dict(state["windows"])
        self._sampler = None
        if state["sampler"] is not None:
            self._sampler = self._new_sampler()
            self._sampler.load_state_dict(state["sampler"])
        self._bases, self._codec, self._codecs, self._staged = [], None, {}, None
        if state["bases"]:
            self._use([basis_from(part) for part in state["bases"]])


def _report(record: Mapping[str, Any], now: Ongoing) -> None:
    now.losses |= {name: record[name] for name in ("held_out", "layers")}


def basis_state(basis: LayerBasis) -> dict[str, Any]:
    """Of dicts, lists, numbers and NumPy arrays; copies."""
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
        tuple(Group(state["name"], part["start"], part["stop"], state["slice_size"]) for part in state["groups"]),
        tuple(
            Basis(np.array(part["components"]), np.array(part["explained_variance"]), part["total_variance"])
            for part in state["groups"]
        ),
    )
