"""What a compressor is applied to in a bucket."""

from __future__ import annotations

from dataclasses import dataclass

from gradiveq.compressors.base import Compressor, Draw
from gradiveq.ddp.scheme import Work


@dataclass(frozen=True, eq=False)
class BucketPart:
    """What is compressed at once: a parameter, or the bucket.

    Attributes:
        index: of its random numbers.
    """

    name: str
    index: int
    start: int
    stop: int
    compressor: Compressor

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def where(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def summed(self) -> bool:
        return self.compressor.collective == "all_reduce"

    def draw(self, seed: int, work: Work, rank: int | None = None) -> Draw:
        """The key of a rank's random numbers; by default this one's."""
        return Draw(seed, work.iteration, work.group.rank if rank is None else rank, self.index)

    def master_draw(self, seed: int, work: Work) -> Draw:
        """The key for the mean's compression, the same on all ranks."""
        return Draw(seed, work.iteration, 0, work.codes.num_parameters + self.index)
