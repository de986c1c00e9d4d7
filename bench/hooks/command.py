"""PyTorch's own communication hooks beside ours, under torchrun: `python -m bench.ddp`.

    python -m bench.ddp                                    # starts torchrun with two ranks; about 10 minutes on 2 cores
    python -m bench.ddp --methods torch:none,half,topk:?+ef --ratios 8 --rate none
    torchrun --nproc-per-node 2 -m bench.ddp               # with ranks that are there already

One model is trained by DistributedDataParallel over Gloo (NCCL with --device cuda) on the shipped sample of
Fashion-MNIST, by each method and several seeds; then all methods are timed in turn, in one process group: between
ranks on this machine's loopback, and between hosts of their own behind links that are shaped to --rate (Linux, root).

Methods are texts (`bench.hooks.equal_bytes`, --help). Where one has a "?", the number is chosen so that the bytes of
the whole run are an x-th of plain DDP's, for each x of --ratios: these are compared at equal bytes. The first --start
iterations go uncompressed with all methods, and count.

Bytes are what is handed to the process group, counted at `torch.distributed`'s functions for PyTorch's hooks and for
ours alike; of DDP without a hook, the gradient. All methods have one bucket: over Gloo, PyTorch's PowerSGD hook stands
still with several.

    --out folder (results/ddp)
        runs/<name>.json    each run (`bench.experiments.grid`); what `--resume` goes on with
        ddp.json            {"environment", "options", "expected" (bytes), "reached" (accuracy), "notes", "rows",
                            "runs"}; see `bench.hooks.findings.Row`
        table.md
        ddp.png
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.common.command_line import Parser, UsageError, description, methods_help, names, numbers
from bench.common.environment import dataset_digest, environment
from bench.common.files import file_name, plain, write_json, writing
from bench.common.launch import INTERRUPTED
from bench.data import DataError, load
from bench.experiments.grid import GridError, run_grid
from bench.hooks.equal_bytes import PLAIN, Entry, Length, blocks_of, entries
from bench.hooks.findings import reached_accuracy, rows
from bench.hooks.ranks import RanksError, by_torchrun, on_hosts, stopped_by_sigterm
from bench.hooks.report import write
from bench.hooks.runs import LR_WARMUP, TIME, TRAIN, RunsPlan, several_by_default, work
from bench.models import MODELS
from bench.shaped.hosts import MOST_HOSTS, Hosts, HostsError, why_not
from gradiveq.ddp.state import FIRST_START
from ring.machine import usable_cores

OUT = Path("results/ddp")
#: GradiVeQ is there three times: one window for the run, the paper's proportion of sampling, and few samples.
METHODS = (
    PLAIN,
    "rar",
    "torch:fp16",
    "half",
    "torch:powersgd:?",
    "powersgd:?:min_compression_rate=2",
    "topk:?+ef",
    "sign:scaled+ef",
    "gradiveq:ratio=?:fit_slices=all:slice_size=192:sample=20",
    "gradiveq:ratio=8:fit_slices=all:slice_size=192:sample=20:compress=80",
    "gradiveq:ratio=49:fit_slices=all:slice_size=192:sample=5",
)
#: What a method may be beside a spec, for --help.
METHODS_ARE = """torch:none                  DistributedDataParallel without a hook, which all others are compared with
    torch:fp16, torch:bf16      PyTorch's hooks that cast
    torch:powersgd:RANK         PyTorch's PowerSGD hook
    rar                         ours without compression
    gradiveq:FIELD=VALUE:...    ours, with fields of gradiveq.methods.GradiVeQ
    any with a "?"              the number at which its bytes over the run are an x-th of plain DDP's, for --ratios"""
