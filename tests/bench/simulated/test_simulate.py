"""n workers in one process: what they are equal to, and that a run is a function of its seed, stopped or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.data import Batches, Dataset
from bench.experiments.grid import GridError, run_grid
from bench.simulated import training
from bench.simulated.training import Aggregation, ExactMean, Images, Observer, Step, make_optimiser, simulate
from gradiveq import Aggregator
from gradiveq.compressors.identity import Identity
from gradiveq.compressors.terngrad import TernGrad
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.exchange.parts import Part
from gradiveq.flatten import Layout
from gradiveq.methods import Compressed
from gradiveq.running_noise import RunningNoise, estimate_here
from gradiveq.specs import parse
from ring.handle import Ring
from ring.lockstep import run
from tests.support.grid_runs import tiny
from tests.support.processes import ROOT

pytestmark = pytest.mark.slow


def dataset(num_train: int = 80, num_test: int = 20) -> Dataset:
    """Noise, with a bright band that tells the class, mirrored or not."""
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 4, num_train + num_test)
    images = generator.integers(0, 120, (num_train + num_test, 3, 32, 32), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 8 * label : 8 * label + 8] += 100
    train, test = slice(None, num_train), slice(num_train, None)
    return Dataset(
        "bands", "bands, made", images[train], labels[train], images[test], labels[test], 4, (0.3,) * 3, (0.2,) * 3
    )


def network(*, batch_norm: bool = False, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.AvgPool2d(4),
            nn.Conv2d(3, 5, 3),
            nn.BatchNorm2d(5) if batch_norm else nn.Identity(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(5 * 36, 4),
        )


def parts(model: nn.Module, compressor: Any = None) -> list[Part]:
    return [Part(block.name, block.start, block.stop, compressor or Identity()) for block in Layout(model).blocks]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def train(
    model: nn.Module,
    aggregation: Aggregation,
    *,
    workers: int = 4,
    batch_size: int = 5,
    iterations: int = 8,
    optimiser: str = "nesterov",
    lr: float = 0.05,
    seed: int = 0,
    **how: Any,
) -> dict[str, Any]:
    task = Images(model, dataset(), batch_size, workers, seed=seed)
    steps = make_optimiser(model.parameters(), optimiser, weight_decay=1e-3)
    return simulate(
        task,
        aggregation,
        steps,
        lambda iteration: lr / (1 + iteration),
        workers=workers,
        iterations=iterations,
        seed=seed,
        **how,
    )


# --- what it is equal to ---------------------------------------------------------------------------------------------


def test_a_worker_has_the_batches_that_its_rank_would_have():
    task = Images(network(), dataset(), 5, 4, seed=3)
    for rank in (0, 3):
        own = Batches(dataset(), 5, rank, 4, seed=3)
        for iteration in (0, 1, 6):
            images, labels = task.batch(iteration, rank)
            wanted_images, wanted_labels = own.batch(iteration)
            assert torch.equal(images, wanted_images)
            assert torch.equal(labels, wanted_labels)


@pytest.mark.parametrize("optimiser", ["sgd", "nesterov", "adam"])
def test_the_mean_of_the_workers_gradients_is_the_global_batchs(optimiser: str):
    many, one, other = network(), network(), network()
    train(many, ExactMean(), workers=4, batch_size=5, optimiser=optimiser)
    train(one, ExactMean(), workers=1, batch_size=20, optimiser=optimiser)
    train(other, ExactMean(), workers=1, batch_size=20, optimiser=optimiser, seed=1)
    torch.testing.assert_close(weights(many), weights(one), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(weights(many), weights(other), rtol=1e-4, atol=1e-6)


def test_identity_in_parts_is_the_exact_mean():
    exact, compressed = network(), network()
    train(exact, ExactMean())
    result = train(compressed, training.CompressedMean(parts(compressed), 4))
    torch.testing.assert_close(weights(exact), weights(compressed), rtol=1e-6, atol=1e-7)
    assert set(result["steps"]["compression_error"]) == {0.0}
    assert set(result["steps"]["payload_bytes"]) == {4.0 * result["num_parameters"]}


@pytest.mark.parametrize("spec", ["terngrad+ef", "topk:0.1@model+ef-scaled", "threshold:0.02+ef-update"])
def test_gathered_compressors_train_as_over_a_ring_to_the_last_bit(spec: str):
    method = parse(spec, momentum=0.9)
    assert isinstance(method, Compressed)
    iterations, workers = 6, 4
    here = network(batch_norm=True)
    aggregation = training.CompressedMean(method.parts(Layout(here).blocks), workers, seed=3, feedback=method.feedback)
    optimiser = "sgd" if spec.endswith("update") else "nesterov"
    train(here, aggregation, iterations=iterations, optimiser=optimiser, seed=3)

    replicas = [network(batch_norm=True) for _ in range(workers)]  # not by the threads: they share torch's generator

    def work(ring: Ring) -> Tensor:
        model = replicas[ring.rank]
        batches = Batches(dataset(), 5, ring.rank, ring.size, seed=3)
        aggregator = Aggregator(model, ring, method, seed=3)
        steps = make_optimiser(model.parameters(), optimiser, weight_decay=1e-3)
        for iteration in range(iterations):
            images, labels = batches.batch(iteration)
            steps.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            for group in steps.param_groups:
                group["lr"] = 0.05 / (1 + iteration)
            aggregator.aggregate(lr=0.05 / (1 + iteration))
            steps.step()
        return weights(model)

    for there in run(workers, work):
        assert torch.equal(there, weights(here))


def test_running_statistics_are_the_mean_over_the_workers():
    """Four replicas, each with its own statistics, trained by hand."""
    together = network(batch_norm=True)
    train(together, ExactMean(), iterations=3, optimiser="sgd")

    replicas = [network(batch_norm=True) for _ in range(4)]
    task = Images(replicas[0], dataset(), 5, 4, seed=0)
    for iteration in range(3):
        for rank, replica in enumerate(replicas):
            images, labels = task.batch(iteration, rank)
            replica.zero_grad()
            nn.functional.cross_entropy(replica(images), labels).backward()
        for same in zip(*(replica.parameters() for replica in replicas), strict=True):
            mean = torch.stack([parameter.grad for parameter in same]).mean(0)
            for parameter in same:
                with torch.no_grad():
                    parameter -= 0.05 / (1 + iteration) * (mean + 1e-3 * parameter)
    torch.testing.assert_close(weights(together), weights(replicas[0]), rtol=1e-4, atol=1e-6)
    for name in ("running_mean", "running_var"):
        wanted = torch.stack([getattr(replica[2], name) for replica in replicas])
        torch.testing.assert_close(getattr(together[2], name), wanted.mean(0), rtol=1e-5, atol=1e-6)
        assert (wanted.std(0) > 1e-5).any()
    assert int(together[2].num_batches_tracked) == 3


# --- one seed, one run -----------------------------------------------------------------------------------------------


def compressed_run(seed: int = 0, **how: Any) -> tuple[dict[str, Any], Tensor]:
    """Everything that has a state: dropout, batch norm, Adam, random compressors with memories."""
    model = network(batch_norm=True, dropout=0.3, seed=seed)
    aggregation = training.CompressedMean(parts(model, TernGrad()), 4, seed=seed, feedback=ErrorFeedback("gradient"))
    result = train(model, aggregation, optimiser="adam", lr=0.01, seed=seed, iterations=12, record_every=3, **how)
    return result, torch.cat([weights(model), *(buffer.flatten().float() for buffer in model.buffers())])


def test_a_run_is_a_function_of_its_seed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, first_weights = compressed_run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    np.random.default_rng(7)
    second, second_weights = compressed_run()
    assert first == second
    assert torch.equal(first_weights, second_weights)
    third, third_weights = compressed_run(seed=1)
    assert first != third
    assert not torch.equal(first_weights, third_weights)


class Stop(Observer):
    """Ends the process's run when it is asked to."""

    def __init__(self, at: int | None) -> None:
        self.at, self.seen = at, 0

    def __call__(self, step: Step) -> Mapping[str, float]:
        if step.iteration == self.at:
            raise KeyboardInterrupt
        self.seen += 1
        return {"seen": float(self.seen)}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]


