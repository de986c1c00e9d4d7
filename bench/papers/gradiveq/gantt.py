"""Fig. 2a beside Fig. 2b of Yu et al. 2018, from real runs: who computed and what travelled in one all-reduce.

    mpirun -n 2 python -m bench.gantt                        # by this machine's clock, over MPI
    python -m bench.gantt --cluster gradiveq-cpu             # by the clock of a described cluster

One all-reduce of QSGD in the ring with one chunk a segment, where nothing can be encoded before the other's chunk is
there; beside one of GradiVeQ's linear codec in several chunks, where a worker encodes its own while the other's comes.
The gradient is ResNet-32's after some iterations of plain training, in which the bases are fitted; both get the same.
Written to `--out`, NAME being the cluster's or mpi-N:

    NAME.json                  both traces (`ring.trace`), what they were made with, and what was found
    NAME.png                   the picture, from that file: `python -m bench.gantt --draw NAME.json` makes it again
    NAME-METHOD.perfetto.json  for ui.perfetto.dev; with .gz behind it if it is large
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.common.command_line import DefaultsFormatter, Parser, UsageError, description

# Only what leaves NumPy alone, as in the training job.
from bench.common.launch import launched, limit_threads, run_as_threads, run_together
from bench.common.workers import LONG_S, Failure, Workers

if TYPE_CHECKING:
    from ring.cluster import Cluster
    from ring.codec import Array, Codec
    from ring.handle import Ring

FIGURE = "2"
#: Files for Perfetto above this size are compressed.
LARGE_BYTES = 200_000
#: Calls of each all-reduce before it is timed.
WARM_CALLS = 2


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m bench.gantt",
        description=description(__doc__),
        formatter_class=DefaultsFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--cluster", metavar="NAME", help="preset or TOML file whose clock is used; this machine's if left out")
    add("--data", metavar="PATH", help="as for the training job; the shipped sample if left out")
    add("--ratio", type=float, default=8.0, metavar="X", help="K/d of GradiVeQ")
    add("--slice-size", type=int, default=256, metavar="K", help="of GradiVeQ")
    add("--chunks", type=int, default=4, metavar="N", help="of a segment with GradiVeQ")
    add("--sample", type=int, default=20, metavar="N", help="iterations in which the bases are fitted")
    add("--batch-size", type=int, default=8, metavar="N", help="images per worker and iteration")
    add("--repeats", type=int, default=9, metavar="N", help="all-reduces, of which the one of median length is shown")
    add("--seed", type=int, default=0, metavar="N", help="of weights, data order and quantisation")
    add("--out", type=Path, default=Path("results/gantt"), metavar="DIR", help="folder for what is written")
    add("--draw", type=Path, metavar="FILE", help="only draw what an earlier run has written")
    return parser


def parse(arguments: Sequence[str] | None, quiet: bool = False) -> argparse.Namespace:
    parser = make_parser()
    parser.quiet = quiet
    options = parser.parse_args(arguments)
    for name, least in (("chunks", 1), ("sample", 2), ("batch_size", 1), ("repeats", 1), ("slice_size", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    if not 1 <= options.ratio < math.inf:
        parser.error(f"--ratio must be at least 1, got {options.ratio}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    if launched():
        return run_together(lambda workers, _: run_processes(arguments, workers))
    warnings.filterwarnings("ignore", r"\s*suspicious MPI")
    try:
        options = parse(arguments)
    except UsageError as error:
        return _complain(error)
    if options.draw is not None:
        return draw_again(options.draw)
    if options.cluster is None:
        return _complain("give a --cluster, or start this under mpirun for this machine's clock")
    limit_threads(1)

    from bench.job.emulated_cluster import choose
    from ring.cluster import ClusterError
    from ring.plan import CHUNK_BYTES

    try:
        cluster = choose(options.cluster, {}, None)
    except ClusterError as error:
        return _complain(error)
    assert cluster is not None
    return run_as_threads(
        lambda workers, ring, _: run(workers, ring, options, cluster),
        cluster.nodes,
        timeout_s=LONG_S,
        chunk_bytes=CHUNK_BYTES,
    )


def _complain(error: object) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def run_processes(arguments: Sequence[str] | None, workers: Any) -> int:
    """What each of MPI's processes does."""
    options = workers.attempt(lambda: parse(arguments, quiet=not workers.lead), UsageError)
    if options.draw is not None:
        raise Failure("--draw needs no mpirun")
    limit_threads(1)

    from ring.abort import end_together

    end_together(workers.comm)
    from bench.job.emulated_cluster import choose
    from ring.cluster import ClusterError
    from ring.mpi import MPIRing

    cluster = None
    if options.cluster is not None:
        cluster = workers.attempt(lambda: choose(options.cluster, {}, workers.size), ClusterError)
    return run(workers, MPIRing(workers.comm), options, cluster)


