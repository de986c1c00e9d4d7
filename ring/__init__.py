"""The ring all-reduce: the algorithm (`ring.algorithm`), its codecs, and the drivers that run it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ring.codec import Codec, Composite, Hop, Identity
    from ring.errors import RingError, RingMismatch, RingTimeout
    from ring.handle import Ring
    from ring.plan import Stats
    from ring.segments import Region
    from ring.timeline import Timeline

#: name -> the module that has it.
_HOMES = {
    "Codec": "codec",
    "Composite": "codec",
    "Hop": "codec",
    "Identity": "codec",
    "Region": "segments",
    "Ring": "handle",
    "RingError": "errors",
    "RingMismatch": "errors",
    "RingTimeout": "errors",
    "Stats": "plan",
    "Timeline": "timeline",
}
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


def __getattr__(name: str) -> Any:
    """Import what is asked for, and not before: `ring.machine` has to work where NumPy isn't imported yet, as a job
    looks how many cores it has before it tells the libraries how many threads they may start."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
