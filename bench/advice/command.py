"""Should I compress my gradients? `python -m bench.advise --model resnet50-imagenet --cluster v100-10gbe-4`.

    python -m bench.advise --model resnet32 --nodes 16 --bandwidth 1
    python -m bench.advise --model mypackage.models:build --input 3x224x224 --batch-size 64 --cluster mine.toml
    python -m bench.advise --model lstm --cluster v100-10gbe-4 --seconds-per-iteration 0.05

For each method that DDP's hook carries: time per iteration, speed-up over plain DDP, bytes, memory, what it does to
gradients, and up to which bandwidth it gains. How that is found:

    computing       forward, backward (gradient by gradient) and the optimiser's step, measured here; or their
                    proportions, with the seconds per iteration given, or the floating-point operations per second
    methods         the hook's own code on the model's own gradients, without a network (`bench.advice.costs`)
    exchanges       emulated on the described cluster, bucket by bucket, overlapped with backward
                    (`bench.virtual.ddp_iteration`)
    risk            what `gradiveq.ddp.probe` measures on this model, and what results/ has of others

Plain DDP is an all-reduce of each bucket. GradiVeQ's iteration is the mean over a window, sampling uncompressed; its
fits run on a thread of their own and are not counted. What is no convolution it leaves alone, unless `--also` names it
(`--also '*weight*' --slice-size 512` for a transformer or an LSTM).

Where gradients are small, messages take longer than their bytes. An all-gather has N-1 steps and an all-reduce 2(N-1),
so that a method that gathers may be faster though it sends more. That hasn't been validated, and libraries have other
algorithms for small messages: the answer says which methods would not pay with as many steps.

Encoding and decoding take what they take on this machine, except where the cluster's file has rates for them (GradiVeQ,
half and random k). So on a cluster with GPUs the other methods take what they take on this machine's processor: on a
GPU, where the hook leaves most of them, nothing was measured. Copying there and back isn't counted either.

`--examples` asks for all that is recorded in results/advise. `--validate` compares predictions with real training
between shaped hosts (`bench.advice.validation`).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import clusters
from bench.advice.costs import PLAIN, MeasuredCosts, local_rates, measure
from bench.advice.model import CIFAR_INPUT, ModelError, Profile, Task, build
from bench.advice.prediction import Against, Situation, Window, bandwidths
from bench.advice.report import Answer, Asked, draw, record, table, words
from bench.advice.risk import Probed, closest, held_out_of, probe_losses, recorded
from bench.common.command_line import Parser, UsageError, description, methods_help, names, positive, program, refused
from bench.common.environment import environment
from bench.common.files import CannotWrite, plain, write_atomically, write_json, writing
from bench.data import DataError, load
from bench.drawing.page import write_figure
from bench.virtual.scaling import PAYS, stretches
from gradiveq.ddp.bucket import Parameters
from gradiveq.ddp.layers import compressible_layers
from gradiveq.methods import GradiVeQ, Method, Plain
from gradiveq.specs import parse as parse_method
from ring.cluster import Cluster, ClusterError, Link, Node
from ring.machine import usable_cores

#: What is compared unless `--methods` says otherwise: one setting of each kind.
METHODS = (
    "half",
    "gradiveq",
    "powersgd:4",
    "topk:0.01+ef",
    "randomk:0.01+ef",
    "adacomp+ef",
    "adaptive",
    "qsgd-gather",
    "natural",
    "terngrad",
    "sign:scaled+ef",
)
LEAST_GBPS, MOST_GBPS, PER_DECADE = 0.01, 100.0, 4
#: Iterations of a probe that nobody asked for: 64 samples are what GradiVeQ needs at ratio 8 on the models of ours.
PROBE = 80
#: The seed of weights, inputs and what methods draw.
SEED = 0
#: Examples of a batch of the probe, and of what proportions are measured with, at most if nothing else is said.
PROBE_BATCH, PROFILE_BATCH = 32, 8
LATENCY_US = 50.0
#: What a V100 reaches in training ResNet-50 in single precision: 367 images per second (bench/clusters/
#: v100-10gbe-4.toml) times 6 · 4.1e9 operations.
V100_TFLOPS = "9.03"
_V100 = "--cluster v100-10gbe-4"
_HOSTS = "--nodes 16 --bandwidth 1"
#: Options that may be given with `--examples`.
WITH_EXAMPLES = ("examples", "out", "threads")
EXAMPLES = (
    f"--model resnet32 --batch-size 128 --profile-batch 32 --tflops {V100_TFLOPS} {_V100}",
    f"--model resnet32 --batch-size 128 --profile-batch 32 {_HOSTS}",
    f"--model resnet50-imagenet --batch-size 256 --profile-batch 8 --ratio 42 --seconds-per-iteration cluster {_V100}",
    f"--model resnet50-imagenet --batch-size 32 --profile-batch 8 --ratio 42 {_HOSTS}",
    f"--model lstm --batch-size 20 --profile-batch 20 --tflops {V100_TFLOPS} {_V100}",
    f"--model lstm --batch-size 20 --profile-batch 20 {_HOSTS}",
)


# --- what is measured here -------------------------------------------------------------------------------------------


def methods_of(options: argparse.Namespace) -> dict[str, Method]:
    """The methods, by spec.

    Raises:
        ValueError: a spec is none.
    """
    found: dict[str, Method] = {}
    for spec in options.methods:
        if spec == GradiVeQ.name:
            found[spec] = GradiVeQ(
                warmup=0,
                sample=options.sample,
                compress=options.compress,
                ratio=options.ratio,
                slice_size=options.slice_size,
                fit_slices=options.fit_slices,
                sampling=Plain(),
                holdout_every=0,
            )
        else:
            found[spec] = parse_method(spec)
    return found


def ask(options: argparse.Namespace) -> Asked:
    """Time the model and the methods, and probe.

    Raises:
        ModelError, DataError, UsageError, ValueError: an option can't be used.
    """
    methods = methods_of(options)
    task = build(options.model, options.input, options.vocabulary)
    if options.also and not any(isinstance(method, GradiVeQ) for method in methods.values()):
        raise UsageError("--also is for gradiveq, which leaves most layers alone: --methods must name it")
    compressible_layers(task.model, Parameters(task.model), options.also)  # a name that matches nothing is refused
    measured = measure(task, methods, options.profile_batch, options.bucket_mb, options.also)
    probed, text = _probe(options, task, {name: method for name, method in methods.items() if name in measured.costs})
    return Asked(task.name, measured, probed, text)


def _probe(options: argparse.Namespace, task: Task, methods: Mapping[str, Method]) -> tuple[dict[str, Probed], str]:
    asking = f"model, also={options.also}" if options.also else "model"
    own = f"probe your own training: gradiveq.ddp.probe({asking})"
    if options.probe == 0:
        return {}, f"not asked for (--probe 0); {own}"
    if not task.images:
        if options.probe is not None or options.data is not None:
            size = "x".join(map(str, CIFAR_INPUT))
            raise UsageError(f"--probe and --data are for models that take {size} images; {task.name} doesn't: {own}")
        return {}, f"not made, as no data for this model is at hand; {own}"
    iterations = PROBE if options.probe is None else options.probe
    dataset, batch_size = load(options.data), min(options.batch_size, PROBE_BATCH)
    try:
        fresh = build(options.model, options.input, options.vocabulary)
        found = probe_losses(fresh.model, methods, dataset, iterations, batch_size, options.lr, options.also)
    except (ModelError, ArithmeticError) as error:  # times are known by now; a fit may fail as well
        return {}, f"not made, as {error}; {own}"
    return found, (
        f"the first {iterations} iterations of training here, by SGD with a learning rate of {options.lr:g} and "
        f"{batch_size} images, on {dataset.source}; the last {held_out_of(iterations)} are held out"
    )


# --- the cluster -----------------------------------------------------------------------------------------------------


def cluster_of(options: argparse.Namespace) -> tuple[Cluster, bool]:
    """(the cluster that is asked for, whether it has rates of its own for copying and PCA).

    Raises:
        ClusterError: there is none, or it has one node.
    """
    if options.cluster is not None:
        cluster = clusters.load(options.cluster)
    else:
        gbps = options.bandwidth
        cluster = Cluster(
            name=f"{options.nodes}-nodes-{gbps:g}gbps",
            source="as asked for, on this machine's processor",
            nodes=options.nodes,
            node=Node(),
            link=Link(latency_us=options.latency, bandwidth_gbps=gbps),
        )
    if cluster.nodes < 2:
        raise ClusterError(
            f"cluster {cluster.name}: one node has nobody to exchange gradients with; `nodes` must be 2 or more"
        )
    rated = all(name in cluster.rates for name in ("copy", "pca.encode", "pca.decode"))
    missing = {name: rate for name, rate in local_rates().items() if name not in cluster.rates}
    return dataclasses.replace(cluster, rates={**cluster.rates, **missing}), rated


def computing_of(options: argparse.Namespace, measured: MeasuredCosts, cluster: Cluster) -> tuple[Profile, str]:
    """(seconds of an iteration on one node, where they come from).

    Raises:
        ClusterError: they are to be the cluster's own, and it doesn't say.
    """
    found, batch = measured.profile, options.batch_size
    factor = batch / found.batch_size
    of_batch = dataclasses.replace(
        found,
        forward_s=factor * found.forward_s,
        backward_s=factor * found.backward_s,
        ready_s=tuple(factor * one for one in found.ready_s),
        flops=round(factor * found.flops),
        batch_size=batch,
    )
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    here = f"measured on this machine ({environment(())['cpu']}, {threads})"
    shares = f"forward, backward and update share it as {here} with {found.batch_size} examples"
    if options.seconds_per_iteration == "cluster":
        if cluster.node.iteration_s is None:
            raise ClusterError(
                f"cluster {cluster.name} doesn't say what an iteration computes: `node.iteration_s` is missing; give "
                "--seconds-per-iteration a number"
            )
        seconds = cluster.node.iteration_s
        return of_batch.lasting(seconds), f"{seconds:g} s per iteration as the cluster's file says; {shares}"
    if options.seconds_per_iteration is not None:
        seconds = options.seconds_per_iteration
        return of_batch.lasting(seconds), f"{seconds:g} s per iteration as given; {shares}"
    if options.tflops is not None:
        seconds = of_batch.flops / (options.tflops * 1e12)
        text = f"{of_batch.flops:.3g} floating-point operations at {options.tflops:g}e12 per second as given; {shares}"
        return of_batch.lasting(seconds), text
    text = here if factor == 1 else f"{here} with {found.batch_size} examples, times {factor:g}"
    if cluster.node.iteration_s is not None:
        text += (
            f" (the cluster's own {cluster.node.iteration_s:g} s are of the model that its file names: with that one, "
            "--seconds-per-iteration cluster)"
        )
    if cluster.node.compute_speed != 1:
        text += f"; the cluster's nodes are {cluster.node.compute_speed:g} times as fast"
    return of_batch.lasting(of_batch.seconds / cluster.node.compute_speed), text


def answer(options: argparse.Namespace, asked: Asked) -> Answer:
    """Predict every method on the cluster, and over all bandwidths.

    Raises:
        ClusterError, ValueError: an option can't be used.
    """
    measured = asked.measured
    cluster, rated = cluster_of(options)
    computing, text = computing_of(options, measured, cluster)
    factor = computing.backward_s / measured.profile.backward_s
    methods = methods_of(options)
    windows = {
        name: Window(method.sample, method.compress)
        for name, method in methods.items()
        if isinstance(method, GradiVeQ) and isinstance(method.sample, int) and isinstance(method.compress, int)
    }
    situation = Situation(
        cluster,
        computing,
        [factor * one for one in measured.ready_s],
        [8 * length / cluster.rates["copy"] for length in measured.lengths] if rated else measured.copies_s,
        measured.costs,
        windows,
        rated,
    )
    predictions = {name: situation.predict(name) for name in measured.costs}
    grid = bandwidths(LEAST_GBPS, MOST_GBPS, PER_DECADE, cluster.link.bandwidth_gbps)
    sweep, gains, pays = {}, {}, {}
    for name in tqdm([name for name in predictions if name != PLAIN], desc="bandwidths", leave=False, disable=None):
        against = Against(situation, name)
        sweep[name] = [against.at(gbps) for gbps in grid]
        gains[name] = stretches(sweep[name], against, lambda point: point.speedup > 1)
        pays[name] = stretches(sweep[name], against, lambda point: point.speedup >= PAYS)
    known = recorded(options.results)
    elsewhere = {name: closest(methods[name], name, asked.task, known) for name in sweep}
    return Answer(
        asked,
        situation,
        options.batch_size,
        options.ratio,
        text,
        predictions,
        gains,
        pays,
        sweep,
        elsewhere,
        also=options.also,
        searched="" if known else str(options.results.absolute()),
    )


# --- the command -----------------------------------------------------------------------------------------------------


def _seconds(text: str) -> float | str:
    return text if text == "cluster" else positive(text)


def _whole(least: int) -> Any:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text}")
        return int(text)

    return read


def _threads(text: str) -> int:
    wanted: int = _whole(1)(text)
    if wanted > usable_cores():
        raise argparse.ArgumentTypeError(f"must be at most {usable_cores()}, the cores at hand, got {text}")
    return wanted


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"must be like 3x224x224, got {text}")
    return tuple(map(int, parts))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises UsageError: options contradict each other, or have a value that is none."""
    parser = Parser(
        prog=program("bench.advise"),
        description=description(__doc__),
        allow_abbrev=False,
        closing=lambda: methods_help("rar (without compression) and gradiveq, with the options above"),
    )
    what = parser.add_argument_group("the model")
    what.add_argument("--model", default="resnet32", metavar="NAME", help="one of ours, or package.module:function")
    what.add_argument("--input", type=_shape, metavar="SHAPE", help="of one example, such as 3x224x224")
    what.add_argument("--vocabulary", type=_whole(1), metavar="N", help="examples are whole numbers below N")
    what.add_argument("--batch-size", type=_whole(1), default=32, metavar="N", help="per node (default: %(default)s)")
    what.add_argument("--bucket-mb", type=positive, metavar="MB", help="DDP's bucket_cap_mb (default: DDP's, 1 and 25)")
    where = parser.add_argument_group("the cluster")
    where.add_argument("--cluster", metavar="NAME", help="a preset or a TOML file")
    where.add_argument("--nodes", type=_whole(1), metavar="N", help="instead of --cluster, with --bandwidth")
    where.add_argument("--bandwidth", type=positive, metavar="GBPS", help="of each node's link, Gbit/s")
    where.add_argument("--latency", type=float, metavar="US", help=f"of a link, microseconds (default: {LATENCY_US:g})")
    seconds = parser.add_argument_group("what an iteration computes (default: it is measured here)")
    seconds.add_argument(
        "--seconds-per-iteration", type=_seconds, metavar="S", help="or 'cluster' for what its file has"
    )
    seconds.add_argument(
        "--tflops", type=positive, metavar="X", help="what a node reaches, 10^12 operations per second"
    )
    seconds.add_argument("--profile-batch", type=_whole(1), metavar="N", help="examples that are measured with here")
    seconds.add_argument("--threads", type=_threads, metavar="N", help="of torch")
    how = parser.add_argument_group("methods")
    how.add_argument("--methods", type=names, default=list(METHODS), metavar="SPEC,…")
    how.add_argument("--ratio", type=positive, default=8.0, metavar="X", help="K/d of GradiVeQ (default: %(default)g)")
    how.add_argument(
        "--also",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="NAME,…",
        help="parameters, or patterns, that GradiVeQ compresses besides convolutions, as State(also=…)",
    )
    how.add_argument("--slice-size", type=_whole(1), metavar="N", help="GradiVeQ's K (default: F·D, at most 4096)")
    how.add_argument("--sample", type=_whole(2), default=100, metavar="N", help="GradiVeQ's Lt (default: %(default)s)")
    how.add_argument(
        "--compress", type=_whole(1), default=400, metavar="N", help="GradiVeQ's Lc (default: %(default)s)"
    )
    how.add_argument("--fit-slices", choices=("first", "all"), default="all", help="GradiVeQ's (default: %(default)s)")
    how.add_argument(
        "--probe",
        type=_whole(0),
        metavar="N",
        help=f"iterations of a probe (default: {PROBE} for models that take 3x32x32 images)",
    )
    how.add_argument("--data", metavar="SPEC", help="images for the probe, as for the job (default: the sample)")
    how.add_argument("--lr", type=positive, default=0.05, metavar="X", help="of the probe (default: %(default)g)")
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="recorded ones, of other models"
    )
    run.add_argument("--out", type=Path, metavar="DIR", help="(default: results/advise/MODEL-CLUSTER)")
    run.add_argument("--examples", action="store_true", help="all that results/advise has; --out is the folder of all")
    run.add_argument("--validate", action="store_true", help="compare with real training (--validate --help for more)")
    options = parser.parse_args(arguments)
    if options.examples:
        asked = vars(parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(vars(options)))))
        other = [option for option, value in asked.items() if value is not None and option not in WITH_EXAMPLES]
        if other:
            raise UsageError(
                f"--examples asks questions of its own: --{other[0].replace('_', '-')} can't go with it (--out and "
                "--threads can)"
            )
        return options
    if options.cluster is not None and (options.nodes, options.bandwidth, options.latency) != (None, None, None):
        raise UsageError(
            "--nodes, --bandwidth and --latency describe a cluster; --cluster names another one: give one of them"
        )
    if options.cluster is None and (options.nodes is None or options.bandwidth is None):
        raise UsageError("which cluster? Give --cluster NAME (a preset or a file), or --nodes N and --bandwidth GBPS")
    options.latency = LATENCY_US if options.latency is None else options.latency
    if not 0 <= options.latency < math.inf:
        raise UsageError(f"argument --latency: must be at least 0, got {options.latency:g}")
    if options.seconds_per_iteration is not None and options.tflops is not None:
        raise UsageError(
            "--seconds-per-iteration and --tflops both say how long an iteration computes: give one of them"
        )
    if options.profile_batch is None:
        given = options.seconds_per_iteration is not None or options.tflops is not None
        options.profile_batch = min(options.batch_size, PROFILE_BATCH) if given else options.batch_size
    if options.probe is not None and 0 < options.probe < 3:
        raise UsageError(
            f"argument --probe: must be 0 or at least 3 (2 are sampled, 1 is held out), got {options.probe}"
        )
    return options


