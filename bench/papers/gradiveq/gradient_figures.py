"""Fig. 4 and 5 of Yu et al. 2018, of recorded gradients (`bench.papers.gradiveq.recorded_gradients`).

    fig4.png/.json   3 adjacent gradients before and after rotation (Fig. 4)
    fig5.png/.json   slice size against ratio and loss (Fig. 5), if a (3, 3, 16, 16) layer was recorded

A recording by another name than gradients.npz has that in front of its figures'. Their numbers are computed once: where
the JSON files are, figures are drawn from these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.common.files import RecordError, read_object, write_json
from bench.common.texts import machine_text, ranks_text, sentences, short_commit
from bench.drawing import page
from bench.drawing.styles import BLUE, GREEN, GREY, ORANGE, VERMILION
from bench.papers.gradiveq import recorded_gradients as gradients

#: Fig. 5's layer.
FIG5_SHAPE = (3, 3, 16, 16)


def redraw(path: Path) -> list[Path]:
    """Fig. 4 of the first layer in a recording, Fig. 5 of its first (3, 3, 16, 16) one.

    Their numbers are computed and written as JSON, unless that is there already.

    Returns:
        The files written.
    Raises:
        RecordError: if the recording or its numbers are damaged, or it is too short.
    """
    prefix = "" if path.stem == "gradients" else f"{path.stem}-"
    names = [path.with_name(f"{prefix}{name}.json") for name in ("fig4", "fig5")]
    if any(name.exists() for name in names):
        recorded = {name: read_object(name) for name in names if name.exists()}
        written = []
    else:
        recorded = _numbers(path, *names)
        for name, numbers in recorded.items():
            write_json(name, numbers)
        written = list(recorded)
    try:
        with page.figure_style():
            for name, numbers in recorded.items():
                drawing = _fig4 if numbers["figure"] == "4" else _fig5
                written.append(page.write_figure(drawing(numbers), name.with_suffix(".png")))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise RecordError(f"{name} is damaged: it isn't as it should be ({error!r})") from error
    return written


def _numbers(path: Path, fig4: Path, fig5: Path) -> dict[Path, dict[str, Any]]:
    """What the figures of a recording show, by the file that it belongs in."""
    try:
        recording = gradients.load(path)
        found = {fig4: gradients.adjacent(recording, next(iter(recording.shapes)))}
        layer = next((name for name, shape in recording.shapes.items() if shape == FIG5_SHAPE), None)
        if layer:
            found[fig5] = gradients.slice_sweep(recording, layer)
    except (OSError, ValueError) as error:
        raise RecordError(str(error)) from error
    return found


def findings(path: Path) -> list[str]:
    """What fig4.json or fig5.json say about the paper's statements, in a line or more."""
    numbers = read_object(path)
    return _fig4_findings(numbers) if numbers["figure"] == "4" else _fig5_findings(numbers)


def _caption(numbers: Mapping[str, Any], lines: Sequence[str], how: str) -> str:
    """What was found, a line each, and how it came about."""
    about = numbers["about"]
    model = f"model {about['model']}, " if about.get("model") else ""
    parts = [
        how,
        f"Data: {about['data']}",
        f"{model}{ranks_text(about['ranks'])} x {about['batch_size']} images, seed {about['seed']}",
    ]
    if about.get("cpu"):
        parts.append(machine_text(about, about))
    if about.get("commit"):
        parts.append(f"commit {short_commit(about['commit'])}")
    parts.append(f"command: {about['command']}")
    lines = [line.partition(", " if line.startswith("Fig. 5, ") else ": ")[2] for line in lines]
    found = [line[0].upper() + line[1:] for line in lines]
    return "\n".join([*found, sentences(parts)])


def _iterations(numbers: Mapping[str, Any], count: int) -> str:
    first = numbers["about"]["first_iteration"]
    return f"iterations {first} to {first + count - 1}"


