"""The calls that aren't `Aggregator` or the hook, each in one function: the only place to change where they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

import gradiveq.ddp as ddp
from gradiveq.compressors import Draw
from gradiveq.exchange import Master, Worker, exchange_here
from gradiveq.flatten import Layout
from gradiveq.methods import Compressed
from gradiveq.powersgd import PowerSGD, PowerSGDWorker, powersgd_here
from gradiveq.specs import parse

SEED = 5


class ExchangeHere:
    """Workers with compressors, all in this process."""

    def __init__(self, method: Compressed, layout: Layout, size: int) -> None:
        parts, length, feedback = method.parts(layout.blocks), layout.length, method.feedback
        self.workers = [
            Worker(parts, length, rank=rank, size=size, seed=SEED, feedback=feedback) for rank in range(size)
        ]
        self.master = None
        if method.master is not None:
            self.master = Master(method.master_parts(layout.blocks), length, seed=SEED)

    def aggregate(self, gradients: Sequence[Any], out: Any, call: int, lr: float) -> list[Any]:
        """One aggregation into `out`; the workers' measures."""
        exchange_here(self.workers, gradients, out, call, lr, self.master)
        return [worker.measures for worker in self.workers]

    def states(self) -> list[Any]:
        return [worker.state_dict() for worker in self.workers]

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        for worker, state in zip(self.workers, states, strict=True):
            worker.load_state_dict(state)


class PowerSGDHere:
    """Workers with PowerSGD, all in this process."""

    def __init__(self, method: PowerSGD, layout: Layout, size: int) -> None:
        self.workers = [PowerSGDWorker(layout.blocks, method, seed=SEED) for _ in range(size)]

    def aggregate(self, gradients: Sequence[Any], out: Any, call: int, lr: float) -> list[Any]:
        """One aggregation into `out`; the workers' measures."""
        powersgd_here(self.workers, gradients, out, call)
        return [worker.measures for worker in self.workers]

    def states(self) -> list[Any]:
        return [worker.state_dict() for worker in self.workers]

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        for worker, state in zip(self.workers, states, strict=True):
            worker.load_state_dict(state)


def aggregation_here(method: Any, layout: Layout, size: int) -> ExchangeHere | PowerSGDHere:
    return PowerSGDHere(method, layout, size) if isinstance(method, PowerSGD) else ExchangeHere(method, layout, size)


def probed(model: nn.Module, methods: Mapping[str, Any]) -> ddp.Probe:
    """A probe of a model, wrapped or not, of 4 samples and 3 iterations that are measured."""
    made = {name: parse(one) if isinstance(one, str) else one for name, one in methods.items()}
    return ddp.probe(model, made, sample=4, holdout=3, seed=SEED)  # type: ignore[arg-type]


def compressed(spec: str, values: Any, call: int) -> tuple[Any, Any]:
    """A compressor's payload of a vector, and its estimate."""
    method = parse(spec)
    assert isinstance(method, Compressed)
    compressor, draw = method.compressor, Draw(seed=7, call=call, rank=1, part=2)
    payload = compressor.compress(values, draw, values if compressor.uses_latest else None)
    estimate = np.full(len(values), np.nan, np.float32)
    compressor.decompress(payload, estimate, draw)
    return payload, estimate
