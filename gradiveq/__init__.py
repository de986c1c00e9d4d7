"""Compression of gradients on their way between workers: GradiVeQ (Yu et al. 2018), QSGD in the ring, and many others.

`Aggregator(model, ring, method)` takes any `Method`; `parse("topk:0.01+ef")` makes one of a short text.
"""

from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.methods import Accordion, AutoThreshold, Compressed, GradiVeQ, Method, Plain, QSGDRing
from gradiveq.over_ring.aggregator import Aggregator, FitError, NonFiniteGradient, Report
from gradiveq.powersgd import PowerSGD
from gradiveq.specs import parse

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
