"""Record the gradients of some convolutions while ResNet-32 trains with plain ring all-reduce, for Fig. 4 and 5.

    mpirun -n 6 python -m bench.record_gradients --data cifar-100-binary.tar.gz --out results/cifar100-gradients

What is recorded is the mean over the ranks, as GradiVeQ samples it. `python -m bench.figures` draws the figures.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from bench.common.command_line import DefaultsFormatter, Parser, UsageError, description
from bench.common.launch import limit_threads, run_together
from bench.common.workers import LONG_S, Processes

FILE = "gradients.npz"


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m bench.record_gradients",
        description=description(__doc__),
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument("--data", metavar="PATH", help="as for the training job; the shipped sample if left out")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"folder for {FILE}")
    parser.add_argument("--layers", default="conv1,layer1.0.conv1", metavar="NAME,…", help="convolutions")
    parser.add_argument("--skip", type=int, default=300, metavar="N", help="iterations before the first recorded one")
    parser.add_argument("--count", type=int, default=150, metavar="N", help="iterations to record")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images per worker and iteration")
    parser.add_argument("--lr", type=float, default=0.1, metavar="X", help="learning rate")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, data order and augmentation")
    return parser


def main(arguments: list[str] | None = None) -> int:
    return run_together(lambda workers, _: prepare_and_record(arguments, workers))


def prepare_and_record(arguments: list[str] | None, workers: Processes) -> int:
    parser = make_parser()
    parser.quiet = not workers.lead
    options = workers.attempt(lambda: parser.parse_args(arguments), UsageError)
    threads = max(1, workers.cores // workers.local_size)
    limit_threads(threads)
    record(workers, options, threads)
    return 0


def record(workers: Processes, options: argparse.Namespace, threads: int) -> None:
    """Train and write; collective. Raises Failure on all ranks for what can't be used."""
    from ring.abort import end_together

    end_together(workers.comm)
    import torch
    from tqdm import trange

    from bench.common.environment import environment
    from bench.data import load
    from bench.job.train import Settings, Trainer
    from bench.models import resnet32
    from bench.papers.gradiveq.recorded_gradients import GradientRecorder
    from gradiveq import Plain
    from ring.mpi import MPIRing

    workers.agree(None)  # all have imported
    torch.set_num_threads(threads)
    ring = MPIRing(workers.comm)

    def prepare() -> tuple[Trainer, GradientRecorder]:
        if options.skip < 0:
            raise ValueError(f"--skip must be at least 0, got {options.skip}")
        model = resnet32(dataset.num_classes, seed=options.seed)
        recorder = GradientRecorder(model, options.layers.split(","), options.count)
        # Twice as long as it runs, so that the learning rate is the same throughout.
        iterations = 2 * (options.skip + options.count)
        settings = Settings(iterations, options.batch_size, options.lr, seed=options.seed)
        return Trainer(ring, model, dataset, Plain(), settings), recorder

    lead = workers.lead  # reads first: it may have to download
    dataset = workers.attempt(lambda: load(options.data), ValueError, here=lead, timeout_s=LONG_S)
    dataset = workers.attempt(lambda: load(options.data), ValueError, here=not lead) or dataset
    trainer, recorder = workers.attempt(prepare, ValueError)
    for iteration in trange(options.skip + options.count, disable=not lead, mininterval=10, file=sys.stderr):
        trainer.step()
        if iteration >= options.skip:
            recorder.add()

    def write() -> None:
        about = {
            "data": trainer.dataset.source,
            "seed": options.seed,
            "ranks": workers.size,
            "batch_size": options.batch_size,
            "first_iteration": options.skip,
            "model": "resnet32",
            "cores": workers.cores,
            **environment(),
            "command": f"mpirun -n {workers.size} python -m bench.record_gradients {shlex.join(sys.argv[1:])}",
        }
        options.out.mkdir(parents=True, exist_ok=True)
        recorder.save(options.out / FILE, about)
        for numbers in ("fig4.json", "fig5.json"):  # of what was recorded before
            (options.out / numbers).unlink(missing_ok=True)
        print(f"recorded {options.count} iterations of {options.layers} in {options.out / FILE}")

    workers.attempt(write, OSError, here=lead, timeout_s=LONG_S)
