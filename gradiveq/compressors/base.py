"""What every compressor of gradients is: a function of a vector, hyper-parameters and a key for random numbers.

A compressor's file holds both of its forms: NumPy's and Numba's for the host, and torch's for a device, where there is
one.

A compressor knows nothing of rings, layers or memories: `gradiveq.exchange` applies it to a layer or to the whole
model, adds what error feedback kept, and sends the payload. It says by which collective its payloads travel:

    "all_reduce"  payloads may be added as they are, and the sum of N of them decodes to the sum of the N estimates
    "all_gather"  everybody gets everybody's payload, decodes each and adds

(The third kind, codecs that each hop of a ring decodes, adds and encodes again, is `ring.codec.Codec`: QSGD in the
ring.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from gradiveq.arrays.counter_random import Draw
from gradiveq.arrays.float32 import Array, Float32
from gradiveq.device.bits import constant

__all__ = ["Array", "Collective", "Compressor", "Constants", "Draw", "Float32"]

Collective = Literal["all_reduce", "all_gather"]


@dataclass(frozen=True)
class Constants:
    """What theory says of a compressor C on vectors of one length; None where there is no such bound.

    Attributes:
        omega: E‖C(x)‖² <= (1 + omega)‖x‖² (Assumption 5 of Dutta et al. 2020).
        delta: E‖x - C(x)‖² <= (1 - delta)‖x‖² with 0 < delta <= 1 (δ-contraction; Karimireddy et al. 2019).
        variance: E‖x - C(x)‖² <= variance·‖x‖² (a relative compressor, Eq. 7 of Sahu et al. 2021, where it is Ω);
            below 1 for a contraction.
        absolute: E‖x - C(x)‖² <= absolute, whatever x is (υ² of an absolute compressor, Eq. 9 of Sahu et al. 2021).

    `gradiveq.theory` makes bounds on a model's gradient of them, layer by layer.
    """

    omega: float | None = None
    delta: float | None = None
    variance: float | None = None
    absolute: float | None = None


class Compressor(ABC):
    """Hyper-parameters, checked when it is made; a frozen dataclass. Holds no state: the same call gives the same bits.

    Attributes:
        name: in the registry, and in `--methods`.
        collective: see the module.
        biased: whether E[C(x)] may differ from x.
        copies: a sparsifier: it sends some elements as they are, so x == C(x) + error to the last bit.
        fixed_size: `payload_bytes` is what is sent, not an upper bound, so that lengths need not be agreed on.
        uses_latest: `compress` wants to know the gradient that was added last (AdaComp), beside the corrected one.
    """

    name: ClassVar[str]
    collective: ClassVar[Collective]
    biased: ClassVar[bool]
    copies: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = True
    uses_latest: ClassVar[bool] = False

    @abstractmethod
    def compress(self, values: Float32, draw: Draw, latest: Float32 | None = None) -> Array:
        """The payload.

        Args:
            values: contiguous float32 of shape (length,), finite. Not modified.
            draw: the key of its random numbers.
            latest: like `values`; only for a compressor with `uses_latest`.
        Returns:
            "all_gather": uint8, self-contained, at most `payload_bytes(length)` long. "all_reduce": a one-dimensional
            array of a dtype that the ring adds, of the same shape on every rank. Never a view of `values`.
        """

    @abstractmethod
    def decompress(self, payload: Array, out: Float32, draw: Draw, size: int = 1) -> None:
        """Write the estimate into `out`, all of it.

        Args:
            payload: one worker's, or with "all_reduce" the sum of those of `size` workers. Not modified.
            out: float32 of shape (length,): the estimate of what that worker compressed, or of the sum.
            draw: as for `compress`. Of a sum it may be any worker's.
        Raises:
            ValueError: the payload of an "all_gather" can't be of a vector of this length.
        """

    @abstractmethod
    def payload_bytes(self, length: int) -> int:
        """Bytes that a vector of `length` takes on the wire; an upper bound unless `fixed_size`."""

    @abstractmethod
    def constants(self, length: int) -> Constants:
        """Bounds that hold for every vector of this length."""

    def num_sent(self, payload: Array, length: int) -> int:
        """Elements of the vector that the payload speaks of, the density's numerator: all, unless a sparsifier."""
        return length

    def add_to(self, payload: Array, total: Float32, draw: Draw, scratch: Float32) -> None:
        """total += the estimate, of an "all_gather" payload. A sparsifier touches only what was sent.

        Args:
            scratch: of the same shape as `total`; overwritten.
        """
        self.decompress(payload, scratch, draw)
        total += scratch

    def finish(self, total: Float32, size: int) -> None:
        """Turn the sum of `size` workers' estimates into what training uses, in place: their mean. (Or a majority.)"""
        total /= np.float32(size)

    # The same on a device, as torch operations. A compressor that has them gives the payloads of its other form, and
    # decodes them alike, bit by bit; nothing waits for the device. `gradiveq.device` says what that takes.

    @property
    def on_device(self) -> bool:
        """Whether this class has a torch form. One that is derived from such a class may do something else."""
        return "compress_tensor" in type(self).__dict__

    def compress_tensor(self, values: Tensor, draw: Draw) -> Tensor:
        """The payload, as of `compress`.

        Args:
            values: float32 of shape (length,), on any device.
        Returns:
            The payload, there; may be a view of `values`.
        """
        raise TypeError(f"{self.name} has no torch form")

    def estimates(self, payloads: Tensor, length: int) -> Tensor:
        """What each of several payloads decodes to.

        Args:
            payloads: uint8 of shape (..., bytes), of an "all_gather".
        Returns:
            float32 of shape (..., length).
        """
        raise TypeError(f"{self.name} has no torch form")

    def decompress_tensor(self, payload: Tensor, out: Tensor, draw: Draw) -> None:
        """Write the estimate into `out`, as `decompress` does."""
        out.copy_(self.estimates(payload, len(out)))

    def add_tensors(self, payloads: Tensor, total: Tensor) -> None:
        """Add the estimates of several payloads, one after the other, as `add_to` does.

        Args:
            payloads: what was gathered, uint8 of shape (ranks, bytes).
        """
        for some in torch.split(payloads, at_once(len(total))):
            for estimate in self.estimates(some, len(total)):
                total += estimate

    def finish_tensor(self, total: Tensor, size: int) -> None:
        """Turn the sum into what training uses, as `finish` does."""
        total /= constant(size, total)


def at_once(length: int) -> int:
    """Number of payloads of vectors of this length that are decoded at once: those of 4 Mi elements, or one."""
    return max(1, (1 << 22) // max(1, length))
