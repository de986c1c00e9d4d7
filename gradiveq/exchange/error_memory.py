"""What compression has left out and a worker adds to its next gradient, by parameter name, for every method.

With g the gradient, e the memory, C the compressor and γ the learning rate, a worker sends C(x):

    form        x             e afterwards       what the caller does with the mean          source
    "scaled"    g + e/γ       γ·(x - C(x))       SGD step with γ; no momentum                Algorithm 1
    "gradient"  g + e         x - C(x)           any optimiser                               Algorithm 2
    "update"    u + e         x - C(x)           SGD step with γ; momentum is in u already   Algorithm 3

of Sahu et al. 2021, where u = m + g and m = λm + g is each worker's own Nesterov momentum. So the memory of "scaled" is
in units of the model's update, that of the others in units of the gradient.

A call counts once it is accepted: until then memories are as before it, so that an iteration that turns out to be of no
use on some worker (its gradient, or the mean, is not finite) leaves no trace on any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gradiveq.arrays.reductions import sum_of_squares
from gradiveq.exchange.flaws import OVERFLOWED
from gradiveq.exchange.kernels import overflows_allowed
from gradiveq.exchange.requests import Call
from gradiveq.flatten import Block, Bucket

Form = Literal["scaled", "gradient", "update"]
FORMS: tuple[Form, ...] = ("scaled", "gradient", "update")

#: What becomes of memories where the number of workers changes.
Memories = Literal["sum", "drop"]


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


@dataclass(frozen=True)
class Measures:
    """What one call left out and sent on one worker; sums over the layers.

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


