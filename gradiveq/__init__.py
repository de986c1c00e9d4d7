"""Compression of gradients on their way between workers: GradiVeQ (Yu et al. 2018), QSGD in the ring, and many others.

`Aggregator(model, ring, method)` takes any `Method`; `parse("topk:0.01+ef")` makes one of a short text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradiveq.exchange.error_memory import ErrorFeedback as ErrorFeedback
from gradiveq.methods import Accordion as Accordion
from gradiveq.methods import AutoThreshold as AutoThreshold
from gradiveq.methods import Compressed as Compressed
from gradiveq.methods import GradiVeQ as GradiVeQ
from gradiveq.methods import Method as Method
from gradiveq.methods import Plain as Plain
from gradiveq.methods import QSGDRing as QSGDRing
from gradiveq.powersgd import PowerSGD as PowerSGD
from gradiveq.report import FitError as FitError
from gradiveq.report import NonFiniteGradient as NonFiniteGradient
from gradiveq.report import Report as Report
from gradiveq.specs import parse as parse

if TYPE_CHECKING:
    from gradiveq.over_ring.aggregator import Aggregator as Aggregator


def __getattr__(name: str) -> Any:
    """Import the aggregator when it is asked for: nothing else needs the package `ring`."""
    if name == "Aggregator":
        from gradiveq.over_ring.aggregator import Aggregator

        return Aggregator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
