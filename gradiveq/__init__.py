"""Compression of gradients on their way around the ring: GradiVeQ (Yu et al. 2018) and QSGD (Alistarh et al. 2017)."""

from gradiveq.aggregator import Aggregator, FitError, NonFiniteGradient, Report
from gradiveq.methods import GradiVeQ, Plain, QSGDRing

__all__ = ["Aggregator", "FitError", "GradiVeQ", "NonFiniteGradient", "Plain", "QSGDRing", "Report"]