@pytest.mark.parametrize("stopped_at", [3, 5, 8])
def test_a_run_that_was_stopped_goes_on_bit_by_bit(tmp_path: Path, stopped_at: int):
    whole, wanted = compressed_run(observers=[Stop(None)], evaluate_every=4)
    path = tmp_path / "run.checkpoint"
    how: dict[str, Any] = {"checkpoint": path, "checkpoint_every": 2, "evaluate_every": 4}
    with pytest.raises(KeyboardInterrupt):
        compressed_run(observers=[Stop(stopped_at)], **how)
    assert path.exists()
    resumed, got = compressed_run(observers=[Stop(None)], **how)
    assert resumed == whole
    assert torch.equal(got, wanted)
    assert not path.exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    path = tmp_path / "run.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        compressed_run(observers=[Stop(5)], checkpoint=path, checkpoint_every=2)
    with pytest.raises(ValueError, match="seed = 0, this one has 1"):
        compressed_run(seed=1, observers=[Stop(None)], checkpoint=path, checkpoint_every=2)


# --- what is recorded ------------------------------------------------------------------------------------------------


class Odd(Observer):
    def __call__(self, step: Step) -> Mapping[str, float]:
        assert len(step.gradients) == 4
        np.testing.assert_allclose(step.mean, np.mean(step.gradients, axis=0), rtol=1e-4, atol=1e-6)
        return {"odd": float(step.iteration)} if step.iteration % 2 else {}