def run(workers: Workers, ring: Ring, options: argparse.Namespace, cluster: Cluster | None) -> int:
    """Train a little, all-reduce with both codecs, and let rank 0 write; collective."""
    import torch

    from bench.common.environment import environment
    from bench.data import load
    from gradiveq.over_ring.qsgd import QSGD
    from ring.trace import TraceError

    torch.set_num_threads(1)
    lead = workers.lead  # reads first: it may have to download
    dataset = workers.attempt(lambda: load(options.data), ValueError, here=lead, timeout_s=LONG_S)
    dataset = workers.attempt(lambda: load(options.data), ValueError, here=not lead, timeout_s=LONG_S) or dataset
    gradient, pca = workers.attempt(lambda: fitted(ring, dataset, options), ValueError)
    payload = sum(region.num_bytes for region in pca.regions(len(gradient), gradient.dtype))
    chunk_bytes = -(-payload // (ring.size * options.chunks))
    panels = [
        measured(workers, ring, cluster, options.repeats, gradient, method, codec, chunks, size)
        for method, codec, chunks, size in (
            ("qsgd", QSGD(seed=options.seed), 1, sys.maxsize),
            ("gradiveq", pca, options.chunks, chunk_bytes),
        )
    ]

    def write() -> None:
        command = f"{workers.command}python -m bench.gantt {shlex.join(sys.argv[1:])}".strip()
        record = {
            "figure": FIGURE,
            "cluster": None if cluster is None else {"name": cluster.name, "source": cluster.source},
            "ranks": ring.size,
            "model": "resnet32",
            "data_source": dataset.source,
            "batch_size": options.batch_size,
            "ratio": options.ratio,
            "slice_size": options.slice_size,
            "environment": environment()
            | {"cores": workers.cores, "mpi": workers.mpi, "seed": options.seed, "command": command},
            "panels": panels,
        }
        name = f"mpi-{ring.size}" if cluster is None else Path(cluster.name).name
        for path in write_all(record, options.out, name):
            print(path)

    workers.attempt(write, OSError, TraceError, here=lead, timeout_s=LONG_S)
    return 0


def fitted(ring: Ring, dataset: Any, options: argparse.Namespace) -> tuple[Array, Codec]:
    """This worker's gradient of the next batch after some iterations, and the codec that was fitted in them."""
    import numpy as np
    from torch.nn import functional

    from bench.job.train import Settings, Trainer
    from bench.models import resnet32
    from gradiveq import Plain
    from gradiveq.flatten import Layout, slice_sizes
    from gradiveq.over_ring.driver import gather_messages
    from gradiveq.over_ring.pca_codec import gradient_codec
    from gradiveq.pca import PCAConfig, PCASampler
    from gradiveq.pca.coding import Bases

    model = resnet32(dataset.num_classes, seed=options.seed)
    settings = Settings(2 * options.sample, options.batch_size, seed=options.seed)
    trainer, layout = Trainer(ring, model, dataset, Plain(), settings), Layout(model)
    config = PCAConfig(slice_size=options.slice_size, fit_slices="all", ratio=options.ratio)
    sizes = slice_sizes(layout.blocks, config.slice_size)
    sampler = PCASampler(layout.blocks, sizes, config, ring.rank, ring.size, options.sample)
    sampler.check(options.sample)
    vector = np.empty(layout.length, np.float32)
    for _ in range(options.sample):
        trainer.step()
        layout.pack(vector)  # the mean over the workers
        sampler.add(vector)
    dims = sampler.fit()
    ring.all_reduce(dims)
    failures = sampler.failures(dims)
    if failures:
        raise ValueError(f"PCA failed: {failures}")
    shares, _ = gather_messages(ring, *sampler.share(dims))
    codec, _ = gradient_codec(layout.blocks, Bases(sampler.rebuild(dims, shares)).by_name)

    images, labels = trainer.batches.batch(options.sample)
    model.zero_grad(set_to_none=True)
    functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
    layout.pack(vector)
    return vector, codec


def measured(
    workers: Workers,
    ring: Ring,
    cluster: Cluster | None,
    repeats: int,
    gradient: Array,
    method: str,
    codec: Codec,
    chunks: int,
    chunk_bytes: int,
) -> dict[str, Any]:
    """All-reduce several times; the trace of the one of median length, and what it did. Collective."""
    import numpy as np

    from ring.timeline import Timeline
    from ring.trace import RunTrace, keeping, records
    from ring.virtual import VirtualRing

    exact = gradient.astype(np.float64)
    ring.all_reduce(exact)
    timeline, kept = Timeline(), []
    used: Ring = ring
    if cluster is not None:
        used = virtual = VirtualRing(ring, cluster)
        timeline = Timeline(virtual=Timeline(virtual.clock))
        beginning = virtual.state_dict() | {"clock_s": 0.0}
    for number in range(WARM_CALLS + repeats):
        vector = gradient.copy()
        ring.barrier()
        if cluster is not None:
            virtual.load_state_dict(beginning)  # links at rest, and all workers begin at once
        with keeping(timeline):
            stats = used.all_reduce(vector, codec, timeline=timeline, chunk_bytes=chunk_bytes)
        if number >= WARM_CALLS:
            kept.append(records(timeline if timeline.virtual is None else timeline.virtual))
    runs = [
        RunTrace("wall" if cluster is None else "virtual", rows) for rows in zip(*workers.gather(kept), strict=True)
    ]
    lengths = [end_s - start_s for start_s, end_s in (run.span() for run in runs)]
    median = lengths.index(statistics.median_low(lengths))
    return {
        "method": method,
        "codec": codec.describe(gradient.dtype)[:80],
        "chunks": chunks,
        "bytes_sent": stats.bytes_sent,
        "loss": float(np.square(vector - exact).sum() / np.square(exact).sum()),
        "lengths_s": [round(length, 9) for length in lengths],
        "trace": runs[median].as_json(),
    }


# --- what was found, and files ---------------------------------------------------------------------------------------


def write_all(record: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Everything about a run; also prints it. Returns the paths."""
    from bench.common.files import plain, write_atomically
    from ring import perfetto
    from ring.trace import RunTrace

    folder.mkdir(parents=True, exist_ok=True)
    print("\n\n".join(report(panel) for panel in record["panels"]), end="\n\n")
    path = folder / f"{name}.json"
    write_atomically(path, (json.dumps(plain(record), allow_nan=False, separators=(",", ":")) + "\n").encode())
    written = [path, draw(record, path.with_suffix(".png"))]
    for panel in record["panels"]:
        content = perfetto.events(RunTrace.from_json(panel["trace"]))
        perfetto.check(content)
        suffix = ".gz" if len(json.dumps(content)) > LARGE_BYTES else ""
        written.append(folder / f"{name}-{panel['method']}.perfetto.json{suffix}")
        perfetto.write(written[-1], content)
    return written


def report(panel: Mapping[str, Any]) -> str:
    """Exposed and hidden communication of each rank in one all-reduce, its link, and the critical path in words."""
    from tabulate import tabulate

    from bench.drawing.styles import METHOD_LABELS
    from ring.trace import RunTrace, communication, critical_path, utilisation

    trace = RunTrace.from_json(panel["trace"])
    busy = utilisation(trace)
    rows = [
        [rank, 1e3 * own.exposed_s, 1e3 * own.hidden_s, None if busy is None else 100 * busy[rank]]
        for rank, own in enumerate(communication(trace))
    ]
    start_s, end_s = trace.span()
    head = [
        f"{METHOD_LABELS[panel['method']]}, {_chunks(panel)}: {1e3 * (end_s - start_s):.2f} ms "
        f"(of {len(panel['lengths_s'])}: {1e3 * min(panel['lengths_s']):.2f} to {1e3 * max(panel['lengths_s']):.2f}), "
        f"{panel['bytes_sent']:,} bytes sent by rank 0, ‖ĝ-g‖²/‖g‖² {panel['loss']:.3f}"
    ]
    table = tabulate(
        rows, ("rank", "exposed (ms)", "hidden (ms)", "its link busy (%)"), floatfmt=".2f", missingval="not known"
    )
    return "\n".join([*head, table, critical_path(trace).describe()])


def _chunks(panel: Mapping[str, Any]) -> str:
    return f"{panel['chunks']} chunk{'' if panel['chunks'] == 1 else 's'} a segment"


def draw_again(path: Path) -> int:
    from bench.common.files import RecordError, read_object

    try:
        record = read_object(path)
        if record.get("figure") != FIGURE:
            raise RecordError(f"{path} is no record of this command")
        print(draw(record, path.with_suffix(".png")))
    except (RecordError, KeyError, TypeError) as error:
        return _complain(f"{path} is damaged ({error!r})" if not isinstance(error, RecordError) else error)
    return 0


def draw(record: Mapping[str, Any], path: Path) -> Path:
    """Write the picture of a record."""
    from bench.papers.gradiveq.gantt_figure import draw as draw_figure

    return draw_figure(record, path)
