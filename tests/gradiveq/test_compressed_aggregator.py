"""Compressors as methods of an aggregator: in lockstep and over MPI, one way and both."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gradiveq import Aggregator, NonFiniteGradient, Plain
from gradiveq.compressors import COMPRESSORS
from gradiveq.compressors.half import Half
from gradiveq.compressors.topk import TopK
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.flatten import Layout
from gradiveq.methods import Compressed
from gradiveq.specs import parse
from ring.cluster import Cluster, Link, Node
from ring.handle import Ring
from ring.lockstep import run
from ring.timeline import Timeline
from ring.virtual import VirtualRing
from tests.support.aggregators import (
    Gradients,
    assert_same_bits,
    collect,
    noise,
    set_gradients,
    small_model,
    spoilt,
    train,
)
from tests.support.processes import Launch
from tests.support.states import contents
from tests.support.workers_here import WorkersHere

Vector = npt.NDArray[np.float32]
CALLS = 4
#: Every compressor by itself, and what can be combined with them.
SPECS = [
    *(f"{name}@{where}" for name in COMPRESSORS for where in ("layer", "model")),
    "topk:0.1+ef",
    "topk:0.1+ef-scaled",
    "topk:0.1+ef-update",
    "threshold:1.0@model+ef",
    "randomk:0.2+ef",
    "half+ef",
    "topk:0.1/*.bias=identity/3.weight=half:bfloat16+ef",
    "sign:scaled@0.*|[12].*+ef",
    "threshold:9.0",
]
BOTH_WAYS = [
    "topk:0.2^threshold:0.5",
    "half^topk:0.3",
    "sign:mean@model^sign",
    "threshold:1.0+ef^half",
    "randomk:0.5^randomk:0.5",
    "topk:0.2/*.bias=half@0.*|[12].*+ef^natural",
]


def compressed(spec: str) -> Compressed:
    method = parse(spec, momentum=0.9)
    assert isinstance(method, Compressed)
    return method


def packed(method: Compressed, gradients: Gradients, rank: int, iteration: int) -> Vector:
    """A worker's gradient as the vector of a layout."""
    model = small_model()
    set_gradients(model, gradients, rank, iteration)
    layout = Layout(model, method.groups)
    vector = np.empty(layout.length, np.float32)
    layout.pack(vector)
    return vector


class Expected:
    """What one process makes of the same gradients (`gradiveq.here`), and what a ring has to send for it."""

    def __init__(self, method: Compressed, size: int, seed: int = 0) -> None:
        self.layout = Layout(small_model(), method.groups)
        blocks = self.layout.blocks
        self.method, self.size = method, size
        self.workers = WorkersHere(
            method.parts(blocks), size, seed=seed, feedback=method.feedback, master=method.master
        )
        self.reduces = any(part.compressor.collective == "all_reduce" for part in method.parts(blocks))

    def call(self, call: int, lr: float) -> tuple[Vector, int]:
        """The mean, and bytes over all ranks."""
        gradients = [packed(self.method, noise, rank, call) for rank in range(self.size)]
        begun = [self.workers.begun(rank, gradient, call, lr) for rank, gradient in enumerate(gradients)]
        sent = [asked.requests for _, asked, _ in begun]
        reduced = sum(payload.nbytes for payload in sent[0][0].payloads)
        gathered = sum(len(gather.message) for _, gather in sent)
        if self.method.master is not None or any(
            part.compressor.collective == "all_gather" and not part.compressor.fixed_size for part in self.workers.parts
        ):
            gathered += 4 * self.size  # lengths first
        elif sent[0][0].payloads:
            reduced += sent[0][0].payloads[0].itemsize  # whose gradient isn't finite
        else:
            gathered += self.size
        mean = np.empty(self.layout.length, np.float32)
        rounds = 2
        if self.method.master is not None:
            rounds = 1
            payloads = zip(*(one[0].payloads for one in sent), strict=True)
            totals = [np.sum(of_all, axis=0, dtype=of_all[0].dtype) for of_all in payloads]
            (spread,) = begun[0][0].send([totals, [gather.message for _, gather in sent]]).requests
            gathered += 4 * self.size + len(spread.make())
        for family in self.workers.families:
            family.skip()
        self.workers.aggregate(gradients, mean, call, lr)
        return mean, (self.size - 1) * (rounds * reduced + gathered)


