"""What PCA costs on one core: `python -m bench.pca_refit`, with `--codec` also encoding and decoding.

Refit of a layer of K = 4096 and d = 512, in two cases: 900 samples held (the Gram matrix is decomposed) and 4,500
samples (the covariance is held; its eigenvectors come from a randomised solver, whose captured variance is compared
with the exact one's). Data: noise whose variance falls as a power of the component's number, in a reflected basis.

Codec: all convolutions of ResNet-32 at ratio 8, whole and in the pieces of a ring of 6, and one layer of K = 4096;
beside it the same products as plain `np.matmul`, and as one large square product (what the core can do).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
from threadpoolctl import threadpool_limits

from gradiveq.flatten import Block, default_slice_size
from gradiveq.over_ring.pca_codec import gradient_codec
from gradiveq.pca import Basis, Float32, GroupSamples, LayerBasis, PCAConfig, groups
from ring.codec import Composite, Hop
from ring.segments import PayloadMap

SLICES = 9
RESNET32 = [(16, 3), *[(16, 16)] * 10, (32, 16), *[(32, 32)] * 9, (64, 32), *[(64, 64)] * 9]


def synthetic_gradients(count: int, slice_size: int, power: float, seed: int = 0) -> Float32:
    """(count, SLICES * slice_size) with the variance of component k falling as (k + 1)^-power."""
    rng = np.random.default_rng(seed)
    scale = (np.arange(1, slice_size + 1) ** (-power / 2)).astype(np.float32)
    x = rng.standard_normal((count, SLICES, slice_size), np.float32) * scale
    reflector = rng.standard_normal(slice_size).astype(np.float32)
    reflector /= np.linalg.norm(reflector)
    x -= 2 * (x @ reflector)[..., None] * reflector
    return np.asarray(x.reshape(count, -1))


def refit(held: GroupSamples) -> None:
    held.rebuild(held.fit())


def layer_basis(name: str, filters: int, depth: int, ratio: int) -> LayerBasis:
    """Random rows at the given ratio for a 3 x 3 convolution: timing doesn't depend on what they are."""
    rng, k, length = np.random.default_rng(0), default_slice_size(filters, depth), 9 * filters * depth
    basis = Basis(rng.standard_normal((k // ratio, k), np.float32), np.ones(k // ratio, np.float32), float(k))
    return LayerBasis(name, length, k, np.zeros(length, np.float32), groups(name, length, k), (basis,))


def measure(call: Callable[[], object], repeats: int) -> tuple[float, float, str]:
    """(median seconds, median CPU seconds, "min - max" of the seconds); other load lengthens the first and the last."""
    wall, cpu = [], []
    for _ in range(repeats):
        before, cpu_before = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - before)
        cpu.append(time.process_time() - cpu_before)
    return statistics.median(wall), statistics.median(cpu), f"{min(wall):.2g} - {max(wall):.2g}"


def time_codec(title: str, shapes: list[tuple[int, int]], pieces: int, repeats: int) -> None:
    """Encode and decode all layers in `pieces` segments, and the same products by plain matmul."""
    bases = [layer_basis(str(i), f, d, 8) for i, (f, d) in enumerate(shapes)]
    blocks, offset = [], 0
    for basis, (f, d) in zip(bases, shapes, strict=True):
        blocks.append(Block(basis.name, offset, basis.length, (f, d, 3, 3), True))
        offset += basis.length
    codec: Composite = gradient_codec(blocks, {basis.name: basis for basis in bases})[0]
    vector = np.random.default_rng(1).standard_normal(offset, np.float32)
    places = PayloadMap(codec.regions(offset, vector.dtype))
    cuts = places.cut(0, offset, pieces)
    payload, hop = np.zeros(places.num_bytes, np.uint8), Hop(0, 6, 0)
    spans = [(a, b, slice(places.byte_at(a), places.byte_at(b))) for a, b in pairwise(cuts)]

    def encode() -> None:
        for a, b, wire in spans:
            codec.encode(vector[a:b], a, payload[wire], hop)

    def decode() -> None:
        for a, b, wire in spans:
            codec.decode(payload[wire], a, vector[a:b], 6)

    operands = [(basis.bases[0].components_, basis.mean_.reshape(-1, basis.slice_size)) for basis in bases]
    coded = [np.zeros((len(x), len(u)), np.float32) for u, x in operands]
    flops = sum(2 * x.size * len(u) for u, x in operands)
    for name, call in (
        ("encode", encode),
        ("decode", decode),
        ("matmul X U^T", lambda: [np.matmul(x, u.T) for u, x in operands]),
        ("matmul Y U", lambda: [np.matmul(y, u) for (u, _), y in zip(operands, coded, strict=True)]),
    ):
        median, _, spread = measure(call, repeats)
        print(
            f"{title}, {name}: {1e3 * median:.2f} ms ({spread} s), "
            f"{flops / median / 1e9:.0f} GFLOP/s, {4 * offset / median / 1e9:.2f} GB/s"
        )


def main() -> None:
    with threadpool_limits(1):
        measure_all()


def measure_all() -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.pca_refit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slice-size", type=int, default=4096)
    parser.add_argument("--components", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--power", type=float, nargs="*", default=[0.5, 1.0, 2.0], help="how the variances fall")
    parser.add_argument("--loss-threshold", type=float, nargs="*", default=[], help="also time the fit for these λ")
    parser.add_argument("--codec", action="store_true", help="only encoding and decoding")
    args = parser.parse_args()
    if args.codec:
        square = np.ones((1024, 1024), np.float32)
        median, _, _ = measure(lambda: square @ square, 15)
        print(f"one square product: {2 * 1024**3 / median / 1e9:.0f} GFLOP/s")
        time_codec("ResNet-32, whole", RESNET32, 1, 51)
        time_codec("ResNet-32, 6 segments", RESNET32, 6, 51)
        time_codec("64 x 64 x 3 x 3", [(64, 64)], 1, 51)
        return
    k, d = args.slice_size, args.components
    print(f"K = {k}, d = {d}, one core, median of {args.repeats} (min - max)")
    for power in args.power:
        for samples in (900, 4500):
            gradients = synthetic_gradients(samples // SLICES, k, power)
            (group,) = groups("layer", gradients.shape[1], k)
            config = PCAConfig(fit_slices="all", n_components=d)
            held = GroupSamples(group, config)
            before = time.perf_counter()
            for gradient in gradients:
                held.add(gradient)
            sampling_ms = 1e3 * (time.perf_counter() - before) / len(gradients)
            median, cpu, spread = measure(partial(refit, held), args.repeats)
            centred = gradients - gradients.mean(axis=0)
            rows = centred.reshape(-1, k).astype(np.float64)
            exact = np.linalg.eigvalsh(rows @ rows.T if len(rows) < k else rows.T @ rows)[::-1]
            basis = held.rebuild(held.fit())
            captured = float(np.square(rows @ basis.components_.T.astype(np.float64)).sum() / exact[:d].sum())
            print(
                f"variance ~ k^-{power:g}, {samples} samples: {median:.2f} s ({spread}), "
                f"CPU {cpu:.2f} s, {sampling_ms:.2f} ms per sampling iteration, "
                f"{held.num_bytes / 2**20:.0f} MiB held, captured variance {captured:.6f} of the exact solver's"
            )
            for threshold in args.loss_threshold:
                held.config = PCAConfig(fit_slices="all", loss_threshold=threshold)
                median, cpu, _ = measure(partial(refit, held), 1)
                found = len(held.fit().explained_variance)
                total = exact.sum()
                least = int(np.argmax(np.cumsum(exact) >= (1 - threshold) * total)) + 1
                print(
                    f"    loss threshold {threshold:g}: {median:.2f} s, CPU {cpu:.2f} s, "
                    f"d = {found}, exact least d = {least}"
                )
