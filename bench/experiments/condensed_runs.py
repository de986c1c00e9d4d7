"""The runs of an experiment as small as its figures and tables need them, in one file beside these: runs.json.gz.

    {"<name>": {"spec": what ran, "seconds": how long it took, "result": what the experiment keeps of it}, …}

Numbers have `DIGITS` significant digits. Figures, tables and findings are made of what is kept, when it was measured as
when it is read again, so that both are the same.
"""

from __future__ import annotations

import gzip
import json
import shlex
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.common.files import RecordError, plain, read_object, write_atomically

FILE = "runs.json.gz"
DIGITS = 9

Runs = dict[str, dict[str, Any]]


def keep(folder: Path, runs: Mapping[str, Mapping[str, Any]], part: Callable[[Mapping[str, Any]], Any]) -> Runs:
    """Write what is kept of the runs, and return it.

    Args:
        runs: the records of `bench.experiments.grid`.
        part: what is kept of a run's result.
    """
    kept = {
        name: {"spec": run["spec"], "seconds": run["seconds"], "result": part(run["result"])}
        for name, run in runs.items()
    }
    text = json.dumps(_short(plain(kept)), allow_nan=False, separators=(",", ":")) + "\n"
    write_atomically(folder / FILE, gzip.compress(text.encode(), mtime=0))
    return read(folder)


def recorded(path: Path) -> tuple[dict[str, Any], list[str], Runs]:
    """What an experiment's command recorded: its environment, its options, and the runs beside the record at `path`.

    Raises:
        RecordError: the runs are missing or damaged.
        LookupError, TypeError, ValueError: the record isn't as it should be.
    """
    about = read_object(path)["environment"]
    return about, shlex.split(about["command"])[3:], read(path.parent)


def read(folder: Path) -> Runs:
    """What `keep` has written into a folder. Raises RecordError if it isn't there or is damaged."""
    path = folder / FILE
    try:
        runs: Runs = json.loads(gzip.decompress(path.read_bytes()))
    except FileNotFoundError:
        raise RecordError(f"{path} is missing, which has the runs") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RecordError(f"{path} is damaged ({error})") from error
    return runs


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list) else value
