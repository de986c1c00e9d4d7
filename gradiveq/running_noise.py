"""M, ζ² and σ² of `gradiveq.noise` in every iteration of training, with or without compression.

Compressed gradients make two things hard: nobody has the exact mean of the gradients any more, and vectors as long as
the gradient to add it up in are dear. So each worker keeps a *sketch* s = S·g of its gradient, w = 509 numbers: element
i is multiplied by a random sign and added to number i mod w. S is the same on all workers and in all iterations. It is
linear, so that the mean of the workers' sketches is that of their exact mean gradient, whatever travels; and over the
signs E‖S·x‖² = ‖x‖². So the estimates are made of sketches as they would be of gradients.

What the signs add: the relative standard deviation of one ‖S·x‖² is at most √(2/w) = 6 % where x² is spread evenly
over the w numbers (w is prime, so that no layer's shape lines up with it). Averages over vectors that point in
different directions have less: the noise's of a window next to nothing. ‖∇f‖², which only M's regression uses, has it
all.

    every iteration     this worker's sketch: local, one pass over the gradient
    every B-th one      the B sketches and three squares of each worker are averaged over the workers: one all-reduce of
                        8·(B·w + 3) bytes (41 KB). All workers then have the same new estimate, of the last m blocks
                        (fewer in the beginning), which stays for the next B iterations

With x_t = s_t - mean of s_t over the workers, the means over the workers that `noise.estimate_of` needs follow from
those squares: mean of Σ‖x_t‖² = mean of Σ‖s_t‖² - Σ‖mean of s_t‖², and likewise of sums over a block or the window.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from gradiveq.arrays.jit import FLOATS, jit
from gradiveq.compressors.base import Float32
from gradiveq.noise import BLOCK, Float64, NoiseEstimate, estimate_of, variance

#: w: numbers of a sketch.
WIDTH = 509
#: m: blocks that an estimate is of, together as many iterations as the warm-up of `methods.AutoThreshold` has.
BLOCKS = 10


class RunningNoise:
    """One worker's part in the estimates; all workers make one with the same arguments.

    In each iteration `see`, and if it counts `accept`; what that returns is averaged over the workers and handed to
    `take`.

    Args:
        size: n, the number of workers.
        seed: of the sketch's signs.
        width, block, blocks: w, B and m.
    Raises:
        ValueError: a value is out of its range.
    Memory: 8·w·(B + 2·m + 1) bytes, 126 KB, whatever the model.

    Attributes:
        estimate: of the last `blocks` whole blocks; None before the first has ended.
    """

    def __init__(
        self, size: int, *, seed: int = 0, width: int = WIDTH, block: int = BLOCK, blocks: int = BLOCKS
    ) -> None:
        for value, name, least in ((size, "size", 1), (width, "width", 1), (block, "block", 2), (blocks, "blocks", 1)):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}")
        self.size, self.block, self.blocks = size, block, blocks
        self.estimate: NoiseEstimate | None = None
        self._key = np.random.SeedSequence(seed).generate_state(1, np.uint32)[0]
        self._seen = np.zeros(width, np.float64)  # of the iteration under way
        self._signs: Tensor | None = None  # of elements on a device, once there are any
        self._sketches = np.zeros((block, width), np.float64)  # of the block under way
        self._done = 0
        # Each block's: the sums over its iterations of this worker's sketches and of the workers' mean, Σ‖x_t‖² (0
        # with one worker), and what `estimate_of` wants.
        self._own: deque[Float64] = deque(maxlen=blocks)
        self._mean: deque[Float64] = deque(maxlen=blocks)
        self._points: deque[tuple[float, float, float]] = deque(maxlen=blocks)

    def see(self, gradient: Float32 | Tensor) -> None:
        """The gradient of this worker in the iteration under way.

        Args:
            gradient: contiguous float32 of shape (length,), an array or a tensor on any device. Not modified.
        Cost: one pass, 1 ns an element on one core of an AMD EPYC; of a tensor three passes, there, and a copy of the
            sketch, and memory for the signs.
        """
        if isinstance(gradient, np.ndarray):
            _sketch(gradient, self._key, self._seen)
            return
        if self._signs is None:
            signs = np.empty(len(gradient))
            _sketch(np.ones(len(gradient), np.float32), self._key, signs)  # as wide as the vector
            self._signs = torch.from_numpy(signs).to(gradient.device, torch.int8)
        rows = gradient.new_zeros(-(-len(gradient) // len(self._seen)), len(self._seen))
        torch.mul(gradient, self._signs, out=rows.view(-1)[: len(gradient)])
        self._seen[:] = rows.sum(0, dtype=torch.float64).cpu().numpy()

    def accept(self) -> Float64 | None:
        """The iteration counts.

        Returns:
            At the end of a block float64 of shape (block·width + 3,), whose mean over the workers `take` needs now.
        """
        self._sketches[self._done] = self._seen
        self._done += 1
        if self._done < self.block:
            return None
        self._done = 0
        own = self._sketches.sum(axis=0)
        self._own.append(own)
        squares = _square(self._sketches.reshape(-1)), _square(own), _square(_total(self._own))
        return np.concatenate([self._sketches.reshape(-1), squares])

    def take(self, mean: Float64) -> None:
        """The mean over the workers of what `accept` returned; the estimate is the same bits for the same mean."""
        sketches, (squares, of_block, of_window) = mean[:-3].reshape(self.block, -1), mean[-3:].tolist()
        gradient = of_block / self.block**2
        if self.size == 1:
            self._points.append((0.0, variance(squares, of_block, self.block), gradient))
            window = [0.0, 0.0]
            iterations = self.block * len(self._points)
        else:
            shared = sketches.sum(axis=0)
            self._mean.append(shared)
            squares -= _square(sketches.reshape(-1))
            self._points.append((squares, variance(squares, of_block - _square(shared), self.block), gradient))
            iterations = self.block * len(self._points)
            square = max(0.0, of_window - _square(_total(self._mean)))
            window = [square / iterations**2, variance(sum(point[0] for point in self._points), square, iterations)]
        row = np.array([*window, *(value for point in self._points for value in point[1:])])
        self.estimate = estimate_of(row, self.size, iterations, self.block)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, between iterations; it differs by rank. Copies."""
        return {
            "sketches": self._sketches[: self._done].copy(),
            "own": [one.copy() for one in self._own],
            "mean": [one.copy() for one in self._mean],
            "points": [list(point) for point in self._points],
            "estimate": None if self.estimate is None else self.estimate.as_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is of other sketches or blocks, or of another number of workers; nothing was changed.
        """
        num_blocks, sketches = len(state["points"]), state["sketches"]
        if (
            sketches.shape[1:] != self._seen.shape
            or len(sketches) >= self.block
            or num_blocks > self.blocks
            or len(state["mean"]) != (num_blocks if self.size > 1 else 0)
        ):
            raise ValueError("the state is of sketches of another size, or of another number of workers")
        self._done = len(sketches)
        self._sketches[: self._done] = sketches
        for mine, name in ((self._own, "own"), (self._mean, "mean")):
            mine.clear()
            mine.extend(one.copy() for one in state[name])
        self._points.clear()
        self._points.extend((first, second, third) for first, second, third in state["points"])
        self.estimate = None if state["estimate"] is None else NoiseEstimate(**copy.deepcopy(state["estimate"]))


def estimate_here(noises: Sequence[RunningNoise], gradients: Sequence[Float32]) -> NoiseEstimate | None:
    """An iteration of workers that are all in this process; their estimate after it.

    Args:
        noises, gradients: by rank.
    """
    messages = []
    for noise, gradient in zip(noises, gradients, strict=True):
        noise.see(gradient)
        message = noise.accept()
        if message is not None:
            messages.append(message)
    if messages:
        mean = np.mean(messages, axis=0)
        for noise in noises:
            noise.take(mean)
    return noises[0].estimate


def _square(vector: Float64) -> float:
    return float(np.dot(vector, vector))


def _total(vectors: Iterable[Float64]) -> Float64:
    """Their sum."""
    return np.sum(list(vectors), axis=0)  # type: ignore[no-any-return]


@jit(types.void(FLOATS, types.uint32, types.float64[::1]), cache=True)
def _sketch(values: Float32, key: np.uint32, out: Float64) -> None:
    """S·values. An element's sign is the first bit of its place and the key, mixed as MurmurHash3 ends."""
    width = len(out)
    out[:] = 0.0
    for first in range(0, len(values), width):
        for j in range(min(width, len(values) - first)):
            word = np.uint32(np.uint32(first + j) * np.uint32(0x9E3779B1) + key)
            word = np.uint32((word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B))
            word = np.uint32((word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35))
            sign = np.int32(1) - np.int32(2) * np.int32(word >> np.uint32(31))
            out[j] += np.float64(values[first + j]) * np.float64(sign)