def advise(options: argparse.Namespace, command: str, asked: Asked | None = None) -> Asked:
    """Answer one question: print it and write it.

    Args:
        asked: what was asked of the same model and methods, if it is known already.
    Raises:
        UsageError, ModelError, DataError, ClusterError, ValueError: an option can't be used.
        OSError: the folder can't be written.
    """
    cluster_of(options)  # so that nothing is measured in vain
    about = environment(("numpy", "scipy", "torch", "numba", "matplotlib")) | {
        "command": command,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "seed": SEED,
    }
    asked = asked or ask(options)
    found = answer(options, asked)
    lines = words(found)
    out = options.out or Path("results/advise") / f"{asked.task}-{found.situation.cluster.name}"
    title = f"Should I compress? {asked.task} on {found.situation.cluster.name}"
    wrapped = [textwrap.fill(line, 118) for line in lines]
    print("\n\n".join([title, wrapped[0], table(found), *wrapped[1:]]))
    page = "\n\n".join([f"# {title}", lines[0], table(found, "github"), *lines[1:], f"Command: `{command}`."]) + "\n"
    written = plain(record(found, lines, about))
    with writing(out):
        write_json(out / "record.json", written)
        write_atomically(out / "table.md", page.encode())
        write_figure(draw(written), out / "figure.png")
        print()
    return asked


def examples(out: Path) -> None:
    """Answer every question of `EXAMPLES`; what is asked twice of a model is measured once."""
    known: dict[tuple[str, int], Asked] = {}
    for line in EXAMPLES:
        options = parse(line.split())
        options.out = out / f"{options.model}-{cluster_of(options)[0].name}"
        key = options.model, options.profile_batch
        known[key] = advise(options, f"python -m bench.advise {line}", known.get(key))


def main(arguments: Sequence[str] | None = None) -> int:
    words_given = sys.argv[1:] if arguments is None else arguments
    if "--validate" in words_given:
        from bench.advice import validation as advise_validation  # which most questions have no use for

        return advise_validation.main([word for word in words_given if word != "--validate"])
    command = " ".join(["python -m bench.advise", *map(shlex.quote, words_given)])
    try:
        options = parse(words_given)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        torch.manual_seed(SEED)
        if options.examples:
            examples(options.out or Path("results/advise"))
        else:
            advise(options, command)
    except (UsageError, ModelError, DataError, ClusterError, CannotWrite, ValueError) as error:
        return refused(error)
    except OSError as error:
        print(f"error: {error.filename or options.out} can't be written ({error.strerror or error})", file=sys.stderr)
        return 2
    return 0
