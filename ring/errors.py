"""Errors of a collective that can't be completed."""


class RingError(RuntimeError):
    """A collective failed, here or on another rank; the message says where and why."""


class RingMismatch(RingError):
    """Ranks called with different operations, lengths, dtypes, codecs or chunk sizes."""


class RingTimeout(RingError):
    """A message did not come, or was not taken, before the deadline."""