RATIOS = (8.0, 25.0)
RATES_MBPS = (100.0,)
#: Models whose channels --width changes, and by how much unless it is said.
WIDTHS = {"alexnet": 0.25, "alexnet-fc": 0.25, "resnet9": 0.25}
#: What torchrun and others tell the processes that they start.
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options.

    Raises:
        UsageError: one of them can't be used; one line.
    """
    parser = Parser(
        prog="python -m bench.ddp",
        description=description(__doc__),
        closing=lambda: methods_help(METHODS_ARE),
    )
    parser.add_argument("--nproc", type=int, default=2, help="ranks to start (default: 2)", metavar="N")
    parser.add_argument(
        "--methods",
        type=names,
        default=list(METHODS),
        metavar="TEXT,…",
        help=f"default: {','.join(METHODS).replace('%', '%%')}",
    )
    parser.add_argument(
        "--ratios",
        type=numbers,
        default=RATIOS,
        metavar="X,…",
        help="what a ? in a method stands for makes it send an x-th of plain DDP's bytes over the run (default: 8,25)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: 3)", metavar="N")
    parser.add_argument("--iterations", type=int, default=400, help="of a run (default: 400)", metavar="N")
    parser.add_argument(
        "--start",
        type=int,
        default=2,
        help="iterations at the beginning that no method compresses (default: 2)",
        metavar="N",
    )
    parser.add_argument("--evaluations", type=int, default=10, help="of a run (default: 10)", metavar="N")
    parser.add_argument("--model", default="alexnet", help=f"{', '.join(MODELS)} (default: alexnet)", metavar="NAME")
    parser.add_argument("--width", type=float, help="factor of the model's channels (default: 0.25)", metavar="X")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a rank (default: 32)", metavar="N")
    parser.add_argument("--lr", type=float, default=0.1, help="the learning rate's peak (default: 0.1)", metavar="X")
    parser.add_argument("--momentum", type=float, default=0.9, help="Nesterov's (default: 0.9)", metavar="X")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="(default: 0.0005)", metavar="X")
    parser.add_argument("--data", help="as for the training job (default: the shipped sample)", metavar="PATH")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=("gloo", "nccl"), help="default: nccl with --device cuda, else gloo")
    parser.add_argument("--threads", type=int, default=1, help="of a rank (default: 1)", metavar="N")
    parser.add_argument(
        "--rate",
        type=_rates,
        metavar="MBPS,…",
        help="also time ranks on hosts of their own behind links of so many Mbit/s; none for none (default: 100)",
    )
    parser.add_argument("--rounds", type=int, default=12, help="in which methods are timed (default: 12)", metavar="N")
    parser.add_argument("--stretch", type=int, default=5, help="iterations of a time (default: 5)", metavar="N")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds of one exchange (120)", metavar="S")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for the results (default: {OUT})", metavar="DIR")
    parser.add_argument("--resume", action="store_true", help="go on with the runs in --out")
    options = parser.parse_args(words)
    _check(options)
    return options


def _rates(text: str) -> tuple[float, ...]:
    return () if text == "none" else numbers(text)


def _check(options: argparse.Namespace) -> None:
    """Fill in what was left open, and refuse what can't be."""
    least = dict.fromkeys(("nproc", "seeds", "evaluations", "batch_size", "threads", "rounds", "stretch"), 1)
    for option, bound in {**least, "start": FIRST_START, "iterations": options.start + 1}.items():
        if getattr(options, option) < bound:
            raise UsageError(f"--{option.replace('_', '-')} must be at least {bound}, got {getattr(options, option)}")
    if options.evaluations > options.iterations:
        raise UsageError(
            f"--evaluations must be at most {options.iterations} (the iterations), got {options.evaluations}"
        )
    for option, limit in (("lr", math.inf), ("timeout", 1e6), ("momentum", 1.0)):
        value = getattr(options, option)
        if not 0 < value < limit:
            raise UsageError(f"--{option} must be above 0 and below {limit:g}, got {value:g}")
    if not 0 <= options.weight_decay < math.inf:
        raise UsageError(f"--weight-decay must be at least 0, got {options.weight_decay:g}")
    if options.model not in MODELS:
        raise UsageError(f"--model must be one of {', '.join(MODELS)}, got {options.model!r}")
    if options.width is not None and options.model not in WIDTHS:
        raise UsageError(f"--width is for {', '.join(WIDTHS)}; {options.model} has none")
    options.width = WIDTHS.get(options.model) if options.width is None else options.width
    if options.width is not None and not 0 < options.width <= 16:
        raise UsageError(f"--width must be above 0 and at most 16, got {options.width:g}")
    if any(not 1 < ratio < math.inf for ratio in options.ratios):
        raise UsageError(f"--ratios must be above 1, got {', '.join(f'{ratio:g}' for ratio in options.ratios)}")
    if PLAIN not in options.methods:
        raise UsageError(f"--methods must have {PLAIN}, which all others are compared with")
    options.rate = RATES_MBPS if options.rate is None else options.rate
    if any(not 1 <= rate <= 100_000 for rate in options.rate):
        raise UsageError(f"--rate must be 1 to 100,000 Mbit/s, got {', '.join(f'{rate:g}' for rate in options.rate)}")
    options.backend = options.backend or ("nccl" if options.device == "cuda" else "gloo")
    if options.backend == "nccl" and options.device != "cuda":
        raise UsageError("--backend nccl needs --device cuda")
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: torch finds no such device here")
        if options.backend == "nccl" and options.nproc > torch.cuda.device_count():
            raise UsageError(
                f"--nproc must be at most {torch.cuda.device_count()} (devices here; NCCL refuses two ranks on one, "
                f"--backend gloo doesn't), got {options.nproc}"
            )


# --- what is run -----------------------------------------------------------------------------------------------------


def skipped(options: argparse.Namespace, launched: bool) -> str | None:
    """Why nothing is timed between shaped hosts; None if it is."""
    if not options.rate:
        return "--rate none"
    if launched:
        return "the ranks are where their launcher has started them; python -m bench.ddp starts them on hosts"
    if options.backend != "gloo":
        return "shaped links are for Gloo"
    if not 2 <= options.nproc <= MOST_HOSTS:
        return f"there can be 2 to {MOST_HOSTS} hosts, --nproc is {options.nproc}"
    return why_not()


