"""Links whose rate is limited by a token bucket: a rested link passes a burst at once, and then its rate.

A bucket holds at most `burst` tokens, one a byte, and is filled at the link's rate whenever the link rests. A message
takes its bytes' worth of tokens when it departs; the bytes that find no token pass at the rate:

    tokens = min(burst, tokens + rate · (departed - free))      filled since the link was free
    left   = departed + max(0, bytes - tokens) / rate
    tokens = max(0, tokens - bytes),  free = left

So in any interval of t seconds at most burst + rate · t bytes pass. Without a burst this is a link of fixed rate.
`tc qdisc … tbf` of Linux works like that, and so do the network limits of most clouds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
#: A number of one link, or an array with a number for each link.
Values = TypeVar("Values", float, Floats)


def spend(
    tokens: Values,
    burst: Values,
    rate: Values,
    rested_s: Values,
    num_bytes: Values,
    least: Callable[[Any, Any], Any],
    most: Callable[[Any, Any], Any],
) -> tuple[Values, Values]:
    """Pass a message through a bucket, for one link or for an array of them.

    Args:
        tokens: in the bucket when the link became free, bytes.
        burst: the bucket's depth, bytes.
        rate: bytes per second.
        rested_s: seconds from when the link became free until the message departs.
        num_bytes: the message's length.
        least, most: `min` and `max` for numbers, `np.minimum` and `np.maximum` for arrays.
    Returns:
        Seconds until the last byte has left, and the tokens that the bucket has then.
    """
    tokens = least(burst, tokens + rested_s * rate)
    return most(0.0, num_bytes - tokens) / rate, most(0.0, tokens - num_bytes)


class TokenBuckets:
    """A table of links with a token bucket each; all are full and free at 0 s.

    Messages of one link depart one after the other, each at the earliest when the link is free. Links can be moved one
    by one (`transmit`) or all at once (`transmit_all`); both give the same bits.

    Args:
        rates: bytes per second of each link.
        bursts: depth of each link's bucket, bytes; 0 for a link of fixed rate.
    """

    def __init__(self, rates: Sequence[float], bursts: Sequence[float]) -> None:
        self._rates, self._bursts = np.array(rates, np.float64), np.array(bursts, np.float64)
        self._free_s, self._tokens = np.zeros(len(rates)), self._bursts.copy()
        # The same memory by number, as Python's floats: several times as fast as an array's elements.
        self._rate_of, self._burst_of, self._free_s_of, self._tokens_of = (
            cast("memoryview[float]", column.data) for column in (self._rates, self._bursts, self._free_s, self._tokens)
        )

    def __len__(self) -> int:
        return len(self._rates)

    def free_s(self, link: int) -> float:
        """Moment at which the last byte of this link's messages so far has left, seconds."""
        return self._free_s_of[link]

    @property
    def all_free_s(self) -> Floats:
        """Moments at which the links are free, seconds: a copy of shape (links,)."""
        return self._free_s.copy()

    def transmit(self, link: int, departed_s: float, num_bytes: float) -> float:
        """A message departs on one link.

        Args:
            departed_s: `free_s(link)` or later.
        Returns:
            When its last byte has left, seconds.
        """
        rested_s = departed_s - self._free_s_of[link]
        passing_s, self._tokens_of[link] = spend(
            self._tokens_of[link], self._burst_of[link], self._rate_of[link], rested_s, num_bytes, min, max
        )
        self._free_s_of[link] = left_s = departed_s + passing_s
        return left_s

    def transmit_all(
        self, departed_s: Floats, num_bytes: Floats, sending: npt.NDArray[np.bool_] | None = None
    ) -> Floats:
        """A message departs on every link.

        Args:
            departed_s: shape (links,); for each link when it is free or later.
            num_bytes: shape (links,).
            sending: shape (links,), which links have a message; by default all.
        Returns:
            When each last byte has left, seconds; where nothing was sent, when the link is free. Shape (links,).
        """
        rested_s = departed_s - self._free_s
        passing_s, tokens = spend(self._tokens, self._bursts, self._rates, rested_s, num_bytes, np.minimum, np.maximum)
        left_s: Floats = departed_s + passing_s
        if sending is not None:
            left_s, tokens = np.where(sending, left_s, self._free_s), np.where(sending, tokens, self._tokens)
        self._free_s[:], self._tokens[:] = left_s, tokens
        return left_s

    def state_dict(self) -> dict[str, list[float]]:
        """State of all links, for `load_state_dict`: when each is free, and the tokens that it has then."""
        return {"free": self._free_s.tolist(), "tokens": self._tokens.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a table of as many links was."""
        self._free_s[:], self._tokens[:] = state["free"], state["tokens"]