def test_records_are_means_over_their_steps():
    result = train(network(), ExactMean(), iterations=8, observers=[Odd()])
    each = result["steps"]
    assert each["iteration"] == list(range(1, 9))
    assert each["odd"] == [None, 1, None, 3, None, 5, None, 7]
    assert each["lr"] == [0.05 / (1 + i) for i in range(8)]
    thinned = train(network(), ExactMean(), iterations=8, observers=[Odd()], record_every=3)["steps"]
    assert thinned["iteration"] == [3, 6, 8]
    losses = each["loss"]
    assert thinned["loss"] == pytest.approx([np.mean(part) for part in (losses[:3], losses[3:6], losses[6:])])
    assert thinned["odd"] == [1, 4, 7]
    assert [entry["iteration"] for entry in result["evaluations"]] == [4, 8]  # 80 images, 4 x 5 an iteration
    assert [entry["epoch"] for entry in result["evaluations"]] == [1, 2]
    assert result["payload_bytes"] == 8 * 4 * result["num_parameters"]


def test_measures_are_means_over_the_workers_and_totals_go_on():
    model = network()
    aggregation = training.CompressedMean(parts(model, TernGrad()), 4, feedback=ErrorFeedback("gradient"))
    result = train(model, aggregation, iterations=6, record_every=2)
    every = train(
        network(),
        training.CompressedMean(parts(model, TernGrad()), 4, feedback=ErrorFeedback("gradient")),
        iterations=6,
    )
    totals = np.cumsum(every["steps"]["error"])
    np.testing.assert_allclose(every["steps"]["total_error"], totals, rtol=1e-6)
    np.testing.assert_allclose(result["steps"]["total_error"], totals[1::2], rtol=1e-6)
    assert np.mean([one.error for one in aggregation.here.measures]) == every["steps"]["error"][-1]


def test_noise_is_recorded_every_step_once_a_block_has_ended():
    """M, ζ² and σ², as of the workers' own gradients; compression doesn't matter, and records have the last value."""
    noises = [RunningNoise(4, seed=0) for _ in range(4)]
    wanted: list[Any] = []

    class Watch(Observer):
        def __call__(self, step: Step) -> Mapping[str, float]:
            wanted.append(estimate_here(noises, step.gradients))
            return {}

    def run_with(every: int, *observers: Observer) -> dict[str, Any]:
        model = network()
        aggregation = training.CompressedMean(parts(model, TernGrad()), 4, feedback=ErrorFeedback("gradient"))
        return train(model, aggregation, iterations=24, record_every=every, observers=observers)["steps"]

    steps, thinned = run_with(1, Watch()), run_with(4)
    for name in ("multiple", "heterogeneity", "noise"):
        assert steps[name] == [None if one is None else getattr(one, name) for one in wanted]
        assert steps[name][:9] == [None] * 9
        assert None not in steps[name][9:]
        assert thinned[name] == steps[name][3::4]
    assert min(steps["noise"][9:]) > 0


def test_it_learns():
    result = train(network(), ExactMean(), iterations=60, lr=1.0, evaluate_every=0)
    assert [entry["iteration"] for entry in result["evaluations"]] == [60]
    assert result["evaluations"][-1]["accuracy"] > 0.9


def test_a_run_that_diverges_ends_there():
    result = train(network(), ExactMean(), iterations=200, lr=1e20, evaluate_every=0)
    assert 0 < result["diverged"] < 199
    assert result["evaluations"][-1]["iteration"] == result["diverged"] + 1
    assert len(result["steps"]["loss"]) == result["diverged"]


