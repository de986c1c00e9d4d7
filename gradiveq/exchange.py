"""One worker's side of an aggregation with compressors: parts, error feedback, payloads. No communication happens here.

    gradient -> corrected by the memory -> each part compressed -> Outgoing -> (a driver: MPI, lockstep, one process)
             -> everybody's payloads -> each part decompressed, added, finished -> the same mean on every worker

A *part* is what a compressor is applied to at once: a layer (layer-wise), the whole vector (entire-model; Dutta et al.
2020) or a group of layers. All parts of a call travel together: payloads that can be added in one vector for each
dtype, the others behind one another in one message for each worker.

**Error feedback.** With g the gradient, e the memory, C the compressor and γ the learning rate, a worker sends C(x):

    form        x             e afterwards       what the caller does with the mean          source
    "scaled"    g + e/γ       γ·(x - C(x))       SGD step with γ; no momentum                Algorithm 1
    "gradient"  g + e         x - C(x)           any optimiser                               Algorithm 2
    "update"    u + e         x - C(x)           SGD step with γ; momentum is in u already   Algorithm 3

of Sahu et al. 2021, where u = m + g and m = λm + g is each worker's own Nesterov momentum. So the memory of "scaled" is
in units of the model's update, that of the others in units of the gradient.

A call counts once it is accepted: until then memories are as before it, so that an iteration that turns out to be of no
use on some worker (its gradient, or the mean, is not finite) leaves no trace on any.

**Both ways.** In Algorithm 1 of Dutta et al. 2020 a master takes the mean of what the workers' compressor Q_W has left,
and sends it back through a compressor Q_M of its own, here `Master`. With the identity as Q_M it is the scheme above.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from gradiveq.compressors.base import Array, Collective, Compressor, Draw, Float32
from gradiveq.compressors.reductions import sum_of_squares
from gradiveq.message import pack, unpack

Form = Literal["scaled", "gradient", "update"]
FORMS: tuple[Form, ...] = ("scaled", "gradient", "update")


@dataclass(frozen=True)
class ErrorFeedback:
    """What a worker does with what its compressor left out; see the module.

    Attributes:
        form: which of the three.
        momentum: λ of "update"; 0 for plain SGD.
    Raises:
        ValueError: there is no such form, or the momentum is out of its range or not of that form.
    """

    form: Form = "gradient"
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"`form` must be one of {', '.join(FORMS)}, got {self.form!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` must be at least 0 and below 1, got {self.momentum}")
        if self.momentum and self.form != "update":
            raise ValueError(f"`momentum` belongs to form 'update'; with {self.form!r} it is the optimiser's")


class Part(NamedTuple):
    """Elements start ... stop of the vector, compressed at once."""

    name: str
    start: int
    stop: int
    compressor: Compressor

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Outgoing:
    """What one worker sends in one call.

    Attributes:
        reduced: by dtype, a vector to be summed over the workers.
        gathered: uint8, to be handed to everybody; empty if no part needs that.
    """

    reduced: dict[str, Array]
    gathered: Array

    @property
    def room(self) -> Array:
        """The last element of the first vector to be summed, or of the message: the caller's, where it asked for it."""
        return next(iter(self.reduced.values()), self.gathered)[-1:]


@dataclass(frozen=True)
class Measures:
    """Of one call on one worker; sums over the parts.

    Attributes:
        norm: ‖x‖² of what was compressed, the corrected gradient. Sums of squares are in float64.
        compression_error: ‖x - C(x)‖², absolute.
        error: ‖e‖² of the memory afterwards (Fig. 1c of Sahu et al. 2021), 0 without error feedback.
        total_error: the sum of `error` over all calls that were accepted, this one included (their Eq. 3 up to the
            units).
        num_sent: elements of the vector that were sent.
        density: the same, over the elements of the vector.
        payload_bytes: sent to be added and to be gathered.
    """

    norm: float
    compression_error: float
    error: float
    total_error: float
    num_sent: int
    density: float
    payload_bytes: int

    @property
    def relative_error(self) -> float:
        """compression_error / norm; 0 of a zero vector."""
        return self.compression_error / self.norm if self.norm else 0.0


