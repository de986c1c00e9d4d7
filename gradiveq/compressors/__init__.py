"""The compressors by name. Adding one takes a file here and a line below (`gradiveq/METHODS.md`, "Adding a method")."""

from __future__ import annotations

from gradiveq.compressors.adacomp import AdaComp
from gradiveq.compressors.adaptive import Adaptive
from gradiveq.compressors.base import Compressor, Constants, Draw
from gradiveq.compressors.half import Half
from gradiveq.compressors.identity import Identity
from gradiveq.compressors.integer import Integer
from gradiveq.compressors.natural import Natural
from gradiveq.compressors.qsgd_gather import QSGDGather
from gradiveq.compressors.randomk import RandomK
from gradiveq.compressors.sign import Sign
from gradiveq.compressors.terngrad import TernGrad
from gradiveq.compressors.threshold import Threshold
from gradiveq.compressors.topk import TopK

#: name -> class; its fields are what `--methods NAME:FIELD=VALUE` sets.
COMPRESSORS: dict[str, type[Compressor]] = {
    compressor.name: compressor
    for compressor in (
        Identity,
        TopK,
        RandomK,
        Threshold,
        Adaptive,
        AdaComp,
        QSGDGather,
        TernGrad,
        Sign,
        Natural,
        Integer,
        Half,
    )
}

__all__ = ["COMPRESSORS", "Compressor", "Constants", "Draw"]
