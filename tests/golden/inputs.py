"""The model and its gradients: functions of (seed, rank, iteration, name), with the same bits on every processor."""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: Added to the key of every random number: another value gives other gradients.
SEED = 0
#: The iteration in which the last rank's gradient has an infinity.
FLAWED = 3
#: Directions that the gradients of a layer have in common.
DIRECTIONS = 3


class Model(nn.Module):
    """Parameters of many shapes; `forward` gives each the gradient that it is told."""

    def __init__(self, *, odd_shapes: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 8, 3, groups=2, bias=False)
        self.line = nn.Conv1d(8, 8, 3)
        self.fc = nn.Linear(64, 10)
        self.unused = nn.Parameter(torch.zeros(7))
        self.scale = nn.Parameter(torch.zeros(()))
        if odd_shapes:
            self.empty = nn.Parameter(torch.zeros(0, 4))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.from_numpy(bell((f"init {name}", 0, 0), tuple(parameter.shape))))

    def forward(self, gradients: dict[str, Tensor], factor: float) -> Tensor:
        """A loss whose gradient is `factor` times what is given; parameters that aren't named don't take part."""
        total = torch.zeros(())
        for name, parameter in self.named_parameters():
            if name in gradients:
                total = total + (parameter * (gradients[name] * factor).to(parameter.dtype)).float().sum()
        return total


def bell(key: tuple[str, int, int], shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Numbers between -2 and 2 that are more often near 0: sums of four uniform ones, without a library's logarithm."""
    name, rank, iteration = key
    words = [zlib.crc32(name.encode()) + (SEED << 32), (rank << 32) + iteration]
    generator = np.random.Generator(np.random.Philox(key=np.array(words, np.uint64)))
    four = [generator.random(shape) for _ in range(4)]
    return np.asarray(four[0] + four[1] + four[2] + four[3] - 2)


@cache
def gradient(name: str, shape: tuple[int, ...], rank: int, iteration: int, flawed: bool = False) -> Tensor:
    """A layer's gradient: few directions, which the ranks share, and noise that grows with the iterations.

    Args:
        flawed: with an infinity in one element.
    Returns:
        float32 of this shape, shared by all callers: not to be modified.
    """
    filters, depth, rest = shape[:1], shape[1:2], shape[2:]
    total = bell((name, rank, 1000 + iteration), shape) * (0.05 * (1 + iteration))
    for direction in range(DIRECTIONS):
        title = f"{name} {direction}"
        left = bell((f"left {title}", 0, 0), (*filters, *(1 for _ in shape[1:])))
        right = bell((f"right {title}", 0, 0), (*(1 for _ in filters), *depth, *(1 for _ in rest)))
        size = bell((f"size {title}", 1 + rank, iteration), (*(1 for _ in shape[:2]), *rest))
        total = total + left * right * size
    result = torch.from_numpy(np.asarray(total, np.float32).reshape(shape).copy())
    if flawed:
        result.view(-1)[5] = torch.inf
    return result


def gradients(
    model: nn.Module, rank: int, size: int, iteration: int, *, unused: bool, flawed: int | None
) -> dict[str, Tensor]:
    """A worker's gradients by name.

    Args:
        unused: leave out `unused` on the first rank always, and on all ranks in iteration 2.
        flawed: the iteration in which the last rank has an infinity in conv2's weight; None for none.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if name == "unused" and unused and (rank == 0 or iteration == 2):
            continue
        has_flaw = name == "conv2.weight" and rank == size - 1 and iteration == flawed
        found[name] = gradient(name, tuple(parameter.shape), rank, iteration, has_flaw)
    return found
