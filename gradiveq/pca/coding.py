"""A window's bases, and the payload of a vector that is compressed with them.

| Uᵀ(g - µ) of layer 1 | of layer 2 | ... | what is in none of them, as it is |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradiveq.device.host_copy import HostCopy
from gradiveq.exchange.parts import worth_compressing
from gradiveq.flatten import Block, Bucket
from gradiveq.pca.basis import LayerBasis
from gradiveq.pca.loss import Loss
from gradiveq.pca.projection import Projection, squares


class Bases:
    """What the layers of a window are compressed with.

    Args:
        layers: by `PCASampler.rebuild`.
        min_ratio: a layer that becomes not shorter, or not so many times, goes uncompressed.

    Attributes:
        by_name: those of the layers that are compressed.
        monitor: whether encoding also measures Eq. 7, for `take_local_loss`.
        local: what was measured, by layer: ‖g_n - (U g'_n + µ/N)‖² and ‖g_n‖².
    """

    def __init__(self, layers: Sequence[LayerBasis], min_ratio: float = 1.0) -> None:
        self.by_name = {
            basis.name: basis
            for basis in layers
            # a payload as long as the layer would only add rounding errors
            if basis.ratio > 1 and worth_compressing(4 * basis.length, basis.payload_bytes, min_ratio)
        }
        self.monitor = False
        self.local: dict[str, Loss | HostCopy] = {}
        self._projections: dict[tuple[str, torch.device], Projection] = {}
        self._codings: dict[tuple[Bucket, torch.device], BucketCoding] = {}

    def projection(self, name: str, device: torch.device) -> Projection:
        """A layer's, on a device; made once."""
        found = self._projections.get((name, device))
        if found is None:
            found = self._projections[name, device] = Projection(self.by_name[name], device)
        return found

    def coding(self, bucket: Bucket, device: torch.device) -> BucketCoding:
        """How a vector is encoded, on a device; made once."""
        found = self._codings.get((bucket, device))
        if found is None:
            found = self._codings[bucket, device] = BucketCoding(bucket, self, device)
        return found

    def take_local_loss(self) -> Loss:
        """Eq. 7 over what was encoded under `monitor` since the last call, in the layers' order."""
        seen, self.local = self.local, {}
        losses = [as_loss(seen[name]) for name in self.by_name if name in seen]
        return sum(losses, Loss())

    def losses_on(self, layers: Sequence[Block], gradient: Tensor) -> dict[str, Loss]:
        """What the bases lose of a gradient that they weren't fitted on, by layer; nothing of a layer without one.

        Args:
            layers: blocks of the gradient, in the order of Fig. 3a.
            gradient: float32, averaged over the workers. Not modified.
        """
        losses = {}
        for layer in layers:
            exact = gradient[layer.where]
            estimate = exact
            if layer.name in self.by_name:
                estimate = self.projection(layer.name, gradient.device).there_and_back(exact)
            losses[layer.name] = Loss(*squares(estimate, exact).tolist())
        return losses


def as_loss(seen: Loss | HostCopy) -> Loss:
    """A loss that was perhaps computed on a device."""
    return seen if isinstance(seen, Loss) else Loss(*seen.value.tolist())


def ordered(block: Block, values: Tensor) -> Tensor:
    """A layer's gradient in the order of Fig. 3a, float32 of shape (length,); a copy."""
    out = torch.empty(block.length, dtype=torch.float32, device=values.device)
    in_order(block).view(out).copy_(block.view(values))
    return out


def in_order(block: Block) -> Block:
    """The block by itself, with neighbours that correlate (`gradiveq.flatten`)."""
    return replace(block, start=0, compressed=True, stride=None)


class BucketCoding:
    """How a vector is encoded with bases where all of it is at hand: in a bucket of the hook, or in one process.

    Attributes:
        length: of the payload, in floats.
    """

    def __init__(self, bucket: Bucket, bases: Bases, device: torch.device) -> None:
        self._bases = bases
        self._layers = [
            (block, in_order(block), bases.projection(block.name, device))
            for block in bucket.blocks
            if block.name in bases.by_name
        ]
        self._rest = _between([block for block, _, _ in self._layers], bucket.length)
        self._coded = sum(projection.length for _, _, projection in self._layers)
        self.length = self._coded + sum(part.stop - part.start for part in self._rest)

    def encode(self, values: Tensor) -> Tensor:
        """The payload, float32 of shape (length,).

        Args:
            values: float32, the vector. Not modified.
        """
        payload = values.new_empty(self.length)
        start = 0
        for block, _, projection in self._layers:
            own, coded = ordered(block, values), payload[start : start + projection.length]
            projection.encode(own, coded)
            if self._bases.monitor:
                self._bases.local[block.name] = HostCopy(squares(projection.decode(coded), own))
            start += projection.length
        for where in self._rest:
            stop = start + where.stop - where.start
            payload[start:stop] = values[where]
            start = stop
        return payload

    def decode(self, payload: Tensor, out: Tensor) -> None:
        """Write what one worker's payload, or the mean of all, decodes to.

        Args:
            out: float32, the vector; overwritten.
        """
        start = 0
        for block, by_itself, projection in self._layers:
            estimate = projection.decode(payload[start : start + projection.length])
            block.view(out).copy_(by_itself.view(estimate))
            start += projection.length
        for where in self._rest:
            stop = start + where.stop - where.start
            out[where] = payload[start:stop]
            start = stop


def _between(layers: Sequence[Block], length: int) -> list[slice]:
    """Stretches of a vector that are in none of the layers."""
    found, start = [], 0
    for layer in layers:
        if start < layer.start:
            found.append(slice(start, layer.start))
        start = layer.stop
    if start < length:
        found.append(slice(start, length))
    return found
