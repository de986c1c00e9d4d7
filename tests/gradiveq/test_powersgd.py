"""PowerSGD against plain-NumPy restatements of its paper's algorithms and of PyTorch's hook."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradiveq.arrays.orthonormal import orthonormalise
from gradiveq.compressors.base import Draw
from gradiveq.exchange.family import check_shapes
from gradiveq.exchange.kernels import HOST
from gradiveq.exchange.lowrank import LowRank
from gradiveq.exchange.requests import Call, Iteration
from gradiveq.flatten import Block, Bucket, matrix_shape
from gradiveq.here import Here
from gradiveq.powersgd import PowerSGD

Vector = npt.NDArray[np.float32]
#: name, shape, whether it is a convolution in the order of `flatten`
LAYERS = [
    ("conv1", (8, 3, 3, 3), True),
    ("conv2", (12, 8, 3, 3), True),
    ("conv1d", (6, 5, 7), True),
    ("bias", (12,), False),
    ("fc", (10, 24), False),
    ("scalar", (), False),
    ("empty", (0, 4), False),
    ("grouped", (8, 1, 3, 3), False),
    ("column", (7, 1), False),
]


def blocks_of(layers: list[tuple[str, tuple[int, ...], bool]]) -> list[Block]:
    blocks, offset = [], 0
    for name, shape, compressed in layers:
        blocks.append(Block(name, offset, prod(shape), shape, compressed))
        offset += blocks[-1].length
    return blocks


BLOCKS = blocks_of(LAYERS)
LENGTH = BLOCKS[-1].stop


def workers_of(method: PowerSGD, size: int = 1, blocks: list[Block] = BLOCKS, seed: int = 0) -> Here:
    length = blocks[-1].stop if blocks else 0
    return Here(lambda rank: LowRank(method, seed=seed), Bucket(tuple(blocks), length), size)


def memory_of(workers: Here, rank: int = 0) -> Vector:
    """What a rank remembers, as a vector."""
    kept = workers.families[rank].state_dict()["memory"]
    flat = torch.zeros(workers.bucket.length)
    for block in workers.bucket.blocks:
        block.view(flat).copy_(kept[block.name])
    return flat.numpy()


def alone(workers: Here, gradient: Vector, out: Vector, call: int) -> None:
    workers.aggregate([gradient], out, call)


def noise(rank: int, call: int, length: int = LENGTH, decay: bool = False) -> Vector:
    values = np.random.default_rng([rank, call]).standard_normal(length).astype(np.float32)
    return values * np.linspace(1, 2, length, dtype=np.float32)


def storage_matrix(block: Block, vector: Any) -> Any:
    """(outputs, inputs), its columns in the order of the vector: (h, w, depth) of a convolution."""
    part = vector[block.start : block.stop]
    rows, columns = matrix_shape(block.shape)
    return part.reshape(columns, rows).T if block.compressed else part.reshape(rows, columns)


def write(block: Block, vector: Any, matrix: Any) -> None:
    vector[block.start : block.stop] = (matrix.T if block.compressed else matrix).reshape(-1)


class Restated:
    """Algorithms 1 and 2 of Vogels et al. 2019 in float64; matrices as PyTorch has them, QR from LAPACK."""

    def __init__(self, method: PowerSGD, workers: int, memory: str = "own", seed: int = 0) -> None:
        self.method, self.memory, self.seed = method, memory, seed
        self.errors = [np.zeros(LENGTH) for _ in range(workers)]
        self.q: dict[str, Any] = {}

    def aggregate(self, gradients: list[Vector], call: int) -> Any:
        deltas = [g.astype(np.float64) + e for g, e in zip(gradients, self.errors, strict=True)]
        out = np.mean(deltas, axis=0)
        errors = [np.zeros(LENGTH) for _ in deltas]
        for index, block in enumerate(BLOCKS):
            rank = self.method.rank_of(block.shape)
            if rank is None:
                continue
            _, columns = matrix_shape(block.shape)
            matrices = [storage_matrix(block, delta) for delta in deltas]
            q = self.q.get(block.name)
            if q is None or not self.method.warm_start:
                generator = Draw(self.seed, call, 0, index).generator(shared=True)
                q = generator.standard_normal((columns, rank), np.float32).astype(np.float64)
            p = np.mean([matrix @ q for matrix in matrices], axis=0)
            p = np.linalg.qr(p).Q
            own = [matrix.T @ p for matrix in matrices]
            self.q[block.name] = np.mean(own, axis=0)
            mean = p @ self.q[block.name].T
            write(block, out, mean)
            for error, matrix, one in zip(errors, matrices, own, strict=True):
                write(block, error, matrix - (p @ one.T if self.memory == "own" else mean))
        if self.method.error_feedback:
            self.errors = errors
        return out


def close(a: Any, b: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-30, float(np.abs(b).max(initial=0))))


@pytest.mark.parametrize(
    "method",
    [
        PowerSGD(2),
        PowerSGD(1),
        PowerSGD(4, warm_start=False),
        PowerSGD(3, error_feedback=False),
        PowerSGD(2, min_compression_rate=2),
        PowerSGD(3, min_compression_rate=0),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_algorithms_1_and_2_in_numpy(method: PowerSGD, size: int) -> None:
    workers = workers_of(method, size, seed=3)
    restated = Restated(method, size, seed=3)
    out = np.empty(LENGTH, np.float32)
    total = [0.0] * size
    for call in range(4):
        gradients = [noise(rank, call) for rank in range(size)]
        kept = [gradient.copy() for gradient in gradients]
        before = [error.copy() for error in restated.errors]
        workers.aggregate(gradients, out, call)
        close(out, restated.aggregate(gradients, call))
        assert all((a == b).all() for a, b in zip(gradients, kept, strict=True))
        for rank, measures in enumerate(workers.measures):
            assert measures is not None
            corrected = gradients[rank] + before[rank]
            assert measures.norm == pytest.approx(float(np.sum(corrected**2)), rel=1e-5)
            assert measures.density == 1
            assert measures.payload_bytes == sum(method.payload_bytes(block.shape) for block in BLOCKS)
            if not method.error_feedback:
                assert workers.families[rank].state_dict()["memory"] is None
                assert measures.error == measures.total_error == 0
                continue
            close(memory_of(workers, rank), restated.errors[rank])
            assert measures.error == measures.compression_error
            assert measures.error == pytest.approx(float(np.sum(restated.errors[rank] ** 2)), rel=1e-4)
            total[rank] += measures.error
            assert measures.total_error == pytest.approx(total[rank])


def test_the_authors_memory_gives_the_same_means() -> None:
    method = PowerSGD(2)
    ours, theirs = Restated(method, 3), Restated(method, 3, memory="mean")
    for call in range(6):
        gradients = [noise(rank, call) for rank in range(3)]
        close(ours.aggregate(gradients, call), theirs.aggregate(gradients, call), 1e-10)
    assert not np.allclose(ours.errors[0], theirs.errors[0])
    close(np.mean(ours.errors, axis=0), np.mean(theirs.errors, axis=0), 1e-10)


def test_what_pytorchs_hook_computes() -> None:
    """torch.distributed's powerSGD_hook, restated: Q orthogonalised, sums of P not divided, memory of the mean."""
    size, rank = 3, 2
    block = Block("conv", 0, 12 * 8 * 9, (12, 8, 3, 3), True)
    workers = workers_of(PowerSGD(rank), size, [block])
    q = Draw(0, 0, 0, 0).generator(shared=True).standard_normal((72, rank), np.float32).astype(np.float64)
    # their columns are (depth, h, w), ours (h, w, depth): the same Q with its rows in their order
    to_theirs = np.arange(72).reshape(3, 3, 8).transpose(2, 0, 1).reshape(-1)
    q = q[to_theirs]
    errors = [np.zeros((12, 72)) for _ in range(size)]
    out = np.empty(block.length, np.float32)
    for call in range(4):
        gradients = [noise(r, call, block.length) for r in range(size)]
        workers.aggregate(gradients, out, call)
        theirs = [g.reshape(3, 3, 8, 12).transpose(3, 2, 0, 1).reshape(12, 72) for g in gradients]
        inputs = [matrix + error for matrix, error in zip(theirs, errors, strict=True)]
        q = np.linalg.qr(q).Q
        p = np.linalg.qr(sum(matrix @ q for matrix in inputs)).Q
        q = sum(matrix.T @ p for matrix in inputs) / size
        mean = p @ q.T
        errors = [matrix - mean for matrix in inputs]
        close(out.reshape(3, 3, 8, 12).transpose(3, 2, 0, 1).reshape(12, 72), mean)


