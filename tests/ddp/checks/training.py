"""What DDP can do besides: accumulation, unused and shared parameters, mixed precision, several models, resuming."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import gradiveq.ddp as ddp
from gradiveq import GradiVeQ, NonFiniteGradient, Plain
from gradiveq.compressors import COMPRESSORS
from gradiveq.compressors.identity import Identity
from gradiveq.compressors.topk import TopK
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.exchange.requests import Iteration
from gradiveq.methods import Compressed
from gradiveq.powersgd import PowerSGD
from tests.ddp.checks.methods import FULL_RANK, windows
from tests.support.ddp_harness import (
    Net,
    batch,
    check,
    close,
    gathered,
    gradients,
    hooked,
    plain,
    raises,
    rank,
    same_everywhere,
    sgd,
    size,
    staying,
    step,
    train,
    weights,
    wrap,
)
from tests.support.states import contents

REMEMBERING = Compressed(TopK(0.05), feedback=ErrorFeedback())
STATEFUL = {
    "topk": REMEMBERING,
    "qsgd": Compressed(COMPRESSORS["qsgd-gather"](), feedback=ErrorFeedback()),
    "powersgd": PowerSGD(2),
    "gradiveq": windows(sample=4, compress=3, holdout_every=2),
    "gradiveq-auto": windows(
        sample="auto", compress="auto", ratio=None, loss_threshold=0.4, max_sample=12, stop_multiple=1.05
    ),
    "gradiveq-remembering": windows(sample=4, compress=3, holdout_every=2, error_feedback=True),
}


@check
def hook_returns_before_communication_ends() -> None:
    """Rank 0's hooks of all buckets but the last return while no other rank has even begun."""
    store = dist.distributed_c10d._get_default_store()
    for index, method in enumerate(
        (Plain(), Identity(), REMEMBERING, TopK(0.1), PowerSGD(2), COMPRESSORS["adacomp"]())
    ):
        returned: list[bool] = []

        def slow(state, bucket, index=index, returned=returned):  # DDP would want the types themselves
            key = f"returned-{index}-{state.iteration}"
            held_up = state.iteration >= 3 and bucket.index() == 0  # the first compares the ranks
            if held_up and rank() != 0:
                store.wait([key])
            future = ddp.hook(state, bucket)
            if held_up and rank() == 0:
                returned.append(not future.done())
                store.set(key, "")
            return future

        model, _ = hooked(Net(), method, hook=slow)
        train(model, range(5))
        assert rank() != 0 or returned == [True, True], (method, returned)


@check
def memories_survive_new_buckets() -> None:
    """Loaded before DDP rebuilds its buckets: the elements stay with their parameters."""
    model, state = hooked(Net(), REMEMBERING)
    train(model, range(4))
    saved = state.state_dict()
    buckets: list[list[str]] = []
    for wrapping in ({}, {"bucket_cap_mb": 25}):
        net = Net()
        names = {id(p): name for name, p in net.named_parameters()}

        def recording(state, bucket, names=names):
            buckets.append([names[id(p)] for p in bucket.parameters()])
            return ddp.hook(state, bucket)

        other, loaded = hooked(net, REMEMBERING, hook=recording, wrapping=wrapping)
        loaded.load_state_dict(saved)
        assert contents(loaded.state_dict()) == contents(saved)
        for iteration in range(
            4
        ):  # of which each leaves it as it was, as its gradient is zero and what is sent is lost
            memory = loaded.state_dict()["family"]["memory"]
            other.zero_grad()
            (other(batch(iteration)[0]) * 0).sum().backward()
            mean = {name: p.grad for name, p in net.named_parameters()}
            after = loaded.state_dict()["family"]["memory"]
            for name, before in memory.items():
                kept = after[name]
                sent = before - kept
                assert torch.equal(kept[sent != 0], torch.zeros_like(kept[sent != 0]))
                total = torch.stack(gathered(sent)).sum(0) / size()
                close(mean[name], total, 1e-7)
                assert sent.any()
    assert len({tuple(bucket) for bucket in buckets}) > 3


@check
def gradient_accumulation() -> None:
    """Under `no_sync` nothing is exchanged, and what has piled up is compressed at once."""
    for method in (Plain(), FULL_RANK):
        results = []
        for hook in (False, True):
            net = Net()
            model, state = hooked(net, method) if hook else (wrap(net), None)
            optimizer = sgd(model)
            for iteration in range(9):
                optimizer.zero_grad()
                with model.no_sync():
                    for part in range(2):
                        x, y = batch(100 * iteration + part)
                        F.cross_entropy(model(x), y).backward()
                x, y = batch(100 * iteration + 2)
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            assert state is None or state.iteration == 9
            same_everywhere(weights(model), "the weights")
            results.append(weights(model))
        close(*results, 1e-5)


