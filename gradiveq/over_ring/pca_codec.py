"""GradiVeQ as a linear codec of the ring: Eq. 3-5 of Yu et al. 2018 on runs of slices.

Worker n sends Uᵀ(g_n - µ/N) for each slice (Eq. 3). The ring adds these to Uᵀ(g - µ) (Eq. 4), and U times that, plus µ,
is the estimate of the sum (Eq. 5). d floats stand for K.

**Products.** A worker's part of a layer is a few slices only, often 1 to 9, and OpenBLAS is slow at products of such a
thin matrix with a large basis: it rearranges the whole basis for each. Up to SMALL_PRODUCT multiplications it takes a
path without that, so the basis is cut in tiles and NumPy's batched product runs over them: about 3 times faster for
K = 4096, d = 512 and 9 slices on one core (`python -m bench.pca_refit --codec`; torch's own product was in between).
Encoding cuts U by rows, decoding by columns, for which a second copy of U is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gradiveq.flatten import Block, slice_sizes
from gradiveq.pca.basis import Basis, LayerBasis
from gradiveq.pca.config import Float32, PCAConfig, SliceGroup
from gradiveq.pca.loss import Loss
from ring.codec import Array, Codec, Composite, Hop, IdentityCodec, Payload
from ring.segments import Region

#: OpenBLAS takes its path for small matrices up to this many multiplications.
SMALL_PRODUCT = 1_000_000
ENCODE_ROWS = 16
DECODE_COLUMNS = 64


class _Projection:
    """One group's basis, laid out for products with few slices. Holds two copies of the basis, 8*d*K bytes."""

    def __init__(self, group: SliceGroup, basis: Basis, mean: Float32) -> None:
        d, k = basis.components_.shape
        self.group, self.components = group, basis.components_
        # Uᵀ µ/N of each slice, subtracted from Uᵀ g_n: a pass over the short payload instead of one over the vector.
        self.offsets: Float32 = group.slices(mean) @ self.components.T
        rows, columns = d // ENCODE_ROWS, k // DECODE_COLUMNS
        self._rows, self._columns = rows * ENCODE_ROWS, columns * DECODE_COLUMNS
        self._encode_tiles = self.components[: self._rows].reshape(rows, ENCODE_ROWS, k).transpose(0, 2, 1)
        self._decode_tiles = np.ascontiguousarray(
            self.components[:, : self._columns].reshape(d, columns, DECODE_COLUMNS).transpose(1, 0, 2)
        )
        self._encode_step = max(1, SMALL_PRODUCT // (ENCODE_ROWS * k))
        self._decode_step = max(1, SMALL_PRODUCT // (DECODE_COLUMNS * d))

    def project(self, slices: Float32, out: Float32) -> None:
        """out = slices @ Uᵀ: (m, K) to (m, d)."""
        for i in range(0, len(slices), self._encode_step):
            x, y = slices[i : i + self._encode_step], out[i : i + self._encode_step]
            if self._rows:
                tiled = y[:, : self._rows].reshape(len(x), -1, ENCODE_ROWS).transpose(1, 0, 2)
                np.matmul(x, self._encode_tiles, out=tiled)
            if self._rows < len(self.components):
                np.matmul(x, self.components[self._rows :].T, out=y[:, self._rows :])

    def expand(self, coded: Float32, out: Float32) -> None:
        """out = coded @ U: (m, d) to (m, K)."""
        for i in range(0, len(coded), self._decode_step):
            x, y = coded[i : i + self._decode_step], out[i : i + self._decode_step]
            if self._columns:
                tiled = y[:, : self._columns].reshape(len(x), -1, DECODE_COLUMNS).transpose(1, 0, 2)
                np.matmul(x, self._decode_tiles, out=tiled)
            if self._columns < self.components.shape[1]:
                np.matmul(x, self.components[:, self._columns :], out=y[:, self._columns :])


class PCASizes(Codec):
    """What is known of a layer's codec without its bases, for runs without data: cuts, bytes, work.

    Args:
        name: of the layer.
        slice_size: K.
        groups: (elements, d) of each group of slices.
    """

    linear = True

    def __init__(self, name: str, slice_size: int, groups: Sequence[tuple[int, int]]) -> None:
        self._name, self._k = name, slice_size
        self._length = sum(length for length, _ in groups)
        self._description = f"pca K={slice_size} d={_runs([d for _, d in groups])}"
        self._regions = tuple(_regions(slice_size, groups))

    def describe(self, dtype: np.dtype[Any]) -> str:
        return self._description

    def regions(self, length: int, dtype: np.dtype[Any]) -> Sequence[Region]:
        if length != self._length:
            raise ValueError(f"the basis of {self._name} is for {self._length} elements, got {length}")
        if dtype != np.float32:
            raise ValueError(f"PCA bases are float32, got a {dtype} vector for {self._name}")
        return self._regions

    def amounts(self, kind: str, values: Array, start: int, payload: Payload) -> Sequence[tuple[str, float]]:
        """Multiplications of the product with the basis, K for each float of the payload; bytes of an addition."""
        if kind == "add":
            return super().amounts(kind, values, start, payload)
        return [(f"pca.{kind}", self._k * len(payload) / 4)]

    def encode(self, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        raise NotImplementedError("these are sizes; `PCACodec` encodes")

    def reduce(self, incoming: Payload, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        own = payload.view(np.float32)
        np.add(incoming.view(np.float32), own, own)

    def decode(self, payload: Payload, start: int, values: Array, size: int) -> None:
        raise NotImplementedError("these are sizes; `PCACodec` decodes")


class PCACodec(PCASizes):
    """One layer's slices, projected onto their groups' bases. float32 only.

    A slice is K elements; of the last one, which may be shorter, the padding's zeros are neither read nor written: the
    matching columns of the basis are left out of the product.

    Cost: 2*d flops per element to encode and to decode, one pass over the vector to add µ; no scratch as long as the
    vector, except µ itself for the last `size`.

    Attributes:
        basis: what the layer is compressed with.
        monitor: whether `encode` also sums up Eq. 7 for `take_local_loss`; two more passes over what it encodes.
    """

    def __init__(self, basis: LayerBasis) -> None:
        self._projections = [_Projection(g, b, basis.mean_) for g, b in zip(basis.groups, basis.bases, strict=True)]
        super().__init__(
            basis.name, basis.slice_size, [(p.group.stop - p.group.start, len(p.components)) for p in self._projections]
        )
        self.basis, self.monitor = basis, False
        self._description += f" {basis.digest}"
        self._mean_sums: tuple[int, Float32] = (1, basis.mean_)
        self._local_loss = Loss()

    def _cut(self, start: int, values: Array, payload: Payload) -> Iterator[tuple[_Projection, int, Array, Float32]]:
        """(projection, start within the group, values, coded (slices, d)) of each group that is touched."""
        coded, stop, taken = payload.view(np.float32), start + len(values), 0
        for p in self._projections:
            first, last = max(start, p.group.start), min(stop, p.group.stop)
            if first < last:
                d, m = len(p.components), -(-(last - first) // self._k)
                part = coded[taken : taken + m * d].reshape(m, d)
                yield p, first - p.group.start, values[first - start : last - start], part
                taken += m * d

    def encode(self, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        self._encode(values, start, payload)
        if self.monitor:
            self._local_loss += self._loss(values, start, payload)

    def _encode(self, values: Array, start: int, payload: Payload) -> None:
        for p, offset, part, coded in self._cut(start, values, payload):
            full, rest = divmod(len(part), self._k)
            if full:
                p.project(part[: full * self._k].reshape(full, self._k), coded[:full])
            if rest:
                np.matmul(p.components[:, :rest], part[full * self._k :], out=coded[full])
            first = offset // self._k
            coded -= p.offsets[first : first + len(coded)]

    def decode(self, payload: Payload, start: int, values: Array, size: int) -> None:
        if self._mean_sums[0] != size:
            self._mean_sums = (size, self.basis.mean_ * np.float32(size))
        for p, _, part, coded in self._cut(start, values, payload):
            full, rest = divmod(len(part), self._k)
            if full:
                p.expand(coded[:full], part[: full * self._k].reshape(full, self._k))
            if rest:
                np.matmul(coded[full], p.components[:, :rest], out=part[full * self._k :])
        values += self._mean_sums[1][start : start + len(values)]

    def _loss(self, values: Array, start: int, payload: Payload) -> Loss:
        """‖x - UUᵀx‖² with x = values - µ/N, and ‖values‖².

        The rows of Uᵀ are orthonormal: the first is ‖x‖² - ‖Uᵀx‖², and Uᵀx is in the payload. Only of a shorter last
        slice the reconstruction is formed.
        """
        mean = self.basis.mean_[start : start + len(values)]
        norm = float(values @ values)
        error = norm - 2 * float(values @ mean) + float(mean @ mean)
        for p, _, part, coded in self._cut(start, values, payload):
            rest = len(part) % self._k
            error -= float(np.vdot(coded, coded))
            if rest:
                y = coded[-1]
                estimate = y @ p.components[:, :rest]
                # ‖x - e‖² = ‖x‖² - 2 yᵀy + ‖e‖² with e = Uy cut to the slice, of which one yᵀy is subtracted already
                error += float(estimate @ estimate) - float(y @ y)
        return Loss(max(error, 0.0), norm)

    def take_local_loss(self) -> Loss:
        """‖g_n - (U g'_n + µ/N)‖² of Eq. 7, and ‖g_n‖², over what was encoded under `monitor` since the last call."""
        taken, self._local_loss = self._local_loss, Loss()
        return taken


def _runs(values: Sequence[int]) -> str:
    """ "3x5,7" for [5, 5, 5, 7]."""
    parts: list[list[int]] = []
    for value in values:
        if parts and parts[-1][1] == value:
            parts[-1][0] += 1
        else:
            parts.append([1, value])
    return ",".join(f"{count}x{value}" if count > 1 else str(value) for count, value in parts)


def _regions(slice_size: int, groups: Sequence[tuple[int, int]]) -> Iterator[Region]:
    """One region per run of groups with the same d."""
    lengths: list[tuple[int, int]] = []
    for length, d in groups:
        if lengths and lengths[-1][0] == d:
            lengths[-1] = (d, lengths[-1][1] + length)
        else:
            lengths.append((d, length))
    for d, length in lengths:
        yield Region(length, slice_size, 4 * d, 4 * d)


def gradient_codec(
    blocks: Sequence[Block], bases: Mapping[str, LayerBasis], trailing: int = 0
) -> tuple[Composite, dict[str, PCACodec]]:
    """The codec of the whole vector: PCA for the layers that have a basis, as they are the others.

    Args:
        blocks: of the layout, in the vector's order.
        bases: by layer.
        trailing: elements after the last block that are not compressed (control values of the caller).
    Returns:
        (the codec, the compressed layers' codecs by name).
    """
    layers = {name: PCACodec(basis) for name, basis in bases.items()}
    return _compose(blocks, layers, trailing), layers


def gradient_sizes(blocks: Sequence[Block], config: PCAConfig, trailing: int = 0) -> Composite:
    """The codec of `gradient_codec`, of sizes only.

    Args:
        config: with `n_components` or `ratio`; what a loss threshold leads to only data can tell.
    Raises:
        ValueError: for a loss threshold, or a slice size that fits no layer.
    """
    sizes = slice_sizes(blocks, config.slice_size)
    layers = {}
    for block in blocks:
        if block.compressed:
            k = sizes[block.name]
            d = config.wanted_components(k)
            if d is None:
                raise ValueError("without data, d must be fixed: give `n_components` or `ratio`, not a loss threshold")
            if d < k:
                layers[block.name] = PCASizes(block.name, k, [(block.length, d)])
    return _compose(blocks, layers, trailing)


def _compose(blocks: Sequence[Block], layers: Mapping[str, Codec], trailing: int) -> Composite:
    """The layers' codecs, and the identity for what is between and behind them."""
    parts: list[tuple[int, Codec]] = []
    rest = 0
    for block in blocks:
        if block.name in layers:
            if rest:
                parts.append((rest, IdentityCodec()))
            parts.append((block.length, layers[block.name]))
            rest = 0
        else:
            rest += block.length
    if rest + trailing:
        parts.append((rest + trailing, IdentityCodec()))
    return Composite(parts)
