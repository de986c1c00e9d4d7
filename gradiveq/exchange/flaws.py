"""Why a worker's gradient is of no use, as a number that fits into the first message of an exchange.

Nobody's numbers may be spoilt by one rank's infinity, nobody may wait for a rank that has given up, and everybody's
error is to name the layer and the rank. So a rank in trouble sends zeros, and a *code* in the same message:

    code = vote + 2·(0, or 1 + reason + REASONS·(index of the parameter))

`vote` is 1 if the rank wants to end GradiVeQ's window. Over a ring the message has room for the number of flawed ranks
and of votes, and a second exchange tells what is wrong where; a callback of DDP's may begin none, so there the codes
themselves travel. Gathered messages carry them as they are. In sums each rank has elements of its own, in which all
others have 0: digits to base 100, which every type that is ever summed (int8, bfloat16, ...) adds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BASE = 100
#: Bytes of a code in a gathered message.
CODE_BYTES = 8
NOT_FINITE, OVERFLOWED, REPLACED, UNKNOWN = range(4)
REASONS = (
    "has a non-finite gradient",
    "has a gradient that overflows float32 together with what error feedback remembers",
    "was replaced in the model after gradiveq.ddp.State was made",
    "is in one bucket with parameters that gradiveq.ddp.State was not made of",
)

#: Reasons after which training can't go on.
HARD = (REPLACED, UNKNOWN)


def flaw(reason: int, index: int) -> int:
    """The code, without a vote, of a parameter that is in trouble."""
    return 2 * (1 + reason + len(REASONS) * index)


@dataclass(frozen=True)
class Codes:
    """Everybody's codes in sums.

    Attributes:
        size: number of ranks.
        num_parameters: that a code may speak of.
    """

    size: int
    num_parameters: int

    @property
    def digits(self) -> int:
        largest = flaw(len(REASONS) - 1, max(0, self.num_parameters - 1)) + 1
        return len(_digits(largest))

    @property
    def length(self) -> int:
        """Elements that they take at the end of a message."""
        return self.size * self.digits

    def write(self, tail: Tensor, rank: int, code: Tensor | int) -> None:
        """Overwrite the end of a message by this rank's code, an integer, on any device."""
        tail.zero_()
        own = tail[rank * self.digits : (rank + 1) * self.digits]
        if isinstance(code, int):
            if code:
                digits = _digits(code)
                own[: len(digits)] = torch.tensor(digits, dtype=tail.dtype)
            return
        powers = BASE ** torch.arange(self.digits, device=code.device)
        own.copy_((code // powers) % BASE)

    def read(self, tail: Tensor) -> Tensor:
        """int64 of shape (size,), by rank, on the message's device."""
        powers = BASE ** torch.arange(self.digits, device=tail.device)
        return (tail.view(self.size, self.digits).round().long() * powers).sum(dim=1)


def is_hard(code: Tensor | int) -> bool:
    """Whether a rank says that it can't go on; known without looking at a device, where only gradients are judged."""
    return isinstance(code, int) and code > 1 and (code // 2 - 1) % len(REASONS) in HARD


def any_flaw(codes: Tensor) -> bool:
    return bool((codes > 1).any())


def votes(codes: Tensor) -> int:
    return int((codes % 2).sum())


def story(codes: Sequence[int], names: Sequence[str]) -> list[tuple[int, str]]:
    """(reason, "layer ... on rank ...") of each rank that is in trouble."""
    found = []
    for rank, code in enumerate(codes):
        if code > 1:
            index, reason = divmod(code // 2 - 1, len(REASONS))
            found.append((reason, f"{names[index]} {REASONS[reason]} on rank {rank}"))
    return found


def _digits(number: int) -> list[int]:
    digits = []
    while number:
        number, digit = divmod(number, BASE)
        digits.append(digit)
    return digits
