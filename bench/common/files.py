"""Files of results: written whole or not at all, and read with one line for what is wrong with them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def file_name(method: str) -> str:
    """A method's name as part of the name of a file; with a digest if it has patterns, as little may tell two apart."""
    name = re.sub(r"[^\w.]+", "-", method).strip("-.")
    return name if re.fullmatch(r"[\w.:+@=^-]+", method) else f"{name}-{zlib.crc32(method.encode()):08x}"


def plain(value: Any) -> Any:
    """The same in JSON's types: arrays as lists, other numbers as int or float, None for what isn't finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy's and torch's arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def write_atomically(path: Path, data: bytes) -> None:
    """The file has all of `data`, or is as it was, whenever the process or the machine stops."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


class CannotWrite(OSError):
    """A folder for results can't be written; one line."""


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """A folder that a command writes into: made before, and named on stdout when everything is there.

    Raises:
        CannotWrite: where anything raised OSError.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise CannotWrite(f"{out} can't be written ({error.strerror or error})") from error
    print(f"written to {out}", flush=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last (where the system can open a folder)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, see `write_atomically`."""
    write_atomically(path, (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


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
