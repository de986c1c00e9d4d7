"""The ring all-reduce: the algorithm (`ring.algorithm`), its codecs, and the drivers that run it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ring.codec import Codec as Codec
    from ring.codec import Composite as Composite
    from ring.codec import Hop as Hop
    from ring.codec import IdentityCodec as IdentityCodec
    from ring.errors import RingError as RingError
    from ring.errors import RingMismatch as RingMismatch
    from ring.errors import RingTimeout as RingTimeout
    from ring.handle import Ring as Ring
    from ring.plan import Stats as Stats
    from ring.segments import Region as Region
    from ring.timeline import Timeline as Timeline

_HOMES = {
    "codec": ("Codec", "Composite", "Hop", "IdentityCodec"),
    "errors": ("RingError", "RingMismatch", "RingTimeout"),
    "handle": ("Ring",),
    "plan": ("Stats",),
    "segments": ("Region",),
    "timeline": ("Timeline",),
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for, and not before.

    `ring.machine` has to work where NumPy isn't imported yet: a job looks how many cores it has before it tells the
    libraries how many threads they may start.
    """
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