@pytest.mark.parametrize("name", ["workers", "iterations", "record_every"])
def test_bounds(name: str):
    model = network()
    task = Images(model, dataset(), 5, 4, seed=0)
    how = {"workers": 4, "iterations": 3, "record_every": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        simulate(task, ExactMean(), make_optimiser(model.parameters(), "sgd"), lambda _: 0.1, **how)
    with pytest.raises(ValueError, match="got 'sdg'"):
        make_optimiser(model.parameters(), "sdg")


def test_top_k_accuracy():
    task = Images(network(), dataset(), 5, 4, seed=0, top=3)
    task.model.eval()
    with torch.no_grad():
        metrics = task.evaluate()
    assert metrics["accuracy"] <= metrics["top3_accuracy"] <= 1
    task.top = 5
    with torch.no_grad():
        assert task.evaluate()["top5_accuracy"] == 1  # of 4 classes


# --- many runs -------------------------------------------------------------------------------------------------------


SPECS = {f"run-{seed}": {"seed": seed, "lr": 0.1} for seed in range(3)}


@pytest.mark.parametrize("processes", [1, 2])
def test_finished_runs_are_not_repeated_and_one_that_fails_keeps_none_from_ending(tmp_path: Path, processes: int):
    lines: list[str] = []
    first = run_grid(tiny, {"run-0": SPECS["run-0"]}, tmp_path, processes=1, show=lines.append)
    assert lines == [f"run-0: {first['run-0']['seconds']:.1f} s; 1 of 1 runs"]
    before = (tmp_path / "run-0.json").read_bytes()
    specs = {"bad": {"seed": 0, "lr": 0.1, "fail": True}} | SPECS
    with pytest.raises(GridError, match="1 of 4 runs failed; the first: bad failed: RuntimeError: as asked"):
        run_grid(tiny, specs, tmp_path, processes=processes, threads=1, resume=True, show=lines.append)
    assert len(lines) == 4
    records = {path.stem: json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))}
    assert list(records) == list(SPECS)
    assert run_grid(tiny, SPECS, tmp_path, resume=True) == records
    assert (tmp_path / "run-0.json").read_bytes() == before
    for name, record in records.items():
        assert record["spec"] == SPECS[name]
        assert record["result"]["sum"] == SPECS[name]["seed"] + SPECS[name]["lr"]
        assert record["result"]["threads"] == 1
        assert (record["result"]["pid"] == os.getpid()) == (processes == 1 or name == "run-0")
    with pytest.raises(GridError, match=r"run-0.json is there already"):
        run_grid(tiny, SPECS, tmp_path)
    with pytest.raises(GridError, match=r"run-2.json was run with lr = 0.1, now it is 0.2"):
        run_grid(tiny, SPECS | {"run-2": {"seed": 2, "lr": 0.2}}, tmp_path, resume=True)


def test_damaged_records_and_bad_names(tmp_path: Path):
    (tmp_path / "run-1.json").write_text('{"spec": 1}')
    with pytest.raises(GridError, match=r"run-1.json is not a run's record"):
        run_grid(tiny, SPECS, tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"got '\.\./x'"):
        run_grid(tiny, {"../x": {}}, tmp_path)
    with pytest.raises(ValueError, match="`processes` must be at least 1, got 0"):
        run_grid(tiny, SPECS, tmp_path, processes=0)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_processes_end_with_the_one_that_started_them(tmp_path: Path, how: str):
    """Signalled alone, so not as from a terminal."""
    pids, records = tmp_path / "pids", tmp_path / "records"
    pids.mkdir()
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\n"
        "from bench.experiments.grid import run_grid\n"
        "from tests.support.grid_runs import slow\n"
        "if __name__ == '__main__':\n"
        f"    run_grid(slow, {{str(i): {{'pids': {str(pids)!r}}} for i in range(2)}}, Path({str(records)!r}))"
    )
    (tmp_path / "program.py").write_text(program)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"], env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(pids.iterdir())) < 2 and time.monotonic() < deadline:
            assert parent.poll() is None
            time.sleep(0.1)
        running = [int(entry.name) for entry in pids.iterdir()]
        assert len(running) == 2
        parent.send_signal(getattr(signal, how))
        assert parent.wait(60) != 0
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in running) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in running)


def alive(pid: int) -> bool:
    """Whether it runs; a process that nobody waits for stays listed after its end."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"
