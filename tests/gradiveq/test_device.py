"""The path of gradients on a device, on CPU tensors: it is the one that runs on a GPU, but for `Lane`'s streams."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.common.command_line import UsageError
from bench.job.options import parse as parse_options
from bench.kernels import device as bench_device
from gradiveq import Aggregator, NonFiniteGradient, Plain, QSGDRing
from gradiveq.powersgd import PowerSGD
from gradiveq.running_noise import RunningNoise
from gradiveq.specs import parse
from ring.cluster import Cluster
from ring.codec import IdentityCodec
from ring.handle import Ring
from ring.lockstep import run
from ring.timeline import Timeline
from ring.virtual import VirtualRing
from tests.support.aggregators import assert_same_bits, collect, noise, set_gradients, small_model, subspace, train
from tests.support.on_devices import CPU, PHASES, SIZE, assert_bitwise, assert_losses, both, brief
from tests.support.processes import Launch


@pytest.mark.usefixtures("lane")
@pytest.mark.parametrize(("size", "chunk_bytes"), [(1, 64), (2, 256), (4, 64), (3, None)])
def test_plain_is_the_hosts_bit_by_bit(size: int, chunk_bytes: int | None) -> None:
    assert_bitwise(*both(Plain(), 3, size=size, chunk_bytes=chunk_bytes))


@pytest.fixture
def wide_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("wide_by_default")
@pytest.mark.parametrize("method", [Plain(), PHASES], ids=brief)
def test_what_travels_is_float32_whatever_the_default(method: Any) -> None:
    gradients = subspace(4)
    host, device = both(method, 7, lambda *which: gradients(*which).double())
    for (_, _, theirs), (_, _, ours) in zip(host, device, strict=True):
        for name, value in theirs[-1].items():
            np.testing.assert_allclose(ours[-1][name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.usefixtures("lane")
@pytest.mark.parametrize("method", [QSGDRing(), parse("topk:0.1+ef"), PowerSGD(2), parse("half")], ids=brief)
def test_what_stays_on_the_host_is_the_hosts_bit_by_bit(method: Any) -> None:
    assert_bitwise(*both(method, 3))


@pytest.mark.usefixtures("lane")
@pytest.mark.parametrize("chunk_bytes", [128, None])
@pytest.mark.parametrize(
    "changed", [{}, {"sampling": QSGDRing()}, {"compress": "auto", "stop_multiple": 1.01, "reuse": 2, "slice_size": 10}]
)
def test_gradiveq_is_the_hosts_within_rounding(chunk_bytes: int | None, changed: dict[str, Any]) -> None:
    method = replace(PHASES, **changed)
    host, device = both(method, 14, subspace(4, off=0.1), chunk_bytes=chunk_bytes)
    for (_, reports, theirs), (_, others, ours) in zip(host, device, strict=True):
        for report, other, expected, got in zip(reports, others, theirs, ours, strict=True):
            for name, value in expected.items():
                # a float of the payload is a dot product of up to 24 terms, decoding one of 3
                np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
            assert_losses(report, other)
    logs = [aggregator.window_log for (aggregator, _, _), *_ in (host, device)]
    for window, other in zip(*logs, strict=True):
        assert (window["ended_by"], window["ratio"]) == (other["ended_by"], other["ratio"])
        for name, layer in window["layers"].items():
            assert layer["d"] == other["layers"][name]["d"]
            assert layer["held_out_loss"] == pytest.approx(other["layers"][name]["held_out_loss"], rel=1e-4, abs=1e-6)


def test_a_callers_autocast_is_not_the_aggregators() -> None:
    """`aggregate()` under autocast gives the same bits and measures the same losses: it is about the model's layers."""

    def work(ring: Ring, inside: bool) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            _, reports, grads = train(ring, PHASES, 9, subspace(4, off=0.1), device=CPU)
        return [report.losses for report in reports], grads

    outside, within = (run(SIZE, lambda ring, inside=inside: work(ring, inside)) for inside in (False, True))
    for (losses, grads), (others, ours) in zip(outside, within, strict=True):
        assert_same_bits([grads, ours])
        assert losses == others


