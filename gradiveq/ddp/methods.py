"""Which scheme carries a method out on buckets, and which methods have none, and why."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import nn

from gradiveq.compressors.base import Compressor
from gradiveq.compressors.identity import Identity
from gradiveq.ddp.bucket import Parameters
from gradiveq.ddp.compressors import CompressorScheme
from gradiveq.ddp.group import Group
from gradiveq.ddp.layers import compressible_layers
from gradiveq.ddp.lowrank import PowerSGDScheme
from gradiveq.ddp.native_lowrank import NativePowerSGDScheme
from gradiveq.ddp.scheme import Scheme, Uncompressed
from gradiveq.ddp.windows import WindowsScheme
from gradiveq.exchange import check_size
from gradiveq.flatten import Block
from gradiveq.methods import Accordion, AutoThreshold, Compressed, GradiVeQ, Plain, QSGDRing, takes_mean
from gradiveq.powersgd import PowerSGD

DDPMethod = Plain | Compressor | Compressed | GradiVeQ | PowerSGD


def make_scheme(
    method: DDPMethod,
    model: nn.Module,
    parameters: Parameters,
    group: Group,
    *,
    seed: int,
    start: int,
    min_ratio: float,
    also: Sequence[str],
) -> Scheme:
    """What carries a method out on buckets.

    Raises:
        TypeError: it is no method, or none that a process group can carry; says why.
        ValueError: the method, an option and the model don't fit each other.
    """
    if also and not isinstance(method, GradiVeQ):
        raise ValueError(f"`also` is for GradiVeQ, which leaves most layers alone; got it with {method!r}")
    if not min_ratio > 0:
        raise ValueError(f"`min_ratio` must be above 0, got {min_ratio}")
    match method:
        case Plain():
            return Uncompressed()
        case GradiVeQ():
            layers = compressible_layers(model, parameters, also)
            return WindowsScheme(method, group, layers, min_ratio, start)
        case PowerSGD():
            on_device = all(p.is_cuda for p in parameters.tensors)
            return NativePowerSGDScheme(method, seed) if on_device else PowerSGDScheme(method, seed)
        case Compressor():
            return _compressors(Compressed(method), parameters, group, min_ratio, seed)
        case Compressed():
            return _compressors(method, parameters, group, min_ratio, seed)
        case QSGDRing():
            raise TypeError(
                "QSGDRing decodes, adds and encodes again at every hop of a ring, as its payloads can't be added; a "
                "process group's all_reduce adds what it is given. qsgd-gather (gradiveq.compressors) quantises alike "
                "and is gathered; gradiveq.Aggregator has the ring"
            )
        case Accordion():
            raise TypeError(
                "Accordion decides by the learning rate as well, which a communication hook isn't told; "
                "gradiveq.Aggregator.aggregate(lr) is"
            )
        case AutoThreshold():
            raise TypeError(
                "AutoThreshold measures the noise of whole gradients, which a hook sees in buckets; let "
                "gradiveq.Aggregator find the threshold, and use Threshold with it here"
            )
    raise TypeError(f"`method` must be Plain, Compressed, a Compressor, GradiVeQ or PowerSGD, got {method!r}")


def _compressors(
    method: Compressed, parameters: Parameters, group: Group, min_ratio: float, seed: int
) -> CompressorScheme:
    if method.feedback is not None and method.feedback.form != "gradient":
        raise ValueError(
            f"`feedback` must be of the form 'gradient' here: {method.feedback.form!r} works on updates, with a "
            "learning rate and a momentum that the optimiser has and a hook isn't told"
        )
    if method.groups:
        raise ValueError(
            "`granularity` must be 'layer' or 'model' here, where 'model' is each bucket: a group's layers may be in "
            f"different buckets; got {method.granularity!r}"
        )
    compressors = [method.compressor, *(one for _, one in method.overrides)]
    check_size(compressors, group.size)
    if method.granularity == "model":
        return CompressorScheme(method, None, seed)
    blocks, offset = [], 0
    for name, shape in zip(parameters.names, parameters.shapes, strict=True):
        blocks.append(Block(name, offset, prod(shape), shape, False))
        offset += prod(shape)
    parts = method.parts(blocks)
    chosen = [_worth_it(part.compressor, part.length, min_ratio) for part in parts]
    return CompressorScheme(method, chosen, seed)


def _worth_it(compressor: Compressor, length: int, min_ratio: float) -> Compressor:
    """The identity where the wanted ratio isn't reached; where sizes depend on the data, nobody knows."""
    if not compressor.fixed_size or not takes_mean(compressor):
        return compressor
    return compressor if 4 * length >= min_ratio * compressor.payload_bytes(length) else Identity()
