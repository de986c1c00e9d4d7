"""Reading what data sets come in: files that may be compressed, and members of a .zip archive whose MD5 is known."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bench.data.share import DataError

#: How a compressed file's name ends -> what opens it.
OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def find(folder: Path, name: str) -> Path | None:
    """The file of this name in a folder, or a compressed one of this name with .gz, .bz2 or .xz; None without one."""
    return next((path for end in ("", *OPENERS) if (path := folder / f"{name}{end}").is_file()), None)


@contextmanager
def reading(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed if its name ends in .gz, .bz2 or .xz.

    Raises:
        DataError: one line that names the file, where it can't be read or is found damaged while it is read.
    """
    try:
        with path.open("rb") as file:
            opener = OPENERS.get(path.suffix)
            if opener is None:
                yield file
            else:
                with opener(file) as stream:
                    yield stream
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged or truncated {path.suffix} file ({error})") from error
    except OSError as error:
        if error.errno is None:  # bz2 has no error of its own for damaged data
            raise DataError(f"{path}: damaged or truncated {path.suffix} file ({error})") from error
        raise DataError(f"{path}: {error.strerror}") from error


@contextmanager
def reading_member(path: Path, md5s: Mapping[str, str], member: str) -> Iterator[IO[bytes]]:
    """Open a file in a published .zip archive.

    Args:
        path: the path of the archive.
        md5s: MD5 -> name of each archive that is expected.
        member: the file's path in it.
    Raises:
        DataError: one line, if it is another archive, or can't be read.
    """
    check_md5(path, md5s)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
            yield stream
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a readable .zip archive ({error})") from error
    except KeyError:
        raise DataError(f"{path}: no {member} in it") from None


def check_md5(path: Path, md5s: Mapping[str, str]) -> str:
    """The MD5 of a file, which must be one of `md5s` (MD5 -> name of what has it); a DataError otherwise."""
    found = md5(path)
    if found not in md5s:
        expected = " or ".join(f"{digest} ({name})" for digest, name in md5s.items())
        raise DataError(f"{path}: {path.stat().st_size:,} bytes with MD5 {found}, expected MD5 {expected}")
    return found


def md5(path: Path) -> str:
    """The MD5 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def lines(stream: IO[bytes], where: str) -> Iterator[str]:
    """The lines of a file in UTF-8; a DataError, which names `where`, if it isn't."""
    try:
        return io.StringIO(stream.read().decode(), newline=None)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start:,})") from error
