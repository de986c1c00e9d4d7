"""NAME.png of NAME.json, which `ring.bench --json` writes: bus bandwidth against size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.common.files import RecordError, read_object
from bench.common.texts import bytes_text, ranks_text, sentences
from bench.drawing import page
from bench.drawing.styles import PURPLE

IMPLEMENTATION_STYLES: dict[str, dict[str, Any]] = {
    "ring": {"color": "#0072B2", "marker": "o", "label": "this ring"},
    "MPI_Allreduce": {"color": "#D55E00", "marker": "s", "label": "MPI_Allreduce"},
    "limit": {"color": "#666666", "marker": "", "linestyle": "--", "label": "limit: the copies\nand adds alone"},
}


def redraw(path: Path) -> list[Path]:
    """Bus bandwidth against size from a file of `ring.bench --json`: the median, and the quartiles as bars.

    Raises:
        RecordError: if the file is damaged.
    """
    record = read_object(path)
    try:
        rows, environment = record["rows"], record["environment"]
        ranks, cores = rows[0]["ranks"], environment["cores"]
        names = list(dict.fromkeys(row["implementation"] for row in rows))
        parts = [
            f"{ranks_text(ranks)} on {cores} core{'' if cores == 1 else 's'} ({environment['cpu']})",
            environment["mpi"],
            f"median of {rows[0]['repeats']} measurements in turn, bars are quartiles",
            f"command: {environment['command']}",
        ]
        if any(row["wrong"] for row in rows):
            parts.insert(0, "SOME RESULTS WERE WRONG")
        caption = sentences(parts)
        with page.figure_style():
            title = f"All-reduce of {rows[0]['dtype']}, {ranks_text(ranks)}, {_mpi_name(environment['mpi'])}"
            figure = page.new_figure(8.5, 3.9, title, caption)
            axis = figure.subplots()
            for name in names:
                _bandwidth_line(axis, name, [row for row in rows if row["implementation"] == name])
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set(xlabel="size of the vector", ylabel="busbw = size/time · 2(N-1)/N  (GB/s)")
            page.add_legend(axis)
            return [page.write_figure(figure, path.with_suffix(".png"))]
    except (KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise RecordError(f"{path} is damaged, its rows or environment aren't ring.bench's ({error!r})") from error


def _mpi_name(text: str) -> str:
    """ "MPICH 5.0.2", of what the library says about itself."""
    return re.sub(r"(?: Version:)?\s+v?(?=\d)", " ", text.partition(",")[0], count=1)


def _bandwidth_line(axis: Axes, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    speed = np.array([row["busbw_gb_per_s"] for row in rows])
    time_s = np.array([row["time_s"] for row in rows])
    low, high = (np.array([row["time_quartiles_s"][i] for row in rows]) for i in (0, 1))
    bars = np.maximum([speed - speed * time_s / high, speed * time_s / low - speed], 0)
    style = IMPLEMENTATION_STYLES.get(name, {"color": PURPLE, "marker": "D", "label": name})
    axis.errorbar([row["size_bytes"] for row in rows], speed, bars, capsize=2.5, elinewidth=1, **style)
