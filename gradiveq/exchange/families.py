"""Which family carries a method out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from gradiveq.compressors.base import Compressor
from gradiveq.compressors.identity import Identity
from gradiveq.exchange.compressed import Compression, check_size
from gradiveq.exchange.direct import Direct
from gradiveq.exchange.family import Family
from gradiveq.exchange.lowrank import LowRank
from gradiveq.exchange.parts import Part, worth_compressing
from gradiveq.exchange.requests import Call
from gradiveq.exchange.switching import AutomaticThreshold, Switching
from gradiveq.exchange.windows import Windows
from gradiveq.flatten import Block, Bucket
from gradiveq.methods import Accordion, AutoThreshold, Compressed, GradiVeQ, Method, Plain, QSGDRing, takes_mean
from gradiveq.powersgd import PowerSGD


def make_family(
    method: Method | Compressor,
    blocks: Sequence[Block],
    *,
    rank: int,
    size: int,
    seed: int = 0,
    layers: Sequence[Block] | None = None,
    warmup: int = 0,
    min_ratio: float | None = None,
    one_vector: bool = True,
) -> Family:
    """One worker's side of a method.

    Args:
        blocks: all parameters, as if they were in one vector.
        rank, size: as in MPI.
        seed: of random numbers; the same on every worker.
        layers: what GradiVeQ may compress; None for the blocks that say so.
        warmup: the least iterations that GradiVeQ doesn't compress.
        min_ratio: a layer that would not become so many times smaller goes uncompressed; None for all layers as the
            method says.
        one_vector: whether all blocks travel in one vector.
    Raises:
        TypeError: it is no method.
        ValueError: the method doesn't fit the parameters or the number of workers.
    """
    match method:
        case Plain() | QSGDRing():
            return Direct(method)
        case GradiVeQ():
            chosen = [block for block in blocks if block.compressed] if layers is None else layers
            return Windows(method, chosen, rank, size, warmup=warmup, min_ratio=min_ratio or 1.0)
        case PowerSGD():
            return LowRank(method, seed=seed)
        case Compressor():
            return _compression(Compressed(method), blocks, size, seed, min_ratio, one_vector)
        case Compressed():
            return _compression(method, blocks, size, seed, min_ratio, one_vector)
        case Accordion(low=PowerSGD() as low):
            return Switching(method, LowRank(low, seed=seed), blocks)
        case Accordion(low=Compressed() as low, high=Compressed() as high):
            inner = _compression(low, blocks, size, seed, min_ratio, one_vector)
            both = [tuple(one.parts(blocks)) for one in (low, high)]
            check_size((part.compressor for part in both[1]), size)
            return Switching(method, inner, blocks, *both)
        case AutoThreshold():
            length = blocks[-1].stop if blocks else 0
            return AutomaticThreshold(
                method,
                length,
                rank,
                size,
                lambda threshold: _compression(method.compressed(threshold), blocks, size, seed, min_ratio, one_vector),
            )
    known = ", ".join(kind.__name__ for kind in get_args(Method))
    raise TypeError(f"`method` must be one of {known}, or a compressor, got {method!r}")


def _compression(
    method: Compressed, blocks: Sequence[Block], size: int, seed: int, min_ratio: float | None, one_vector: bool
) -> Compression:
    parts = method.parts(blocks)
    used = [part.compressor for part in parts] + ([] if method.master is None else [method.master])
    check_size((part.compressor for part in parts), size)
    if method.granularity == "model":

        def parts_of(call: Call) -> Sequence[Part]:
            return [Part("model", 0, call.bucket.length, method.compressor, call.index)]

    elif method.granularity == "layer":
        layers_of: dict[Bucket, list[Part]] = {}
        chosen = {part.name: _worth_it(part.compressor, part.length, min_ratio) for part in parts}

        def parts_of(call: Call) -> Sequence[Part]:
            if call.bucket not in layers_of:
                layers_of[call.bucket] = [
                    Part(one.name, one.start, one.stop, chosen[one.name], one.index) for one in call.bucket.blocks
                ]
            return layers_of[call.bucket]

    else:

        def parts_of(call: Call) -> Sequence[Part]:
            return parts

    return Compression(
        parts_of,
        seed=seed,
        feedback=method.feedback,
        master=method.master,
        num_parts=len(parts) if one_vector else len(blocks),
        on_device=all(compressor.on_device for compressor in used),
    )


def _worth_it(compressor: Compressor, length: int, min_ratio: float | None) -> Compressor:
    """The identity where the wanted ratio isn't reached; where sizes depend on the data, nobody knows."""
    if min_ratio is None or not compressor.fixed_size or not takes_mean(compressor):
        return compressor
    return compressor if worth_compressing(4 * length, compressor.payload_bytes(length), min_ratio) else Identity()
