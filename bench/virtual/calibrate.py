"""Complete a cluster that `ring.calibrate` has measured: how fast its nodes train and run the codecs.

    python -m bench.calibrate --cluster results/this-machine.toml

Adds to the file, and leaves the rest of it as it is:

    [node] iteration_s          forward, backward and update of a model
    [rates] qsgd.encode, qsgd.recode, qsgd.decode       elements per second, 4 bits
    [rates] pca.encode, pca.decode                      multiplications per second, with the bases of a compressed model

All are processor time of one thread, unless --threads says otherwise. Under `mpirun` all ranks are measured at once,
and what is written is the median over them: where ranks share a machine's memory, that is what they have of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.common.command_line import Parser, UsageError, description, program
from bench.common.launch import limit_threads

if TYPE_CHECKING:
    from mpi4py import MPI

#: What stands between what `ring.calibrate` says of the file's origin and what this command adds.
ALSO = "; codecs and iteration "


def make_parser() -> Parser:
    parser = Parser(prog=program("bench.calibrate"), description=description(__doc__))
    parser.add_argument(
        "--cluster",
        type=Path,
        default=Path("results/this-machine.toml"),
        metavar="FILE",
        help="written by ring.calibrate; completed in place (results/this-machine.toml)",
    )
    parser.add_argument("--model", default="resnet32", metavar="NAME", help="whose iterations are timed (resnet32)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images per worker and iteration (16)")
    parser.add_argument("--data", metavar="PATH", help="as for the training job; the shipped sample if left out")
    parser.add_argument("--ratio", type=float, default=8.0, metavar="X", help="K / d of the bases (8)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of a worker (1)")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="of each measurement (15)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    options, error, status = None, "", 0
    if comm.rank == 0:
        try:
            options = make_parser().parse_args(arguments)
            for name in ("batch_size", "threads", "repeats"):
                if getattr(options, name) < 1:
                    raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
        except UsageError as refused:
            options, error, status = None, str(refused), 2
        except SystemExit as stop:  # --help
            status = int(stop.code or 0)
    options, error, status = comm.bcast((options, error, status))
    if options is not None:
        limit_threads(options.threads)
        error = complete(comm, options)
        status = 2 if error else 0
    if error and comm.rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return status


def complete(comm: MPI.Intracomm, options: argparse.Namespace) -> str:
    """Measure and write; collective. Returns on all ranks what was wrong, in one line, or nothing."""
    import torch

    from bench.data import load
    from bench.models import MODELS
    from bench.virtual import rates
    from ring.abort import check_launcher, end_together
    from ring.calibrate import unwritable
    from ring.cluster import read, write
    from ring.fit import rounded
    from ring.machine import processor

    end_together(comm)
    check_launcher(comm)
    torch.set_num_threads(options.threads)
    cluster = dataset = None
    error = ""
    try:
        if options.model not in MODELS:
            raise ValueError(f"--model must be one of {', '.join(MODELS)}, got {options.model!r}")
        if not options.ratio > 1:
            raise ValueError(f"--ratio must be above 1, or nothing is compressed, got {options.ratio:g}")
        cluster = read(options.cluster)
        if comm.rank == 0 and (problem := unwritable(options.cluster)):
            raise ValueError(f"--cluster: {problem}")
        dataset = load(options.data)
        if options.batch_size > len(dataset.train_images):
            raise ValueError(f"--batch-size must be at most {len(dataset.train_images)}, the images there are")
    except ValueError as caught:
        error = " ".join(str(caught).split())
    if errors := [text for text in comm.allgather(error) if text]:
        return str(errors[0])
    assert cluster is not None
    assert dataset is not None

    own = rates.measure_all(dataset, options.model, options.batch_size, options.ratio, options.repeats)
    everything = comm.gather(own)
    if everything is not None:
        own = rates.merge(everything)
        known = {**cluster.rates, **{name: rounded(rate) for name, rate in own.rates().items()}}
        today = datetime.datetime.now(datetime.UTC).date()
        launch = f"mpirun -n {comm.size} " if comm.size > 1 else ""
        command = f"{launch}python -m bench.calibrate {shlex.join(sys.argv[1:])}".strip()
        how = (
            f"{ALSO}{today} by `{command}`: {options.model}, {options.batch_size} images, K/d = {options.ratio:g}, "
            f"{options.threads} thread{'s' if options.threads > 1 else ''} of {processor()}, torch {torch.__version__}"
        )
        completed = dataclasses.replace(
            cluster,
            source=cluster.source.partition(ALSO)[0] + how,
            node=dataclasses.replace(cluster.node, iteration_s=rounded(own.iteration_s)),
            rates=known,
        )
        print(how.removeprefix("; "))
        print(rates.report(own, known), flush=True)
        try:
            write(completed, options.cluster)
            print(f"\n{options.cluster} completed", flush=True)
        except OSError as caught:
            error = f"{options.cluster} can't be written ({caught.strerror or caught})"
    return str(comm.bcast(error))