def test_full_rank_is_the_exact_mean() -> None:
    method = PowerSGD(1000, min_compression_rate=0)
    workers = workers_of(method, 4)
    out = np.empty(LENGTH, np.float32)
    for call in range(3):
        gradients = [noise(rank, call) for rank in range(4)]
        workers.aggregate(gradients, out, call)
        close(out, np.mean([g.astype(np.float64) for g in gradients], axis=0), 3e-6)


def test_a_layer_that_would_not_be_smaller_goes_uncompressed_and_exactly() -> None:
    method = PowerSGD(3)
    assert method.rank_of((12, 8, 3, 3)) == 3
    assert method.rank_of((12, 4)) is None  # 48 elements, 16*3 in P and Q
    assert method.rank_of((13, 4)) == 3  # 52 elements, 51 in P and Q
    assert [method.rank_of(shape) for shape in [(7,), (), (7, 1), (0, 4)]] == [None] * 4
    assert method.payload_bytes((13, 4)) == 4 * 51
    assert method.payload_bytes((12, 4)) == 4 * 48
    assert PowerSGD(3, min_compression_rate=2).rank_of((13, 4)) is None
    workers = workers_of(method, 3)
    gradients = [noise(rank, 0) for rank in range(3)]
    out = np.empty(LENGTH, np.float32)
    workers.aggregate(gradients, out, 0)
    mean = (gradients[0] + gradients[1] + gradients[2]) / np.float32(3)
    for block in BLOCKS:
        place = slice(block.start, block.stop)
        if method.rank_of(block.shape) is None:
            assert (out[place] == mean[place]).all()
            assert (memory_of(workers)[place] == 0).all()
        else:
            assert np.linalg.matrix_rank(storage_matrix(block, out).astype(np.float64), tol=1e-4) <= 3