class Branches(nn.Module):
    """A layer that only some ranks use, one that nobody uses, a shared and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.odd = nn.Conv2d(8, 8, 3, padding=1)
        self.even = nn.Conv2d(8, 8, 3, padding=1)
        self.never = nn.Conv2d(8, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.shared
        self.frozen = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
        self.fc = nn.Linear(8 * 64, 10)

    def forward(self, x: Tensor, odd: bool) -> Tensor:
        y = torch.relu(self.first(x))
        y = torch.relu((self.odd if odd else self.even)(y))
        y = torch.relu(self.again(torch.relu(self.shared(self.frozen(y)))))
        out: Tensor = self.fc(y.flatten(1))
        return out


@check
def unused_shared_and_frozen_parameters() -> None:
    results = []
    for method in (None, Plain(), FULL_RANK, REMEMBERING, PowerSGD(2), COMPRESSORS["natural"]()):
        net = Branches()
        model, _ = (
            (wrap(net, find_unused_parameters=True), None)
            if method is None
            else hooked(net, method, wrapping={"find_unused_parameters": True})
        )
        optimizer = sgd(model)
        for iteration in range(8):
            x, y = batch(iteration)
            optimizer.zero_grad()
            F.cross_entropy(model(x, (rank() + iteration) % 2 == 1), y).backward()
            assert net.never.weight.grad is None
            assert net.frozen.weight.grad is None
            optimizer.step()
        same_everywhere(weights(model), "the weights")
        results.append(weights(model))
    close(results[1], results[0], 1e-5)
    close(results[2], results[0], 1e-4)


@check
def gradient_views_and_static_graphs() -> None:
    expected = plain(8)
    for wrapping in ({"gradient_as_bucket_view": True}, {"static_graph": True}):
        for method, tolerance in ((Plain(), 1e-6), (FULL_RANK, 1e-5)):
            model, _ = hooked(Net(), method, wrapping=wrapping)
            close(train(model, range(8)), expected, tolerance)
        for method in (REMEMBERING, PowerSGD(2)):
            results = []
            for options in ({}, wrapping):
                model, _ = hooked(Net(), method, wrapping=options)
                results.append(train(model, range(5)))
            close(*results, 1e-5)


@check
def autocast_in_bfloat16() -> None:
    """With `backward()` under it too: that is about the model's layers, and nothing to the hook."""
    by_torch = PowerSGD(2)
    for method, ways in (
        (Plain(), [True]),
        (REMEMBERING, [True]),
        (PowerSGD(3), [True]),
        (by_torch, [False, True]),
        (windows(sample=2, ratio=8, holdout_every=1), [False, True]),
    ):
        results, logs = [], []
        for inside in ways:
            model, state = hooked(Net(), method)
            optimizer = sgd(model)
            with staying(method is by_torch):
                for iteration in range(6):
                    x, y = batch(iteration)
                    optimizer.zero_grad()
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        loss = F.cross_entropy(model(x), y)
                        if inside:
                            loss.backward()
                    if not inside:
                        loss.backward()
                    optimizer.step()
                    same_everywhere(weights(model), f"the weights after iteration {iteration}")
            results.append(weights(model))
            logs.append([window["held_out"] for window in state.window_log])
        assert torch.equal(results[0], results[-1]), method
        assert logs[0] == logs[-1], method


@check
def the_default_type_does_not_matter() -> None:
    for method in (windows(sample=2, ratio=8, holdout_every=1), REMEMBERING, COMPRESSORS["adacomp"](), PowerSGD(2)):
        results = []
        for default in (torch.float32, torch.bfloat16, torch.float64):
            model, _ = hooked(Net(), method)
            optimizer = sgd(model)
            x, y = batch(0)
            torch.set_default_dtype(default)
            try:
                for _ in range(6):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
                results.append(weights(model))
            finally:
                torch.set_default_dtype(torch.float32)
        assert all(torch.equal(results[0], one) for one in results), method


