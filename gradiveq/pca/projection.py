"""GradiVeQ's projection of a layer as torch products, on the gradient's device: Eq. 3-5 of Yu et al. 2018.

The ring's codec on the host (`gradiveq.over_ring.pca_codec`) meets a few slices at a time and cuts its products
accordingly; a bucket of the hook, or a device that has the whole gradient (`gradiveq.over_ring.staging`), has a layer's
slices all at once, which one product per basis takes. (The product subtracts Uᵀµ as well, so there is no second pass
that a fused kernel could save.)

A user's loop may call this under `torch.autocast`, which leaves alone what is told where to write (`out`), and `dot`
of float32. Bases in 16 bits would be worse, and others on a rank whose callback runs on another thread.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gradiveq.pca.basis import LayerBasis


class Projection:
    """One layer's bases on a device. Memory: the bases, 4·d·K bytes each, µ, and Uᵀµ.

    Attributes:
        length: floats on the wire.
        multiplications: of encoding, and of decoding.
    """

    def __init__(self, basis: LayerBasis, device: torch.device) -> None:
        self._k = basis.slice_size
        self._mean = torch.from_numpy(basis.mean_).to(device)
        self._groups: list[tuple[slice, int, Tensor, Tensor]] = []  # elements, slices, U (d, K), Uᵀµ (slices, d)
        self.length = 0
        for group, one in zip(basis.groups, basis.bases, strict=True):
            components = torch.from_numpy(one.components_).to(device)
            elements, num = slice(group.start, group.stop), group.num_slices
            offsets = _product(self._slices(self._mean[elements], num), components.T)
            self._groups.append((elements, num, components, offsets))
            self.length += offsets.numel()
        self.multiplications = self.length * basis.slice_size

    def encode(self, gradient: Tensor, out: Tensor) -> None:
        """out = Uᵀ(g - µ) of all slices, the last one of a group padded after centring.

        Args:
            gradient: float32 of shape (num_elements,), in the order of `gradiveq.flatten.Block`. Not modified.
            out: float32 of shape (length,).
        """
        place = 0
        for elements, num, components, offsets in self._groups:
            coded = out[place : place + offsets.numel()].view(offsets.shape)
            torch.addmm(offsets, self._slices(gradient[elements], num), components.T, beta=-1, out=coded)
            place += offsets.numel()

    def decode(self, coded: Tensor, out: Tensor | None = None) -> Tensor:
        """U g' + µ, float32 of shape (num_elements,), of one worker's g' or of the mean of all.

        Args:
            out: overwritten and returned, instead of a new tensor.
        """
        out = torch.empty_like(self._mean) if out is None else out
        place = 0
        for elements, _, components, offsets in self._groups:
            slices = _product(coded[place : place + offsets.numel()].view(offsets.shape), components)
            out[elements] = slices.view(-1)[: elements.stop - elements.start]
            place += offsets.numel()
        return out.add_(self._mean)

    def there_and_back(self, gradient: Tensor) -> Tensor:
        """What is left of one worker's gradient, or of the mean of all: U Uᵀ(g - µ) + µ."""
        coded = torch.empty(self.length, dtype=torch.float32, device=gradient.device)
        self.encode(gradient, coded)
        return self.decode(coded)

    def _slices(self, values: Tensor, num: int) -> Tensor:
        missing = num * self._k - len(values)
        return (F.pad(values, (0, missing)) if missing else values).view(num, self._k)


def squares(estimate: Tensor, exact: Tensor) -> Tensor:
    """‖ĝ - g‖² and ‖g‖² of float32 vectors: shape (2,), on their device, so that nothing waits for them."""
    difference = estimate - exact
    return torch.stack([difference.dot(difference), exact.dot(exact)])


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))