@pytest.mark.usefixtures("lane")
def test_resumed_on_a_device_bit_by_bit() -> None:
    """In a sampling and in a compressed iteration; and a state may move from the host to a device."""
    gradients = subspace(4, off=0.1)
    whole = run(SIZE, lambda ring: train(ring, PHASES, 14, gradients, device=CPU)[2])

    def resumed(stop: int, first: torch.device | None) -> Callable[[Ring], list[Any]]:
        def work(ring: Ring) -> list[Any]:
            state = pickle.dumps(train(ring, PHASES, stop, gradients, device=first)[0].state_dict())
            model = small_model()
            aggregator = Aggregator(model, ring, PHASES, device=CPU)
            aggregator.load_state_dict(pickle.loads(state))
            results = []
            for iteration in range(stop, 14):
                set_gradients(model, gradients, ring.rank, iteration)
                aggregator.aggregate()
                results.append(collect(model))
            return results

        return work

    for stop, first in ((4, CPU), (8, CPU), (4, None)):
        for grads, expected in zip(run(SIZE, resumed(stop, first)), whole, strict=True):
            assert_same_bits([grads, expected[stop:]])


@pytest.mark.parametrize("policy", ["fail", "skip"])
@pytest.mark.parametrize("method", [Plain(), QSGDRing(), PHASES], ids=lambda method: method.name)
def test_flaws_are_found_as_on_the_host(method: Any, policy: str) -> None:
    at = 7  # GradiVeQ compresses then

    def spoilt(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> Tensor:
        gradient = noise(name, shape, rank, iteration)
        if (name, rank, iteration) == ("2.weight", 1, at):
            gradient.view(-1)[5] = torch.nan
        return gradient

    def huge(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> Tensor:
        return torch.full(shape, 3e38) if name == "3.bias" and iteration == at else noise(name, shape, rank, iteration)

    for gradients, words in ((spoilt, "2.weight on rank 1"), (huge, "overflows float32 in iteration 7")):
        if policy == "skip":
            _, device = both(method, at + 2, gradients, nonfinite="skip")
            reports, results = device[0][1:]
            assert [report.skipped for report in reports] == [False] * at + [True, False]
            assert all(not value.any() for value in results[at].values())
        else:
            with pytest.raises(NonFiniteGradient, match=words):
                run(SIZE, lambda ring, gradients=gradients: train(ring, method, at + 1, gradients, device=CPU))


def test_watch_sees_this_workers_gradient() -> None:
    """As a tensor, of which the noise's sketch is that of the array."""

    def work(ring: Ring) -> None:
        model, seen = small_model(), []
        aggregator = Aggregator(model, ring, Plain(), device=CPU)
        aggregator.watch = lambda gradient: seen.append(torch.as_tensor(gradient).clone())
        set_gradients(model, noise, ring.rank, 0)
        expected = np.empty(aggregator.layout.length, np.float32)
        aggregator.layout.pack(expected)
        aggregator.aggregate()
        np.testing.assert_array_equal(seen[0], expected)
        here, there = (RunningNoise(2, seed=3, width=101, block=2) for _ in range(2))
        for noise_of, gradient in ((here, expected), (there, seen[0])):
            noise_of.see(gradient)
            noise_of.accept()
        sketches = [noise_of.state_dict()["sketches"] for noise_of in (here, there)]
        assert np.abs(sketches[0]).max() > 1
        np.testing.assert_allclose(sketches[1], sketches[0], rtol=1e-12, atol=1e-12)

    run(2, work)


def test_a_cluster_hears_the_same_work() -> None:
    """Its clock takes as long to encode and decode as on the host's path: the rates are of multiplications."""
    rates = {"add": 1e12, "scale": 1e12, "copy": 1e12, "pca.encode": 1e3, "pca.decode": 1e3}
    cluster = Cluster("test", nodes=SIZE, rates=rates)

    def work(ring: Ring, device: torch.device | None) -> dict[str, float]:
        virtual = VirtualRing(ring, cluster)
        timeline = Timeline(virtual=Timeline(virtual.clock))
        reports = train(virtual, PHASES, 7, subspace(4), timeline=timeline, device=device)[1]
        return reports[-1].virtual_seconds

    host = run(SIZE, lambda ring: work(ring, None))
    device = run(SIZE, lambda ring: work(ring, CPU))
    for kind in ("encode", "decode"):  # about a second each; on a device there is what it takes to ask for it, too
        before, after = (sum(one[kind] for one in ranks) for ranks in (host, device))
        assert before == pytest.approx(after, rel=0.1), kind


def test_refused() -> None:
    with pytest.raises(ValueError, match="`gpu_aware` is for gradients on a device"):
        run(1, lambda ring: Aggregator(small_model(), ring, Plain(), gpu_aware=True))
    with pytest.raises(TypeError, match="LockstepRing sums NumPy vectors"):
        run(1, lambda ring: train(ring, Plain(), 1, device=CPU, gpu_aware=True))


def test_the_rings_staging_calls_come_once_for_each_chunk() -> None:
    """Of each element `encode` before it is used, and `decode` when it is the mean; nothing is missed or repeated."""

    class Counting(IdentityCodec):
        staged = True

        def __init__(self, length: int) -> None:
            self.encoded, self.decoded, self.means = (np.zeros(length) for _ in range(3))

        def encode(self, values: Any, start: int, payload: Any, hop: Any) -> None:
            self.encoded[start : start + len(values)] += 1
            values += start + np.arange(len(values))

        def decode(self, payload: Any, start: int, values: Any, size: int) -> None:
            self.decoded[start : start + len(values)] += 1
            self.means[start : start + len(values)] = values

    def work(ring: Ring) -> None:
        codec, vector = Counting(101), np.zeros(101)
        ring.all_reduce(vector, codec, op="mean", chunk_bytes=80)
        np.testing.assert_array_equal(codec.encoded, np.ones(101))
        np.testing.assert_array_equal(codec.decoded, np.ones(101))
        np.testing.assert_array_equal(codec.means, np.arange(101))
        np.testing.assert_array_equal(vector, codec.means)

    for size in (1, 2, 3, 5):
        run(size, work)


def test_over_mpi(mpirun: Launch) -> None:
    program = """
    import pytest
    from tests.support.on_devices import compare_over_mpi
    from bench.job.command import check_gpu_aware

    compare_over_mpi("cpu", direct=True)
    with pytest.raises(ValueError, match="--gpu-aware: this MPI says that it isn't"):  # that of the tests does
        check_gpu_aware()
    """
    result = mpirun(2, program)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu-aware"], "--gpu-aware is for --device cuda, got --device cpu"),
        (["--gpu-aware", "--device", "cuda"], "can't be emulated, add --cluster none"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_options(arguments)


def test_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """That it runs and records what its table shows. How fast anything is, no test says."""
    monkeypatch.setattr(bench_device, "SAMPLE_S", 1e-5)
    monkeypatch.setattr(bench_device, "SLICE_SIZES", (64, 256))
    size = ["--elements", "8192", "--square", "32", "--repeats", "2"]
    bench_device.main(["--device", "cpu", *size, "--out", str(tmp_path / "new")])
    record = json.loads((tmp_path / "new" / "device.json").read_text())
    rows = {row["operation"]: row for row in record["rows"]}
    assert rows["memory: copy"]["of_limit"]["median"] == rows["product"]["of_limit"]["median"] == 1
    # The gradient, the payload and Uᵀµ, an eighth of it each, and the bases.
    assert rows["encode, K = 64, d = 8"]["bytes"] == 4 * (8192 + 2 * 1024 + 64 * 8)
    assert rows["encode, K = 64, d = 8"]["flops"] == 2 * 8192 * 8
    for field in ("bytes", "flops"):
        parts = [rows[f"{what}, K = 256, d = 32"][field] for what in ("encode", "decode", "exchange")]
        assert parts[0] + parts[1] == parts[2]
    for row in rows.values():
        assert 0 < row["of_limit"]["low"] <= row["of_limit"]["median"] <= row["of_limit"]["high"]
    table = (tmp_path / "new" / "table.md").read_text()
    assert table.startswith(f"{record['device']}, 8,192 elements")
    assert all(f"| {name} " in table for name in rows)
    assert "of the limit" in capsys.readouterr().out
    for arguments, words in ((["--elements", "100"], "multiple of 256"), (["--repeats", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            bench_device.main(["--device", "cpu", *arguments])
        assert words in capsys.readouterr().err
