"""One worker's payloads of an all-gather in one message, behind one another; before one whose size depends on the data
stands its length:

    | payload of a fixed size | length, uint32 | payload | ...
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import numpy as np

from gradiveq.arrays.float32 import Array
from gradiveq.exchange.parts import Part

#: Bytes that the length takes.
LENGTH_BYTES = 4


def pack(payloads: Sequence[Array], parts: Sequence[Part]) -> Array:
    """The message, uint8.

    Args:
        payloads: of each part, uint8.
    """
    message: list[Array] = []
    for payload, part in zip(payloads, parts, strict=True):
        if not part.compressor.fixed_size:
            message.append(np.array([len(payload)], np.uint32).view(np.uint8))
        message.append(payload)
    return np.concatenate(message) if message else np.empty(0, np.uint8)


def unpack(message: Array, parts: Sequence[Part], rank: int) -> Iterator[Array]:
    """The payload of each part in a message, views of it.

    Args:
        rank: whose message it is, for the errors' text.
    Raises:
        ValueError: it can't be a message of these parts.
    """
    place = 0
    for part in parts:
        num_bytes = part.compressor.payload_bytes(part.length)
        if not part.compressor.fixed_size:
            most = num_bytes
            num_bytes = int.from_bytes(message[place : place + LENGTH_BYTES].tobytes(), sys.byteorder)
            place += LENGTH_BYTES
            if num_bytes > most:
                raise ValueError(
                    f"rank {rank} sent {num_bytes} bytes for {part.name}, of which there are at most {most}"
                )
        if place + num_bytes > len(message):
            raise ValueError(
                f"rank {rank} sent {len(message)} bytes, which end within {part.name}, {place + num_bytes} are due"
            )
        yield message[place : place + num_bytes]
        place += num_bytes
    if place != len(message):
        raise ValueError(f"rank {rank} sent {len(message)} bytes, {len(message) - place} more than its parts have")
