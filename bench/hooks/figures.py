"""The figure of `bench.ddp`: accuracy, and time per iteration, against bytes.

A method looks the same whatever its numbers are; the bytes tell these apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.drawing import page
from bench.drawing.styles import GREY, method_marker, method_style
from bench.hooks.equal_bytes import PLAIN, TORCH, TORCH_POWERSGD
from bench.hooks.findings import Row

#: Families -> their names in the figure, where these are others.
LABELS = {
    PLAIN: "plain DDP",
    "rar": "ours, uncompressed (rar)",
    f"{TORCH}fp16": "PyTorch's fp16",
    f"{TORCH}bf16": "PyTorch's bf16",
    TORCH_POWERSGD: "PyTorch's PowerSGD",
    "powersgd": "PowerSGD, ours",
}


def family(method: str) -> str:
    """A method without its numbers and named settings: "topk+ef" of "topk:0.1+ef", but "sign:scaled+ef" as it is."""
    torch = TORCH if method.startswith(TORCH) else ""
    text, plus, feedback = method.removeprefix(TORCH).partition("+ef")
    first, *rest = text.split(":")
    return torch + ":".join([first, *(word for word in rest if word.isidentifier())]) + plus + feedback


def draw(rows: Sequence[Row], title: str, caption: str) -> Figure:
    """A panel of accuracies, and one of times for each way in which ranks are joined."""
    places = list(dict.fromkeys(where for row in rows for where in row.times))
    families = list(dict.fromkeys(family(row.method) for row in rows))
    figure = page.new_figure(6.4 + 3.8 * len(places), max(4.2, 0.6 + 0.27 * len(families)), title, caption)
    panels: list[Axes] = list(figure.subplots(1, 1 + len(places), squeeze=False)[0])
    drawn = set()
    for row in rows:
        name = family(row.method)
        style = {**method_style(name, families), "marker": method_marker(name, families)}
        label = LABELS.get(name, style["label"])
        style |= {"label": None if name in drawn else label, "linestyle": "none", "capsize": 2.5, "elinewidth": 1}
        drawn.add(name)
        percent = [100 * value for value in row.accuracies]
        middle = statistics.fmean(percent)
        bars = [[middle - min(percent)], [max(percent) - middle]]
        panels[0].errorbar([1 / row.share], [middle], bars, **style)
        for axis, where in zip(panels[1:], places, strict=True):
            if where in row.times:
                time = row.times[where]
                bars = [[time.median - time.low], [time.high - time.median]]
                axis.errorbar([1 / row.share], [time.median], bars, **style)
    panels[0].set(ylabel="test accuracy at the end (%)", title="mean and range over the seeds")
    for axis, where in zip(panels[1:], places, strict=True):
        axis.set(ylabel="time per iteration, plain DDP = 1", title=f"{where}: median and quartiles of rounds")
        axis.axhline(1, color=GREY, linestyle=":", linewidth=1)
        axis.set_ylim(bottom=0)
    for axis in panels:
        axis.set(xlabel="times fewer bytes over the run", xscale="log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xticks([1, 2, 5, 10, 20, 50], minor=False)
    page.add_legend(panels[0], panels[-1])
    return figure
