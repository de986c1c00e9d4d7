"""Records as they are read for figures and tables: what is wrong with a file is one line that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class RecordError(ValueError):
    """A record is missing or damaged; one line."""


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{path} can't be read ({error.strerror or error})") from error
    except ValueError as error:
        raise RecordError(f"{path} is damaged ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path))
    except RecordError:
        raise
    except ValueError as error:
        raise RecordError(f"{path} is damaged ({error})") from error
    if not isinstance(value, dict):
        raise RecordError(f"{path} is damaged, it should hold a JSON object")
    return value
