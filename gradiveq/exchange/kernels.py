"""Array operations that methods are written in: NumPy and Numba on the host, torch on a device.

Both do the same on float32 vectors. On a device nothing waits for it, so that nothing can be decided by what is in an
array: `all_finite` gives a tensor there, and `choose` takes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import torch
from scipy.linalg.blas import sgemm
from torch import Tensor

from gradiveq.arrays.counter_random import Draw
from gradiveq.arrays.orthonormal import orthonormalise
from gradiveq.compressors.base import Compressor
from gradiveq.exchange.flaws import flaw
from gradiveq.exchange.message import pack, unpack
from gradiveq.exchange.parts import Part
from gradiveq.flatten import Block

#: Gives the key of a rank's random numbers for a part.
DrawOf = Callable[[Part, int], Draw]


class Kernels(Protocol):
    """See the module. Arrays are NumPy's (`HostKernels`) or tensors (`gradiveq.device.kernels.DeviceKernels`).

    Attributes:
        device: where the arrays are.
        on_host: whether they are NumPy's.
    """

    device: torch.device
    on_host: bool

    def tensor(self, array: Any) -> Tensor:
        """The same memory as a tensor."""

    def array(self, tensor: Tensor) -> Any:
        """What these kernels take, of a tensor; on its device the same memory."""

    def empty(self, length: int) -> Any: ...

    def zeros(self, length: int) -> Any: ...

    def compress(self, compressor: Compressor, values: Any, draw: Draw, latest: Any) -> Any: ...

    def decompress(self, compressor: Compressor, payload: Any, out: Any, draw: Draw, size: int = 1) -> None: ...

    def finish(self, compressor: Compressor, total: Any, size: int) -> None: ...

    def pack(self, payloads: Sequence[Any], parts: Sequence[Part]) -> Any:
        """The message of an all-gather, uint8 (`gradiveq.exchange.message`)."""

    def unpack(self, message: Any, parts: Sequence[Part], rank: int) -> Sequence[Any]:
        """Each part's payload."""

    def add_gathered(self, parts: Sequence[Part], messages: Any, out: Any, draw_of: DrawOf) -> None:
        """Add what every rank's message decodes to."""

    def as_bytes(self, payload: Any) -> Any: ...

    def from_bytes(self, message: Any, like: Any) -> Any:
        """Numbers of the type that `like` has."""

    def all_finite(self, values: Any) -> Any:
        """Whether there is no infinity and no NaN."""

    def choose(self, condition: Any, values: Any, other: Any) -> Any:
        """`values` if the condition holds, `other` (an array or a number) otherwise."""

    def flaw_of(self, values: Any, blocks: Sequence[Block], reason: int) -> Any:
        """The code of a block with an infinity or a NaN, or 0."""

    def orthonormal(self, matrices: Sequence[Any]) -> list[Any]:
        """Orthonormal columns that span at least those of each matrix, which are at most as many as its rows."""

    def normal(self, draw: Draw, shape: tuple[int, int]) -> Any:
        """Standard normal numbers, the same on all ranks."""

    def write_product(self, p: Any, q: Any, out: Any) -> None:
        """`out` becomes P Qᵀ."""

    def subtract_product(self, p: Any, q: Any, out: Any) -> None:
        """`out` becomes `out` - P Qᵀ."""


class HostKernels:
    """NumPy arrays."""

    device = torch.device("cpu")
    on_host = True

    def tensor(self, array: Any) -> Tensor:
        """NumPy's bfloat16 is a stranger to torch."""
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def array(self, tensor: Tensor) -> Any:
        tensor = tensor.cpu()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def empty(self, length: int) -> Any:
        return np.empty(length, np.float32)

    def zeros(self, length: int) -> Any:
        return np.zeros(length, np.float32)

    def compress(self, compressor: Compressor, values: Any, draw: Draw, latest: Any) -> Any:
        return compressor.compress(values, draw, latest if compressor.uses_latest else None)

    def decompress(self, compressor: Compressor, payload: Any, out: Any, draw: Draw, size: int = 1) -> None:
        compressor.decompress(payload, out, draw, size)

    def finish(self, compressor: Compressor, total: Any, size: int) -> None:
        compressor.finish(total, size)

    def pack(self, payloads: Sequence[Any], parts: Sequence[Part]) -> Any:
        return pack(payloads, parts)

    def unpack(self, message: Any, parts: Sequence[Part], rank: int) -> Sequence[Any]:
        return list(unpack(message, parts, rank))

    def add_gathered(self, parts: Sequence[Part], messages: Any, out: Any, draw_of: DrawOf) -> None:
        scratch = np.empty(max((part.length for part in parts), default=0), np.float32)
        for rank, message in enumerate(messages):
            for part, payload in zip(parts, unpack(message, parts, rank), strict=True):
                total = out[part.where]
                part.compressor.add_to(payload, total, draw_of(part, rank), scratch[: part.length])

    def as_bytes(self, payload: Any) -> Any:
        return payload.view(np.uint8)

    def from_bytes(self, message: Any, like: Any) -> Any:
        return np.frombuffer(message.tobytes(), like.dtype)

    def all_finite(self, values: Any) -> Any:
        return bool(np.isfinite(values).all())

    def choose(self, condition: Any, values: Any, other: Any) -> Any:
        return values if condition else np.broadcast_to(np.asarray(other, np.float32), values.shape)

    def flaw_of(self, values: Any, blocks: Sequence[Block], reason: int) -> Any:
        with overflows_allowed():
            if math.isfinite(np.dot(values, values)) or np.isfinite(values).all():
                return 0
        worst = next(block for block in blocks if not np.isfinite(values[block.where]).all())
        return flaw(reason, worst.index)

    def orthonormal(self, matrices: Sequence[Any]) -> list[Any]:
        """Gram-Schmidt in a fixed order of additions (`gradiveq.arrays.orthonormal`)."""
        found = [np.array(matrix, np.float32, order="C") for matrix in matrices]
        for matrix in found:
            orthonormalise(matrix)
        return found

    def normal(self, draw: Draw, shape: tuple[int, int]) -> Any:
        return draw.generator(shared=True).standard_normal(shape, np.float32)

    def write_product(self, p: Any, q: Any, out: Any) -> None:
        if out.flags.c_contiguous:
            np.matmul(p, q.T, out=out)
        else:
            np.matmul(q, p.T, out=out.T)

    def subtract_product(self, p: Any, q: Any, out: Any) -> None:
        left, right, fortran = (q, p, out.T) if out.flags.c_contiguous else (p, q, out)
        written = sgemm(-1.0, left, right, beta=1.0, c=fortran, trans_b=True, overwrite_c=True)
        assert np.shares_memory(written, out)


HOST = HostKernels()


def overflows_allowed() -> np.errstate:
    """Within, NumPy warns of no overflow and no invalid operation: drivers look for what isn't finite, on all ranks."""
    return np.errstate(over="ignore", invalid="ignore")
