"""An experiment: many runs of one grid, then findings, a table and figures of what was recorded of them.

    --out folder
        runs/<name>.json    each run (`bench.experiments.grid`); what `--resume` goes on with
        NAME.json           the environment, the findings, and what the experiment adds
        runs.json.gz        what figures and tables need of the runs (`bench.experiments.condensed_runs`)
        table.md            the paper's findings beside ours, judged by written rules
        *.png

A package of an experiment fills in an `Experiment` (`command`), with what is run at which size (`sizes`), one run
(`runs`), what is found (`findings`) and the drawings (`figures`). Its `command` has `main` and `redraw`, those of the
`Experiment`; `bench.figures.EXPERIMENTS` says which record it draws.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from bench.common.command_line import Parser, UsageError, refused
from bench.common.environment import environment
from bench.common.files import CannotWrite, plain, write_atomically, write_json, writing
from bench.common.launch import INTERRUPTED
from bench.data import DataError
from bench.drawing import page
from bench.experiments import condensed_runs
from bench.experiments.condensed_runs import Runs
from bench.experiments.findings import Finding
from bench.experiments.grid import GridError, Run, Spec, run_grid
from ring.machine import usable_cores

TABLE = "table.md"


@dataclass(frozen=True)
class Experiment:
    """What one experiment is; `main` and `redraw` do the rest.

    Attributes:
        name: name of its command (`python -m bench.NAME`).
        record: name of the JSON file, by which `python -m bench.figures` knows it.
        parse: the options from the words of a command line, those of `add_run_options` among them. Raises UsageError.
        about: what the environment has beside the machine. Raises DataError, before any run, for unusable data.
        specs: the grid of runs, by name.
        run: one of them; a module's function, as spawned processes have to find it.
        condense: what is kept of a run's result for findings, table and figures.
        judge: the findings; none if there is no paper to judge by.
        report: table.md.
        draw: each figure by the name of its file.
        summary: what the JSON file has beside the environment and the findings, of the runs as they were recorded.
        packages: whose versions are recorded.
    """

    name: str
    record: str
    parse: Callable[[Sequence[str]], argparse.Namespace]
    about: Callable[[argparse.Namespace], dict[str, Any]]
    specs: Callable[[argparse.Namespace], Mapping[str, Spec]]
    run: Run
    condense: Callable[[Mapping[str, Any]], dict[str, Any]]
    judge: Callable[[Runs, argparse.Namespace], list[Finding]]
    report: Callable[[Runs, Sequence[Finding], argparse.Namespace, Mapping[str, Any]], str]
    draw: Callable[[Runs, argparse.Namespace, Mapping[str, Any]], Iterator[tuple[str, Figure]]]
    summary: Callable[[Runs, argparse.Namespace], dict[str, Any]]
    packages: tuple[str, ...] = ("numpy", "scipy", "torch", "numba", "mpi4py")

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """The command; returns its exit status."""
        words = list(sys.argv[1:] if arguments is None else arguments)
        out: Path | None = None
        try:
            options = self.parse(words)
            out = options.out
            self._do(options, words)
        except (UsageError, DataError, GridError, CannotWrite, ValueError) as error:
            return refused(error)
        except KeyboardInterrupt:
            print(f"stopped; go on with --resume --out {out}", file=sys.stderr)
            return INTERRUPTED
        except OSError as error:
            print(f"error: {error.filename or out}: {error.strerror or error}", file=sys.stderr)
            return 2
        return 0

    def _do(self, options: argparse.Namespace, words: Sequence[str]) -> None:
        about = environment(self.packages) | {
            "command": shlex.join(["python", "-m", f"bench.{self.name}", *words]),
            "cores": usable_cores(),
            **self.about(options),
        }
        grid = self.specs(options)
        with tqdm(total=len(grid), desc="runs", unit="run", disable=None) as bar:

            def show(line: str) -> None:
                bar.update()
                bar.write(line)

            how = {"processes": options.processes, "threads": options.threads, "resume": options.resume}
            recorded = run_grid(self.run, grid, options.out / "runs", show=show, **how)
        with writing(options.out):
            runs = condensed_runs.keep(options.out, recorded, self.condense)
            found = self.judge(runs, options)
            record = {
                "environment": about,
                "findings": [finding.as_dict() for finding in found],
                **self.summary(recorded, options),
            }
            write_json(options.out / self.record, plain(record))
            self._write(runs, found, options, about, options.out)
            print((options.out / TABLE).read_text())

    def _write(
        self,
        runs: Runs,
        found: Sequence[Finding],
        options: argparse.Namespace,
        about: Mapping[str, Any],
        folder: Path,
    ) -> list[Path]:
        """table.md and all figures."""
        text = self.report(runs, found, options, about)
        return write_table_and_figures(folder, text, lambda: self.draw(runs, options, about))

    def redraw(self, path: Path) -> list[Path]:
        """Figures and table again, of the record at `path` and the runs beside it.

        Raises: as `condensed_runs.recorded`.
        """
        about, words, runs = condensed_runs.recorded(path)
        options = self.parse(words)  # the size is what the options made of it
        return self._write(runs, self.judge(runs, options), options, about, path.parent)


def write_table_and_figures(folder: Path, text: str, draw: Callable[[], Iterator[tuple[str, Figure]]]) -> list[Path]:
    """Write table.md and the figures into a folder; returns the files."""
    written = [folder / TABLE]
    write_atomically(written[0], text.encode())
    with page.figure_style():
        written += [page.write_figure(figure, folder / name) for name, figure in draw()]
    return written


def add_run_options(parser: Parser, out: Path) -> None:
    """--device, --processes, --threads, --out, --resume.

    Args:
        out: the folder for results unless another is said; `folder_for` adds to it with --paper.
    """
    cores = min(2, usable_cores())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, default=cores, help=f"runs at a time (default: {cores})", metavar="N")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: 1)", metavar="N")
    parser.add_argument("--out", type=Path, help=f"folder for the results (default: {out}; {out}-paper)", metavar="DIR")
    parser.add_argument("--resume", action="store_true", help="go on with the runs in --out")


def folder_for(options: argparse.Namespace, out: Path) -> Path:
    """The folder for results that the options say, or that of the size."""
    given: Path | None = options.out
    return given or (Path(f"{out}-paper") if options.paper else out)


def check_bounds(options: argparse.Namespace, bounds: Mapping[str, int]) -> None:
    """Whether options that were given are at least so much; 0 stands for above 0. Raises UsageError naming one."""
    for name, bound in bounds.items():
        value = getattr(options, name)
        if value is not None and not value >= (bound or 1e-9):
            least = f"at least {bound}" if bound else "positive"
            raise UsageError(f"--{name.replace('_', '-')} must be {least}, got {value:g}")
