"""Make the shipped text, a novel in the form of WikiText-2: words between spaces, a paragraph a line, rare words <unk>.

    python -m bench.sample.make_text Rdata.rdb [--out FOLDER]

The input is the data file of Debian's package `r-cran-janeaustenr` (in /usr/lib/R/site-library/janeaustenr/data), which
has Jane Austen's novels as vectors of lines. The same input gives the same text with any version of Python; the
compressed bytes may differ with another version of zlib.
"""

from __future__ import annotations

import argparse
import gzip
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench.data.share import DataError
from bench.data.text import SAMPLE_TEXT, UNKNOWN

TITLE = "PRIDE AND PREJUDICE"
#: Chapters that are trained on; the others, to the end, are tested on.
TRAIN_CHAPTERS = 54
#: Words that occur less often are unknown, as in WikiText-2.
MIN_COUNT = 3
#: A word, 's, a number with its separators, a dash, or another sign by itself.
TOKEN = re.compile(r"'s\b|[^\W\d_]+(?:'(?!s\b)[^\W\d_]+)?|\d+(?:[.,]\d+)*|--|[^\w\s]")


def novels(path: Path) -> Iterator[list[str]]:
    """The lines of each vector of strings in an R package's data file.

    The file is a sequence of objects, each after its size: zlib streams of R's serialisation (XDR, version 3), here
    character vectors: 14 bytes, the encoding's name, the type, the number of strings, then for each a type and a size.
    """
    data = path.read_bytes()
    while data:
        stream = zlib.decompressobj()
        try:
            values = stream.decompress(data[4:])
            (name_size,) = struct.unpack_from(">I", values, 14)
            _, count = struct.unpack_from(">II", values, 18 + name_size)
            position = 26 + name_size
            lines = []
            for _ in range(count):
                (size,) = struct.unpack_from(">I", values, position + 4)
                lines.append(values[position + 8 : position + 8 + size].decode())
                position += 8 + size
        except (zlib.error, struct.error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not an R package's data file of character vectors ({error})") from error
        yield lines
        data = stream.unused_data


def chapters(lines: list[str]) -> list[list[str]]:
    """Paragraphs of each chapter as words between spaces; its heading is the first, between equals signs."""
    found: list[list[str]] = []
    for paragraph in "\n".join(lines).split("\n\n"):
        text = " ".join(paragraph.replace("_", "").split())
        if re.fullmatch(r"chapter \w+", text, re.IGNORECASE):
            found.append([f"= {text} ="])
        elif found and text:
            joined = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", text)
            found[-1].append(" ".join("@-@" if part == "@-@" else words(part) for part in re.split("(@-@)", joined)))
    return [[" ".join(paragraph.split()) for paragraph in chapter] for chapter in found]


def words(text: str) -> str:
    """The words and signs of a text, between spaces."""
    return " ".join(TOKEN.findall(text))


def make_text(source: Path, out: Path, title: str = TITLE, train_chapters: int = TRAIN_CHAPTERS) -> None:
    """Write train.txt.gz and valid.txt.gz into the folder `out`; a DataError if the novel isn't in the file."""
    lines = next((lines for lines in novels(source) if lines and lines[0] == title), None)
    if lines is None:
        raise DataError(f"{source}: no novel that begins with {title!r}")
    parts = chapters(lines)
    splits = {"train": parts[:train_chapters], "valid": parts[train_chapters:]}
    counts = Counter(word for chapter in splits["train"] for paragraph in chapter for word in paragraph.split())
    for name, chosen in splits.items():
        text = "".join(
            " ".join(word if counts[word] >= MIN_COUNT else UNKNOWN for word in paragraph.split()) + "\n"
            for chapter in chosen
            for paragraph in chapter
        )
        (out / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sample.make_text", description="Make the shipped text.")
    parser.add_argument("file", type=Path, help="Rdata.rdb of the package janeaustenr")
    parser.add_argument("--out", type=Path, default=SAMPLE_TEXT, help="where to write (default: where it is shipped)")
    arguments = parser.parse_args()
    make_text(arguments.file, arguments.out)


if __name__ == "__main__":
    main()
