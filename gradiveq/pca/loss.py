"""The compression loss ‖ĝ - g‖² / ‖g‖², kept as numerator and denominator until it is looked at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Loss:
    """A squared error beside what it is relative to, so that the losses of parts add up to that of the whole.

    Attributes:
        error: ‖ĝ - g‖².
        norm: ‖g‖².
    """

    error: float = 0.0
    norm: float = 0.0

    @classmethod
    def between(cls, estimate: npt.NDArray[np.float32], exact: npt.NDArray[np.float32]) -> Loss:
        """The loss of ĝ for g, both float32 of shape (length,). Not modified. Cost: three passes and a copy."""
        difference = estimate - exact
        return cls(float(np.dot(difference, difference)), float(np.dot(exact, exact)))

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.error + other.error, self.norm + other.norm)

    @property
    def relative(self) -> float:
        """error / norm; 0 where both are zero, inf where only the norm is."""
        return self.error / self.norm if self.norm else (0.0 if self.error == 0 else math.inf)
