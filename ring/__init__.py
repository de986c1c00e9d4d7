"""The ring all-reduce: the algorithm (`ring.algorithm`), its codecs, and the drivers that run it."""

from ring.codec import Codec, Composite, Hop, Identity
from ring.errors import RingError, RingMismatch, RingTimeout
from ring.handle import Ring
from ring.plan import Stats
from ring.segments import Region
from ring.timeline import Timeline

__all__ = [
    "Codec",
    "Composite",
    "Hop",
    "Identity",
    "Region",
    "Ring",
    "RingError",
    "RingMismatch",
    "RingTimeout",
    "Stats",
    "Timeline",
]
