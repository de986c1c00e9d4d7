"""Every family of methods, on more than one driver: what all of them have to keep to."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from gradiveq import Aggregator, GradiVeQ, Method, Plain, PowerSGD, parse
from gradiveq.exchange.families import make_family
from gradiveq.exchange.kernels import HOST
from gradiveq.exchange.requests import Call, Iteration
from gradiveq.flatten import Layout
from gradiveq.here import Here, carry
from gradiveq.methods import Compressed
from gradiveq.sizes import bases_handed, handed
from ring.handle import Ring
from ring.lockstep import run
from tests.support.aggregators import CONTROL_BYTES, Vector, collect, set_gradients, small_model, subspace
from tests.support.processes import environment
from tests.support.states import without_times

WINDOWS = {"warmup": 1, "sample": 4, "compress": 3, "n_components": 2, "fit_slices": "all"}
REMEMBERING = GradiVeQ(**WINDOWS, sampling=Plain(), holdout_every=2, error_feedback=True)  # type: ignore[arg-type]
METHODS: dict[str, Method] = {
    "plain": Plain(),
    "gradiveq": GradiVeQ(**WINDOWS, sampling=Plain(), holdout_every=2),  # type: ignore[arg-type]
    "gradiveq+ef": REMEMBERING,
    "powersgd": PowerSGD(2),
    "powersgd without feedback": PowerSGD(2, error_feedback=False),
    **{
        spec: parse(spec)
        for spec in (
            "topk:0.1+ef",
            "qsgd-gather+ef-update",
            "threshold:0.5+ef-scaled",
            "sign:vote",
            "sign:mean@model^sign",
            "randomk:0.2@0*|2*+ef^half",
            "accordion:interval=3:window=1:topk:0.3|topk:0.05+ef",
            "accordion:interval=3:window=1:powersgd:3|powersgd:1",
            "threshold:auto:0.05:warmup=20+ef",
        )
    },
}
EVERY_METHOD = pytest.mark.parametrize("method", list(METHODS.values()), ids=list(METHODS))
SIZE, ITERATIONS = 2, 24


class Group:
    """Workers here, whose gradients are those of a small model."""

    def __init__(self, method: Method) -> None:
        self.model = small_model()
        self.layout = Layout(self.model, method.groups if isinstance(method, Compressed) else ())
        blocks = self.layout.blocks
        self.here = Here(
            lambda rank: make_family(method, blocks, rank=rank, size=SIZE, seed=3), self.layout.bucket, SIZE
        )

    def packed(self, iteration: int) -> list[Vector]:
        """Gradients by rank."""
        vectors = [np.empty(self.layout.length, np.float32) for _ in range(SIZE)]
        for rank, vector in enumerate(vectors):
            set_gradients(self.model, subspace(2, 0.1), rank, iteration)
            self.layout.pack(vector)
        return vectors

    def aggregate(self, iteration: int) -> dict[str, Vector]:
        out = np.empty(self.layout.length, np.float32)
        self.here.aggregate(self.packed(iteration), out, iteration, rate(iteration))
        self.layout.unpack(out)
        return collect(self.model)

    def given_up(self, iteration: int) -> None:
        """An iteration that is exchanged to its end, and then doesn't count."""
        calls = [
            Call(self.layout.bucket, Iteration(iteration, rate(iteration)), HOST, rank, SIZE, measured=True)
            for rank in range(SIZE)
        ]
        for call in calls:
            call.out = np.empty(self.layout.length, np.float32)
        families = self.here.families
        given = zip(families, calls, self.packed(iteration + 1000), strict=True)
        carry([family.exchange(call, gradient) for family, call, gradient in given], calls)
        for family in families:
            family.skip()


def rate(iteration: int) -> float:
    return 0.1 if iteration < 7 else 0.05


@EVERY_METHOD
def test_in_one_process_it_is_what_a_ring_of_two_gives(method: Method) -> None:
    """To the last bit, as a sum of two doesn't depend on their order; but products with bases are made by others."""

    def work(ring: Ring) -> list[dict[str, Vector]]:
        model, results = small_model(), []
        aggregator = Aggregator(model, ring, method, seed=3)
        for iteration in range(ITERATIONS):
            set_gradients(model, subspace(2, 0.1), ring.rank, iteration)
            aggregator.aggregate(rate(iteration))
            results.append(collect(model))
        return results

    group = Group(method)
    found = [group.aggregate(iteration) for iteration in range(ITERATIONS)]
    for ranks in run(SIZE, work):
        for iteration, (one, other) in enumerate(zip(found, ranks, strict=True)):
            for name, value in one.items():
                if isinstance(method, GradiVeQ):
                    np.testing.assert_allclose(value, other[name], rtol=1e-4, atol=1e-4, err_msg=f"{iteration} {name}")
                else:
                    assert value.tobytes() == other[name].tobytes(), (iteration, name)


