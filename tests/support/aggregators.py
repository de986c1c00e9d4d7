"""A small model with made-up gradients, and what an aggregator makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gradiveq import Aggregator, Report
from ring.handle import Ring

Vector = npt.NDArray[np.float32]
#: gradient(name, shape, rank, iteration)
Gradients = Callable[[str, tuple[int, ...], int, int], torch.Tensor]
CONTROL_BYTES = 8


def small_model() -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.Linear(6, 5))
    return model.to_empty(device="cpu")


def generator(*key: object) -> np.random.Generator:
    return np.random.default_rng([*repr(key).encode()])


def noise(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> torch.Tensor:
    return torch.from_numpy(generator(name, rank, iteration).standard_normal(shape, np.float32))


def subspace(rank_of_data: int, off: float = 0.0) -> Gradients:
    """Slices in a subspace of each convolution, about a mean of their own; `off` is the size of noise outside it."""

    def gradient(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> torch.Tensor:
        if len(shape) < 4:
            return noise(name, shape, rank, iteration)
        filters, depth, height, width = shape
        basis = generator(name).standard_normal((rank_of_data, filters * depth))
        means = generator(name, "mean").standard_normal((height * width, filters * depth))
        weights = generator(name, rank, iteration).standard_normal((height * width, rank_of_data))
        slices = means + weights @ basis
        slices += off * generator(name, rank, iteration, "off").standard_normal(slices.shape)
        return torch.from_numpy(slices.reshape(height, width, depth, filters).transpose(3, 2, 0, 1).astype(np.float32))

    return gradient


def set_gradients(model: nn.Module, gradients: Gradients, rank: int, iteration: int) -> None:
    for name, p in model.named_parameters():
        p.grad = gradients(name, tuple(p.shape), rank, iteration)


def collect(model: nn.Module) -> dict[str, Vector]:
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def train(
    ring: Ring, method: Any, iterations: int, gradients: Gradients = noise, **options: Any
) -> tuple[Aggregator, list[Report], list[dict[str, Vector]]]:
    model = small_model()
    aggregator = Aggregator(model, ring, method, **options)
    reports, results = [], []
    for iteration in range(iterations):
        set_gradients(model, gradients, ring.rank, iteration)
        reports.append(aggregator.aggregate())
        results.append(collect(model))
    return aggregator, reports, results


def exact(gradients: Gradients, size: int, iteration: int) -> dict[str, Any]:
    """The mean over workers in float64."""

    def mean(name: str, shape: tuple[int, ...]) -> Any:
        return np.mean([gradients(name, shape, rank, iteration).double().numpy() for rank in range(size)], axis=0)

    return {name: mean(name, tuple(p.shape)) for name, p in small_model().named_parameters()}


def assert_same_bits(results: list[list[dict[str, Vector]]]) -> None:
    for ranks in zip(*results, strict=True):
        for name, value in ranks[0].items():
            assert all(value.tobytes() == other[name].tobytes() for other in ranks[1:]), name


def spoilt(rank: int, iteration: int, names: dict[str, float]) -> Gradients:
    def gradient(name: str, shape: tuple[int, ...], this_rank: int, this_iteration: int) -> torch.Tensor:
        result = noise(name, shape, this_rank, this_iteration)
        if (this_rank, this_iteration) == (rank, iteration) and name in names:
            result.view(-1)[-1] = names[name]
        return result

    return gradient