class Spectrum(nn.Module):
    """A convolution, and complex weights behind a Fourier transform."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 8, 3)
        self.mix = nn.Parameter(0.1 * torch.randn(10, 8, dtype=torch.complex64).T)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (torch.fft.rfft2(torch.relu(self.conv(x))).mean((2, 3)) @ self.mix).abs()
        return out


@check
def complex_parameters() -> None:
    """They are pairs of real numbers in a bucket."""
    expected = train(wrap(Spectrum()), range(9))
    for method in (Plain(), Identity(), FULL_RANK, PowerSGD(999, error_feedback=False, min_compression_rate=0.0)):
        close(train(hooked(Spectrum(), method)[0], range(9)), expected, 1e-5)
    for name, method in STATEFUL.items():
        net = Spectrum()
        model, state = hooked(net, method)
        train(model, range(6))
        if name in ("topk", "qsgd"):
            assert state.state_dict()["family"]["memory"]["mix"].shape == (8, 10, 2)
        if rank() == 0:
            net.mix.register_hook(lambda grad: torch.full_like(grad, torch.nan))
        with raises(RuntimeError, "mix has a non-finite gradient on rank 0"):
            step(model, sgd(model), 6)


@check
def scaler_skips_on_all_ranks_alike() -> None:
    """An overflow on one rank: no rank steps, all scales fall, and the step leaves no trace in memories and windows.

    As the scale is taken out again before anything is remembered, the run equals one without the overflow and with
    another scale.
    """
    for method in (REMEMBERING, windows(sample=3, compress=3), PowerSGD(2), Plain(), COMPRESSORS["sign"]("scaled")):
        finals = []
        for overflow in (True, False):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
            model, state = hooked(Net(), method, nonfinite="propagate", loss_scale=scaler.get_scale)
            optimizer = sgd(model)
            for iteration in range(8):
                for attempt in range(2 if overflow and iteration in (3, 6) else 1):
                    x, y = batch(iteration)
                    before = weights(model)
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(x), y)
                    bad = overflow and iteration in (3, 6) and attempt == 0
                    if bad and rank() == size() - 1:
                        loss = loss * torch.inf
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    assert torch.equal(weights(model), before) == bad
                    same_everywhere(weights(model), "the weights")
            assert scaler.get_scale() == 2.0 ** (10 - (2 if overflow else 0))
            finals.append(weights(model))
            assert state.iteration == (10 if overflow else 8)
        if not isinstance(method, Compressed) or method is REMEMBERING:
            assert torch.equal(*finals), method


@check
def several_models_and_groups() -> None:
    """Two models in turn on all ranks, and one on the even ranks only."""
    evens = dist.new_group(list(range(0, size(), 2)))
    try:
        pairs = [hooked(Net(), REMEMBERING), hooked(Net(), windows())]
        optimizers = [sgd(model) for model, _ in pairs]
        if rank() % 2 == 0:
            part, _ = hooked(Net(), PowerSGD(2), wrapping={"process_group": evens})
            optimizer = sgd(part)
        for iteration in range(8):
            losses = []
            for model, _ in pairs:
                x, y = batch(iteration)
                losses.append(F.cross_entropy(model(x), y))
            for opt in optimizers:
                opt.zero_grad()
            for loss in losses:
                loss.backward()
            for opt in optimizers:
                opt.step()
            if rank() % 2 == 0:
                step(part, optimizer, iteration)
        alone = [train(hooked(Net(), method)[0], range(8)) for method in (REMEMBERING, windows())]
        for (model, _), expected in zip(pairs, alone, strict=True):
            assert torch.equal(weights(model), expected)
        if rank() % 2 == 0:
            everybody = [torch.empty_like(weights(part)) for _ in range(dist.get_world_size(evens))]
            dist.all_gather(everybody, weights(part), group=evens)
            assert all(torch.equal(everybody[0], one) for one in everybody)
    finally:
        if rank() % 2 == 0:
            dist.destroy_process_group(evens)


#: Windows of four and three iterations.
FEW_SAMPLES = ("gradiveq", "gradiveq-remembering")


def saved_and_loaded(state: Any) -> Any:
    """By way of a file, as `torch.load` does it by default."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed_equals_uninterrupted(method: Any, stops: list[int], total: int) -> None:
    """The documented recipe, at each of these iterations."""
    straight, first = hooked(Net(), method)
    expected = train(straight, range(total))
    log = first.window_log
    model, state = hooked(Net(), method)
    optimizer = sgd(model)
    start = 0
    for stop in stops:
        train(model, range(start, stop), optimizer)
        saved = saved_and_loaded([model.state_dict(), optimizer.state_dict(), state.state_dict()])

        model, state = hooked(Net(), method)
        optimizer = sgd(model)
        x, y = batch(12345)
        F.cross_entropy(model(x), y).backward()  # so that DDP rebuilds its buckets
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        state.load_state_dict(saved[2])
        start = stop
    assert torch.equal(train(model, range(start, total), optimizer), expected)
    for one, other in zip(state.window_log, log, strict=True):
        assert min(one.pop("fit_s"), other.pop("fit_s")) > 0
        assert contents(one) == contents(other)
    assert state.compression_stats() == first.compression_stats()


for _name, _method in STATEFUL.items():

    def _resume(method: Any = _method, name: str = _name) -> None:
        stops, total = ([3, 5, 6, 8, 9, 11], 14) if name in FEW_SAMPLES else ([4, 6], 9)
        if name == "gradiveq-auto":
            stops, total = [7, 12, 13, 16, 17], 30
        resumed_equals_uninterrupted(method, stops, total)

    _resume.__name__ = f"resume_{_name}"
    check(_resume)