def test_a_warm_start_finds_the_best_approximation() -> None:
    """On the same matrix the power iteration converges to the truncated singular value decomposition."""
    generator = np.random.default_rng(0)
    u, v = np.linalg.qr(generator.standard_normal((30, 30))).Q, np.linalg.qr(generator.standard_normal((50, 50))).Q
    gradient = ((u * 0.5 ** np.arange(30)) @ v[:30]).astype(np.float32).reshape(-1)
    best = 1 - sum(0.25 ** np.arange(3)) / sum(0.25 ** np.arange(30))
    blocks = [Block("fc", 0, 1500, (30, 50), False)]
    errors = {}
    for warm in (True, False):
        worker = workers_of(PowerSGD(3, error_feedback=False, warm_start=warm), 1, blocks)
        out = np.empty(1500, np.float32)
        for call in range(20):
            alone(worker, gradient, out, call)
        assert worker.measures[0] is not None
        errors[warm] = worker.measures[0].relative_error
    assert errors[True] == pytest.approx(best, rel=1e-3)
    assert errors[False] > 1.05 * best


def test_error_feedback_loses_nothing() -> None:
    """What was sent so far, and the mean of the memories, are the sum of the gradients."""
    workers = workers_of(PowerSGD(1), 2)
    out, sent, given = np.empty(LENGTH, np.float32), np.zeros(LENGTH), np.zeros(LENGTH)
    for call in range(10):
        gradients = [noise(rank, call) for rank in range(2)]
        workers.aggregate(gradients, out, call)
        sent += out
        given += np.mean(gradients, axis=0, dtype=np.float64)
    left = np.mean([memory_of(workers, rank) for rank in range(2)], axis=0, dtype=np.float64)
    close(sent + left, given, 1e-5)


def test_delta_without_a_warm_start() -> None:
    """E‖x - C(x)‖² <= (1 - r/s)‖x‖², attained by equal singular values: one-sided tests at 1e-6 each."""
    generator, calls = np.random.default_rng(1), 400
    method = PowerSGD(3, error_feedback=False, warm_start=False)
    shape = (12, 20)
    constants = method.constants(shape)
    assert constants.delta == pytest.approx(3 / 12)
    assert PowerSGD(3).constants(shape).delta is None
    q = np.linalg.qr(generator.standard_normal((20, 20))).Q
    for matrix, tight in [
        (q[:12], True),
        (generator.standard_normal(shape), False),
        (np.diag([9, 3, 3, 1, 1] + [0.1] * 7) @ q[:12], False),
    ]:
        gradient = matrix.astype(np.float32).reshape(-1)
        worker = workers_of(method, 1, [Block("fc", 0, 240, shape, False)], seed=5)
        errors, out = [], np.empty(240, np.float32)
        for call in range(calls):
            alone(worker, gradient, out, call)
            assert worker.measures[0] is not None
            errors.append(worker.measures[0].relative_error)
        deviation = max(float(np.std(errors)) / np.sqrt(calls), 1e-6)
        bound = 1 - constants.delta
        assert np.mean(errors) < bound + stats.norm.isf(1e-6) * deviation
        if tight:
            assert np.mean(errors) > bound - stats.norm.isf(1e-6) * deviation


def projected(call: int) -> tuple[Here, Vector, Vector]:
    worker = workers_of(PowerSGD(2))
    out = np.empty(LENGTH, np.float32)
    alone(worker, noise(0, call), out, call)
    return worker, noise(0, call), out


