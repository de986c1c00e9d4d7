"""Which parameters' gradients a DDP bucket holds, and where.

DDP hands a hook a flat tensor and the parameters in it; it knows them by name here, so that what is remembered of a
parameter (error memories, bases) survives DDP's rebuilding of its buckets after the first iteration, and a checkpoint.

`GradBucket.gradients()` isn't used: it views every region as contiguous, also that of a parameter in channels-last
format, whose gradient DDP stores with the parameter's own strides.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradiveq.flatten import Block, Bucket

#: Name of the module in what `torch.compile` makes of it.
COMPILED = "_orig_mod"

#: What compressors can take, all of them as float32; buckets of other types travel as they are.
COMPRESSIBLE = (torch.float32, torch.float16, torch.bfloat16)


class Parameters:
    """The parameters of a model that require a gradient when this is made. Shared ones have their first name.

    Attributes:
        names: by index.
        tensors: by index.
        shapes: of their gradients in a bucket, by index; complex ones are pairs of real numbers there, (..., 2).
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [_uncompiled(name) for name, _ in named]
        self.tensors = [p for _, p in named]
        self.shapes = [tuple(p.shape) + (2,) * p.is_complex() for p in self.tensors]
        self._index = {id(p): index for index, p in enumerate(self.tensors)}
        self._buckets: dict[tuple[int, ...], Bucket] = {}
        # (the module's own parameters, name in there, index): looked at in each iteration, so it has to be quick
        self._seats = [
            (module._parameters, key, self._index[id(p)])
            for module in model.modules()
            for key, p in module._parameters.items()
            if p is not None and id(p) in self._index
        ]

    @property
    def identity(self) -> dict[str, Any]:
        """What has to be the same on all ranks, and in a checkpoint: each parameter's type and shape."""
        pairs = zip(self.names, self.tensors, strict=True)
        return {f"model.{name}": [str(p.dtype), *p.shape] for name, p in pairs}

    @property
    def device(self) -> torch.device:
        """The first one's."""
        return self.tensors[0].device if self.tensors else torch.device("cpu")

    def replaced(self) -> int | None:
        """The index of a parameter that isn't in its module any more. Cost: about 0.1 µs a parameter."""
        tensors = self.tensors
        return next((index for module, key, index in self._seats if module.get(key) is not tensors[index]), None)

    @property
    def blocks(self) -> list[Block]:
        """All parameters as if they were in one vector, each as PyTorch has it."""
        blocks: list[Block] = []
        for index, (name, shape) in enumerate(zip(self.names, self.shapes, strict=True)):
            blocks.append(Block(name, blocks[-1].stop if blocks else 0, prod(shape), shape, False, index))
        return blocks

    def contents(self, bucket: dist.GradBucket) -> Bucket:  # type: ignore[name-defined]
        """What is where in a bucket of DDP's."""
        parameters = bucket.parameters()
        key = tuple(map(id, parameters))
        found = self._buckets.get(key)
        if found is None:
            blocks = tuple(self._blocks(parameters))
            length = sum(p.numel() * (1 + p.is_complex()) for p in parameters)
            found = self._buckets[key] = Bucket(blocks, length, len(parameters) - len(blocks))
        return found

    def _blocks(self, parameters: list[Tensor]) -> Iterator[Block]:
        start = 0
        for p in parameters:
            index = self._index.get(id(p))
            if index is None:
                return
            shape = self.shapes[index]
            yield Block(self.names[index], start, prod(shape), shape, False, index, _stride(p))
            start += prod(shape)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given; any other one is itself."""
    inner: nn.Module = getattr(model, COMPILED, model)
    return inner


def _uncompiled(name: str) -> str:
    """A parameter's name in a model of which nothing is compiled, so that both may load the other's state."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def _stride(p: Tensor) -> tuple[int, ...]:
    """Strides of the parameter's gradient in the bucket: its own if that is dense, as in DDP's reducer."""
    stride = p.stride() if _is_dense(p) else torch.empty(p.shape, device="meta").stride()
    return (*(2 * one for one in stride), 1) if p.is_complex() else tuple(stride)


def _is_dense(p: Tensor) -> bool:
    """Whether its elements fill a stretch of memory, in any order."""
    dense = 1
    for size, stride in sorted(zip(p.shape, p.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1:
            if stride != dense:
                return False
            dense *= size
    return True
