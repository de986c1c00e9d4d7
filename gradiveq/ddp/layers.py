"""Which parameters PCA is for.

How well it holds beyond convolutions, measured by `gradiveq.ddp.probe` (K = 512, ratio 8, fit_slices="all", 80
samples and 15 held-out iterations after 100 to 150 of training, one worker, batches of 32): held-out losses are 0.09
to 0.32 for the attention and feed-forward layers of a small transformer (2 layers, d = 128, bytes of WikiText-2's
validation text), 0.02 and 0.03 for its head and embedding, and 0.05 to 0.43 for the convolutions of ResNet-20
(CIFAR-10).
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from gradiveq.ddp.bucket import COMPRESSIBLE, Parameters
from gradiveq.flatten import Block, convolution_weights

NOTHING_TO_COMPRESS = (
    "GradiVeQ compresses the weights of convolutions (groups=1) in float32, float16 and bfloat16; `model` has none "
    "that is a parameter (a weight that weight_norm or spectral_norm computes isn't) and requires a gradient. Name "
    "others with `also`, as in also=('*.weight',), or use another method"
)


def compressible_layers(model: nn.Module, parameters: Parameters, also: Sequence[str]) -> list[Block]:
    """The parameters that PCA is for, as blocks of one vector.

    Weights of convolutions, 1-D, 2-D and 3-D ones. Not those of transposed ones, nor with groups: there the filters
    don't see the same input, so that the correlation that the paper found has no reason to be. Not what isn't a
    convolution. `also` names such parameters nevertheless; they are flattened as (F, D, ...) by their own first two
    dimensions, of a linear layer outputs and inputs.

    Args:
        also: patterns (`fnmatch`) of names, each of which has to match something.
    Raises:
        TypeError: `also` is a string.
        ValueError: a pattern matches nothing, or a vector.
    """
    if isinstance(also, str):
        raise TypeError(
            f"`also` must be a sequence of names or patterns, as in also=({also!r},), got the string {also!r}"
        )
    wanted = convolution_weights(model)
    asked = dict.fromkeys(also, False)
    blocks: list[Block] = []
    offset = 0
    for name, p in zip(parameters.names, parameters.tensors, strict=True):
        matching = [pattern for pattern in also if fnmatchcase(name, pattern)]
        asked.update(dict.fromkeys(matching, True))
        if any("*" not in pattern for pattern in matching) and p.dim() < 2:
            raise ValueError(f"`also` must name parameters of two or more dimensions, {name} has {p.dim()}")
        if p.dtype in COMPRESSIBLE and p.numel() and (id(p) in wanted or (matching and p.dim() >= 2)):
            blocks.append(Block(name, offset, p.numel(), tuple(p.shape), True, len(blocks)))
            offset += p.numel()
    missing = [pattern for pattern, matched in asked.items() if not matched]
    if missing:
        raise ValueError(f"`also` has {missing[0]!r}, which matches none of the {len(parameters.names)} parameters")
    return blocks
