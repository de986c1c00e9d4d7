"""Kinds of hyper-parameters: a text that looks like a number isn't one."""

from __future__ import annotations

from typing import TypeGuard


def at_least(name: str, value: object, bound: int, remark: str = "") -> None:
    """Refuse what is no whole number of at least `bound`.

    Args:
        remark: why, or what else may be given.
    Raises:
        ValueError: it isn't.
    """
    if not isinstance(value, int) or value < bound:
        raise ValueError(f"`{name}` must be a whole number of at least {bound}{remark}, got {value!r}")


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it can be compared with numbers; also of NaN and infinity."""
    return isinstance(value, int | float)
