"""How a method turns the workers' gradients into one and the same vector: the part of an aggregator that differs.

    aggregator    packs gradients, finds what isn't finite, reports, keeps count      (`gradiveq.aggregator`)
    strategy      exchanges a vector with the other workers                           (here: as a codec of the ring)

A strategy doesn't know of models or of `.grad`; an aggregator doesn't know what travels.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from gradiveq.device import Mirror, OnDevice, staged_plain
from gradiveq.exchange import Worker
from gradiveq.flatten import Vector
from gradiveq.methods import Plain, QSGDRing
from gradiveq.powersgd import PowerSGDWorker
from gradiveq.report import Ongoing
from ring.codec import Codec, Composite, IdentityCodec
from ring.handle import Ring

#: Elements behind the gradient in the vector that a strategy gets: how many workers have a non-finite gradient, and how
#: many vote to end a window.
FLAG, VOTE, CONTROLS = 0, 1, 2
FLOAT32 = np.dtype(np.float32)

if TYPE_CHECKING:  # it needs Triton
    from gradiveq.device_qsgd import StagedQSGD


class Strategy(ABC):
    """One method's exchange. All ranks make one with the same arguments and call the same things.

    What it keeps from one iteration for the next changes in `accept` only, so that a skipped iteration leaves no trace.
    """

    @property
    @abstractmethod
    def phase(self) -> str:
        """Of the next exchange, for `Report.phase`."""

    @property
    def log(self) -> list[dict[str, Any]]:
        """For `Aggregator.window_log`."""
        return []

    @property
    def on_device(self) -> bool:
        """Whether the next exchange is of the gradient in the mirror (`gradiveq.device`), on the device, and leaves the
        mean there; by default the aggregator copies the gradient to the host, and the mean back."""
        return False

    @abstractmethod
    def exchange(self, vector: Vector, flawed: bool, now: Ongoing) -> bool:
        """Replace this worker's gradient by the mean over the workers; collective.

        Args:
            vector: the gradient and `CONTROLS` elements behind it, which are the strategy's. The gradient is finite,
                zeros if it was not. Overwritten, on all ranks with the same bits. If the exchange is `on_device`, the
                mirror's host memory, with nothing in it.
            flawed: whether this worker's gradient was not finite.
            now: gets what is sent, measured and found.
        Returns:
            Whether any worker's was not, on all ranks alike. What is in `vector` is of no use then.
        """

    def accept(self, mean: Vector, now: Ongoing) -> None:  # noqa: B027
        """The iteration counts: it was not skipped. Collective.

        Args:
            mean: what `exchange` has left in the gradient's part of the vector; finite. Not modified. If the exchange
                was `on_device`, the mean is in the mirror.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; it may differ by rank. Copies."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from there."""


class WorkerStrategy(Strategy):
    """Compressed in every iteration; all that it keeps is kept by this rank's side.

    Attributes:
        worker: this rank's side.
    """

    worker: Worker | PowerSGDWorker

    @property
    def phase(self) -> str:
        return "compressed"

    def accept(self, mean: Vector, now: Ongoing) -> None:
        self.worker.accept()
        now.measures = self.worker.measures

    def state_dict(self) -> dict[str, Any]:
        return self.worker.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.worker.load_state_dict(state)


class CodecStrategy(Strategy):
    """One all-reduce of the vector, as a codec encodes it; the control elements travel in the same messages.

    Args:
        length: of the gradient.
        seed: of QSGD's random numbers.
        mirror: where the gradient is on a device; None where it is on the host.
    """

    def __init__(self, ring: Ring, length: int, seed: int, chunk_bytes: int, mirror: Mirror | None = None) -> None:
        self.ring, self.length, self.seed, self.chunk_bytes = ring, length, seed, chunk_bytes
        self.mirror = mirror
        self._plain = IdentityCodec() if mirror is None else staged_plain(mirror, length, chunk_bytes)

    @property
    def vote(self) -> bool:
        """What this worker says in the element VOTE."""
        return False

    @abstractmethod
    def codec(self, iteration: int) -> tuple[Codec, int]:
        """What encodes an iteration's vector, and its chunk size."""

    def codec_of(self, method: Plain | QSGDRing, iteration: int) -> tuple[Codec, int]:
        if isinstance(method, Plain):
            return self._plain, self.chunk_bytes
        quantised = method.codec(self.seed, iteration)
        return Composite([(self.length, quantised), (CONTROLS, IdentityCodec())]), self.message_bytes(method)

    def message_bytes(self, method: QSGDRing) -> int:
        return self.chunk_bytes if method.pipelined else sys.maxsize

    def exchange(self, vector: Vector, flawed: bool, now: Ongoing) -> bool:
        """As in the base class; in the end the elements behind the gradient have what they came to."""
        codec, chunk_bytes = self.codec(now.iteration)
        controls = vector[self.length :]
        if isinstance(codec, OnDevice):
            said = [float(flawed), float(self.vote)]
            stats, controls[:] = codec.mean_over(self.ring, said, chunk_bytes, now.timeline)
            now.ratio = vector.nbytes / (codec.num_bytes + controls.nbytes)
        else:
            controls[FLAG], controls[VOTE] = flawed, self.vote
            with np.errstate(over="ignore", invalid="ignore"):  # looked for by the aggregator, on all ranks alike
                stats = self.ring.all_reduce(vector, codec, op="mean", chunk_bytes=chunk_bytes, timeline=now.timeline)
            now.ratio = payload_ratio(codec, len(vector))
        now.bytes_sent += stats.bytes_sent
        return bool(controls[FLAG] > 0)


class Direct(CodecStrategy):
    """The same codec in every iteration."""

    def __init__(
        self,
        method: Plain | QSGDRing,
        ring: Ring,
        length: int,
        seed: int,
        chunk_bytes: int,
        mirror: Mirror | None = None,
    ) -> None:
        super().__init__(ring, length, seed, chunk_bytes, mirror)
        self._method = method
        self._staged = None if mirror is None or isinstance(method, Plain) else self._quantised_on(mirror, method)

    @property
    def phase(self) -> str:
        return "plain" if isinstance(self._method, Plain) else "qsgd"

    @property
    def on_device(self) -> bool:
        return self.mirror is not None and (isinstance(self._method, Plain) or self._staged is not None)

    def codec(self, iteration: int) -> tuple[Codec, int]:
        if self._staged is None or isinstance(self._method, Plain):
            return self.codec_of(self._method, iteration)
        quantised = self._method.codec(self.seed, iteration)
        return replace(self._staged, codec=quantised), self.message_bytes(self._method)

    def _quantised_on(self, mirror: Mirror, method: QSGDRing) -> StagedQSGD | None:
        """None where the host is the better place, or the only one."""
        if find_spec("triton") is None:
            return None
        from gradiveq.device_qsgd import StagedQSGD, pays

        codec = method.codec()
        most = self.message_bytes(method) // codec.num_bytes(codec.bucket) * codec.bucket
        elements = min(most, self.length // self.ring.size)
        return StagedQSGD.of(codec, mirror, self.length) if pays(codec, elements, mirror.device) else None


def payload_ratio(codec: Codec, length: int) -> float:
    """Bytes of a float32 vector / bytes of its payload."""
    return FLOAT32.itemsize * length / sum(region.num_bytes for region in codec.regions(length, FLOAT32))
