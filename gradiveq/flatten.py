"""A model's gradients as one flat vector, in the order in which neighbours correlate.

Fig. 3a of Yu et al. 2018: the gradients at one coordinate of all F filters of a convolution stand together, then
come depth, width and height. Element (f, d, h, w) of a (F, D, H, W) weight is at ((h·W + w)·D + d)·F + f of its
block, so that a slice of F·D adjacent elements is one filter position (h, w).

    | conv 1 (H, W, D, F) | conv 2 (H, W, D, F) | ... | biases, batch norm, fully connected, ... as PyTorch has them |
      compressed                                        uncompressed, in the same pass around the ring

Convolutions with groups (F filters don't see the same input there) and transposed ones count as "the rest".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Vector = npt.NDArray[np.float32]
AnyArray = TypeVar("AnyArray", npt.NDArray[Any], Tensor)

#: Above this, a covariance (K x K floats) takes more than 64 MiB and the refit seconds.
SLICE_LIMIT = 4096


@dataclass(frozen=True)
class Block:
    """One parameter's place in a vector.

    Attributes:
        name: as in `model.named_parameters()` of the model without wrappers.
        start: first element in the vector.
        length: number of elements.
        shape: of the parameter, (F, D, *kernel) for a convolution.
        compressed: whether it is for PCA and in the order of Fig. 3a; otherwise it is stored as PyTorch has it.
        index: number of the parameter, which its random numbers are keyed by.
        stride: of its elements in the vector, if that is neither of the two orders; as `torch.Tensor.stride`.
    """

    name: str
    start: int
    length: int
    shape: tuple[int, ...]
    compressed: bool
    index: int = 0
    stride: tuple[int, ...] | None = None

    @property
    def filters(self) -> int:
        """F of a compressed block."""
        return self.shape[0]

    @property
    def depth(self) -> int:
        """D of a compressed block."""
        return self.shape[1]

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def where(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def rows_are_innermost(self) -> bool:
        """Whether neighbours in the vector are of different rows of `matrix`: of a convolution in the order of Fig. 3a,
        of a linear layer whose weight is stored transposed."""
        if self.stride is None or self.shape[0] == 1:
            return self.compressed and self.stride is None
        return self.stride[0] == 1 and max(self.shape[1:]) > 1

    @cached_property
    def _as_matrix(self) -> tuple[int, int, bool]:
        return *matrix_shape(self.shape), self.rows_are_innermost

    def view(self, flat: Tensor) -> Tensor:
        """The block's stretch of a flat tensor, as a view in the parameter's shape."""
        part = flat[self.start : self.stop]
        if self.stride is not None:
            return part.as_strided(self.shape, self.stride)
        if not self.compressed:
            return part.view(self.shape)
        filters, depth, *kernel = self.shape
        axes = range(len(kernel))
        return part.view(*kernel, depth, filters).permute(len(kernel) + 1, len(kernel), *axes)

    def matrix(self, flat: AnyArray) -> AnyArray:
        """The gradient of two or more dimensions as a matrix, (outputs, inputs), of a convolution (F, D·H·W).

        Its columns may be in another order than PyTorch's, the same in every vector in which the block is stored alike.

        Args:
            flat: array or tensor, with the block's elements in their place.
        Returns:
            A view, contiguous or the transpose of what is.
        """
        rows, columns, rows_are_innermost = self._as_matrix
        part = flat[self.start : self.stop]
        if rows_are_innermost:
            return part.reshape(columns, rows).T
        return part.reshape(rows, columns)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(n, m) of a parameter of two or more dimensions: (outputs, inputs), of a convolution (F, D·H·W)."""
    return shape[0], prod(shape[1:])


@dataclass(frozen=True, eq=False)
class Bucket:
    """A flat vector of several parameters' gradients, in order and without gaps: DDP's, or the whole model's.

    Attributes:
        blocks: its parameters.
        length: in elements.
        unknown: how many of its parameters, from some one on, are not the model's; then `blocks` ends there.
    """

    blocks: tuple[Block, ...]
    length: int
    unknown: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(block.name for block in self.blocks)

    def title(self) -> str:
        """Its first and last parameter, for messages."""
        names = self.names
        if not names:
            return "no parameter of the model"
        return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"


def default_slice_size(filters: int, depth: int, limit: int = SLICE_LIMIT) -> int:
    """K = F·D' with D' the largest divisor of D for which F·D' <= limit.

    D' divides D, so the slices fit the layer without padding. Where F alone exceeds the limit, K = F: the correlation
    is among the F filters, so a slice is never less than that, and the covariance is then larger than the limit
    intends (4·F·F bytes).
    """
    fitting = (d for d in range(depth, 0, -1) if depth % d == 0 and filters * d <= limit)
    return filters * next(fitting, 1)


