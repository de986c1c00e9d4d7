"""What commands share: a parser that doesn't exit, values of options, and what a command ends with.

Nothing here imports NumPy: how many threads that may have is an option of some commands, and has to be told before.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class UsageError(Exception):
    """The options of this rank can't be used; one line."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of exiting, so that all ranks can leave together.

    Args:
        closing: makes the text that ends the help; called when the help is asked for.
        how: as of `argparse.ArgumentParser`.
    """

    quiet = False

    def __init__(self, *, closing: Callable[[], str] | None = None, **how: Any) -> None:
        super().__init__(**how)
        self._closing = closing

    def format_help(self) -> str:
        text = super().format_help()
        return f"{text}\n{self._closing()}" if self._closing else text

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def print_help(self, file: Any = None) -> None:
        if not self.quiet:
            super().print_help(file)


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to every option's help, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def description(doc: str | None) -> str:
    """The first line of a command's docstring, without the command itself, which the usage line has."""
    line = re.sub(r"(:| with)? `python -m [^`]*`", "", (doc or "").splitlines()[0])
    return line.replace("?.", "?")


def program(command: str) -> str:
    """The command as it was started, for its usage line: an installed script, or `python -m` and its module."""
    script = Path(sys.argv[0]).name
    return script if script.startswith("gradiveq-") else f"python -m {command}"


def methods_help(others: str) -> str:
    """The end of the help of a command that takes methods as texts.

    Args:
        others: the methods that aren't specs, as a text that goes before "; or a spec:".
    """
    from gradiveq import specs  # and NumPy with it: nothing else happens in this process

    grammar = (specs.__doc__ or "").split("\n\n", 1)[1].rstrip()
    compressors = "\n".join(f"    {spec}\n        {text}" for spec, text in specs.describe())
    lead = f"what --methods takes:\n    {others}; or a spec:"
    return f"{lead}\n\n{grammar}\n\ncompressors, with their defaults:\n{compressors}\n"


def positive(text: str) -> float:
    """The value of an option: a number above 0, not infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def names(text: str) -> list[str]:
    """The value of an option: names between commas."""
    return text.split(",")


def numbers(text: str) -> tuple[float, ...]:
    """The value of an option: numbers between commas."""
    return tuple(float(word) for word in text.split(","))


def refused(error: Exception) -> int:
    """Say in one line on stderr why a command can't be done; returns its exit status."""
    print(f"error: {error}", file=sys.stderr)
    return 2
