"""The Markdown pages: their links, their lines, and the length of the README."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.support.printed import ROOT

#: Most lines of what is to be read in one sitting.
README_LINES, ARCHITECTURE_LINES = 180, 110
WIDTH = 120
#: Columns that indented code begins at.
CODE_INDENT = 4
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def tracked() -> list[Path]:
    """The pages of the repository; without one, those beside the packages."""
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "*.md"], capture_output=True, text=True, check=True
        ).stdout
        return [ROOT / name for name in listed.splitlines()]
    folders = ("bench", "gradiveq", "results", "ring", "tests")
    return sorted([*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))])


PAGES = tracked()
#: Pages that commands write have no width.
WRITTEN_BY_HAND = [page for page in PAGES if page.name not in ("table.md", "this-machine.md")]


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@cache
def prose(page: Path) -> tuple[tuple[int, str], ...]:
    """The lines of a page, with their numbers, that are in no listing."""
    return tuple(_outside_listings(page.read_text().splitlines()))


def _outside_listings(lines: list[str]) -> Iterator[tuple[int, str]]:
    fenced, before, in_list = False, "", False
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            in_list = bool(re.match(r" {0,3}([*-]|\d+\.) ", line)) or (in_list and (not line or line.startswith(" ")))
            indented = line.startswith(" " * CODE_INDENT) and not in_list
            if not (indented and (not before or before.startswith(" " * CODE_INDENT))):
                yield number, line
        before = line


@cache
def anchors(page: Path) -> frozenset[str]:
    """The fragments that a page's headings have on GitHub."""
    found: Counter[str] = Counter()
    result = set()
    for _, line in prose(page):
        if heading := re.match(r"#+ (.*)", line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            result.add(f"{slug}-{found[slug]}" if found[slug] else slug)
            found[slug] += 1
    return frozenset(result)


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    text = "\n".join(re.sub(r"`[^`]*`", "", line) for _, line in prose(page))
    found = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        leads_to = page if not path else (page.parent / unquote(path)).resolve()
        if not leads_to.exists() or (fragment and fragment not in anchors(leads_to)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken(page)


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading, of words\n\n[here](#a-heading-of-words) [no](#a-heading) [file](none.md)\n\n"
        "    [code](none.md)\n\nA [link over\nlines](gone.md#x), `[none](at-all.md)`, [far](https://example.org/#x)\n"
    )
    assert broken(page) == ["#a-heading", "none.md", "gone.md#x"]


@pytest.mark.parametrize("page", WRITTEN_BY_HAND, ids=names(WRITTEN_BY_HAND))
def test_lines_are_of_one_width(page: Path) -> None:
    unbroken = re.compile(r"\s*(\||!\[)")  # tables and figures
    long = [number for number, line in prose(page) if len(line) > WIDTH and not unbroken.match(line)]
    assert not long


@pytest.mark.parametrize(("name", "most"), [("README.md", README_LINES), ("ARCHITECTURE.md", ARCHITECTURE_LINES)])
def test_what_is_read_in_one_sitting(name: str, most: int) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= most