@pytest.mark.parametrize("spec", [*SPECS, *BOTH_WAYS])
def test_what_one_process_gives(spec: str) -> None:
    """The same bits on all ranks, and those of `gradiveq.here`; where floats are added in another order, nearly."""
    method = compressed(spec)
    for size in (1, 2, 3, 5):
        expected = Expected(method, size, seed=7)

        def work(ring: Ring) -> tuple[list[Any], list[Vector], list[dict[str, Vector]]]:
            model = small_model()
            aggregator = Aggregator(model, ring, method, seed=7)
            reports, means, grads = [], [], []
            for iteration in range(CALLS):
                set_gradients(model, noise, ring.rank, iteration)
                reports.append(aggregator.aggregate(lr=0.1 / (1 + iteration)))
                grads.append(collect(model))
                means.append(np.empty(aggregator.layout.length, np.float32))
                aggregator.layout.pack(means[-1])
            return reports, means, grads

        results = run(size, work)
        assert_same_bits([grads for _, _, grads in results])
        for iteration in range(CALLS):
            mean, num_bytes = expected.call(iteration, 0.1 / (1 + iteration))
            got = results[0][1][iteration]
            if size <= 2 or not expected.reduces:
                assert got.tobytes() == mean.tobytes()
            elif method.master is None:
                np.testing.assert_allclose(got, mean, rtol=1e-2 if "half" in spec else 1e-5, atol=1e-2)
            reports = [reports[iteration] for reports, _, _ in results]
            assert all(report.phase == "compressed" and not report.skipped for report in reports)
            if size <= 2 or not expected.reduces or method.master is None:
                assert sum(report.bytes_sent for report in reports) == num_bytes
            assert len({report.ratio for report in reports}) == 1
            for report, worker in zip(reports, expected.workers.measures, strict=True):
                assert report.measures == worker


def test_the_mean_and_the_bytes_of_a_few_are_as_said() -> None:
    """Beside plain: what identity gives, and what half a vector or a bit an element is."""
    size = 3
    plain = run(size, lambda ring: train(ring, Plain(), 2))
    length = plain[0][0].layout.length
    for spec, ratio in (("identity", 1.0), ("half", 2.0), ("sign@model", 4 * length / math.ceil(length / 8))):
        results = run(size, lambda ring, spec=spec: train(ring, compressed(spec), 2))  # type: ignore[misc]
        assert results[0][1][0].ratio == pytest.approx(ratio)
        assert results[0][1][0].dense_bytes == plain[0][1][0].dense_bytes
        for mine, theirs in zip(results[0][2], plain[0][2], strict=True):
            for name, value in mine.items():
                if spec != "sign@model":
                    np.testing.assert_allclose(value, theirs[name], atol=1e-6 if spec == "identity" else 1e-2)
                else:
                    votes = sum(np.where(noise(name, value.shape, rank, 0).numpy() >= 0, 1, -1) for rank in range(size))
                    if mine is results[0][2][0]:
                        np.testing.assert_array_equal(value, np.sign(votes))


