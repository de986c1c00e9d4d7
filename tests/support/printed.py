"""What README.md, gradiveq/METHODS.md and bench/LAUNCH.md print, to be run as it stands there."""

from __future__ import annotations

import re

from tests.support.processes import ROOT

README = (ROOT / "README.md").read_text()
METHODS = (ROOT / "gradiveq" / "METHODS.md").read_text()
LAUNCH = (ROOT / "bench" / "LAUNCH.md").read_text()


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or above. (In listings, # begins a comment.)"""
    level, inside, listing = len(heading.split(" ")[0]), False, False
    lines = []
    for line in text.splitlines(keepends=True):
        if line.startswith("```"):
            listing = not listing
        if not listing and re.match(rf"#{{1,{level}}} ", line):
            inside = line.rstrip() == heading
        elif inside:
            lines.append(line)
    assert lines, f"there is no {heading!r}"
    return "".join(lines)


def block(text: str, language: str) -> str:
    """The only listing in a language."""
    (listing,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return listing


def losses(printed: str) -> list[float]:
    """Those that a script of the README prints."""
    return [float(number) for number in re.findall(r"loss ([\d.]+)", printed)]