@EVERY_METHOD
def test_what_is_skipped_leaves_no_trace(method: Method) -> None:
    """In any iteration: neither in the state nor in what follows."""
    spoilt, whole = Group(method), Group(method)
    for iteration in range(ITERATIONS):
        before = without_times(spoilt.here.state_dict())
        spoilt.given_up(iteration)
        assert without_times(spoilt.here.state_dict()) == before, iteration
        one, other = spoilt.aggregate(iteration), whole.aggregate(iteration)
        assert all(value.tobytes() == other[name].tobytes() for name, value in one.items()), iteration


@EVERY_METHOD
def test_a_state_goes_on_bitwise(method: Method) -> None:
    whole = Group(method)
    states, means = [], []
    for iteration in range(ITERATIONS):
        states.append(pickle.dumps(whole.here.state_dict()))
        means.append(whole.aggregate(iteration))
    for stop in (2, 4, 7, 21):
        resumed = Group(method)
        resumed.here.load_state_dict(pickle.loads(states[stop]))
        for iteration in range(stop, ITERATIONS):
            found = resumed.aggregate(iteration)
            assert all(value.tobytes() == means[iteration][name].tobytes() for name, value in found.items()), iteration
        states_of_both = [without_times(one.here.state_dict()) for one in (resumed, whole)]
        assert states_of_both[0] == states_of_both[1]


def test_gradiveq_sends_what_it_remembers_when_it_samples() -> None:
    """Nothing is lost: what all means are short of the gradients' is what the memories hold, and a sample empties
    them."""
    group = Group(REMEMBERING)
    blocks, short = group.layout.blocks, np.zeros(group.layout.length)
    for iteration in range(ITERATIONS):
        phase = group.here.families[0].phase
        short += np.mean(group.packed(iteration), axis=0, dtype=np.float64)
        out = np.empty(group.layout.length, np.float32)
        group.here.aggregate(group.packed(iteration), out, iteration)
        short -= out
        memories = [family.state_dict()["memory"] for family in group.here.families]
        for block in blocks:
            held = np.mean([one[block.name].numpy() for one in memories], axis=0)
            np.testing.assert_allclose(held, block.view(torch.from_numpy(short)).numpy(), atol=1e-5)
        held_at_all = any(bool(one[block.name].any()) for one in memories for block in blocks)
        assert held_at_all == (phase == "compress"), (iteration, phase)


@pytest.mark.parametrize("spec", ["plain", "gradiveq", "powersgd", "powersgd without feedback"])
def test_sizes_are_what_a_ring_counts(spec: str) -> None:
    """Sizes leave out control values, which a report's ratio of an encoded vector has."""
    method = METHODS[spec]
    controls = 0 if isinstance(method, PowerSGD) else CONTROL_BYTES
    blocks = Layout(small_model()).blocks
    said = handed(method, blocks, SIZE)

    def work(ring: Ring) -> list[tuple[str, float, int]]:
        model, found = small_model(), []
        aggregator = Aggregator(model, ring, method)
        dense = 4 * aggregator.layout.length + controls
        for iteration in range(8):
            set_gradients(model, subspace(2, 0.1), ring.rank, iteration)
            report = aggregator.aggregate()
            found.append((report.phase, dense / report.ratio, report.fit_bytes))
        return found

    everybody = run(SIZE, work)
    for reports in everybody:
        compressed = [payload for phase, payload, _ in reports if phase not in ("warm-up", "sample")]
        assert compressed
        assert compressed == pytest.approx([said.all_reduce + controls] * len(compressed), rel=1e-6)
    if isinstance(method, GradiVeQ):
        dims = 8 * sum(block.compressed for block in blocks)  # d of each layer, in float64
        sent = sum(fit for reports in everybody for _, _, fit in reports) / SIZE
        assert sent == bases_handed(method, blocks, 4).sent(SIZE) + dims


@pytest.mark.slow
def test_only_the_rings_driver_imports_the_ring() -> None:
    """So that the hook loads without it."""
    program = """
import pkgutil, sys
import gradiveq, gradiveq.ddp, gradiveq.here, gradiveq.sizes, gradiveq.specs
for module in pkgutil.walk_packages(gradiveq.__path__, "gradiveq."):
    if not module.name.startswith("gradiveq.over_ring"):
        __import__(module.name)
print(sorted(name for name in sys.modules if name.split(".")[0] in ("ring", "mpi4py")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