@pytest.mark.parametrize("spec", ["topk:0.2+ef", "threshold:1.0", "sign:mean", "qsgd-gather@model"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_identity_as_master_gives_the_same_bits(spec: str, size: int) -> None:
    one, other = (run(size, lambda ring, s=s: train(ring, compressed(s), 3)[2]) for s in (spec, f"{spec}^identity"))  # type: ignore[misc]
    assert_same_bits([*one, *other])


@pytest.mark.parametrize("spec", ["topk:0.1+ef", "threshold:1.0+ef-scaled", "randomk:0.2+ef-update", "half^terngrad"])
def test_resume_is_bitwise(spec: str) -> None:
    size, total, stops = 3, 7, (1, 4)
    method = compressed(spec)

    def going_on(ring: Ring, state: bytes | None = None) -> tuple[Any, ...]:
        model = small_model()
        aggregator = Aggregator(model, ring, method, seed=3)
        if state is not None:
            aggregator.load_state_dict(pickle.loads(state))
        states, measures, grads = {}, [], []
        for iteration in range(aggregator.iteration, total):
            states[iteration] = pickle.dumps(aggregator.state_dict())
            set_gradients(model, noise, ring.rank, iteration)
            measures.append(aggregator.aggregate(lr=1 / (1 + iteration)).measures)
            grads.append(collect(model))
        return states, measures, grads, aggregator.state_dict()

    whole = run(size, going_on)
    for stop in stops:
        parts = run(size, lambda ring, stop=stop: going_on(ring, whole[ring.rank][0][stop]))  # type: ignore[misc]
        for (_, measures, grads, end), (_, theirs, their_grads, their_end) in zip(whole, parts, strict=True):
            assert_same_bits([grads[stop:], their_grads])
            assert measures[stop:] == theirs
            assert contents(their_end) == contents(end)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("topk:0.2+ef", r"method\.compressor is TopK\(ratio=0\.1, .* there and TopK\(ratio=0\.2"),
        ("topk:0.1+ef-scaled", r"method\.feedback is .*'gradient'.* there and .*'scaled'"),
        ("topk:0.1@model+ef", r"method\.granularity is 'layer' there and 'model' here"),
        ("topk:0.1+ef^half", r"method\.master is None there and Half"),
    ],
)
def test_a_state_of_another_method(spec: str, message: str) -> None:
    def work(ring: Ring) -> None:
        state = Aggregator(small_model(), ring, compressed("topk:0.1+ef")).state_dict()
        Aggregator(small_model(), ring, compressed(spec)).load_state_dict(state)

    with pytest.raises(ValueError, match=message):
        run(1, work)


FEEDBACKS = ["topk:0.1+ef", "topk:0.1+ef-scaled", "topk:0.1+ef-update", "half+ef", "threshold:1.0+ef^half"]


@pytest.mark.parametrize("spec", FEEDBACKS)
def test_a_skipped_iteration_leaves_no_trace(spec: str) -> None:
    """What follows is as if the worker with the NaN, and all others, had not called; but its number counts."""
    gradients = spoilt(1, 2, {"2.weight": math.nan})

    def work(ring: Ring) -> tuple[list[Any], list[dict[str, Vector]]]:
        model = small_model()
        aggregator = Aggregator(model, ring, compressed(spec), nonfinite="skip")
        reports, grads = [], []
        for iteration in range(5):
            set_gradients(model, gradients, ring.rank, iteration)
            before = contents(aggregator.state_dict()["family"])
            reports.append(aggregator.aggregate(lr=0.5))
            grads.append(collect(model))
            assert (contents(aggregator.state_dict()["family"]) == before) == (iteration == 2)
        return reports, grads

    for reports, grads in run(3, work):
        assert [report.iteration for report in reports if report.skipped] == [2]
        assert reports[2].measures is None
        assert not any(value.any() for value in grads[2].values())
        assert all(np.isfinite(value).all() for one in grads for value in one.values())
        assert reports[3].measures.total_error > reports[1].measures.total_error > 0


@pytest.mark.parametrize("spec", ["topk:0.1", "topk:0.1+ef", "half", "half+ef^topk:0.1"])
def test_a_non_finite_gradient_is_named_on_all_ranks(spec: str) -> None:
    gradients = spoilt(1, 1, {"2.weight": math.nan, "3.bias": -math.inf})

    def work(ring: Ring) -> tuple[str, int]:
        model = small_model()
        aggregator = Aggregator(model, ring, compressed(spec))
        set_gradients(model, gradients, ring.rank, 0)
        aggregator.aggregate()
        set_gradients(model, gradients, ring.rank, 1)
        with pytest.raises(NonFiniteGradient) as caught:
            aggregator.aggregate()
        return str(caught.value), aggregator.iteration

    assert run(3, work) == [("non-finite gradient in iteration 1: 2.weight, 3.bias on rank 1", 1)] * 3


