"""Draw everything again from what was recorded: `python -m bench.figures results`. Nothing is trained or measured.

What is in a file is told by its name, or by what it holds; the experiment that made it draws it, into the same folder.
Tables that are made of the same records are written again too. The same records give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from bench.common.command_line import description
from bench.common.files import RecordError, read_object
from bench.job.record import ENVIRONMENT, SUMMARY
from bench.papers.gradiveq import gradient_figures
from bench.papers.gradiveq import recorded_gradients as gradients

#: Records that have a name of their own -> the module that draws them; imported where there is one.
EXPERIMENTS = {
    "ddp.json": "bench.hooks.report",
    "hard-threshold.json": "bench.papers.hard_threshold.command",
    "layerwise.json": "bench.papers.layerwise.command",
    "paper-timing.json": "bench.papers.gradiveq.timing",
    "scaling.json": "bench.virtual.scaling",
    "validate.json": "bench.shaped.validation",
}
Redraw = Callable[[Path], list[Path]]


def drawing_of(path: Path) -> Redraw | None:
    """What draws a file; None if it is no record.

    Raises:
        RecordError: it can't be read.
    """
    if path.name == SUMMARY:
        return _redraw_of("bench.job.figures")
    if path.suffix == ".npz":
        return _redraw_of("bench.papers.gradiveq.gradient_figures") if _is_recording(path) else None
    if path.suffix != ".json" or path.name == ENVIRONMENT:
        return None
    record = read_object(path)
    name = EXPERIMENTS.get(path.name)
    if name is None and path.name == "record.json":
        name = "bench.advice.validation" if "cells" in record else "bench.advice.report" if "words" in record else None
    if name is None and "panels" in record:
        name = "bench.papers.gradiveq.gantt_figure"
    if name is None and _is_bandwidth(record.get("rows")):
        name = "bench.drawing.bandwidth"
    return None if name is None else _redraw_of(name)


def _redraw_of(module: str) -> Redraw:
    redraw: Redraw = import_module(module).redraw
    return redraw


def _is_bandwidth(rows: object) -> bool:
    """Of `ring.bench`; `bench.shaped_busbw` also has rows of implementations, on hosts."""
    if not (isinstance(rows, list) and rows and isinstance(rows[0], dict)):
        return False
    return "implementation" in rows[0] and "hosts" not in rows[0]


def _is_recording(path: Path) -> bool:
    """Whether it has what a recording has; a file that is no archive at all may be a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{gradients.ABOUT}.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return True


def draw_all(folder: Path) -> tuple[list[Path], list[str]]:
    """Draw every record under a folder. A damaged one doesn't keep the others from being drawn.

    Returns:
        The files written, and one line for each damaged record.
    Raises:
        RecordError: if the folder is missing.
    """
    if not folder.is_dir():
        raise RecordError(f"there is no folder {folder}")
    written: list[Path] = []
    errors: list[str] = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part[0] == "." or part == "checkpoint" for part in parts) or not path.is_file():
            continue
        try:
            draw = drawing_of(path)
            if draw is not None:
                written += draw(path)
        except RecordError as error:
            errors.append(str(error))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            errors.append(f"{path} is damaged: it isn't as it should be ({error!r})")
        except OSError as error:
            errors.append(f"{path} can't be drawn ({error.filename or ''}: {error.strerror or error})")
    return written, errors


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=description(__doc__))
    parser.add_argument("folder", type=Path, help="looked through for records, such as results")
    folder: Path = parser.parse_args(arguments).folder
    try:
        written, errors = draw_all(folder)
    except RecordError as error:
        written, errors = [], [str(error)]
    for path in written:
        print(path)
        if path.suffix == ".json":
            print("\n".join(f"    {line}" for line in gradient_figures.findings(path)))
    for line in errors:
        print(f"error: {line}", file=sys.stderr)
    if not written and not errors:
        print(f"nothing recorded in {folder}, so nothing to draw")
    return 2 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
