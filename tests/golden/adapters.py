"""The calls that aren't `Aggregator` or the hook, each in one function: the only place to change where they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

import gradiveq.ddp as ddp
from gradiveq.compressors import Draw
from gradiveq.exchange.families import make_family
from gradiveq.exchange.family import Family
from gradiveq.flatten import Layout
from gradiveq.here import Here
from gradiveq.methods import Compressed
from gradiveq.specs import parse

SEED = 5


class WorkersHere:
    """Workers of any method, all in this process."""

    def __init__(self, method: Any, layout: Layout, size: int) -> None:
        def family(rank: int) -> Family:
            return make_family(method, layout.blocks, rank=rank, size=size, seed=SEED)

        self.here = Here(family, layout.bucket, size)

    def aggregate(self, gradients: Sequence[Any], out: Any, call: int, lr: float) -> list[Any]:
        """One aggregation into `out`; the workers' measures."""
        self.here.aggregate(gradients, out, call, lr)
        return self.here.measures

    def states(self) -> list[Any]:
        return list(self.here.state_dict()["workers"])

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        self.here.load_state_dict({"workers": states})


def aggregation_here(method: Any, layout: Layout, size: int) -> WorkersHere:
    return WorkersHere(method, layout, size)


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