def test_gradient_and_memory_that_overflow_together_are_named() -> None:
    def gradients(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> torch.Tensor:
        return torch.full(shape, 2e38 if rank == 1 and name == "2.weight" else 1.0)

    with pytest.raises(NonFiniteGradient) as caught:
        run(2, lambda ring: train(ring, compressed("topk:count=1+ef"), 3, gradients))
    assert str(caught.value) == (
        "non-finite gradient in iteration 1: the sum of a gradient and what error feedback remembers on rank 1"
    )


@pytest.mark.parametrize(
    ("spec", "where"), [("identity", "1.bias"), ("topk:1.0", "1.bias"), ("topk:1.0^half", "0.wei")]
)
def test_a_sum_that_overflows_is_skipped(spec: str, where: str) -> None:
    """Each gradient is finite, their sum isn't; a master finds that out for all."""

    def gradients(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> torch.Tensor:
        return torch.full(shape, 3e38 if name == "1.bias" and iteration == 1 else 1.0)

    for _, reports, grads in run(2, lambda ring: train(ring, compressed(f"{spec}"), 3, gradients, nonfinite="skip")):
        assert [report.skipped for report in reports] == [False, True, False]
        assert all((value == 1).all() for value in grads[2].values())
    with pytest.raises(
        NonFiniteGradient, match=rf"finite gradients overflows float32 in iteration 1: {where}.* on all"
    ):
        run(2, lambda ring: train(ring, compressed(spec), 3, gradients))


def test_no_room_for_so_many_workers_is_said_before_anything_is_sent() -> None:
    with pytest.raises(ValueError, match="`workers` must be at least 3, the number of workers"):
        run(3, lambda ring: Aggregator(small_model(), ring, Compressed(Half(workers=2))))


def test_patterns_that_do_not_fit_the_model() -> None:
    for spec, message in (("topk/fc.*=half", "pattern 'fc.*' matches no layer"), ("half@2.*|*.bias", "two patterns")):
        with pytest.raises(ValueError, match=message):
            run(1, lambda ring, spec=spec: Aggregator(small_model(), ring, compressed(spec)))  # type: ignore[misc]


def test_seconds_by_both_clocks() -> None:
    """Messages of an hour each; what is computed takes no time at all."""
    cluster = Cluster("far", nodes=3, node=Node(overhead_us=1e6), link=Link(latency_us=3.6e9))

    def work(ring: Ring, spec: str) -> tuple[Any, Any]:
        virtual = VirtualRing(ring, cluster, processor_time=lambda: 0.0)
        timeline = Timeline(virtual=Timeline(virtual.clock))
        _, (report,), (mine,) = train(virtual, compressed(spec), 1, timeline=timeline)
        _, (other,), (theirs,) = train(ring, compressed(spec), 1)
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
        assert report.bytes_sent == other.bytes_sent
        return report, timeline

    # N - 1 steps to gather lengths that depend on the data, and N - 1 to gather payloads or 2(N - 1) to add them; with
    # a master always lengths, N - 1 for that of its message, and as many until the last rank has it
    for spec, steps in (("threshold:1.0", 4), ("sign", 2), ("half", 4), ("topk:0.1^half", 8)):
        results = run(3, lambda ring, spec=spec: work(ring, spec))  # type: ignore[misc]
        latest_s = max(sum(report.virtual_seconds.values()) for report, _ in results)
        assert latest_s == pytest.approx(3600 * steps, rel=0.01)
        for report, timeline in results:
            assert timeline.virtual is not None
            assert timeline.virtual.totals() == report.virtual_seconds
            assert report.seconds.keys() >= {"pack", "encode", "decode"}
            assert report.seconds.keys() <= {"pack", "encode", "decode", "add", "wait"}


MPI = """
    import numpy as np
    from ring.abort import end_together
    from ring.lockstep import run
    from ring.mpi import MPIRing
    from gradiveq import Aggregator
    from tests.support.aggregators import set_gradients, small_model, spoilt
    from tests.gradiveq.test_compressed_aggregator import BOTH_WAYS, SPECS, compressed
    import pickle

    end_together()

    def work(ring, spec):
        model = small_model()
        aggregator = Aggregator(model, ring, compressed(spec), seed=5, nonfinite="skip")
        gradients = spoilt(0, 2, {"0.weight": float("nan")})
        said, state = [], None
        for iteration in range(5):
            set_gradients(model, gradients, ring.rank, iteration)
            report = aggregator.aggregate(lr=0.5)
            bits = b"".join(p.grad.numpy().tobytes() for p in model.parameters())
            said.append((bits, report.bytes_sent, report.ratio, report.skipped, repr(report.measures)))
            if iteration == 3:  # go on as another one, that knows the state only
                state = pickle.dumps(aggregator.state_dict())
                aggregator = Aggregator(model, ring, compressed(spec), seed=5, nonfinite="skip")
                aggregator.load_state_dict(pickle.loads(state))
        return said

    def compare(ring, specs):
        for spec in specs:
            mine = work(ring, spec)
            expected = run(ring.size, lambda worker: work(worker, spec)) if ring.rank == 0 else None
            expected = ring.comm.scatter(expected)
            for iteration, (one, other) in enumerate(zip(mine, expected, strict=True)):
                assert one[:1] + one[2:] == other[:1] + other[2:], (spec, iteration, one[1:], other[1:])
                if ring.size != 2 or iteration != 2:  # a table of flaws is one message between two
                    assert one[1] == other[1] or ring.size == 2, (spec, iteration, one[1:], other[1:])
            sums = [0, 0]
            for place, said in enumerate((mine, expected)):
                sums[place] = ring.rows_of_all([sum(row[1] for row in said)]).sum()
            assert sums[0] == sums[1], (spec, sums)
        if ring.rank == 0:
            print("compared", len(specs), "on", ring.size)

    specs = [spec for spec in (*SPECS, *BOTH_WAYS) if spec.split("@")[0].split("+")[0] in MINE or "^" in spec]
    world = MPIRing(timeout_s=100)
    pair = world.comm.Split(world.rank < 2, world.rank)
    compare(world, specs)
    if world.rank < 2:
        compare(MPIRing(pair, timeout_s=30), specs)
    world.barrier()
"""


def test_over_mpi_the_bits_of_lockstep(mpirun: Launch) -> None:
    """On 3 ranks and on 2, in one launch."""
    names = ("topk", "threshold", "randomk", "half", "integer", "sign", "topk:0.1", "threshold:1.0", "threshold:9.0")
    done = mpirun(3, MPI.replace("MINE", repr(names)), timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr
    compared = [line.split() for line in done.stdout.splitlines()]
    assert [(words[0], words[3]) for words in compared] == [("compared", "3"), ("compared", "2")], done.stdout
    assert min(int(words[1]) for words in compared) >= 18, done.stdout
    assert done.stderr == ""


def test_memory_is_what_feedback_says() -> None:
    """The decoded payload and the memory add up to gradient and old memory, to the last bit with a sparsifier."""
    size = 2

    def work(ring: Ring) -> None:
        model = small_model()
        method = Compressed(TopK(0.1), feedback=ErrorFeedback())
        aggregator = Aggregator(model, ring, method)
        old = np.zeros(aggregator.layout.length, np.float32)
        for iteration in range(4):
            set_gradients(model, noise, ring.rank, iteration)
            corrected = packed(method, noise, ring.rank, iteration) + old
            aggregator.aggregate()
            kept, flat = aggregator.state_dict()["family"]["memory"], torch.zeros(aggregator.layout.length)
            for block in aggregator.layout.blocks:
                block.view(flat).copy_(kept[block.name])
            memory = flat.numpy()
            sent = np.where(memory == 0, corrected, 0)
            assert np.count_nonzero(sent) == np.count_nonzero(corrected) - np.count_nonzero(memory)
            assert (sent + memory).tobytes() == corrected.tobytes()
            old = memory

    run(size, work)
