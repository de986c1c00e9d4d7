"""What needs a GPU: `python -m pytest -rs tests/gpu` on a machine with one. Without, all of it is skipped.

`test_device` runs the same path on CPU tensors. Here copies are asynchronous and products are the card's. Ranks share
one card over MPI and over Gloo; NCCL refuses two ranks on one, so it is tested with one.
"""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.kernels import device as bench_device
from bench.models import resnet32
from gradiveq import Aggregator, GradiVeQ, Plain, QSGDRing
from gradiveq.powersgd import PowerSGD
from gradiveq.specs import parse
from ring.handle import Ring
from ring.lockstep import run
from tests.support.aggregators import subspace
from tests.support.jobs import SMALL, job, lines_of, stopped, timeless, write_idx
from tests.support.on_devices import assert_bitwise, both, brief
from tests.support.processes import TORCHRUN, Launch
from tests.support.processes import environment as ddp_environment

GPU = torch.device("cuda", 0)


def on_gpu(what: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not torch.cuda.is_available(), reason=f"torch finds no GPU, so not run: {what}")


@on_gpu("the aggregator on a GPU: Plain and methods by way of the host, bitwise as on the CPU")
@pytest.mark.parametrize("method", [Plain(), QSGDRing(), parse("topk:0.1+ef"), parse("half"), PowerSGD(2)], ids=brief)
def test_bitwise_as_on_the_host(method: Any) -> None:
    assert_bitwise(*both(method, 4, chunk_bytes=128, device=GPU))


@on_gpu("QSGD's kernels in the ring, on a GPU")
@pytest.mark.parametrize("changed", [{}, {"pipelined": False}, {"bits": 8, "bucket": 7}])
def test_qsgd_quantised_there(changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And by themselves in `test_device_qsgd`, which runs them here as well."""
    monkeypatch.setattr("gradiveq.over_ring.staged_qsgd.FROM_ELEMENTS", 1)
    assert_bitwise(*both(QSGDRing(**({"bucket": 16} | changed)), 4, chunk_bytes=64, device=GPU))


@on_gpu("GradiVeQ's windows on a GPU, within rounding as on the CPU")
@pytest.mark.parametrize("sampling", [Plain(), QSGDRing()], ids=["plain", "qsgd"])
def test_gradiveq_as_on_the_host(sampling: Any) -> None:
    method = GradiVeQ(warmup=1, sample=5, compress=4, sampling=sampling, holdout_every=2, n_components=3)
    host, device = both(method, 14, subspace(4, off=0.1), chunk_bytes=256, device=GPU)
    for (_, _, theirs), (_, _, ours) in zip(host, device, strict=True):
        for expected, got in zip(theirs, ours, strict=True):
            for name, value in expected.items():
                np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


@on_gpu("copies of ResNet-32's gradient in chunks, beside the ring, on a GPU")
def test_a_large_gradient_is_copied_in_order() -> None:
    """Gradients made on the GPU and exchanged at once, often: a copy that doesn't wait would be of the one before."""

    def work(ring: Ring) -> None:
        model = resnet32(10, seed=0).to(GPU)
        aggregator = Aggregator(model, ring, Plain(), chunk_bytes=64 * 1024, device=GPU)
        for iteration in range(20):
            for p in model.parameters():
                p.grad = torch.full_like(p, float(iteration + ring.rank))
            aggregator.aggregate()
            for p in model.parameters():
                assert p.grad is not None
                assert (p.grad == iteration + 1).all(), iteration

    run(3, work)


@on_gpu("ranks that share a GPU over MPI")
@pytest.mark.timeout(200)
def test_ranks_share_the_card_over_mpi(mpirun: Launch) -> None:
    result = mpirun(
        2,
        "from tests.support.on_devices import compare_over_mpi\nfrom ring.mpi import gpu_support\n"
        "compare_over_mpi('cuda', direct=gpu_support() is True)",
        150.0,
    )
    assert result.returncode == 0, result.stderr


@on_gpu("the hook over NCCL with one rank, and with two ranks that share a GPU over Gloo")
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("backend", "ranks"), [("nccl", 1), ("gloo", 2)])
def test_the_hook_as_on_the_cpu(backend: str, ranks: int, tmp_path: Path) -> None:
    result = subprocess.run(
        [str(TORCHRUN), "--standalone", "--nproc-per-node", str(ranks), "-m", "tests.gpu.hook", backend, "cuda:0"],
        cwd=tmp_path,
        env=ddp_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "all as on the CPU" in result.stdout


@on_gpu("the job with --device cuda on two ranks, stopped and resumed")
@pytest.mark.timeout(600)
def test_the_job_stopped_and_resumed_is_bitwise_the_same(tmp_path: Path) -> None:
    write_idx(tmp_path / "data")
    arguments = [*SMALL, "--data", "data", "--device", "cuda"]
    result = job(2, [*arguments, "--out", "whole"], tmp_path)
    assert result.returncode == 0, result.stderr
    run_folder = tmp_path / "stopped"
    metrics = run_folder / "metrics-gradiveq.jsonl"
    stopped(2, [*arguments, "--out", "stopped", "--methods", "gradiveq"], tmp_path, metrics, signal.SIGINT)
    result = job(2, ["--resume", "stopped"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert timeless(lines_of(run_folder, "gradiveq")) == timeless(lines_of(tmp_path / "whole", "gradiveq"))
    weights = [(tmp_path / name / "weights-gradiveq.pt").read_bytes() for name in ("stopped", "whole")]
    assert weights[0] == weights[1]


@on_gpu("bench.device on a GPU")
def test_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_device, "SAMPLE_S", 1e-3)
    bench_device.main(
        ["--device", "cuda", "--elements", str(2**20), "--square", "512", "--repeats", "2", "--out", str(tmp_path)]
    )
    assert json.loads((tmp_path / "device.json").read_text())["device"] == torch.cuda.get_device_name()