def test_a_projection() -> None:
    worker, gradient, out = projected(0)
    memory = memory_of(worker)
    close(gradient.astype(np.float64) - out, memory, 1e-5)
    norms = [float(np.sum(np.square(one, dtype=np.float64))) for one in (out, memory, gradient)]
    assert norms[0] + norms[1] == pytest.approx(norms[2], rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-38, 1e-20, 1.0, 1e18, 3e35])
def test_tiny_and_huge_gradients(scale: float) -> None:
    with np.errstate(over="ignore"):  # ‖x‖² in the measures
        worker = workers_of(PowerSGD(2, error_feedback=False))
        gradient = np.float32(scale) * noise(0, 0)
        out = np.empty(LENGTH, np.float32)
        for call in range(3):
            alone(worker, gradient, out, call)
        assert np.isfinite(out).all()
        worker = workers_of(PowerSGD(2, error_feedback=False))
        expected = np.empty(LENGTH, np.float32)
        for call in range(3):
            alone(worker, noise(0, 0), expected, call)
    # a denormal has few bits
    np.testing.assert_allclose(out, np.float64(scale) * expected, rtol=0, atol=scale * (1e-4 if scale > 1e-37 else 0.2))


def test_a_direction_that_was_lost_is_found_again() -> None:
    worker = workers_of(PowerSGD(2, error_feedback=False))
    out = np.empty(LENGTH, np.float32)
    for call in range(2):
        alone(worker, np.zeros(LENGTH, np.float32), out, call)
        assert (out == 0).all()
    for call in range(2, 40):
        alone(worker, noise(0, 0), out, call)
    assert worker.measures[0] is not None
    block = next(block for block in BLOCKS if block.name == "conv2")
    matrix, estimate = storage_matrix(block, noise(0, 0)), storage_matrix(block, out)
    singular = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    assert float(np.sum((matrix - estimate) ** 2)) < 1.02 * float(np.sum(singular[2:] ** 2))


@pytest.mark.parametrize("where", ["bias", "conv2"])
def test_overflow_is_found_on_all_and_changes_nothing(where: str) -> None:
    workers = workers_of(PowerSGD(2), 2)
    out = np.empty(LENGTH, np.float32)
    workers.aggregate([noise(rank, 0) for rank in range(2)], out, 0)
    before = [(memory_of(workers, rank), workers.families[rank].state_dict()) for rank in range(2)]
    block = next(block for block in BLOCKS if block.name == where)
    gradients = [noise(rank, 1) for rank in range(2)]
    for gradient in gradients:
        gradient[block.start : block.stop] = 3e38
    with pytest.raises(OverflowError, match="overflows float32 in iteration 1"):
        workers.aggregate(gradients, out, 1)
    assert not np.isfinite(out[block.start : block.stop]).any()
    assert np.isfinite(np.delete(out, slice(block.start, block.stop))).all()
    for rank, (memory, state) in enumerate(before):
        now = workers.families[rank].state_dict()
        assert now["total_error"] == state["total_error"]
        assert (memory_of(workers, rank) == memory).all()
        assert all((now["q"][name] == q).all() for name, q in state["q"].items())


def test_a_call_that_is_not_accepted_has_not_happened() -> None:
    called, other = workers_of(PowerSGD(2)), workers_of(PowerSGD(2))
    out, others = np.empty(LENGTH, np.float32), np.empty(LENGTH, np.float32)
    for worker in (called, other):
        alone(worker, noise(0, 0), out, 0)
    family = called.families[0]
    for seed, stop in ((7, None), (8, 1)):  # through to its end, and left in the midst
        call = Call(called.bucket, Iteration(1), HOST, 0, 1, out=out, measured=True)
        exchange, asked, rounds = family.exchange(call, noise(0, seed)), None, 0
        while rounds != stop:
            try:
                asked = next(exchange) if asked is None else exchange.send([list(asked.requests[0].payloads)])
            except StopIteration:
                break
            rounds += 1
        family.skip()
    for worker, result in ((called, out), (other, others)):
        alone(worker, noise(0, 1), result, 1)
    assert out.tobytes() == others.tobytes()


