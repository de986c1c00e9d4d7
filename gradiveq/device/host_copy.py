"""Looking at what a GPU computes without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A tensor's copy on the host, begun now on the current stream, and waited for when it is looked at.

    Of a tensor on the CPU it is the tensor itself.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._event = tensor, None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # The copy's stream, by name: a backend's thread may have another device as its current one.
            self._event.record(torch.cuda.current_stream(tensor.device))

    @property
    def value(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host