class ByName:
    """Vectors as long as the buckets, float32, zeros to begin with: flat while buckets last, by parameter beyond."""

    def __init__(self) -> None:
        self._flat: dict[Bucket, Tensor] = {}
        self._staged: dict[Bucket, Tensor] = {}
        self._home: dict[str, tuple[Bucket, Block]] = {}
        self._loaded: dict[str, Tensor] = {}

    def of(self, bucket: Bucket, device: torch.device) -> Tensor:
        """A bucket's vector; not to be modified. Parameters keep theirs if they were in another bucket before."""
        flat = self._flat.get(bucket)
        if flat is not None:
            return flat
        known = self.by_name()
        flat = torch.zeros(bucket.length, dtype=torch.float32, device=device)
        for block in bucket.blocks:
            if block.name in known:
                block.view(flat).copy_(known[block.name])
            self._home[block.name] = bucket, block
            self._loaded.pop(block.name, None)
        self._flat[bucket] = flat
        lived_in = {bucket for bucket, _ in self._home.values()}
        self._flat = {bucket: tensor for bucket, tensor in self._flat.items() if bucket in lived_in}
        return flat

    def stage(self, bucket: Bucket, flat: Tensor) -> None:
        """What the bucket's vector will be, unless the iteration is skipped. This object owns it from now on."""
        self._staged[bucket] = flat

    def commit(self) -> None:
        self._flat.update(self._staged)
        self._staged = {}

    def forget(self) -> None:
        """The iteration is skipped."""
        self._staged = {}

    def by_name(self) -> dict[str, Tensor]:
        """Each parameter's, in its shape; views."""
        return {
            **self._loaded,
            **{name: block.view(self._flat[bucket]) for name, (bucket, block) in self._home.items()},
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Copies on the CPU, by name."""
        return {
            name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in self.by_name().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._flat, self._staged, self._home = {}, {}, {}
        self._loaded = {name: tensor.clone() for name, tensor in state.items()}


class ErrorMemory:
    """One worker's memory, with whatever method it wraps; without `feedback` it changes nothing.

    Memory: with error feedback two vectors as long as the gradient, with momentum four.
    """

    def __init__(self, feedback: ErrorFeedback | None) -> None:
        self.feedback = feedback
        self.errors, self._momentum = ByName(), ByName()
        self.total_error = self._next_total = 0.0

    @property
    def _has_momentum(self) -> bool:
        return self.feedback is not None and self.feedback.momentum > 0

    def corrected(self, call: Call, gradient: Any) -> tuple[Any, Any]:
        """What is to be compressed (x of the module), and what of it is new in this call.

        If x isn't finite though the gradient is, or the gradient is of no use anyway, `call.flaw` says so and x is 0.

        Args:
            gradient: float32 of shape (length,), zeros if it is of no use. Not modified.
        """
        if self.feedback is None:
            return gradient, gradient
        kernels, bucket = call.kernels, call.bucket
        memory = kernels.array(self.errors.of(bucket, kernels.device))
        latest = gradient
        with overflows_allowed():
            if self._has_momentum:
                factor = np.float32(self.feedback.momentum)
                momentum = kernels.array(self._momentum.of(bucket, kernels.device)) * factor
                momentum += gradient
                self._momentum.stage(bucket, kernels.tensor(momentum))
                latest = momentum + gradient
            if self.feedback.form == "scaled":
                if not 0 < call.now.lr < math.inf:
                    raise ValueError(
                        f"`lr` must be positive for error feedback of the form 'scaled', got {call.now.lr}"
                    )
                corrected = memory / np.float32(call.now.lr)
                corrected += latest
            else:
                corrected = latest + memory
        overflow = kernels.flaw_of(corrected, bucket.blocks, OVERFLOWED)
        if isinstance(call.flaw, int) and isinstance(overflow, int):
            call.flaw = call.flaw or overflow
            return (kernels.zeros(bucket.length) if call.flaw else corrected), latest
        found = torch.as_tensor(call.flaw, device=kernels.device)
        call.flaw = found = torch.where((found == 0) & (overflow > 0), overflow, found)
        return kernels.choose(found == 0, corrected, 0.0), latest

    def keep(self, call: Call, x: Any, left: Any, num_sent: int, payload_bytes: int) -> None:
        """Take what was left out of x; it is remembered once the iteration is accepted.

        Args:
            left: x - C(x), whose memory is this object's from now on.
            num_sent, payload_bytes: for `Measures`.
        """
        length = call.bucket.length
        norm = float(sum_of_squares(x)) if call.measured else 0.0
        error = float(sum_of_squares(left)) if call.measured else 0.0
        remembered = 0.0
        if self.feedback is not None:
            remembered = error
            if self.feedback.form == "scaled":
                left *= np.float32(call.now.lr)
                remembered = float(sum_of_squares(left)) if call.measured else 0.0
            self.errors.stage(call.bucket, call.kernels.tensor(left))
        if call.measured:
            self._next_total = self.total_error + remembered
            call.now.measures = Measures(
                norm, error, remembered, self._next_total, num_sent, num_sent / max(1, length), payload_bytes
            )

    def wants(self, call: Call) -> bool:
        """Whether what is left out has to be known at all."""
        return call.measured or self.feedback is not None

    def commit(self) -> None:
        """The iteration counts."""
        self.errors.commit()
        self._momentum.commit()
        self.total_error = self._next_total

    def forget(self) -> None:
        """The iteration doesn't."""
        self.errors.forget()
        self._momentum.forget()
        self._next_total = self.total_error

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, by parameter name; it differs by rank. Copies; None where nothing is."""
        return {
            "memory": None if self.feedback is None else self.errors.state_dict(),
            "momentum": self._momentum.state_dict() if self._has_momentum else None,
            "total_error": self.total_error,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is of another error feedback; nothing was changed.
        """
        for name, mine in (("memory", self.feedback is not None), ("momentum", self._has_momentum)):
            if (state[name] is not None) != mine:
                raise ValueError(f"the state's {name} is of another error feedback than this worker's")
        if self.feedback is not None:
            self.errors.load_state_dict(state["memory"])
        if self._has_momentum:
            self._momentum.load_state_dict(state["momentum"])
        self.total_error = self._next_total = state["total_error"]

    def load_others(self, states: Sequence[Mapping[str, Any]], memories: Memories, rank: int, size: int) -> None:
        """Go on as this rank of another number of workers, from the states of all the old ones, by rank."""
        if self.feedback is not None:
            self.errors.load_state_dict(summed([state["memory"] for state in states], rank, size, memories))


def summed(states: Sequence[Mapping[str, Tensor]], rank: int, size: int, rule: Memories) -> dict[str, Tensor]:
    """A rank's memory from those of another number of workers.

    With "sum" rank r of M takes those of the N old ranks r, r + M, ..., times M/N: the mean over the workers of what
    has been left out stays what it was. With "drop" it is forgotten.
    """
    total: dict[str, Tensor] = {}
    if rule == "sum":
        for old in range(rank, len(states), size):
            for name, tensor in states[old].items():
                share = tensor * (size / len(states))
                total[name] = total[name] + share if name in total else share
    return total
