"""What `bench.calibrate` times: an iteration's computing, and the codecs' real kernels on real gradients.

Processor time of the calling thread, so that what else wants the cores does not count (though it takes caches and
memory bandwidth). With more than one thread the calling one takes part in all that they do, so its time is theirs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from bench.data import Batches, Dataset
from bench.job.train import Settings
from bench.models import MODELS
from gradiveq.flatten import Layout, slice_sizes
from gradiveq.over_ring.pca_codec import PCACodec, gradient_codec
from gradiveq.over_ring.qsgd import QSGD
from gradiveq.pca import Basis, Float32, LayerBasis, PCAConfig, groups
from gradiveq.pca.coding import Bases
from ring.codec import Codec, Hop
from ring.fit import fit_line, flag, quartiles, relative_errors, table
from ring.plan import CHUNK_BYTES
from ring.segments import PayloadMap, cut_segments

#: Elements of a chunk: from a small model between many workers to the longest that 512 KiB of payload hold.
QSGD_ELEMENTS = (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
#: Slices of a layer in a chunk. ResNet's layers have 9.
PCA_SLICES = (1, 3, 9)
#: Workers among which the whole model's codec is cut, to see what the rates make of it.
WORKERS = (2, 6, 20)
WARM_UP = 3
SAMPLE_S = 0.005


@dataclass(frozen=True)
class Case:
    """One call of a codec, timed.

    Attributes:
        label: its row in the report.
        amounts: the amounts by rate, as `Codec.amounts` has them.
        seconds: CPU time of each repeat.
    """

    label: str
    amounts: Mapping[str, float]
    seconds: Sequence[float]

    @property
    def median_s(self) -> float:
        return float(np.median(self.seconds))

    def predicted_s(self, rates: Mapping[str, float]) -> float | None:
        """What these rates make of it; None if one is missing."""
        if any(name not in rates for name in self.amounts):
            return None
        return sum(amount / rates[name] for name, amount in self.amounts.items())


@dataclass(frozen=True)
class MeasuredRates:
    """All that was timed on one rank, or on all.

    Attributes:
        iteration: CPU seconds of "forward", "backward" and "update", of each iteration.
        qsgd, model: what rates are taken from; the latter are PCA's.
        layers: what else the rates of PCA are compared with.
    """

    iteration: Mapping[str, Sequence[float]]
    qsgd: Sequence[Case]
    model: Sequence[Case]
    layers: Sequence[Case]

    @property
    def iteration_s(self) -> float:
        return sum(float(np.median(samples)) for samples in self.iteration.values())

    def rates(self) -> dict[str, float]:
        """Elements per second of QSGD, multiplications per second of PCA."""
        return rates_of(self.qsgd) | rates_of(self.model)


def measure_all(dataset: Dataset, model_name: str, batch_size: int, ratio: float, repeats: int) -> MeasuredRates:
    """Time everything on this rank. Cost: some 10 s."""
    layout, gradient, seconds = iterations(dataset, model_name, batch_size, repeats)
    return MeasuredRates(
        seconds,
        list(qsgd_cases(gradient, repeats)),
        list(model_cases(layout, gradient, ratio, repeats)),
        list(layer_cases(layout, gradient, ratio, repeats)),
    )


def merge(ranks: Sequence[MeasuredRates]) -> MeasuredRates:
    """The same with the samples of all ranks."""

    def together(cases: Sequence[Case]) -> Case:
        return replace(cases[0], seconds=[second for case in cases for second in case.seconds])

    return MeasuredRates(
        {name: [second for rank in ranks for second in rank.iteration[name]] for name in ranks[0].iteration},
        *(
            [together(cases) for cases in zip(*(getattr(rank, part) for rank in ranks), strict=True)]
            for part in ("qsgd", "model", "layers")
        ),
    )


def report(measured: MeasuredRates, rates: Mapping[str, float]) -> str:
    """What was measured, and what the rates miss of it."""
    rows = []
    for name, samples in measured.iteration.items():
        low, median, high = quartiles(samples)
        rows.append([name, f"{median * 1e3:.2f}", f"{low * 1e3:.2f}-{high * 1e3:.2f}"])
    rows.append(["iteration", f"{measured.iteration_s * 1e3:.2f}", ""])
    parts = ["\nan iteration's computing (ms)", table(("", "median", "quartiles"), rows)]
    groups_of_cases = {
        "QSGD, 4 bits: one rate for all lengths": measured.qsgd,
        "PCA: the whole model, which the rate is taken from": measured.model,
        "PCA: single layers, of which the basis stays in the caches; not fitted": measured.layers,
    }
    for title, cases in groups_of_cases.items():
        rows = []
        for case in cases:
            low, median, high = quartiles(case.seconds)
            predicted_s = case.predicted_s(rates)
            row = ["+".join(case.amounts), case.label, f"{median * 1e6:.1f}", f"{low * 1e6:.1f}-{high * 1e6:.1f}"]
            if predicted_s is None:
                rows.append([*row, "-", "no rate"])
            else:
                error = float(relative_errors(median, predicted_s))
                rows.append([*row, f"{predicted_s * 1e6:.1f}", f"{error:+.1%}", flag(error)])
        parts += [f"\n{title} (us)", table(("rate", "of", "measured", "quartiles", "by the rate", "error"), rows)]
    parts.append("\n" + "\n".join(f"{name:<12} {rates[name]:.4g} per second" for name in measured.rates()))
    return "\n".join(parts)


def iterations(
    dataset: Dataset, model_name: str, batch_size: int, repeats: int
) -> tuple[Layout, Float32, dict[str, list[float]]]:
    """Train for a few iterations.

    Returns:
        The model's layout, its last gradient, and CPU seconds of "forward", "backward" and "update" in each iteration.
    """
    model = MODELS[model_name](dataset.num_classes, seed=0)
    settings = Settings(WARM_UP + repeats, batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    batches = Batches(dataset, batch_size)
    seconds: dict[str, list[float]] = defaultdict(list)
    model.train()
    for iteration in range(WARM_UP + repeats):
        images, labels = batches.batch(iteration)
        begin = time.thread_time()
        loss = functional.cross_entropy(model(images), labels)
        loss.item()
        forward = time.thread_time()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        backward = time.thread_time()
        optimizer.step()
        update = time.thread_time()
        if iteration >= WARM_UP:
            seconds["forward"].append(forward - begin)
            seconds["backward"].append(backward - forward)
            seconds["update"].append(update - backward)
    layout = Layout(model)
    gradient = np.empty(layout.length, np.float32)
    layout.pack(gradient)
    return layout, gradient, dict(seconds)


def measure(
    label: str, codec: Codec, kind: str, vector: Float32, repeats: int, chunks: Sequence[tuple[int, int]] | None = None
) -> Case:
    """Time `kind` of a codec on chunks of a vector, one after the other.

    Args:
        vector: all that the codec is for. Not modified.
        chunks: first element and the one behind the last of each; one chunk of all of it if left out.
    """
    chunks = [(0, len(vector))] if chunks is None else chunks
    payload_map = PayloadMap(codec.regions(len(vector), vector.dtype))
    hop = Hop(1, 2, 1)
    work = []
    for start, stop in chunks:
        values = vector[start:stop]
        num_bytes = payload_map.byte_at(stop) - payload_map.byte_at(start)
        incoming, payload = np.zeros(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
        codec.encode(values, start, incoming, hop)
        work.append((values, start, incoming, payload, np.empty_like(values)))

    def once() -> None:
        for values, start, incoming, payload, decoded in work:
            if kind == "encode":
                codec.encode(values, start, payload, hop)
            elif kind == "recode":
                codec.reduce(incoming, values, start, payload, hop)
            else:
                codec.decode(incoming, start, decoded, 2)

    def seconds(count: int) -> float:
        begin = time.thread_time()
        for _ in range(count):
            once()
        return (time.thread_time() - begin) / count

    seconds(1)
    count = max(1, int(SAMPLE_S / max(seconds(2), 1e-7)))
    amounts: dict[str, float] = defaultdict(float)
    for values, start, _, payload, _ in work:
        for name, amount in codec.amounts(kind, values, start, payload):
            amounts[name] += amount
    return Case(label, dict(amounts), [seconds(count) for _ in range(repeats)])


def qsgd_cases(gradient: Float32, repeats: int) -> Iterator[Case]:
    """Encoding, recoding and decoding chunks of a gradient with 4 bits."""
    codec = QSGD()
    for elements in QSGD_ELEMENTS:
        vector = np.resize(gradient, elements)
        for kind in ("encode", "recode", "decode"):
            yield measure(f"{elements} elements", codec, kind, vector, repeats)


def layer_cases(layout: Layout, gradient: Float32, ratio: float, repeats: int) -> Iterator[Case]:
    """Encoding and decoding some slices of each kind of layer, again and again: its basis stays in the caches."""
    offsets = {block.name: block.start for block in layout.blocks}
    seen = set()
    for basis in bases(layout, gradient, ratio):
        k, d = basis.slice_size, len(basis.bases[0].components_)
        if (kind_of_layer := (k, d, basis.length)) in seen:
            continue
        seen.add(kind_of_layer)
        codec, start = PCACodec(basis), offsets[basis.name]
        slices = -(-basis.length // k)
        for count in sorted({*(count for count in PCA_SLICES if count < slices), slices}):
            chunks = [(0, min(count * k, basis.length))]
            for kind in ("encode", "decode"):
                vector = gradient[start : start + basis.length]
                yield measure(f"K={k} d={d}, {count} slices", codec, kind, vector, repeats, chunks)


def bases(layout: Layout, gradient: Float32, ratio: float) -> Iterator[LayerBasis]:
    """A basis for each layer that is compressed, of the size that a fit would have, orthonormal but random.

    How long a product takes does not depend on the numbers. The gradient is taken for the mean.
    """
    config = PCAConfig(ratio=ratio)
    drawn: dict[tuple[int, int], Float32] = {}
    generator = np.random.default_rng(0)
    for block in layout.blocks:
        if block.compressed:
            k = slice_sizes(layout.blocks)[block.name]
            d = config.wanted_components(k) or k
            if (k, d) not in drawn:
                columns = generator.standard_normal((k, d), dtype=np.float32)
                drawn[k, d] = np.ascontiguousarray(np.linalg.qr(columns)[0].T)
            basis = Basis(drawn[k, d], np.ones(d, np.float32), float(k))
            whole = groups(block.name, block.length, k)
            mean = gradient[block.start : block.stop].copy()
            yield LayerBasis(block.name, block.length, k, mean, whole, (basis,) * len(whole))


def model_cases(layout: Layout, gradient: Float32, ratio: float, repeats: int) -> Iterator[Case]:
    """Encoding and decoding the whole model in the chunks that 2, 6 and 20 workers cut it into."""
    codec, _ = gradient_codec(layout.blocks, Bases(list(bases(layout, gradient, ratio))).by_name)
    for workers in WORKERS:
        segments = cut_segments(codec.regions(len(gradient), gradient.dtype), workers, CHUNK_BYTES)
        chunks = [(chunk.start, chunk.stop) for segment in segments for chunk in segment]
        for kind in ("encode", "decode"):
            yield measure(f"model, {len(chunks)} chunks", codec, kind, gradient, repeats, chunks)


def rates_of(cases: Sequence[Case]) -> dict[str, float]:
    """Amounts per second: for each rate a line through the origin of its cases.

    What a case copies beside (a model's few uncompressed elements) is not worth a rate of its own.
    """
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for case in cases:
        name = max(case.amounts, key=case.amounts.__getitem__)
        points[name].append((case.amounts[name], case.median_s))
    return {name: 1 / fit_line(*zip(*of, strict=True), through_origin=True).slope for name, of in points.items()}
