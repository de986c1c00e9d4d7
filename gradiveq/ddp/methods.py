"""Which family carries a method out on buckets, and which methods have none, and why."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from gradiveq.compressors.base import Compressor
from gradiveq.ddp.bucket import Parameters
from gradiveq.ddp.layers import NOTHING_TO_COMPRESS, compressible_layers
from gradiveq.ddp.process_group import ProcessGroup
from gradiveq.exchange.families import make_family
from gradiveq.exchange.family import Family
from gradiveq.flatten import Block
from gradiveq.methods import Accordion, AutoThreshold, Compressed, GradiVeQ, Plain, QSGDRing
from gradiveq.powersgd import PowerSGD

DDPMethod = Plain | Compressor | Compressed | GradiVeQ | PowerSGD


def make_hook_family(
    method: DDPMethod,
    model: nn.Module,
    parameters: Parameters,
    group: ProcessGroup,
    *,
    seed: int,
    start: int,
    min_ratio: float,
    also: Sequence[str],
) -> Family:
    """What carries a method out on buckets.

    Raises:
        TypeError: it is no method, or none that a process group can carry; says why.
        ValueError: the method, an option and the model don't fit each other.
    """
    if also and not isinstance(method, GradiVeQ):
        raise ValueError(f"`also` is for GradiVeQ, which leaves most layers alone; got it with {method!r}")
    if not min_ratio > 0:
        raise ValueError(f"`min_ratio` must be above 0, got {min_ratio}")
    layers: Sequence[Block] = ()
    used = method
    match method:
        case GradiVeQ():
            layers = compressible_layers(model, parameters, also)
            if not layers:
                raise ValueError(NOTHING_TO_COMPRESS)
            used = replace(method, sampling=Plain())  # no hop of a process group's decodes, adds and encodes again
        case Compressed():
            _check(method)
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
        case Plain() | PowerSGD() | Compressor():
            pass
        case _:
            raise TypeError(f"`method` must be Plain, Compressed, a Compressor, GradiVeQ or PowerSGD, got {method!r}")
    family = make_family(
        used,
        parameters.blocks,
        rank=group.rank,
        size=group.size,
        seed=seed,
        layers=layers,
        warmup=start,
        min_ratio=min_ratio,
        one_vector=False,
    )
    if parameters.device.type == "cuda" and not family.stays_on_device():
        warnings.warn(
            f"{method!r} has no form for a GPU: gradients are copied to the host and back, which waits for them",
            stacklevel=3,
        )
    return family


def _check(method: Compressed) -> None:
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
