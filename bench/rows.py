"""What every rank has to tell all others in a few numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ring.handle import Ring


def rows_of_all(ring: Ring, row: Sequence[float]) -> npt.NDArray[np.float64]:
    """Every rank's `row`, as float64 of shape (size, len(row)). Collective; rows are of the same length everywhere."""
    rows = np.zeros((ring.size, len(row)))
    rows[ring.rank] = row
    ring.all_reduce(rows.reshape(-1))
    return rows
