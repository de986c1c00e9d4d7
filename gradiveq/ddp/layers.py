"""Which parameters PCA is for."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from gradiveq.ddp.bucket import COMPRESSIBLE, Parameters
from gradiveq.flatten import Block


def compressible_layers(model: nn.Module, parameters: Parameters, also: Sequence[str]) -> list[Block]:
    """The parameters that PCA is for, as blocks of one vector.

    Weights of convolutions, 1-D, 2-D and 3-D ones. Not those of transposed ones, nor with groups: there the filters
    don't see the same input, so that the correlation that the paper found has no reason to be. Not what isn't a
    convolution. `also` names such parameters nevertheless; they are flattened as (F, D, ...) by their own first two
    dimensions, of a linear layer outputs and inputs.

    Args:
        also: patterns (`fnmatch`) of names, each of which has to match something.
    Raises:
        ValueError: it doesn't, or what it matches is a vector.
    """
    wanted = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1
    }
    asked = dict.fromkeys(also, False)
    blocks, offset = [], 0
    for name, p in zip(parameters.names, parameters.tensors, strict=True):
        matching = [pattern for pattern in also if fnmatchcase(name, pattern)]
        asked.update(dict.fromkeys(matching, True))
        if any("*" not in pattern for pattern in matching) and p.dim() < 2:
            raise ValueError(f"`also` must name parameters of two or more dimensions, {name} has {p.dim()}")
        if p.dtype in COMPRESSIBLE and p.numel() and (id(p) in wanted or (matching and p.dim() >= 2)):
            blocks.append(Block(name, offset, p.numel(), tuple(p.shape), True))
            offset += p.numel()
    missing = [pattern for pattern, matched in asked.items() if not matched]
    if missing:
        raise ValueError(f"`also` has {missing[0]!r}, which matches none of the {len(parameters.names)} parameters")
    return blocks
