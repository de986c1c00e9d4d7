"""One worker's side of an exchange: parts, error feedback against the papers' loops, what is kept and when."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from torch import nn

from gradiveq.compressors import COMPRESSORS, Compressor, Constants, Draw
from gradiveq.compressors.half import Half
from gradiveq.compressors.identity import Identity
from gradiveq.compressors.randomk import RandomK
from gradiveq.compressors.sign import Sign
from gradiveq.compressors.threshold import Threshold
from gradiveq.compressors.topk import TopK
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.exchange.family import check_shapes
from gradiveq.exchange.message import LENGTH_BYTES, pack, unpack
from gradiveq.exchange.parts import Part, check_parts, group_parts, layer_parts, model_parts
from gradiveq.flatten import Layout
from tests.support.states import contents
from tests.support.workers_here import WorkersHere

Vector = npt.NDArray[np.float32]
LENGTH, WORKERS, STEPS = 40, 3, 12


@dataclass(frozen=True)
class Coarse(Compressor):
    """Elements of a magnitude of a half or more, rounded to whole numbers; int8, as many bytes as elements."""

    name = "coarse"
    collective = "all_gather"
    biased = True
    fixed_size = True

    def compress(self, values: Vector, draw: Draw, latest: Vector | None = None) -> Any:
        return np.rint(np.where(np.abs(values) < 0.5, 0, values)).astype(np.int8).view(np.uint8)

    def decompress(self, payload: Any, out: Vector, draw: Draw, size: int = 1) -> None:
        out[:] = payload.copy().view(np.int8)

    def payload_bytes(self, length: int) -> int:
        return length

    def constants(self, length: int) -> Constants:
        return Constants()


def coarse(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.where(np.abs(values) < 0.5, 0, np.rint(values))


def gradients(step: int, length: int = LENGTH) -> list[Vector]:
    return [np.random.default_rng([step, rank]).normal(0, 3, length).astype(np.float32) for rank in range(WORKERS)]


def workers(
    compressor: Compressor, feedback: ErrorFeedback | None, length: int = LENGTH, **options: Any
) -> WorkersHere:
    third = length // 3
    parts = [Part("first", 0, third, compressor), Part("second", third, length, compressor)]
    return WorkersHere(parts, WORKERS, feedback=feedback, **options)


def trained(group: WorkersHere, lr: Callable[[int], float]) -> tuple[Vector, list[Vector]]:
    """x after plain SGD on what the workers agree on, and their memories."""
    x, mean = np.zeros(LENGTH, np.float32), np.empty(LENGTH, np.float32)
    for step in range(STEPS):
        group.aggregate(gradients(step), mean, step, lr(step))
        x -= np.float32(lr(step)) * mean
    return x, [group.memory(rank) for rank in range(WORKERS)]


def falling(step: int) -> float:
    return 0.1 if step < 5 else 0.01


# --- error feedback: the loops as the papers print them, in float64 --------------------------------------------------


def test_scaled_is_algorithm_1() -> None:
    x = np.zeros(LENGTH)
    e = [np.zeros(LENGTH) for _ in range(WORKERS)]
    for t in range(STEPS):
        lr, delta = falling(t), []
        for i, g in enumerate(gradients(t)):
            p = e[i] + lr * g.astype(np.float64)
            delta.append(lr * coarse(p / lr))
            e[i] = p - delta[i]
        x = x - np.mean(delta, axis=0)
    mine, memories = trained(workers(Coarse(), ErrorFeedback("scaled")), falling)
    np.testing.assert_allclose(mine, x, atol=1e-5)
    for memory, error in zip(memories, e, strict=True):
        np.testing.assert_allclose(memory, error, atol=1e-5)
        assert np.abs(error).max() > 1e-3


def test_gradient_is_algorithm_2() -> None:
    """With Nesterov's momentum in the optimiser, as it is there."""
    x, momentum, m = np.zeros(LENGTH), 0.9, np.zeros(LENGTH)
    e = [np.zeros(LENGTH) for _ in range(WORKERS)]
    mine, mean, own = np.zeros(LENGTH), np.empty(LENGTH, np.float32), np.zeros(LENGTH)
    group = workers(Coarse(), ErrorFeedback("gradient"))
    for t in range(STEPS):
        delta = []
        for i, g in enumerate(gradients(t)):
            corrected = g.astype(np.float64) + e[i]
            delta.append(coarse(corrected))
            e[i] = corrected - delta[i]
        aggregated = np.mean(delta, axis=0)
        m = momentum * m + aggregated
        x = x - falling(t) * (aggregated + m)

        group.aggregate(gradients(t), mean, t, falling(t))
        own = momentum * own + mean
        mine -= falling(t) * (mean + own)
    np.testing.assert_allclose(mine, x, atol=1e-5)
    for rank, error in enumerate(e):
        np.testing.assert_allclose(group.memory(rank), error, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_update_is_algorithm_3(momentum: float) -> None:
    x = np.zeros(LENGTH)
    e = [np.zeros(LENGTH) for _ in range(WORKERS)]
    m = [np.zeros(LENGTH) for _ in range(WORKERS)]
    for t in range(STEPS):
        delta = []
        for w, g in enumerate(gradients(t)):
            m[w] = momentum * m[w] + g
            u = m[w] + g if momentum else g.astype(np.float64)  # without momentum u = g, not twice that
            corrected = u + e[w]
            delta.append(coarse(corrected))
            e[w] = corrected - delta[w]
        x = x - falling(t) * np.mean(delta, axis=0)
    mine, memories = trained(workers(Coarse(), ErrorFeedback("update", momentum)), falling)
    np.testing.assert_allclose(mine, x, atol=1e-4)
    for memory, error in zip(memories, e, strict=True):
        np.testing.assert_allclose(memory, error, atol=1e-4)


def test_scaled_and_gradient_are_the_same_at_a_constant_rate() -> None:
    """Here for any compressor (Remark 1 of Sahu et al. 2021): only a rate that changes tells their units apart."""
    one, memories = trained(workers(Coarse(), ErrorFeedback("scaled")), lambda step: 0.25)
    other, theirs = trained(workers(Coarse(), ErrorFeedback("gradient")), lambda step: 0.25)
    np.testing.assert_array_equal(one, other)
    for memory, error in zip(memories, theirs, strict=True):
        np.testing.assert_array_equal(memory, 0.25 * error)


def test_nothing_is_lost_but_what_memories_hold() -> None:
    """All that was sent and what is remembered add up to all gradients."""
    group = workers(TopK(0.1), ErrorFeedback())
    total, sent, mean = np.zeros(LENGTH), np.zeros(LENGTH), np.empty(LENGTH, np.float32)
    for step in range(STEPS):
        group.aggregate(gradients(step), mean, step)
        total, sent = total + sum(gradients(step)), sent + WORKERS * mean.astype(np.float64)
    remembered = sum(group.memory(rank).astype(np.float64) for rank in range(WORKERS))
    np.testing.assert_allclose(sent + remembered, total, atol=1e-4)


def test_measures() -> None:
    group = workers(TopK(0.1), ErrorFeedback("scaled"))
    mean, total = np.empty(LENGTH, np.float32), 0.0
    for step in range(4):
        memory = group.memory(1)
        corrected = gradients(step)[1] + memory / np.float32(0.5)
        group.aggregate(gradients(step), mean, step, lr=0.5)
        memory, measures = group.memory(1), group.measures[1]
        assert measures is not None
        error = float(np.square(memory.astype(float)).sum())
        total += error
        assert measures.norm == pytest.approx(float(np.square(corrected.astype(float)).sum()))
        assert measures.error == pytest.approx(error)
        assert measures.compression_error == pytest.approx(error / 0.25)
        assert measures.relative_error == pytest.approx(error / 0.25 / measures.norm)
        assert measures.total_error == pytest.approx(total)
        assert (measures.num_sent, measures.density) == (1 + 3, 0.1)
        assert measures.payload_bytes == len(group.message(1, gradients(step)[1], step, 0.5))


# --- what counts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [ErrorFeedback("scaled"), ErrorFeedback(), ErrorFeedback("update", 0.9)])
def test_what_is_not_accepted_leaves_no_trace(feedback: ErrorFeedback) -> None:
    one, other = workers(TopK(0.2), feedback), workers(TopK(0.2), feedback)
    means = [np.empty(LENGTH, np.float32) for _ in range(2)]
    for step in range(5):
        for rank, family in enumerate(one.families):
            before = contents(family.state_dict())
            one.begun(rank, gradients(100 + step)[0], 7, 0.3)
            assert contents(family.state_dict()) == before
            family.skip()
            assert contents(family.state_dict()) == before
        for group, mean in zip((one, other), means, strict=True):
            group.aggregate(gradients(step), mean, step, falling(step))
        assert means[0].tobytes() == means[1].tobytes()
    assert contents(one.state_dict()) == contents(other.state_dict())


@pytest.mark.parametrize("feedback", [None, ErrorFeedback("scaled"), ErrorFeedback("update", 0.9)])
def test_a_state_goes_on_bitwise(feedback: ErrorFeedback | None) -> None:
    group, resumed = workers(RandomK(0.2), feedback, seed=3), workers(RandomK(0.2), feedback, seed=3)
    means = [np.empty(LENGTH, np.float32) for _ in range(2)]
    for step in range(6):
        group.aggregate(gradients(step), means[0], step, falling(step))
        if step >= 3:
            resumed.aggregate(gradients(step), means[1], step, falling(step))
            assert means[0].tobytes() == means[1].tobytes()
        if step == 2:
            resumed.load_state_dict(pickle.loads(pickle.dumps(group.state_dict())))
    assert contents(group.state_dict()) == contents(resumed.state_dict())


def test_states_of_something_else() -> None:
    def family(feedback: ErrorFeedback | None, length: int = LENGTH) -> Any:
        return workers(TopK(), feedback, length).families[0]

    state = family(ErrorFeedback("update", 0.9)).state_dict()
    with pytest.raises(ValueError, match="the state's memory is of another"):
        family(None).load_state_dict(state)
    with pytest.raises(ValueError, match="the state's memory is of another"):
        family(ErrorFeedback()).load_state_dict(family(None).state_dict())
    with pytest.raises(ValueError, match="the state's momentum is of another"):
        family(ErrorFeedback()).load_state_dict(state)
    longer = workers(TopK(), ErrorFeedback(), LENGTH + 1)
    longer.aggregate(gradients(0, LENGTH + 1), np.empty(LENGTH + 1, np.float32), 0)
    with pytest.raises(ValueError, match=r"memory of vector must be of shape \(40\), got \(41,\)"):
        check_shapes(longer.families[0].state_dict(), {"vector": (LENGTH,)})


def test_gradient_and_memory_that_overflow_together() -> None:
    group = workers(TopK(0.01), ErrorFeedback())
    mean = np.empty(LENGTH, np.float32)
    group.aggregate([np.full(LENGTH, 2e38 if rank == 1 else 5e37, np.float32) for rank in range(WORKERS)], mean, 0)
    huge = [np.full(LENGTH, 3e38 if rank == 1 else 1e38, np.float32) for rank in range(WORKERS)]
    before = contents(group.state_dict())
    with pytest.raises(OverflowError, match="gradient and memory of rank 1 together overflow float32 in iteration 1"):
        group.aggregate(huge, mean, 1)
    assert contents(group.state_dict()) == before
    assert group.measures[1] is not None
    assert math.isfinite(group.measures[1].norm)  # of squares that float32 can't hold


@pytest.mark.parametrize("lr", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_that_is_none(lr: float) -> None:
    with pytest.raises(ValueError, match="`lr` must be positive for error feedback of the form 'scaled'"):
        workers(TopK(), ErrorFeedback("scaled")).begun(0, gradients(0)[0], 0, lr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("both",), "`form` must be one of scaled, gradient, update, got 'both'"),
        (("update", 1.0), r"`momentum` must be at least 0 and below 1, got 1\.0"),
        (("gradient", 0.9), "`momentum` belongs to form 'update'; with 'gradient' it is the optimiser's"),
    ],
)
def test_invalid_feedback(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ErrorFeedback(*arguments)


# --- both ways -------------------------------------------------------------------------------------------------------


def through(q_w: Compressor, q_m: Compressor | None, step: int = 0, seed: int = 0) -> tuple[Vector, int]:
    """What the workers get, and the bytes that a master sends back."""
    group = workers(q_w, None, seed=seed, master=q_m)
    mean = np.empty(LENGTH, np.float32)
    group.aggregate(gradients(step), mean, step)
    return mean, 0 if q_m is None else len(masters_message(group, gradients(step), step))


def masters_message(group: WorkersHere, given: list[Vector], step: int) -> Any:
    """What the master makes of everybody's first round."""
    begun = [group.begun(rank, gradient, step) for rank, gradient in enumerate(given)]
    payloads = zip(*(asked.requests[0].payloads for _, asked, _ in begun), strict=True)
    sums = [np.sum(of_all, axis=0, dtype=of_all[0].dtype) for of_all in payloads]
    (spread,) = begun[0][0].send([sums, [asked.requests[1].message for _, asked, _ in begun]]).requests
    for family in group.families:
        family.skip()
    return spread.make()


@pytest.mark.parametrize("q_w", [TopK(0.3), Threshold(2.0), Sign("mean"), Half(), RandomK(0.3), Coarse()])
def test_the_identity_as_master_changes_nothing(q_w: Compressor) -> None:
    for step in range(3):
        one, _ = through(q_w, None, step)
        other, num_bytes = through(q_w, Identity(), step)
        assert one.tobytes() == other.tobytes()
        assert num_bytes == 4 * LENGTH


def test_a_master_compresses_the_mean() -> None:
    """Algorithm 1 of Dutta et al. 2020, layer by layer, in NumPy."""
    kept = [np.where(np.abs(g) >= 2, g, 0) for g in gradients(0)]
    mean = np.mean(kept, axis=0, dtype=np.float64)
    expected = np.concatenate([coarse(mean[: LENGTH // 3]), coarse(mean[LENGTH // 3 :])])
    result, num_bytes = through(Threshold(2.0), Coarse())
    np.testing.assert_array_equal(result, expected)
    assert num_bytes == LENGTH
    assert result.any()


def test_a_master_draws_other_numbers_than_its_worker() -> None:
    """Random k twice with the same indices would be random k once."""
    once, _ = through(RandomK(0.5), None)
    twice, _ = through(RandomK(0.5), RandomK(0.5))
    assert 0 < np.count_nonzero(twice) < np.count_nonzero(once)


@pytest.mark.parametrize("q_m", [Threshold(1.0), TopK(0.2), Half("bfloat16"), RandomK(0.5)])
def test_everybody_makes_the_same_of_a_masters_message(q_m: Compressor) -> None:
    parts = [Part("first", 0, 7, Identity()), Part("none", 7, 7, Identity()), Part("rest", 7, LENGTH, Identity())]
    group = WorkersHere(parts, 2, seed=4, master=q_m)
    given = gradients(0)[:2]
    message = masters_message(group, given, 5)
    outs = []
    for rank in range(2):
        exchange, asked, call = group.begun(rank, given[rank], 5)
        payloads = zip(
            *(group.begun(other, given[other], 5)[1].requests[0].payloads for other in range(2)), strict=True
        )
        sums = [a + b for a, b in payloads]
        exchange.send([sums, []])
        with pytest.raises(StopIteration):
            exchange.send([message])
        outs.append(call.out)
    assert outs[0].tobytes() == outs[1].tobytes()
    assert np.isfinite(outs[0]).all()
    for wrong in (message[:-1], np.append(message, np.uint8(0))):
        exchange, asked, call = group.begun(1, given[1], 5)
        exchange.send([list(asked.requests[0].payloads), []])
        with pytest.raises(ValueError, match="rank 0 sent"):
            exchange.send([wrong])


# --- parts -----------------------------------------------------------------------------------------------------------


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Linear(4, 2))


def test_layers_and_the_model() -> None:
    layout = Layout(model())
    parts = layer_parts(layout.blocks, TopK(), [("*.bias", Identity()), ("3.weight", Half())])
    assert [(part.name, part.start, part.stop) for part in parts] == [
        (block.name, block.start, block.stop) for block in layout.blocks
    ]
    assert {part.name: part.compressor for part in parts} == {
        "0.weight": TopK(),
        "2.weight": TopK(),
        "0.bias": Identity(),
        "1.weight": TopK(),
        "1.bias": Identity(),
        "2.bias": Identity(),
        "3.weight": Half(),
        "3.bias": Identity(),
    }
    assert model_parts(layout.blocks, TopK()) == [Part("model", 0, layout.length, TopK())]
    assert model_parts([], TopK()) == [Part("model", 0, 0, TopK())]


def test_groups_stand_together_in_a_layout_of_theirs() -> None:
    groups = ("2.*", "[01].*")
    layout = Layout(model(), groups)
    names = [block.name for block in layout.blocks]
    assert names == ["2.weight", "2.bias", "0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    parts = group_parts(layout.blocks, TopK(), groups, [("2.*", Half()), ("3.bias", Identity())])
    assert [(part.name, part.length, part.compressor) for part in parts] == [
        ("2.*", 16, Half()),
        ("[01].*", 63, TopK()),
        ("3.weight", 8, TopK()),
        ("3.bias", 2, Identity()),
    ]
    check_parts(parts, layout.length)


@pytest.mark.parametrize(
    ("groups", "overrides", "message"),
    [
        (("0.*", "4.*"), (), r"pattern '4\.\*' matches no layer; the 8 layers are 0\.weight, 2\.weight, .*, …"),
        (("0.*", "*.bias"), (), r"layer 0\.bias is matched by two patterns, '0\.\*' and '\*\.bias'"),
        (("0.*",), (), r"group '0\.\*' must be of layers that stand together .* 2\.weight is between them and 0\.bias"),
        ((), (("fc.*", Identity()),), r"pattern 'fc\.\*' matches no layer"),
        ((), (("0.*", Identity()), ("*.bias", Half())), r"layer 0\.bias is matched by two patterns"),
    ],
)
def test_patterns_that_do_not_fit(groups: tuple[str, ...], overrides: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_parts(Layout(model()).blocks, TopK(), groups, overrides)


def test_parts_must_cover_the_vector() -> None:
    one = Part("a", 0, 5, TopK())
    for parts, message in (
        ([one._replace(start=1)], "part a must begin at element 0"),
        ([one, one], "part a must begin at element 5"),
        ([one], "the parts must cover 6 elements, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            check_parts(parts, 6)


def test_payloads_that_can_not_be() -> None:
    group = workers(Threshold(1.0), None)
    sent = [group.message(rank, gradient, 0) for rank, gradient in enumerate(gradients(0))]
    for wrong, message in (
        (sent[1][:-1], "rank 1 sent .* bytes, which end within second"),
        (np.append(sent[1], np.uint8(0)), "rank 1 sent .* bytes, 1 more than its parts have"),
        (np.append(np.array([10**6], np.uint32).view(np.uint8), sent[1]), "rank 1 sent 1000000 bytes for first"),
    ):
        exchange, _, _ = group.begun(0, gradients(0)[0], 0)
        with pytest.raises(ValueError, match=message):
            exchange.send([[], [sent[0], wrong, sent[2]]])


@pytest.mark.parametrize("names", [("topk",), ("adacomp", "natural"), ("sign", "threshold", "qsgd-gather"), ()])
def test_messages(names: tuple[str, ...]) -> None:
    generator = np.random.default_rng(2)
    parts = [Part(name, 0, 100 + 7 * i, COMPRESSORS[name]()) for i, name in enumerate(names)]
    payloads = [
        part.compressor.compress(generator.standard_normal(part.length).astype(np.float32), Draw(0, 0, 0, 0))
        for part in parts
    ]
    message = pack(payloads, parts)
    varying = sum(not part.compressor.fixed_size for part in parts)
    assert len(message) == sum(len(payload) for payload in payloads) + LENGTH_BYTES * varying
    for payload, one in zip(payloads, unpack(message, parts, 0), strict=True):
        np.testing.assert_array_equal(one, payload)
    with pytest.raises(ValueError, match=r"rank 3 sent .* 1 more than its parts have"):
        list(unpack(np.append(message, np.uint8(0)), parts, 3))
    if names:
        with pytest.raises(ValueError, match=f"rank 3 sent .* end within {names[-1]}"):
            list(unpack(message[:-1], parts, 3))