def specs(options: argparse.Namespace, found: Sequence[Entry], num_parameters: int) -> dict[str, dict[str, Any]]:
    """The runs by name: training, all seeds of a method after one another, then times on loopback, then by rate."""
    common = {
        "model": options.model,
        "width": options.width,
        "data": options.data,
        "device": options.device,
        "backend": options.backend,
        "ranks": options.nproc,
        "batch_size": options.batch_size,
        "start": options.start,
        "lr": options.lr,
        "momentum": options.momentum,
        "weight_decay": options.weight_decay,
    }
    runs: dict[str, dict[str, Any]] = {}
    for entry in found:
        for seed in range(options.seeds):
            runs[f"{file_name(entry.text)}-s{seed}"] = {
                "kind": TRAIN,
                "method": entry.text,
                **common,
                "iterations": options.iterations,
                "warmup": LR_WARMUP,
                "evaluations": options.evaluations,
                "seed": seed,
            }
    for rate in (None, *options.rate):
        runs["times" if rate is None else f"times-{rate:g}-mbps"] = {
            "kind": TIME,
            "methods": [entry.text for entry in found],
            **common,
            "seed": 0,
            "rounds": options.rounds,
            "stretch": options.stretch,
            "rate_mbps": rate,
            "defaults": several_by_default(num_parameters),
        }
    return runs


def check_recorded(runs: Mapping[str, Mapping[str, Any]], folder: Path, resume: bool) -> None:
    """Whether what is there already may be taken. Raises GridError if not."""
    there = {name: spec for name, spec in runs.items() if (folder / f"{name}.json").exists()}
    run_grid(_nothing, there, folder, processes=1, resume=resume)


def _nothing(spec: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    raise AssertionError("it is recorded")


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    launched = all(name in os.environ for name in LAUNCHED)
    lead = not launched or os.environ["RANK"] == "0"
    options = None
    try:
        options = parse(words)
        if launched:
            options.nproc = int(os.environ["WORLD_SIZE"])
        with stopped_by_sigterm():
            return run(options, words, launched, lead)
    except (UsageError, DataError, GridError, RanksError, HostsError, ValueError) as error:
        if lead:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if lead:
            print("stopped" + (f"; go on with --resume --out {options.out}" if options else ""), file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if lead:
            print(f"error: {error.filename or (options and options.out)}: {error.strerror or error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace, words: Sequence[str], launched: bool, lead: bool) -> int:
    """Do all of it, as the process that starts the ranks or as one of them."""
    dataset = load(options.data)
    widths = {} if options.width is None else {"width": options.width}
    blocks = blocks_of(MODELS[options.model](dataset.num_classes, **widths))
    num_parameters = sum(block.length for block in blocks)
    length = Length(options.iterations, options.start, options.nproc)
    found, left_out = entries(options.methods, options.ratios, blocks, length)
    why = skipped(options, launched)
    notes = [f"Not at equal bytes: {line}." for line in left_out]
    notes += [] if why is None else [f"No times between shaped hosts: {why}."]
    for note in notes if lead else ():
        print(note, flush=True)
    grid = specs(options, found, num_parameters)
    if why is not None:
        grid = {name: spec for name, spec in grid.items() if not spec.get("rate_mbps")}
    folder = options.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    about = environment() | {  # of the source as it is now: training takes a while
        "command": shlex.join(["python", "-m", "bench.ddp", *words]),
        "cores": usable_cores(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "backend": options.backend,
        "data_sha256": dataset_digest(dataset),
    }
    if lead:
        check_recorded(grid, folder, options.resume)

    def plan(names: Sequence[str], links: Mapping[str, Any] | None = None) -> RunsPlan:
        chosen = {name: grid[name] for name in names}
        # What is there already has been looked at.
        ranks_are = options.backend, options.device, options.threads, options.timeout
        return RunsPlan(chosen, str(folder.resolve()), True, *ranks_are, links)

    here = [name for name, spec in grid.items() if not spec.get("rate_mbps")]
    if launched:
        status = work(plan(here))
        if not lead:
            return status
    elif any(not (folder / f"{name}.json").exists() for name in here):
        by_torchrun(plan(here), options)
    missing = [name for name in grid if name not in here and not (folder / f"{name}.json").exists()]
    if missing:
        with Hosts(options.nproc, options.rate[0]) as hosts:
            for name in missing:
                hosts.reshape(grid[name]["rate_mbps"])
                on_hosts(plan([name], hosts.describe()), options, hosts)
    runs = run_grid(_nothing, grid, folder, processes=1, resume=True)
    record = plain(
        {
            "environment": about,
            "options": vars(options),
            "expected": [asdict(entry) for entry in found],
            "reached": reached_accuracy(runs),
            "notes": notes,
            "rows": [row.as_dict() for row in rows(runs, found, options.nproc)],
            "runs": runs,
        }
    )
    with writing(options.out):
        write_json(options.out / "ddp.json", record)
        write(record, options.out)
        print((options.out / "table.md").read_text())
    return 0
