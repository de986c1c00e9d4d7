"""How methods and kinds of seconds look in figures: colours, markers, labels."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

#: Okabe and Ito's palette. A method has the same colour in every figure; others than these get one by their name, the
#: next if another method of the figure has it.
METHOD_COLORS = {"rar": "#0072B2", "qsgd": "#E69F00", "gradiveq": "#009E73"}
#: Colours and markers of other methods.
OTHER_STYLES = (
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#D55E00", "P"),
    ("#666666", "X"),
    ("#332288", "<"),
    ("#882255", ">"),
    ("#999933", "p"),
    ("#000000", "h"),
    ("#A6761D", "d"),
    ("#66A61E", "*"),
    ("#E7298A", "H"),
    ("#7570B3", "8"),
)
LINE_STYLES = ("-", "--", ":", "-.")
METHOD_LABELS = {"rar": "plain ring (rar)", "qsgd": "QSGD in the ring", "gradiveq": "GradiVeQ"}
METHOD_MARKERS = {"rar": "o", "qsgd": "s", "gradiveq": "^"}
#: Tol's light palette, for kinds of seconds.
GROUP_COLORS = {
    "compute": "#DDDDDD",
    "encode": "#77AADD",
    "add": "#EEDD88",
    "exposed communication": "#EE8866",
    "decode": "#44BB99",
    "fit": "#FFAABB",
    "other": "#FFFFFF",
}
GROUP_LABELS = {
    "compute": "compute\n(forward, backward, update)",
    "encode": "encode (and recode, pack)",
    "exposed communication": "exposed communication\n(waiting)",
    "fit": "fit (PCA)",
    "other": "other (data, control)",
}
BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#888888"


def _places(methods: Iterable[str]) -> dict[str, int]:
    """The index in `OTHER_STYLES` of each method that has no style of its own; beyond the end it begins again."""
    places: dict[str, int] = {}
    for method in dict.fromkeys(methods):
        if method not in METHOD_COLORS:
            first, count = zlib.crc32(method.encode()) % len(OTHER_STYLES), len(OTHER_STYLES)
            rounds = len(places) // count * count
            free = (rounds + (first + step) % count for step in range(count))
            places[method] = next(place for place in free if place not in places.values())
    return places


def method_color(method: str, among: Sequence[str] = ()) -> str:
    """See `method_style`."""
    color: str = method_style(method, among)["color"]
    return color


def method_marker(method: str, among: Sequence[str] = ()) -> str:
    """See `method_style`."""
    if method in METHOD_MARKERS:
        return METHOD_MARKERS[method]
    return OTHER_STYLES[_places([*among, method])[method] % len(OTHER_STYLES)][1]


def method_style(method: str, among: Sequence[str] = ()) -> dict[str, Any]:
    """How a line of a method is drawn.

    Args:
        among: all methods of the figure, in order, so that no two look alike.
    """
    label = METHOD_LABELS.get(method, method)
    if method in METHOD_COLORS:
        return {"color": METHOD_COLORS[method], "label": label}
    rounds, place = divmod(_places([*among, method])[method], len(OTHER_STYLES))
    return {"color": OTHER_STYLES[place][0], "label": label, "linestyle": LINE_STYLES[rounds % len(LINE_STYLES)]}
