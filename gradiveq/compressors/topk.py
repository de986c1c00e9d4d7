"""Top-k: the k elements of largest magnitude, exactly; of equal ones the first."""

from __future__ import annotations

from dataclasses import dataclass

from gradiveq.compressors.base import Constants, Float32
from gradiveq.compressors.bits import UInt32
from gradiveq.compressors.select import check_kept, num_kept, top_k
from gradiveq.compressors.sparse import Sparsifier, positions_bytes


@dataclass(frozen=True)
class TopK(Sparsifier):
    """Sends the k elements of largest magnitude as they are: no k elements leave a smaller error.

    The optimum for a budget of k elements an iteration (Lemma 2 of Sahu et al. 2021), and a δ-contraction with
    δ = k/length (section 4.5 there): what is left is at most 1 - k/length of ‖x‖², as much as of equal elements.

    Args:
        ratio: the fraction of the elements to keep: k = max(1, round(ratio·length)).
        count: k itself, instead of `ratio`; a shorter vector is sent whole.
    Raises:
        ValueError: if a value is out of its range.
    """

    ratio: float = 0.01
    count: int | None = None

    name = "topk"

    def __post_init__(self) -> None:
        check_kept(self.ratio, self.count)

    def select(self, values: Float32) -> tuple[UInt32, Float32]:
        return top_k(values, num_kept(len(values), self.ratio, self.count))

    def payload_bytes(self, length: int) -> int:
        k = num_kept(length, self.ratio, self.count)
        return positions_bytes(length, k) + 4 * k

    def constants(self, length: int) -> Constants:
        if length == 0:
            return Constants(omega=0.0, delta=1.0, variance=0.0, absolute=0.0)
        delta = num_kept(length, self.ratio, self.count) / length
        return Constants(omega=0.0, delta=delta, variance=1 - delta, absolute=0.0 if delta == 1 else None)
