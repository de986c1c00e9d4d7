"""For tests of commands that draw: figures come again from what was recorded alone."""

from pathlib import Path

from bench import figures


def check_drawn_again(out: Path) -> None:
    """Without its figures and tables, a folder becomes what it was, to the byte."""
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for path in before:
        if path.suffix == ".png":
            path.unlink()
    assert figures.main([str(out)]) == 0
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
