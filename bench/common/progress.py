"""What is shown of a run while it runs."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm


def has_terminal() -> bool:
    """Whether somebody watches: this process's own error output is a terminal, or its launcher's is."""
    if sys.stderr.isatty():
        return True
    pid, terminal = os.getppid(), False
    try:
        while re.match(r"hydra_|mpiexec|mpirun|orte|prte|prun", Path(f"/proc/{pid}/comm").read_text()):
            terminal = os.readlink(f"/proc/{pid}/fd/2").startswith(("/dev/pts/", "/dev/tty"))
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        pass
    return terminal


class Progress:
    """A bar or lines on rank 0, nothing elsewhere.

    Args:
        style: "bar", "lines" or "none".
        done: iterations that were done before.
    """

    def __init__(self, style: str, method: str, iterations: int, done: int) -> None:
        self._style, self._method, self._iterations, self._first = style, method, iterations, done
        self._every = max(1, iterations // 10)
        self._start = time.monotonic()
        self._accuracy = ""
        self._bar = None
        if style == "bar":
            self._bar = tqdm(
                total=iterations, initial=done, desc=method, ncols=110, file=sys.stderr, mininterval=0.3, unit="it"
            )

    def show(self, line: Mapping[str, Any]) -> None:
        """Take a line of the metrics."""
        if line["type"] == "evaluation":
            self._accuracy = f", test accuracy {line['test_accuracy']:.4f}"
            if self._style == "lines":
                print(f"{self._method}: after {line['iteration']} iterations{self._accuracy}", flush=True)
        elif line["type"] == "iteration":
            done = line["iteration"] + 1
            if self._bar is not None:
                self._bar.set_postfix_str(f"{line['phase']}, loss {line['loss']:.3f}{self._accuracy}", refresh=False)
                self._bar.update()
            elif self._style == "lines" and done % self._every == 0:
                elapsed = time.monotonic() - self._start
                left = elapsed / (done - self._first) * (self._iterations - done)
                there = f" ({line['virtual_s']:,.1f} s of training on the cluster)" if "virtual_s" in line else ""
                print(
                    f"{self._method}: {done} of {self._iterations}, {line['phase']}, loss {line['loss']:.3f}, "
                    f"{elapsed:.0f} s, {left:.0f} s left{there}",
                    flush=True,
                )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