def slice_sizes(blocks: Sequence[Block], slice_size: int | None = None) -> dict[str, int]:
    """K of each compressed block, by name.

    Args:
        slice_size: any K from 1 on for all layers, where a layer shorter than K is one slice (K = its length); None
            for each layer's `default_slice_size`.
    Raises:
        ValueError: if K is below 1, or fits no layer.
    """
    layers = [block for block in blocks if block.compressed]
    if slice_size is None:
        return {block.name: default_slice_size(block.filters, block.depth) for block in layers}
    largest = max(layers, key=lambda block: block.length, default=None)
    if slice_size < 1:
        raise ValueError(f"`slice_size` must be at least 1, got {slice_size}")
    if largest is not None and slice_size > largest.length:
        raise ValueError(
            f"`slice_size` must be at most {largest.length} (F*D*H*W of {largest.name}, the largest layer), "
            f"got {slice_size}"
        )
    return {block.name: min(slice_size, block.length) for block in layers}


def convolution_weights(model: nn.Module) -> set[int]:
    """The ids of the weights of convolutions without groups: those that are flattened as in Fig. 3a."""
    return {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1
    }


class Layout:
    """The place of each parameter's gradient in the vector, and the copies there and back.

    Parameters that don't require a gradient when the layout is made are left out: nothing is sent for them. One that
    several modules share is counted once.

    A parameter whose `.grad` is None (this worker's batch didn't use it) contributes zeros, and `unpack` gives it the
    aggregated gradient: other workers may have used it, and all have to take the same step. A parameter that no worker
    uses thereby gets a zero gradient instead of None, to which an optimiser applies weight decay and momentum, on all
    workers alike; freeze it to leave it alone.

    Args:
        groups: patterns (`fnmatch`) of the names of parameters that are to stand together: a group for each.

    Attributes:
        bucket: the vector. Its blocks are the groups, then what is in none; in each the convolutions first, then the
            rest, both in the order of `model.named_parameters()`.
    """

    def __init__(self, model: nn.Module, groups: Sequence[str] = ()) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for name, p in named:
            if not p.is_floating_point():
                raise ValueError(f"gradients must be real numbers, {name} is {p.dtype}")
        convolutions = convolution_weights(model)

        def place(item: tuple[str, nn.Parameter]) -> tuple[int, bool]:
            group = next((i for i, pattern in enumerate(groups) if fnmatchcase(item[0], pattern)), len(groups))
            return group, id(item[1]) not in convolutions

        ordered = sorted(named, key=place)  # stable
        blocks: list[Block] = []
        for index, (name, p) in enumerate(ordered):
            start, shape = blocks[-1].stop if blocks else 0, tuple(p.shape)
            blocks.append(Block(name, start, prod(shape), shape, id(p) in convolutions, index))
        self.bucket = Bucket(tuple(blocks), blocks[-1].stop if blocks else 0)
        self._parameters = tuple(p for _, p in ordered)
        self._last: tuple[Vector | Tensor, list[Tensor]] | None = None

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.bucket.blocks

    @property
    def length(self) -> int:
        return self.bucket.length

    def _views(self, vector: Vector | Tensor) -> list[Tensor]:
        """Each block in its parameter's shape. The last vector's are kept: making them takes as long as copying."""
        if self._last is not None and self._last[0] is vector:
            return self._last[1]
        flat = torch.from_numpy(vector) if isinstance(vector, np.ndarray) else vector
        if flat.dtype != torch.float32 or flat.shape != (self.length,) or not flat.is_contiguous():
            raise ValueError(
                f"the vector must be contiguous float32 of shape ({self.length},), got {vector.dtype} {vector.shape}"
            )
        self._last = vector, [block.view(flat) for block in self.blocks]
        return self._last[1]

    @torch.no_grad()
    def pack(self, vector: Vector | Tensor) -> None:
        """Copy each `.grad` into the vector, whatever its device, memory format or floating-point type.

        Args:
            vector: float32 of shape (length,), an array, or a tensor on any device; overwritten.
        Cost: one strided copy per parameter.
        """
        targets, sources = [], []
        for block, view, p in zip(self.blocks, self._views(vector), self._parameters, strict=True):
            if p.grad is None:
                view.zero_()
            elif p.grad.layout != torch.strided:
                raise ValueError(f"gradients must be dense, {block.name} has a {p.grad.layout} one")
            else:
                targets.append(view)
                sources.append(p.grad)
        if targets:
            torch._foreach_copy_(targets, sources)

    @torch.no_grad()
    def unpack(self, vector: Vector | Tensor) -> None:
        """Copy the vector back into each `.grad`. A `.grad` that is None is made (see the class).

        Args:
            vector: float32 of shape (length,). Not modified.
        """
        views = self._views(vector)
        for p in self._parameters:
            if p.grad is None:
                p.grad = torch.empty_like(p)
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if grads:
            torch._foreach_copy_(grads, views)