def _fig4_findings(numbers: Mapping[str, Any]) -> list[str]:
    shares, scaled, later = numbers["variance_shares"], numbers["standardised"], numbers["loss_held_out"]
    held_out = "" if later is None else f" in these iterations, {later:.3f} in later ones"
    return [
        f"Fig. 4: 2 of 3 axes (ratio 1.5) lose {shares[2]:.1%} of the variance of the first 3 gradients of "
        f"{numbers['layer']}; relative loss {numbers['loss_in_sample']:.3f}{held_out}.",
        f"Fig. 4: scaled to unit variance each, these 3 lose {scaled['these']:.1%}, the median of all 3 adjacent ones "
        f"{scaled['adjacent'][1]:.1%}, of 3 at random in the layer {scaled['random'][1]:.1%}; independent ones would "
        f"lose {scaled['independent']:.1%}.",
    ]


def _fig5_findings(numbers: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, which in (("dips", "same iterations"), ("dips_later", "later iterations")):
        dips = numbers[key]
        if dips["median_left"] is not None:
            left = ", ".join(f"{m['slice_size']}: {m['loss']:.3f} / {m['neighbours']:.3f}" for m in dips["multiples"])
            seen = "seen" if dips["median_left"] < 0.95 else "not seen"
            lines.append(
                f"Fig. 5, {which}: dips at multiples of F*D = {numbers['collocated']} {seen}; loss there / around: "
                f"{left}; median quotient {dips['median_left']:.3f}."
            )
    return lines


def _fig4(numbers: Mapping[str, Any]) -> Figure:
    values, mean = np.array(numbers["values"]), np.array(numbers["mean"])
    rotated = (values - mean) @ np.array(numbers["axes"]).T
    shares, count = numbers["variance_shares"], numbers["iterations"]
    first = numbers["first_gradient"]
    title = (
        f"Gradients {first + 1} to {first + 3} of {numbers['layer']} over {count} iterations, "
        f"{numbers['about']['data']}"
    )
    caption = _caption(numbers, _fig4_findings(numbers), _iterations(numbers, count).capitalize())
    figure = page.new_figure(10.5, 4.9, title, caption)
    engine = figure.get_layout_engine()
    rect = engine.get()["rect"] if engine is not None else (0, 0, 1, 1)
    figure.set_layout_engine("none")  # it doesn't know how far labels of 3-D axes reach
    exponent = int(np.floor(np.log10(max(np.abs(values).max(), np.abs(rotated).max(), 1e-30))))
    unit = rf"($\times 10^{{{exponent}}}$)"
    reach = 1.1 * max(float(np.ptp(values, axis=0).max()) / 2, float(np.abs(rotated).max()), 1e-30) / 10**exponent
    middle = (values.max(axis=0) + values.min(axis=0)) / 2 / 10**exponent
    panels = (
        ("(a) as they are", values, middle, [f"gradient {first + i + 1} {unit}" for i in range(3)]),
        (
            "(b) centred and rotated (PCA)",
            rotated,
            np.zeros(3),
            [f"axis {i + 1}′ {unit}\n{shares[i]:.1%} of variance" for i in range(3)],
        ),
    )
    for index, (name, points, centre, labels) in enumerate(panels):
        box = (0.01 + 0.49 * index, rect[1] + 0.1 * rect[3], 0.47, 0.95 * rect[3])
        axis: Any = figure.add_axes(box, projection="3d")
        _scatter3d(axis, points / 10**exponent, centre, reach, labels)
        figure.text(box[0] + box[2] / 2, rect[1] + rect[3] - 0.005, name, ha="center", va="top", fontsize=11)
    handles, names = axis.get_legend_handles_labels()
    order = (2, 0, 1)
    figure.legend(
        [handles[i] for i in order],
        [names[i] for i in order],
        loc="lower center",
        bbox_to_anchor=(0.5, rect[1]),
        ncols=3,
        markerscale=1.8,
    )
    return figure


def _scatter3d(axis: Any, points: Any, centre: Any, reach: float, labels: Sequence[str]) -> None:
    """Points, and their projections on the floor and on the two walls behind; all axes have the same scale."""
    axis.view_init(elev=22, azim=-55)
    low, high = centre - reach, centre + reach
    x, y, z = points.T
    flat = {"s": 5, "depthshade": False, "linewidths": 0}
    axis.scatter(x, y, np.full_like(z, low[2]), color=GREEN, label="projection on the plane of 1 and 2", **flat)
    axis.scatter(np.full_like(x, low[0]), y, z, color="#AAAAAA", label="on the other planes", **flat)
    axis.scatter(x, np.full_like(y, high[1]), z, color="#AAAAAA", **flat)
    axis.scatter(x, y, z, color=BLUE, s=13, depthshade=False, linewidths=0, label="an iteration")
    axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
    axis.set_box_aspect((1, 1, 1), zoom=0.93)
    for direction, label in zip((axis.xaxis, axis.yaxis, axis.zaxis), labels, strict=True):
        direction.set_label_text(label, fontsize=9)
        direction.labelpad = 8
        direction.set_major_locator(MaxNLocator(5, steps=page.STEPS))
        direction.set_tick_params(labelsize=8)


def _fig5(numbers: Mapping[str, Any]) -> Figure:
    rows, collocated, filters = numbers["rows"], numbers["collocated"], numbers["shape_hwdf"][-1]
    sizes = [row["slice_size"] for row in rows]
    shape = tuple(numbers["shape_hwdf"])
    samples, later = numbers["samples"], numbers["later_iterations"]
    first = numbers["about"]["first_iteration"]
    how = (
        f"Compressor of the first slice, fitted on iterations {first} to {first + samples - 1} with loss threshold "
        f"{numbers['loss_threshold']:g}, so d ≤ {samples - 1}; later: the {later} that follow; losses are means over "
        "iterations"
    )
    title = f"Slice size, {numbers['layer']} {shape} = (H, W, D, F), {numbers['about']['data']}"
    figure = page.new_figure(10, 5.6, title, _caption(numbers, _fig5_findings(numbers), how))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.9))
    upper.plot(sizes, [row["ratio"] for row in rows], color=BLUE, label="ratio K/d")
    upper.set(ylabel="compression ratio K/d")
    upper.set_ylim(bottom=0)
    aligned = [row for row in rows if row["slice_size"] % filters == 0 and row["slice_size"] % collocated]
    multiples = [row for row in rows if row["slice_size"] % collocated == 0]
    between = [row for row in rows if row["slice_size"] % filters]
    keys = ("random_basis", "other_slices_later", "other_slices", "first_slice_later", "first_slice")
    _curve(
        lower, rows, keys[0], color=GREY, ls=":", label="other slices, same iterations,\nd random directions instead"
    )
    for key, color, which in (
        (keys[1], VERMILION, "later iterations"),
        (keys[2], BLUE, "same iterations (the paper's)"),
    ):
        _curve(lower, between, key, color=color, label=f"other slices, {which}")
        _curve(
            lower, aligned, key, color=color, label=f"  K a multiple of F = {filters}", linewidth=0.6, marker=".", ms=4
        )
        _curve(
            lower, multiples, key, color=color, label=f"  K a multiple of F·D = {collocated}", ls="", marker="o", ms=7
        )
    _curve(lower, rows, keys[3], color=ORANGE, ls="--", label="first slice, later iterations")
    _curve(
        lower, rows, keys[4], color=GREEN, ls="-.", label="first slice, same iterations\n(what the threshold bounds)"
    )
    lower.set(xlabel="slice size K (gradients)", ylabel="compression loss ‖ĝ-g‖² / ‖g‖²", xlim=(0, sizes[-1] + 4))
    lower.set_ylim(0, 1.05 * max(row[key] for row in rows for key in keys))
    for axis in (upper, lower):
        for row in multiples:
            axis.axvline(row["slice_size"], color="#BBBBBB", linewidth=5, alpha=0.45, zorder=0.5)
        axis.grid(axis="x", visible=False)
    lower.set_xticks(range(0, sizes[-1] + 1, max(1, collocated // 2)))
    page.add_legend(lower)
    return figure


def _curve(axis: Axes, rows: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
    axis.plot([row["slice_size"] for row in rows], [row[key] for row in rows], **{"linewidth": 1.4, **style})
