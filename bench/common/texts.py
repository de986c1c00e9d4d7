"""Pieces of tables and captions: numbers, sizes, and how a figure came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def sentences(parts: Sequence[str]) -> str:
    return ". ".join(part[0].upper() + part[1:] for part in parts) + "."


def machine_text(environment: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    cores = environment.get("cores") or summary.get("cores")
    return f"{environment.get('cpu') or 'an unknown processor'}, {cores or '?'} cores"


def ranks_text(number: int) -> str:
    return f"{number} rank{'' if number == 1 else 's'}"


def short_commit(commit: str) -> str:
    """12 digits of a commit, and whether files differed from it."""
    digits, plus, changes = commit.partition("+")
    return digits[:12] + plus + changes


def commit_text(environment: Mapping[str, Any]) -> str:
    """ "commit 0123456789ab", or that it isn't known."""
    commit = environment.get("commit")
    return f"commit {short_commit(commit) if commit else 'unknown'}"


def bytes_text(num_bytes: float) -> str:
    """A number of bytes in the largest binary unit that it reaches: "64 KiB"."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:g} {unit}"
    return f"{num_bytes:g} B"


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
