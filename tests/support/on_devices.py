"""An aggregator on a device beside the same one on the host."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradiveq import GradiVeQ, Plain, Report
from gradiveq.over_ring.staging import Lane
from ring.lockstep import run
from tests.support.aggregators import assert_same_bits, noise, subspace, train

CPU = torch.device("cpu")
SIZE = 3
PHASES = GradiVeQ(warmup=1, sample=5, compress=4, sampling=Plain(), holdout_every=2, n_components=3)


def brief(method: Any) -> str:
    return str(method).partition("(")[2][:24] if method.name == "compressed" else method.name


class LateLane(Lane):
    """A device whose copies are done as late as may be: those to the host when somebody waits for them, those to the
    device when something is computed that has to come after them. Who doesn't wait gets what was there before."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.pending: list[tuple[Tensor, Tensor]] = []

    def fetch(self, host: Tensor, source: Tensor) -> Any:
        self.pending.append((host, source))
        return _LateMark(self, self.pending[-1])

    def push(self, target: Tensor, host: Tensor) -> None:
        self.pending.append((target, host))

    def join(self) -> None:
        while self.pending:
            target, source = self.pending.pop(0)
            target.copy_(source)


class _LateMark:
    def __init__(self, lane: LateLane, copy: tuple[Tensor, Tensor]) -> None:
        self.lane, self.copy = lane, copy

    def synchronize(self) -> None:
        while any(one is self.copy for one in self.lane.pending):  # in order, as on a stream
            target, source = self.lane.pending.pop(0)
            target.copy_(source)


def both(
    method: Any,
    iterations: int,
    gradients: Any = noise,
    size: int = SIZE,
    device: torch.device = CPU,
    **options: Any,
) -> tuple[Any, Any]:
    """By rank what `train` returns, on the host's path and on the device's."""
    host = run(size, lambda ring: train(ring, method, iterations, gradients, **options))
    there = run(size, lambda ring: train(ring, method, iterations, gradients, device=device, **options))
    assert_same_bits([grads for _, _, grads in there])
    for (_, theirs, _), (_, ours, _) in zip(host, there, strict=True):
        for a, b in zip(theirs, ours, strict=True):
            assert (a.phase, a.skipped, a.ratio, a.dense_bytes) == (b.phase, b.skipped, b.ratio, b.dense_bytes)
            assert (a.losses is None) == (b.losses is None)
    for iteration in range(iterations):
        for field in ("bytes_sent", "fit_bytes", "measure_bytes"):  # by rank they depend on where segments are cut
            sums = [sum(getattr(reports[iteration], field) for _, reports, _ in ranks) for ranks in (host, there)]
            assert sums[0] == sums[1], field
    return host, there


def assert_bitwise(host: Any, device: Any) -> None:
    for (_, _, theirs), (_, _, ours) in zip(host, device, strict=True):
        assert_same_bits([theirs, ours])


def assert_losses(report: Report, other: Report) -> None:
    """The same ones, within rounding."""
    before, after = report.losses or {}, other.losses or {}
    assert before.keys() == after.keys()
    for kind in before.keys() - {"layers"}:
        assert before[kind] == pytest.approx(after[kind], rel=1e-3, abs=1e-6)
    assert before.get("layers", {}) == pytest.approx(after.get("layers", {}), rel=1e-3, abs=1e-6)


def compare_over_mpi(device: str, direct: bool) -> None:
    """On each of two ranks, whose vectors fit into one message: by way of host memory, and by MPI's own all-reduce."""
    from ring.mpi import MPIRing

    ring, on_device = MPIRing(timeout_s=30), torch.device(device)
    gradients = subspace(4, off=0.1)
    for method in (Plain(), PHASES):
        _, reports, expected = train(ring, method, 9, gradients)
        for gpu_aware in (False, True) if direct else (False,):
            _, others, got = train(ring, method, 9, gradients, device=on_device, gpu_aware=gpu_aware)
            if method == Plain():  # of two workers a sum has one order
                assert_same_bits([expected, got])
            digest = zlib.crc32(b"".join(value.tobytes() for one in got for value in one.values()))
            assert np.ptp(ring.rows_of_all([digest])) == 0
            for report, other, before, after in zip(reports, others, expected, got, strict=True):
                assert report.phase == other.phase
                sent = [ring.rows_of_all([one.bytes_sent]).sum() for one in (report, other)]
                assert sent[0] == sent[1]
                for name, value in before.items():
                    np.testing.assert_allclose(after[name], value, rtol=1e-4, atol=1e-4)
                assert_losses(report, other)
