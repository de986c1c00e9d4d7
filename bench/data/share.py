"""What all data sets share: how a failure is told, and which rank sees what in which iteration."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class DataError(ValueError):
    """A data set is missing, damaged, or too small for what was asked."""


class Shares:
    """The order in which one rank sees the items of a data set: a function of the iteration, with no state to save.

    An epoch is a permutation drawn from (seed, epoch), cut into global batches of size·batch_size items, of which rank
    r takes the r-th part; what is left at its end is dropped. So the items of an iteration don't depend on how many
    ranks share it.

    Args:
        num_items: how many items the data set has.
        batch_size: items per rank and iteration.
        rank: the rank of the caller, 0 … size - 1.
        size: number of ranks.
        seed: 0 … 2**63 - 1; the same on all ranks.
        items: what they are, for the error's text.
        source: source of the data set, for messages.
    Raises:
        DataError: if a global batch has more items than there are.
        ValueError: if another argument is outside its bounds.
    """

    def __init__(
        self, num_items: int, batch_size: int, rank: int, size: int, seed: int, *, items: str, source: str
    ) -> None:
        check_share(batch_size, rank, size)
        check_seed(seed)
        if size * batch_size > num_items:
            raise DataError(
                f"{size} ranks x {batch_size} {items} each need {size * batch_size:,} training {items}, "
                f"but there are {num_items:,} in {source}"
            )
        self.num_items = num_items
        self.batch_size = batch_size
        self.rank = rank
        self.size = size
        self.seed = seed
        self.batches_per_epoch = num_items // (size * batch_size)
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def indices(self, iteration: int) -> npt.NDArray[np.int64]:
        """Which items this rank sees in an iteration (from 0): int64 of shape (batch_size,)."""
        if iteration < 0:
            raise ValueError(f"iteration must be at least 0, got {iteration}")
        epoch, position = divmod(iteration, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, generator(self.seed, ORDER, epoch).permutation(self.num_items)
        start = (position * self.size + self.rank) * self.batch_size
        return self._order[start : start + self.batch_size]

    @property
    def part(self) -> slice:
        """This rank's part of what is drawn for the whole global batch."""
        return slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)


#: Streams of random numbers.
ORDER, AUGMENT, NEGATIVES, TEST_NEGATIVES = range(4)


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """A counter-based generator of its own for each (seed, stream, index): none depends on what was drawn before."""
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, stream]))


def check_share(batch_size: int, rank: int, size: int) -> None:
    """A ValueError where a share of a global batch can't be."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= rank < size:
        raise ValueError(f"rank must be 0 to size - 1, got rank {rank} of size {size}")


def check_seed(seed: int) -> None:
    """A ValueError where a seed is outside what `generator` takes."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be 0 to 2**63 - 1, got {seed}")