@check
def another_number_of_workers() -> None:
    """All ranks' states go to half of the workers, rounded up."""
    members = list(range((size() + 1) // 2))
    half = dist.new_group(members)
    try:
        for method in (REMEMBERING, PowerSGD(2), windows(), windows(sample=50), windows(error_feedback=True)):
            model, state = hooked(Net(), method)
            optimizer = sgd(model)
            train(model, range(9), optimizer)
            states: list[Any] = [None] * size()
            dist.all_gather_object(states, saved_and_loaded(state.state_dict()))
            for rule in ("sum", "drop"):
                if rank() in members:
                    fewer, resumed = hooked(Net(), method, wrapping={"process_group": half})
                    with pytest.raises(ValueError, match=f"one of {size()} workers"):
                        resumed.load_state_dict(states[0])
                    resumed.load_state_dict(states if rule == "sum" else states[0], memories=rule)
                    fewer.load_state_dict(model.state_dict())
                    after = resumed.state_dict()
                    memories = [one["family"]["memory"] or {} for one in states]
                    kept = after["family"]["memory"] or {}
                    assert bool(memories[0]) == ("windows" not in after["family"] or method.error_feedback)
                    if rule == "sum":
                        assert kept.keys() == memories[0].keys()
                        mine = list(range(rank(), size(), len(members)))
                        for name, tensor in kept.items():
                            expected = sum(memories[r][name] for r in mine) * (len(members) / size())
                            close(tensor, expected, 1e-7)
                    else:
                        assert not kept
                    if "bases" in after["family"]:
                        assert contents(after["family"]["bases"]) == contents(states[0]["family"]["bases"])
                    opt = sgd(fewer)
                    for iteration in range(9, 14):
                        step(fewer, opt, iteration)
                    everybody = [torch.empty_like(weights(fewer)) for _ in members]
                    dist.all_gather(everybody, weights(fewer), group=half)
                    assert all(torch.equal(everybody[0], one) for one in everybody)
                dist.barrier()
    finally:
        if rank() in members:
            dist.destroy_process_group(half)


@check
def fits_run_beside_training() -> None:
    """What follows a sample is on a thread; backward returns without it."""
    model, state = hooked(Net(), windows(sample=3, compress=2))
    release, entered = threading.Event(), threading.Event()
    absorb = state._family._absorb

    def slowly(now: Iteration, first: bool) -> Any:
        entered.set()
        assert release.wait(20)
        yield from absorb(now, first)

    optimizer = sgd(model)
    train(model, range(4), optimizer)  # two at the start, two samples
    state._family._absorb = slowly
    step(model, optimizer, 4)
    assert entered.wait(20)
    assert state.phase == "sample"
    release.set()
    step(model, optimizer, 5)
    assert state.phase == "compress"


@check
def non_finite_gradient_names_layer_and_rank() -> None:
    for method in (Plain(), REMEMBERING, TopK(0.1), PowerSGD(2), windows(), COMPRESSORS["adacomp"]()):
        # At the start, when sampling or compressed, and GradiVeQ's compressed.
        for at in (0, 4, 9) if isinstance(method, GradiVeQ) else (0, 4):
            net = Net()
            model, _ = hooked(net, method)
            optimizer = sgd(model)
            train(model, range(at), optimizer)
            if rank() == size() - 1:
                net.conv2.weight.register_hook(lambda grad: grad * torch.nan)
            with raises(
                RuntimeError, "NonFiniteGradient", f"conv2.weight has a non-finite gradient on rank {size() - 1}"
            ):
                step(model, optimizer, at)
    assert issubclass(NonFiniteGradient, RuntimeError)
    net = Net()
    model, _ = hooked(net, Identity())
    optimizer = sgd(model)
    train(model, range(2), optimizer)
    net.fc.bias.register_hook(lambda grad: torch.full_like(grad, 2e38))
    with raises(RuntimeError, "the mean of finite gradients overflows on all ranks: fc.bias"):
        step(model, optimizer, 2)


@check
def non_finite_gradients_can_be_propagated() -> None:
    """With nonfinite="propagate" all ranks get NaN in that bucket, and can go on."""
    net = Net()
    model, _ = hooked(net, REMEMBERING, nonfinite="propagate")
    optimizer = sgd(model)
    train(model, range(4), optimizer)
    x, y = batch(4)
    loss = F.cross_entropy(model(x), y)
    (loss * torch.inf if rank() == 0 else loss).backward()
    assert gradients(net).isnan().any()
    counts = gathered(gradients(net).isnan())
    assert all(torch.equal(counts[0], one) for one in counts)
    train(model, range(4, 6), optimizer)
