"""Checks that all ranks of a torchrun job do together, many in one job, and what they share."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradiveq.ddp as ddp

TIMEOUT_S = 40
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Register a function that every rank of the job calls."""
    CHECKS[function.__name__] = function
    return function


def rank() -> int:
    return dist.get_rank()


def size() -> int:
    return dist.get_world_size()


class Net(nn.Module):
    """Two convolutions and a linear layer: about 3,700 parameters, in three buckets of DDP's (see `wrap`)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1))
        return y


def batch(iteration: int, of: int | None = None, num: int = 4) -> tuple[Tensor, Tensor]:
    """A rank's own images and labels in an iteration."""
    generator = torch.Generator().manual_seed(1000 * iteration + (rank() if of is None else of))
    return torch.randn(num, 3, 8, 8, generator=generator), torch.randint(0, 10, (num,), generator=generator)


def wrap(net: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(net, **{"bucket_cap_mb": 0.001, **options})


def hooked(net: nn.Module, method: Any, *, hook: Any = ddp.hook, wrapping: Any = None, **options: Any) -> Any:
    """(the wrapped model, the state)"""
    model = wrap(net, **(wrapping or {}))
    state = ddp.State(model, method, **options)
    model.register_comm_hook(state, hook)
    return model, state


@contextmanager
def staying(on_device: bool = True) -> Iterator[None]:
    """Within, methods that have torch forms use them on this rank, for gradients on the CPU too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradiveq.ddp.driver.on_device", lambda buffer: on_device)
        yield


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int) -> None:
    x, y = batch(iteration)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def train(model: nn.Module, iterations: Sequence[int], optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    """Train, look after each step whether all ranks have the same weights, and return them."""
    optimizer = optimizer or sgd(model)
    for iteration in iterations:
        step(model, optimizer, iteration)
        same_everywhere(weights(model), f"the weights after iteration {iteration}")
    return weights(model)


def plain(iterations: int) -> Tensor:
    """What DDP trains without a hook."""
    return train(wrap(Net()), range(iterations))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([real(p.detach()).flatten().float() for p in model.parameters()])


def real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([real(p.grad.detach()).flatten() for p in model.parameters() if p.grad is not None])


def gathered(tensor: Tensor) -> list[Tensor]:
    """By rank."""
    everybody = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(everybody, tensor.contiguous())
    return everybody


def same_everywhere(tensor: Tensor, what: str) -> None:
    """To the last bit."""
    everybody = gathered(tensor.detach().view(-1))
    assert all(torch.equal(everybody[0], one) for one in everybody), f"{what} differ between ranks"
    assert tensor.isfinite().all(), f"{what} are not finite"


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    off = float((a - b).abs().max())
    assert off <= tolerance, f"off by {off}, of {float(b.abs().max())}"


@contextmanager
def raises(kind: type[Exception], *parts: str) -> Iterator[None]:
    """On every rank, with these words in the message."""
    problem = None
    try:
        yield
    except kind as error:
        missing = [part for part in parts if part not in str(error)]
        problem = f"{missing} not in: {error}" if missing else None
    else:
        problem = f"no {kind.__name__}"
    everybody: list[Any] = [None] * size()
    dist.all_gather_object(everybody, problem)
    assert not any(everybody), everybody


def floats(*values: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(values, np.float32)


def main() -> None:
    """Do the checks that are named (all by default) and write what came of them: {name: error or None} a line."""
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(CHECKS)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    for name in names:
        start, problem = time.monotonic(), None
        try:
            CHECKS[name]()
        except Exception:
            problem = traceback.format_exc()
        everybody: list[Any] = [None] * size()
        dist.all_gather_object(everybody, problem)
        if rank() == 0:
            problems = [f"rank {i}: {one}" for i, one in enumerate(everybody) if one is not None]
            with out.open("a") as file:
                seconds = time.monotonic() - start
                file.write(json.dumps({"name": name, "error": "\n".join(problems) or None, "seconds": seconds}) + "\n")
    dist.barrier()
    os._exit(0)  # some checks leave exchanges behind that no other rank takes part in
