"""Train ResNet-32 data-parallel with plain ring all-reduce, QSGD, GradiVeQ and others, and show where the time went.

    mpirun -n 6 python -m bench.resnet32_cifar100
    python -m bench.resnet32_cifar100 --cluster gradiveq-k80
    mpirun -n 6 python -m bench.resnet32_cifar100 --methods rar,gradiveq,topk:0.01+ef,sign

Each method starts from the same weights and sees the same data in the same order. Without options: a short run on a
sample of Fashion-MNIST that ends within 10 minutes on 2 cores, with the paper's schedule scaled down.

Two clocks run, this machine's and that of an emulated cluster (`bench.job.emulated_cluster`). With `--cluster` and
without `mpirun` all workers of the cluster are threads of one process; the weights are the same bits.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import re
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.common.command_line import UsageError

# Only what leaves NumPy alone: how many threads it may have is known, and has to be told, before it is imported.
from bench.common.launch import INTERRUPTED, StopRequest, launched, limit_threads, run_as_threads, run_together
from bench.common.optional_packages import what_is_missing
from bench.common.progress import Progress, has_terminal
from bench.common.workers import LONG_S, Failure, Processes, Workers
from bench.job.options import DEFAULTS, NO_CLUSTER, parse

if TYPE_CHECKING:
    from bench.data import Dataset
    from bench.job.checkpoint import Checkpoints
    from bench.job.configure import Configuration
    from bench.job.train import Trainer
    from gradiveq.methods import Method
    from ring.cluster import Cluster
    from ring.handle import Ring


class Interrupted(Exception):
    """Somebody asked the run to stop, all ranks agreed, and there is a checkpoint."""


def main(arguments: list[str] | None = None) -> int:
    warnings.filterwarnings("ignore", r"\s*suspicious MPI")  # `check_launcher` says it in one line
    if launched():
        return run_together(lambda workers, stop: run_processes(arguments, workers, stop))
    try:
        options, recorded = parse(arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if recorded.get("one_process", options["cluster"] not in (None, NO_CLUSTER)):
        return run_threads(options, recorded)
    return run_together(lambda workers, stop: run_processes(arguments, workers, stop))


def run_processes(arguments: list[str] | None, workers: Processes, stop: StopRequest) -> int:
    """What each of MPI's processes does."""
    options, recorded = workers.attempt(lambda: parse(arguments, quiet=not workers.lead), UsageError)
    if options["threads"] is None:
        options["threads"] = max(1, workers.cores // workers.local_size)
    limit_threads(options["threads"])

    from ring.abort import check_launcher, end_together

    end_together(workers.comm)

    from bench.job.emulated_cluster import choose
    from ring.cluster import ClusterError
    from ring.errors import RingError
    from ring.mpi import MPIRing
    from ring.plan import CHUNK_BYTES

    set_up_torch(options["threads"])

    try:
        check_launcher(workers.comm)
    except RingError as error:  # every process believes to be rank 0
        ranks = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")
        first = all(os.environ.get(name, "0") == "0" for name in ranks)
        if first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    workers.agree(None)  # all have imported
    said = workers.gather(options)
    different = [(rank, name) for rank, theirs in enumerate(said) for name in DEFAULTS if theirs[name] != said[0][name]]
    if different:
        rank, name = different[0]
        raise Failure(f"ranks 0 and {rank} were given different values of --{name.replace('_', '-')}")
    # Read by one, as all have to emulate the same.
    cluster = workers.gather(
        workers.attempt(lambda: choose(options["cluster"], recorded, workers.size), ClusterError, here=workers.lead)
    )[0]
    if options["gpu_aware"]:
        workers.attempt(check_gpu_aware, ValueError)
    ring = MPIRing(workers.comm, timeout_s=options["timeout"], chunk_bytes=options["chunk_bytes"] or CHUNK_BYTES)
    return JobRun(workers, ring, options, recorded, cluster, stop).run()


def run_threads(options: dict[str, Any], recorded: Mapping[str, Any]) -> int:
    """All workers of the cluster in this process, without MPI."""
    if options["threads"] is None:
        options["threads"] = 1  # whose processor time is the worker's
    limit_threads(options["threads"])

    from bench.job.emulated_cluster import choose
    from ring.cluster import ClusterError
    from ring.plan import CHUNK_BYTES

    try:
        cluster = choose(options["cluster"], recorded, None)
    except ClusterError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    assert cluster is not None
    set_up_torch(options["threads"])
    return run_as_threads(
        lambda workers, ring, stop: JobRun(workers, ring, copy.deepcopy(options), recorded, cluster, stop).run(),
        cluster.nodes,
        timeout_s=options["timeout"],
        chunk_bytes=options["chunk_bytes"] or CHUNK_BYTES,
    )


def check_gpu_aware() -> None:
    """Raises ValueError if MPI says that it can't use a GPU's memory."""
    from ring.mpi import gpu_support

    if gpu_support() is False:
        raise ValueError("--gpu-aware: this MPI says that it isn't; without the option, host memory is used")


def set_up_torch(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


@functools.cache
def read_data(path: str | None) -> Dataset:
    """Read once, and shared by workers that are threads; nobody writes into it."""
    from bench.data import load

    return load(path)


class JobRun:
    """All methods of one command, one after the other, on one rank."""

    def __init__(
        self,
        workers: Workers,
        ring: Ring,
        options: dict[str, Any],
        recorded: Mapping[str, Any],
        cluster: Cluster | None,
        stop: StopRequest,
    ) -> None:
        self.workers, self.ring, self.options, self.recorded = workers, ring, options, recorded
        self.cluster, self.stop = cluster, stop
        self.lead = workers.lead
        self.evaluated = False  # whether this command has tested any model

    def run(self) -> int:
        from bench.data import DataError
        from bench.job.configure import configure, notes

        self.workers.attempt(self._same_ranks, ValueError)
        self.configuration: Configuration = self.workers.attempt(lambda: configure(self.options), ValueError)
        self.methods = self.configuration.methods
        # One rank first: it may have to download.
        dataset = self.workers.attempt(self._load, DataError, here=self.lead, timeout_s=LONG_S)
        self.dataset: Dataset = self.workers.attempt(self._load, DataError, here=not self.lead) or dataset
        self.digest = self._same_data()
        # Made now, as a later method would only then find out what is wrong after the others have run.
        self.trainers: dict[str, Trainer] = self.workers.attempt(
            lambda: {name: self._trainer(method) for name, method in self.methods.items()}, ValueError
        )
        self.notes = notes(self.options, self.configuration, self.dataset, self.workers, self.cluster)
        self.folder = self._open_folder()
        return self._run_methods()

    # --- before anything is written

    def _same_ranks(self) -> None:
        """Raises ValueError if a run is resumed with other ranks than it has."""
        folder, recorded, size = self.options["resume"], self.recorded, self.workers.size
        if recorded and recorded["one_process"] and not self.workers.one_process:
            raise ValueError(f"the run in {folder} was begun without mpirun, go on with it the same way")
        if recorded and recorded["ranks"] != size:
            raise ValueError(f"the run in {folder} has {recorded['ranks']} ranks, now there are {size}")

    def _load(self) -> Dataset:
        return read_data(self.options["data"])

    def _same_data(self) -> str:
        """The digest of the data, after all ranks and the run that is resumed agreed on it."""
        from bench.common.environment import dataset_digest

        digest = dataset_digest(self.dataset)
        digests = self.workers.gather(digest)
        different = [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]
        if different:
            raise Failure(f"rank {different[0]} read other data than rank 0; each has {self.dataset.source}")
        if self.recorded and self.recorded["data_sha256"] != digest:
            raise Failure(
                f"the data is {self.dataset.source}, but the run in {self.options['resume']} was begun with other "
                f"data: {self.recorded['data_source']}"
            )
        return digest

    def _trainer(self, method: Method) -> Trainer:
        import torch

        from bench.job.train import Trainer
        from bench.models import MODELS, resnet_cifar

        device = self.options["device"]
        if device == "cuda":
            device = f"cuda:{self.workers.local_rank % torch.cuda.device_count()}"
            torch.cuda.set_device(device)  # or every rank would have a context on the first
        classes, seed = self.dataset.num_classes, self.configuration.settings.seed
        name = self.options["model"]
        model = resnet_cifar(8, classes, seed=seed) if name == "resnet8" else MODELS[name](classes, seed=seed)
        return Trainer(
            self.ring,
            model,
            self.dataset,
            method,
            self.configuration.settings,
            nonfinite=self.options["nonfinite"],
            device=device,
            gpu_aware=self.options["gpu_aware"],
            cluster=self.cluster,
            trace=self.options["trace"],
        )

    # --- with a folder

    def _open_folder(self) -> Path:
        """The run's folder, with its environment recorded."""
        from bench.common.files import write_json
        from bench.job.record import ENVIRONMENT

        path = self.options["resume"] or self.options["out"]
        if path is None:
            what = re.sub(r"[^a-z0-9]+", "-", self.dataset.name.lower()).strip("-")
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{self.options['model']}-{what}-{self.workers.size}"
            path = self.workers.gather(str(Path("results") / name))[0]
        folder = Path(path)

        def create() -> list[Path]:
            if self.recorded:
                resumed = [*self.recorded.get("resumed", []), {**self._environment(), "options": None, "resumed": None}]
                write_json(folder / ENVIRONMENT, {**self.recorded, "resumed": resumed})
                return []
            missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise OSError(f"{folder} exists and is not an empty folder; choose another --out, or --resume it")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / ENVIRONMENT, self._environment())
            except OSError as error:
                remove(folder, missing)
                raise OSError(f"{folder} can't be made or written ({error.strerror or error})") from error
            return missing

        #: The folders that this command made, innermost first; only rank 0 knows.
        self.created: list[Path] = self.workers.attempt(create, OSError, here=self.lead) or []
        return folder

    def _environment(self) -> dict[str, Any]:
        from bench.common.environment import environment

        return {
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": f"{self.workers.command}python -m bench.resnet32_cifar100 {shlex.join(sys.argv[1:])}".rstrip(),
            **environment(),
            "mpi": self.workers.mpi,
            "ranks": self.workers.size,
            "one_process": self.workers.one_process,
            "cluster": self._cluster_table(),
            "ranks_on_first_machine": self.workers.local_size,
            "cores": self.workers.cores,
            "threads_per_rank": self.options["threads"],
            "seed": self.options["seed"],
            "data_source": self.dataset.source,
            "data_sha256": self.digest,
            "options": {**self.options, "resume": None},
        }

    def _cluster_table(self) -> dict[str, Any] | None:
        from ring.cluster import as_table

        return None if self.cluster is None else as_table(self.cluster)

    def _summary(self, finished: Mapping[str, Any]) -> dict[str, Any]:
        options = self.options
        return {
            "title": f"{options['model']} on {self.dataset.source}",
            "data_source": self.dataset.source,
            "model": options["model"],
            "ranks": self.workers.size,
            "ranks_per_machine": self.workers.local_size,
            "cores": self.workers.cores,
            "batch_size": options["batch_size"],
            "iterations": options["iterations"],
            "complete": all(name in finished for name in self.methods),
            "notes": self.notes,
            "one_process": self.workers.one_process,
            "cluster": self._cluster_table(),
            "options": {**options, "resume": None},
            "methods": {name: finished[name] for name in self.methods if name in finished},
        }

    def _say(self, text: str) -> None:
        if self.lead:
            print(text, flush=True)

    def _run_methods(self) -> int:
        from bench.job.checkpoint import CheckpointError, Checkpoints
        from gradiveq.over_ring.aggregator import FitError, NonFiniteGradient

        checkpoints: Checkpoints = self.workers.attempt(lambda: Checkpoints(self.folder, self.ring), CheckpointError)
        self._say("\n".join(f"* {note}" for note in self.notes))
        self._say(f"Recording in {self.folder}" + (", resumed" if self.recorded else ""))
        with self.stop as stop:
            try:
                for name in self.methods:
                    if name in checkpoints.finished:
                        self._say(f"{name}: finished before")
                    else:
                        self._run_method(name, checkpoints, stop)
                    self.workers.attempt(lambda: self._summarise(checkpoints), OSError, here=self.lead)
            except Interrupted as interrupted:
                raise Failure(f"{interrupted}; go on with --resume {self.folder}", INTERRUPTED) from None
            except (NonFiniteGradient, FitError, CheckpointError, Failure) as error:  # raised on all ranks alike
                raise Failure(f"{error}{self._what_is_left(error)}", 1) from None

        if self.lead:
            self._show(self._summary(checkpoints.finished))
        self.workers.agree(None, LONG_S)  # leave MPI together: its own way of waiting spins
        return 0

    def _summarise(self, checkpoints: Checkpoints) -> None:
        from bench.common.files import write_json
        from bench.job.record import SUMMARY

        write_json(self.folder / SUMMARY, self._summary(checkpoints.finished))

    def _what_is_left(self, error: Exception) -> str:
        """What a run that failed leaves, to be said after why. Collective.

        It leaves nothing if training itself failed before there was a checkpoint or an evaluation: then options or data
        don't fit. That something could not be written is no reason to remove what was.
        """
        from bench.job.checkpoint import FOLDER, MANIFEST, CheckpointError

        resumable: bool = self.workers.gather((self.folder / FOLDER / MANIFEST).exists())[0]
        if resumable:
            return f"; checkpoints and metrics until then are in {self.folder}, --resume goes on from there"
        if self.evaluated or self.recorded or isinstance(error, CheckpointError | Failure):
            return f"; metrics until then are in {self.folder}"
        if self.lead:
            remove(self.folder, self.created)
        return ""

    def _show(self, summary: dict[str, Any]) -> None:
        """The end of a complete run, whose results are written: nothing here makes it a failed one."""
        from bench.job.report import text

        print("\n" + text(summary, notes=False))
        if self.options["figures"]:
            try:
                from bench.job import figures as run_figures

                run_figures.draw(self.folder)
            except Exception as error:
                story = what_is_missing(error) or " ".join(str(error).split()) or type(error).__name__
                print(f"no figures: {story}; `python -m bench.figures {self.folder}` tries again", file=sys.stderr)
        print(f"Everything is in {self.folder}", flush=True)

    def _run_method(self, name: str, checkpoints: Checkpoints, stop: StopRequest) -> None:
        from bench.common.files import plain, write_atomically
        from bench.job.checkpoint import CheckpointError
        from bench.job.record import Metrics, metrics_name, weights_name
        from bench.job.train import train

        trainer = self.trainers.pop(name)
        current = checkpoints.current

        def restore() -> tuple[float, int]:
            assert current is not None
            try:
                state = checkpoints.load()
                trainer.load_state_dict(state["trainer"])
                return state["checkpoint_s"], current["metrics_bytes"]
            except (LookupError, TypeError) as error:
                raise CheckpointError(f"{checkpoints.folder}: not a checkpoint of this job ({error!r})") from error

        checkpoint_s, position = 0.0, 0
        if current is not None and current["method"] == name:
            checkpoint_s, position = self.workers.attempt(restore, RuntimeError, ValueError)
            self._say(f"{name}: resumed after {trainer.iteration} of {trainer.settings.iterations} iterations")
        metrics: Metrics | None = self.workers.attempt(
            lambda: Metrics(self.folder / metrics_name(name), position), OSError, ValueError, here=self.lead
        )
        unwritten: OSError | None = None
        style = self.options["progress"]
        if style == "auto":
            style = "bar" if has_terminal() else "lines"
        progress = Progress(style if self.lead else "none", name, trainer.settings.iterations, trainer.iteration)

        def write(line: dict[str, Any]) -> None:
            nonlocal unwritten
            if metrics is not None and unwritten is None:
                try:
                    metrics.write(line)
                except OSError as error:  # stops all ranks, and `sync` tells them why
                    unwritten = error
            self.evaluated |= line["type"] == "evaluation"
            progress.show(line)

        def sync() -> int:
            assert metrics is not None
            if unwritten is not None:
                path = self.folder / metrics_name(name)
                raise OSError(f"{path} can't be written ({unwritten.strerror or unwritten})")
            return metrics.sync()

        def save() -> None:
            nonlocal checkpoint_s
            start = time.perf_counter()
            length = self.workers.attempt(sync, OSError, here=self.lead)
            state = {"trainer": trainer.state_dict(), "checkpoint_s": checkpoint_s}
            checkpoints.save(name, trainer.iteration, state, {"metrics_bytes": length})
            checkpoint_s += time.perf_counter() - start

        try:
            complete = train(
                trainer,
                write,
                save,
                eval_every=self.options["eval_every"],
                checkpoint_every=self.options["checkpoint_every"],
                stop=lambda: stop() or unwritten is not None,
            )
            if not complete:
                raise Interrupted(f"stopped after {trainer.iteration} of {trainer.settings.iterations} with {name}")
            result = trainer.result()

            def write_weights() -> None:
                sync()
                write_atomically(self.folder / weights_name(name), _weights(trainer))

            self.workers.attempt(write_weights, OSError, here=self.lead)
            if self.options["trace"]:
                self._trace(name, trainer)
            checkpoints.finish(name, plain({**result, "checkpoint_s": checkpoint_s}))
        finally:
            progress.close()
            if metrics is not None:
                metrics.close()

    def _trace(self, name: str, trainer: Trainer) -> None:
        """Collective. Nothing here makes it a failed run."""
        from bench.job import tracing
        from bench.job.report import clocks
        from ring.trace import TraceError

        said = self.workers.gather(tracing.rows(trainer.timeline))
        if self.lead:
            try:
                print("\n".join(tracing.write(self.folder, name, clocks(self._summary({})), said)), flush=True)
            except (TraceError, OSError) as error:
                print(f"{name}: no trace: {' '.join(str(error).split())}", file=sys.stderr)


def remove(folder: Path, created: list[Path]) -> None:
    """Remove what a run writes into its folder, and the folders that were made for it if nothing else is in them."""
    from bench.job.checkpoint import FOLDER
    from bench.job.record import ENVIRONMENT, METRICS, SUMMARY, TRACES, WEIGHTS

    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    for pattern in (ENVIRONMENT, SUMMARY, METRICS, WEIGHTS, TRACES):
        for path in [*folder.glob(pattern), *folder.glob(f".{pattern}.tmp")]:
            with contextlib.suppress(OSError):
                path.unlink()
    for made in created:
        with contextlib.suppress(OSError):
            made.rmdir()


def _weights(trainer: Trainer) -> bytes:
    import torch

    data = io.BytesIO()
    torch.save({name: value.detach().cpu() for name, value in trainer.model.named_parameters()}, data)
    return data.getvalue()
