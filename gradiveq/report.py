"""What one `Aggregator.aggregate()` did, and how it can fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gradiveq.exchange.error_memory import Measures

NAMES_IN_MESSAGE = 3


class NonFiniteGradient(RuntimeError):
    """A gradient has an infinity or a NaN; raised on all ranks alike. No gradient was changed."""


class FitError(RuntimeError):
    """A layer's bases could not be found; raised on all ranks alike, with the same words. No gradient was changed."""


@dataclass(frozen=True)
class Report:
    """What one `aggregate()` did, on this rank.

    Attributes:
        iteration: from 0 on.
        phase: "plain", "qsgd", "compressed", GradiVeQ's "warm-up", "sample" and "compress", or while a threshold's
            formula measures noise (`AutoThreshold`), "warm-up".
        bytes_sent: payload bytes, those of a fit included. The first call after `load_state_dict` compares iterations;
            these 16(N-1) bytes are not counted, so that a resumed run reports what an uninterrupted one does.
        dense_bytes: what plain ring all-reduce would have sent.
        fit_bytes: sent to agree on bases, in the last iteration of a sampling phase.
        measure_bytes: sent to measure the held-out loss; not part of `bytes_sent`, as training doesn't need it.
        ratio: dense payload bytes / payload bytes of the gradients, on all ranks the same; 1 for plain. Of payloads
            that everybody gets from everybody it is that of the mean payload, and says nothing of how often each
            travels: dense_bytes / bytes_sent does.
        skipped: a gradient was not finite; all gradients are zero now, and the caller must not step.
        seconds: by kind: pack (both ways), encode, add, recode, decode, wait, fit, measure.
        virtual_seconds: the same on the cluster of a `ring.virtual.VirtualRing`, whose messages cost "overhead" as
            well; empty if the timeline has no virtual one.
        losses: relative losses that were measured in this iteration, or None:
            "local": Eq. 7 over ‖g_n‖² of this worker, in the compressed layers;
            "held_out": ‖ĝ - g‖² / ‖g‖² of the average over the workers, in all convolutions, and "layers", the same by
            layer. In a sampling iteration it is that of the last window's bases, and QSGD's noise is part of g.
        measures: what this worker's compressor left out and sent, of a method with one; None of a skipped iteration.
    """

    iteration: int
    phase: str
    bytes_sent: int
    dense_bytes: int
    ratio: float
    fit_bytes: int = 0
    measure_bytes: int = 0
    skipped: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    virtual_seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, Any] | None = None
    measures: Measures | None = None


def listed(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    rest = len(names) - NAMES_IN_MESSAGE
    return ", ".join(names[:NAMES_IN_MESSAGE]) + (f" and {rest} more" if rest > 0 else "")