def test_state_dict_resumes_bitwise_with_ranks_that_change() -> None:
    def run(stop: int | None) -> tuple[Vector, list[Vector]]:
        workers = workers_of(PowerSGD(4), 2, seed=9)
        out = np.empty(LENGTH, np.float32)
        for call in range(8):
            if call == stop:
                state, workers = workers.state_dict(), workers_of(PowerSGD(4), 2, seed=9)
                workers.load_state_dict(state)
            for family in workers.families:  # which states don't tell
                family.ranks = dict.fromkeys(workers.bucket.names, 1 if call in (2, 3, 4) else 4)
            workers.aggregate([noise(rank, call) for rank in range(2)], out, call)
        return out, [memory_of(workers, rank) for rank in range(2)]

    whole, memories = run(None)
    for stop in (1, 3, 6):
        resumed, others = run(stop)
        assert resumed.tobytes() == whole.tobytes()
        assert all(a.tobytes() == b.tobytes() for a, b in zip(memories, others, strict=True))


def test_ranks_that_change() -> None:
    worker = workers_of(PowerSGD(4, error_feedback=False))
    out = np.empty(LENGTH, np.float32)
    block = next(block for block in BLOCKS if block.name == "conv2")
    for call, rank in enumerate([4, 1, 1, 3, 1000]):
        worker.families[0].ranks = dict.fromkeys(worker.bucket.names, rank)
        alone(worker, noise(0, 0), out, call)
        if rank == 1000:  # not smaller then
            assert (out == noise(0, 0)).all()
            assert worker.measures[0].payload_bytes == 4 * LENGTH
        else:
            assert np.linalg.matrix_rank(storage_matrix(block, out).astype(np.float64), tol=1e-3) == rank
            assert worker.families[0].state_dict()["q"]["conv2"].shape == (72, rank)
            assert worker.measures[0].payload_bytes == sum(
                PowerSGD(rank).payload_bytes(block.shape) for block in BLOCKS
            )


def test_states_of_others_are_refused() -> None:
    family = LowRank(PowerSGD(2))
    with pytest.raises(ValueError, match="another error feedback"):
        family.load_state_dict(LowRank(PowerSGD(2, error_feedback=False)).state_dict())
    with pytest.raises(ValueError, match="another error feedback"):
        LowRank(PowerSGD(2, error_feedback=False)).load_state_dict(family.state_dict())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"conv1": ("q", torch.zeros(8, 2))}, r"the state's Q of conv1 must be of shape \(27, any\), got \(8, 2\)"),
        ({"conv1": ("memory", torch.zeros(9))}, r"the state's memory of conv1 must be of shape \(8, 3, 3, 3\)"),
        ({"other": ("memory", torch.zeros(9))}, "the state's memory of other must be nothing here"),
    ],
)
def test_states_of_other_layers_are_refused(changed: dict[str, Any], said: str) -> None:
    worker = workers_of(PowerSGD(2))
    alone(worker, noise(0, 0), np.empty(LENGTH, np.float32), 0)
    state = worker.families[0].state_dict()
    ((name, (kind, value)),) = changed.items()
    state[kind][name] = value
    with pytest.raises(ValueError, match=said):
        check_shapes(state, {block.name: block.shape for block in BLOCKS})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": 0}, "`rank` must be a whole number of at least 1, got 0"),
        ({"rank": 1.5}, "`rank` must be a whole number"),
        ({"min_compression_rate": -1}, "`min_compression_rate` must be at least 0, got -1"),
        ({"min_compression_rate": float("nan")}, "`min_compression_rate` must be"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PowerSGD(**values)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 8),
    kind=st.sampled_from(["normal", "low", "zero", "equal", "near"]),
    scale=st.sampled_from([1e-44, 1e-30, 1.0, 1e30]),
    seed=st.integers(0, 1000),
)
def test_orthonormalise(rows: int, columns: int, kind: str, scale: float, seed: int) -> None:
    columns = min(rows, columns)
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((rows, columns))
    if kind == "low":
        matrix = np.outer(matrix[:, 0], np.arange(columns))
    elif kind == "zero":
        matrix[:] = 0
    elif kind == "equal":
        matrix[:] = 1
    elif kind == "near":
        matrix = matrix[:, :1] + 1e-7 * matrix
    values = np.ascontiguousarray(matrix * scale, np.float32)
    result = values.copy()
    orthonormalise(result)
    wide = result.astype(np.float64)
    np.testing.assert_allclose(wide.T @ wide, np.eye(columns), atol=1e-6)
    # the columns are still within the span
    source = values.astype(np.float64)
    left = source - wide @ (wide.T @ source)
    assert np.abs(left).max() <= 1e-6 * np.abs(source).max()
    again = values.copy()
    orthonormalise(again)
    assert again.tobytes() == result.tobytes()


def test_no_layers() -> None:
    worker = workers_of(PowerSGD(), 1, [])
    alone(worker, np.empty(0, np.float32), np.empty(0, np.float32), 0)
    assert worker.measures[0] is not None
    assert worker.measures[0].density == worker.measures[0].payload_bytes == 0
