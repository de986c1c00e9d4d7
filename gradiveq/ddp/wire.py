"""Sums as a process group carries them.

int16 becomes int32 (no backend adds int16), and where the bucket itself has 16 bits (a half-precision model, or the
fp16/bf16 wrappers) float32 payloads are sent in its type. Those of one type follow one another in one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gradiveq.ddp.driver import Delivery


class Sums:
    """The messages of several payloads.

    Args:
        payloads: of any shape, as families give them, on any device.
        codes: whether every message ends with the ranks' codes.
        half: whether float32 payloads are sent in the bucket's own 16 bits.

    Attributes:
        messages: on the bucket's device, to be summed in place.
    """

    def __init__(self, delivery: Delivery, payloads: Sequence[Tensor], *, codes: bool, half: bool) -> None:
        self._delivery, self._payloads, self._half = delivery, payloads, half
        wires = [self._to_wire(payload.reshape(-1)) for payload in payloads]
        self._kinds: dict[torch.dtype, list[int]] = {}
        for i, wire in enumerate(wires):
            self._kinds.setdefault(wire.dtype, []).append(i)
        self.messages: list[Tensor] = []
        for kind, chosen in self._kinds.items():
            lengths = [len(wires[i]) for i in chosen]
            message = delivery.message(sum(lengths), kind)
            if not codes:
                message = message[: sum(lengths)]
            torch._foreach_copy_(message[: sum(lengths)].split_with_sizes(lengths), [wires[i] for i in chosen])
            self.messages.append(message)

    def totals(self, device: torch.device) -> list[Tensor]:
        """The sum of each payload, in its shape and type, once the messages are summed."""
        totals = list(self._payloads)
        for message, chosen in zip(self.messages, self._kinds.values(), strict=True):
            there, start = message.to(device), 0
            for i in chosen:
                payload = self._payloads[i]
                total = self._from_wire(there[start : start + payload.numel()], payload.dtype)
                totals[i] = total.reshape(payload.shape)
                start += payload.numel()
        return totals

    def _to_wire(self, payload: Tensor) -> Tensor:
        if self._half and payload.dtype == torch.float32:
            return self._delivery.to_wire(payload)
        return payload.int() if payload.dtype == torch.int16 else payload

    def _from_wire(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        half = self._half and dtype == torch.float32
        return self._delivery.from_wire(total) if half else total.to(dtype)