class Worker:
    """Compresses what this worker has, decompresses what all sent, and remembers what was left out.

    Args:
        parts: that cover a vector of `length` in order, without gaps. The same on every worker.
        rank, size: of this worker, as in MPI.
        seed: of random numbers; the same on every worker.
        feedback: None for no memory.
    Memory: a vector of `length`, with error feedback three; with momentum five.

    Attributes:
        parts: may be replaced between calls by parts with the same boundaries.
        measures: of the last call.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        length: int,
        *,
        rank: int,
        size: int,
        seed: int = 0,
        feedback: ErrorFeedback | None = None,
    ) -> None:
        _check_parts(parts, length)
        self.parts, self.length = tuple(parts), length
        self.rank, self.size, self.seed, self.feedback = rank, size, seed, feedback
        # What is remembered, and beside it what will be if the call under way is accepted.
        self.memory, self._next_memory = self._pair(feedback is not None)
        self.momentum, self._next_momentum = self._pair(feedback is not None and feedback.momentum > 0)
        self._pending = False
        self.measures: Measures | None = None
        self._total_error = 0.0
        self._scratch = np.empty(length, np.float32)
        self._reduced: list[tuple[str, int]] = []  # dtype and length of each payload in the last call that is added

    def _pair(self, needed: bool) -> tuple[Float32 | None, Float32 | None]:
        return (np.zeros(self.length, np.float32), np.empty(self.length, np.float32)) if needed else (None, None)

    def send(self, gradient: Float32, call: int, lr: float = 1.0, *, room: bool = False) -> Outgoing:
        """Compress this worker's gradient. What was sent before and not accepted is forgotten.

        Args:
            gradient: finite float32 of shape (length,). Not modified.
            call: the number of the aggregation, from 0 on; the same on every worker.
            lr: γ, for error feedback of the form "scaled".
            room: leave a 0 for the caller: an element at the end of the first vector of `reduced`, or where there is
                none, a byte at the end of `gathered`. The measures know nothing of it.
        Raises:
            OverflowError: the gradient is finite, but together with the memory it isn't.
        """
        corrected, latest = self._corrected(gradient, lr)
        norm = float(sum_of_squares(corrected))
        if not math.isfinite(norm):
            raise OverflowError(f"gradient and memory of rank {self.rank} together overflow float32 in call {call}")
        payloads: list[Array] = []
        num_sent = 0
        own = self._scratch
        for index, part in enumerate(self.parts):
            where = slice(part.start, part.stop)
            draw = Draw(self.seed, call, self.rank, index)
            compressor = part.compressor
            payload = compressor.compress(corrected[where], draw, latest[where] if compressor.uses_latest else None)
            compressor.decompress(payload, own[where], draw)
            num_sent += compressor.num_sent(payload, part.length)
            payloads.append(payload)
        outgoing, num_bytes = self._outgoing(payloads, room)
        error = np.subtract(corrected, own, out=own if self._next_memory is None else self._next_memory)
        compression_error = float(sum_of_squares(error))
        remembered = 0.0
        if self._next_memory is not None:
            assert self.feedback is not None
            if self.feedback.form == "scaled":
                error *= np.float32(lr)
            remembered = float(sum_of_squares(error))
        self.measures = Measures(
            norm,
            compression_error,
            remembered,
            self._total_error + remembered,
            num_sent,
            num_sent / max(1, self.length),
            num_bytes,
        )
        self._pending = True
        return outgoing

    def send_nothing(self, call: int) -> Outgoing:
        """What has the shape of what the others send, with a 1 where `room` leaves a 0: this call is of no use.

        Only where all payloads that are gathered have a fixed size.
        """
        payloads = []
        for index, part in enumerate(self.parts):
            zeros = np.zeros(part.length, np.float32)
            payloads.append(part.compressor.compress(zeros, Draw(self.seed, call, self.rank, index), zeros))
        self._pending = False
        outgoing, _ = self._outgoing(payloads, room=True)
        outgoing.room[:] = 1
        return outgoing

    def _outgoing(self, payloads: Sequence[Array], room: bool) -> tuple[Outgoing, int]:
        """What is sent, and how many bytes it has but for the room."""
        reduced: dict[str, list[Array]] = {}
        gathered: list[Array] = []
        self._reduced = []
        for part, payload in zip(self.parts, payloads, strict=True):
            if part.compressor.collective == "all_reduce":
                self._reduced.append((payload.dtype.name, len(payload)))
                reduced.setdefault(payload.dtype.name, []).append(payload)
            else:
                gathered.append(payload)
        if room and reduced:
            vectors = next(iter(reduced.values()))
            vectors.append(np.zeros(1, vectors[0].dtype))
        message = pack(gathered, [part for _, part in self._parts("all_gather")])
        if room and not reduced:
            message = np.append(message, np.uint8(0))
        outgoing = Outgoing({dtype: np.concatenate(vectors) for dtype, vectors in reduced.items()}, message)
        num_bytes = sum(vector.nbytes for vector in outgoing.reduced.values()) + message.nbytes
        return outgoing, num_bytes - outgoing.room.nbytes if room else num_bytes

    def receive(self, reduced: Mapping[str, Array], gathered: Sequence[Array], out: Float32, call: int) -> None:
        """The mean over the workers, or whatever the compressors make of the sum: the same bits on every worker.

        Args:
            reduced: the sums over the workers of `Outgoing.reduced`.
            gathered: every worker's `Outgoing.gathered`, by rank.
            out: float32 of shape (length,); overwritten.
        Raises:
            ValueError: a payload that can't be one; names the rank and the part.
        """
        out.fill(0)
        taken = dict.fromkeys(reduced, 0)
        for (index, part), (dtype, num_elements) in zip(self._parts("all_reduce"), self._reduced, strict=True):
            payload = reduced[dtype][taken[dtype] : taken[dtype] + num_elements]
            taken[dtype] += num_elements
            draw = Draw(self.seed, call, self.rank, index)
            part.compressor.decompress(payload, out[part.start : part.stop], draw, self.size)
        gathering = list(self._parts("all_gather"))
        if gathering:
            for rank, message in enumerate(gathered):
                payloads = unpack(message, [part for _, part in gathering], rank)
                for (index, part), payload in zip(gathering, payloads, strict=True):
                    where = slice(part.start, part.stop)
                    draw = Draw(self.seed, call, rank, index)
                    part.compressor.add_to(payload, out[where], draw, self._scratch[where])
        for part in self.parts:
            part.compressor.finish(out[part.start : part.stop], self.size)

    def accept(self) -> None:
        """The call that `send` began counts: remember what it has left out.

        Raises:
            RuntimeError: there is no such call.
        """
        if not self._pending:
            raise RuntimeError("there is no call to accept, or it was accepted before")
        assert self.measures is not None
        self.memory, self._next_memory = self._next_memory, self.memory
        self.momentum, self._next_momentum = self._next_momentum, self.momentum
        self._total_error = self.measures.total_error
        self._pending = False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit by bit; it differs by rank. Copies."""
        return {
            "memory": None if self.memory is None else self.memory.copy(),
            "momentum": None if self.momentum is None else self.momentum.copy(),
            "total_error": self._total_error,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is of another error feedback or vector; nothing was changed.
        """
        for mine, name in ((self.memory, "memory"), (self.momentum, "momentum")):
            theirs = state[name]
            if (mine is None) != (theirs is None) or (mine is not None and mine.shape != theirs.shape):
                raise ValueError(f"the state's {name} is of another error feedback or vector than this worker's")
        for mine, name in ((self.memory, "memory"), (self.momentum, "momentum")):
            if mine is not None:
                mine[:] = state[name]
        self._total_error, self._pending = state["total_error"], False

    def _parts(self, collective: Collective) -> Iterator[tuple[int, Part]]:
        for index, part in enumerate(self.parts):
            if part.compressor.collective == collective:
                yield index, part

    def _corrected(self, gradient: Float32, lr: float) -> tuple[Float32, Float32]:
        """What is to be compressed (x of the module), and what of it is new in this call."""
        if self.memory is None or self._next_memory is None:
            return gradient, gradient
        assert self.feedback is not None
        corrected = self._next_memory  # until the error takes its place
        with np.errstate(over="ignore", invalid="ignore"):  # looked for in the norm
            latest = gradient
            if self.momentum is not None and self._next_momentum is not None:
                np.multiply(self.momentum, np.float32(self.feedback.momentum), out=self._next_momentum)
                self._next_momentum += gradient
                latest = self._next_momentum + gradient
            if self.feedback.form == "scaled":
                if not 0 < lr < math.inf:
                    raise ValueError(f"`lr` must be positive for error feedback of the form 'scaled', got {lr}")
                np.divide(self.memory, np.float32(lr), out=corrected)
                corrected += latest
            else:
                np.add(latest, self.memory, out=corrected)
        return corrected, latest


class Master:
    """The master's side of a scheme that compresses both ways: Q_M of the mean, and what every worker makes of it.

    Args:
        parts: as for `Worker`, with the compressors Q_M, of either collective.
        seed: of random numbers, which are others than the workers'.
    """

    def __init__(self, parts: Sequence[Part], length: int, *, seed: int = 0) -> None:
        _check_parts(parts, length)
        self.parts, self.length, self.seed = tuple(parts), length, seed
        # Of a payload that could be added, the dtype is known by example only.
        self._dtypes = [
            part.compressor.compress(np.zeros(part.length, np.float32), self._draw(0, index)).dtype
            for index, part in enumerate(self.parts)
        ]

    def send(self, mean: Float32, call: int) -> Array:
        """The message for everybody, uint8.

        Args:
            mean: finite float32 of shape (length,). Not modified.
        """
        payloads: list[Array] = []
        for index, part in enumerate(self.parts):
            values = mean[part.start : part.stop]
            payloads.append(part.compressor.compress(values, self._draw(call, index), values).view(np.uint8))
        return pack(payloads, self.parts)

    def receive(self, message: Array, out: Float32, call: int) -> None:
        """What the message says; the same bits on every worker.

        Raises:
            ValueError: it can't be a message; names the part.
        """
        for index, (part, payload) in enumerate(zip(self.parts, unpack(message, self.parts, 0), strict=True)):
            typed = np.frombuffer(payload.tobytes(), self._dtypes[index])
            part.compressor.decompress(typed, out[part.start : part.stop], self._draw(call, index))

    def _draw(self, call: int, index: int) -> Draw:
        return Draw(self.seed, call, 0, len(self.parts) + index)


def _check_parts(parts: Sequence[Part], length: int) -> None:
    place = 0
    for part in parts:
        if part.start != place or part.stop < part.start:
            raise ValueError(f"part {part.name} must begin at element {place}, where the last one ends, got {part}")
        place = part.stop
    if place != length:
        raise ValueError(f"the parts must cover {length} elements, got {place}")


def check_size(compressors: Iterable[Compressor], size: int) -> None:
    """Refuse what can't be added, before anything is sent.

    Raises:
        ValueError: a sum of `size` payloads doesn't fit a compressor's dtype.
    """
    zero, draw = np.zeros(1, np.float32), Draw(0, 0, 0, 0)
    for compressor in {one for one in compressors if one.collective == "all_reduce"}:
        compressor.decompress(compressor.compress(zero, draw, zero), zero.copy(), draw, size)


def exchange_here(
    workers: Sequence[Worker],
    gradients: Sequence[Float32],
    out: Float32,
    call: int,
    lr: float = 1.0,
    master: Master | None = None,
) -> None:
    """One aggregation of workers that are all in this process; what a ring does, without one.

    For experiments with dozens of workers. Gathered payloads give the bits that a ring gives; sums are added in the
    order of the ranks, where a ring adds each segment in another.

    Args:
        workers, gradients: by rank.
        out: float32 of shape (length,): what every worker would have; overwritten.
        master: compresses the mean on its way back; None for no more compression.
    """
    outgoing = [worker.send(gradient, call, lr) for worker, gradient in zip(workers, gradients, strict=True)]
    reduced = {dtype: vector.copy() for dtype, vector in outgoing[0].reduced.items()}
    for other in outgoing[1:]:
        for dtype, vector in other.reduced.items():
            reduced[dtype] += vector
    workers[0].receive(reduced, [one.gathered for one in outgoing], out, call)
    if master is not None:
        master.receive(master.send(out, call), out, call)
    for worker in workers:
        worker.accept()
