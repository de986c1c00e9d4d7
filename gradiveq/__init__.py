"""Compression of gradients on their way between workers: GradiVeQ (Yu et al. 2018), QSGD in the ring, and many others.

`Aggregator(model, ring, method)` takes any `Method`; `parse("topk:0.01+ef")` makes one of a short text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.methods import Accordion, AutoThreshold, Compressed, GradiVeQ, Method, Plain, QSGDRing
from gradiveq.powersgd import PowerSGD
from gradiveq.report import FitError, NonFiniteGradient, Report
from gradiveq.specs import parse

if TYPE_CHECKING:
    from gradiveq.over_ring.aggregator import Aggregator

__all__ = [
    "Accordion",
    "Aggregator",
    "AutoThreshold",
    "Compressed",
    "ErrorFeedback",
    "FitError",
    "GradiVeQ",
    "Method",
    "NonFiniteGradient",
    "Plain",
    "PowerSGD",
    "QSGDRing",
    "Report",
    "parse",
]


def __getattr__(name: str) -> Any:
    """Import the aggregator when it is asked for: nothing else needs the package `ring`."""
    if name == "Aggregator":
        from gradiveq.over_ring.aggregator import Aggregator

        return Aggregator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
