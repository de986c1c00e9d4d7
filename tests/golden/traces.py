"""What is kept of a run: digests of exact bits, and a few values for comparisons within a tolerance."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from .inputs import bell

#: Values that are recorded of a vector.
SAMPLES = 8
MEASURES = ("norm", "compression_error", "relative_error", "error", "total_error", "num_sent", "density")


def digest(*pieces: bytes) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        hashed.update(len(piece).to_bytes(8, "little"))
        hashed.update(piece)
    return hashed.hexdigest()


def plain(value: Any) -> Any:
    """A log or a report as JSON has it, without seconds."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items() if not str(key).endswith(("_s", "seconds"))}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


def key_names(state: Any, prefix: str = "") -> set[str]:
    """Flattened names of all that a state holds; members of a list share one."""
    if isinstance(state, Mapping):
        return set().union(*(key_names(one, f"{prefix}.{key}") for key, one in state.items())) or {prefix}
    if isinstance(state, list | tuple) and any(isinstance(one, Mapping | list | tuple) for one in state):
        return set().union(*(key_names(one, f"{prefix}[]") for one in state))
    return {prefix}


def measured(measures: Any) -> dict[str, float] | None:
    """Of `Report.measures` and the like."""
    return None if measures is None else {name: float(getattr(measures, name)) for name in MEASURES}


class Trace:
    """One worker's weights, float32, and what was reported on the way; the weights follow w -= 0.1·mean."""

    def __init__(self, length: int) -> None:
        self.weights = bell(("weights", 0, 0), (length,)).astype(np.float32)
        self.means: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def copy(self) -> Trace:
        return copy.deepcopy(self)

    def add(self, mean: np.ndarray[Any, Any], row: dict[str, Any]) -> None:
        """One iteration: the mean gradient that this worker got, and what was reported."""
        self.means.append(digest(mean.tobytes()))
        self.rows.append(plain(row))
        if np.isfinite(mean).all():
            self.weights -= np.float32(0.1) * mean

    @property
    def fingerprint(self) -> str:
        """Of all that is in here."""
        return digest(self.weights.tobytes(), *(one.encode() for one in self.means), repr(self.rows).encode())

    def result(self) -> dict[str, Any]:
        columns = {name: [row[name] for row in self.rows] for name in self.rows[0]}
        return {
            "weights": digest(self.weights.tobytes()),
            "means": digest(*(one.encode() for one in self.means)),
            **sampled(self.weights),
            "reports": {name: packed(column) for name, column in columns.items()},
        }


def sampled(values: np.ndarray[Any, Any]) -> dict[str, Any]:
    """A few values and the norm, for a comparison within a tolerance."""
    if not len(values):
        return {"sample": [], "norm": 0.0}
    places = np.linspace(0, len(values) - 1, min(SAMPLES, len(values))).astype(int)
    norm = math.sqrt(float(np.square(values, dtype=np.float64).sum()))
    return {"sample": [float(f"{values[place]:.8g}") for place in places], "norm": float(f"{norm:.8g}")}


def packed(column: Sequence[Any]) -> Any:
    """A column without repetitions: runs of (value, how often)."""
    runs: list[list[Any]] = []
    for value in column:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    if all(isinstance(value, Mapping | None) for value, _ in runs):  # too long to keep: what it hashes to, and the last
        last = next((value for value, _ in reversed(runs) if value is not None), None)
        return {"digest": digest(repr(list(column)).encode()), "last": last} if last is not None else None
    return runs


def flat(tensors: Iterable[Tensor | None], model: nn.Module) -> np.ndarray[Any, Any]:
    """All parameters' gradients in their order, float32; zeros where there is none."""
    pieces = [
        np.zeros(parameter.numel(), np.float32) if one is None else one.detach().float().contiguous().numpy().ravel()
        for one, parameter in zip(tensors, model.parameters(), strict=True)
    ]
    return np.concatenate(pieces)
