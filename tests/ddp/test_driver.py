"""The hook's driver and state where no process group of several ranks is needed: memory, threads, what fails inside."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import gradiveq.ddp as ddp
from gradiveq import GradiVeQ
from gradiveq.ddp.driver import Delivery
from gradiveq.device.kernels import DeviceKernels
from gradiveq.exchange.families import make_family
from gradiveq.exchange.family import Family
from gradiveq.exchange.lowrank import LowRank
from gradiveq.exchange.windows import Windows
from gradiveq.flatten import Layout
from gradiveq.powersgd import PowerSGD
from gradiveq.specs import parse
from tests.ddp.ranks import MATRICES, VECTORS, Ranks, bucket_of
from tests.support.ddp_harness import staying

REMEMBERING = GradiVeQ(
    warmup=0, sample=3, compress=4, n_components=2, fit_slices="all", holdout_every=1, error_feedback=True
)


def family_of(spec: str, rank: int, size: int) -> Family:
    if spec == "powersgd":
        return LowRank(PowerSGD(2), seed=1)
    return make_family(parse(spec), VECTORS.blocks, rank=rank, size=size, seed=5, one_vector=False)


SPECS = ["powersgd", "topk:0.1+ef", "half+ef", "sign:scaled^topk:0.1", "threshold:0.5", "identity"]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_what_an_iteration_holds_is_let_go(spec: str, on_device: bool, size: int) -> None:
    """Without the garbage collector, which may not come before a device's memory is full; also of one rank alone."""
    bucket = MATRICES if spec == "powersgd" else VECTORS
    ranks = Ranks([family_of(spec, rank, size) for rank in range(size)], bucket, [on_device] * size)
    gc.collect()
    gc.disable()
    try:
        for iteration in range(2):
            works = ranks.exchange(iteration, [torch.ones(bucket.length) for _ in range(size)])
            remembered = {id(q) for family in ranks.families if isinstance(family, LowRank) for q in family._q.values()}
            tensors = [one for work in works for one in tensors_in(work.kept) if id(one) not in remembered]
            assert tensors
            seen = [weakref.ref(work) for work in works] + [weakref.ref(one) for one in tensors]
            del works, tensors
            assert [one for one in seen if one() is not None] == []
    finally:
        gc.enable()


def tensors_in(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [one for part in tree for one in tensors_in(part)] if isinstance(tree, list | tuple) else []


@pytest.mark.parametrize("spec", ["powersgd", "topk:0.1+ef", "half+ef", "sign:scaled^topk:0.1", "identity"])
def test_the_mean_is_kept_until_the_next_iteration(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made on the stream of the backward pass, and a callback writes it on another."""
    made: list[Tensor] = []
    empty = DeviceKernels.empty

    def recorded(self: DeviceKernels, length: int) -> Tensor:
        made.append(empty(self, length))
        return made[-1]

    monkeypatch.setattr(DeviceKernels, "empty", recorded)
    bucket = MATRICES if spec == "powersgd" else VECTORS
    (work,) = Ranks([family_of(spec, 0, 1)], bucket, [True]).exchange(0, [torch.ones(bucket.length)])
    assert any(one is made[0] for one in tensors_in(work.kept))


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("spec", ["sign", "topk:0.1", "half", "randomk:0.5", "threshold:0.5", "sign:mean^half"])
def test_a_bucket_of_nothing_carries_codes(spec: str, on_device: bool) -> None:
    empty = bucket_of((0,), (0, 3))
    families = [make_family(parse(spec), empty.blocks, rank=rank, size=2, one_vector=False) for rank in range(2)]
    for work in Ranks(families, empty, [on_device] * 2).exchange(0, [torch.zeros(0)] * 2):
        assert work.heard is not None
        assert work.heard.tolist() == [0, 0]


def test_held_out_losses_are_measured_in_32_bits() -> None:
    """In buckets of 16 bits payloads are in 16, and the exact mean beside them isn't."""
    family = windows_that_compress()
    (block,) = family._layers.values()
    bucket = bucket_named(block.name, block.shape)
    ranks = Ranks([family], bucket, [False])
    types: list[torch.dtype] = []
    member = ranks.members[0]
    all_reduce = member.all_reduce
    member.all_reduce = lambda tensor: (types.append(tensor.dtype), all_reduce(tensor))[1]  # type: ignore[method-assign]
    ranks.exchange(5, [torch.randn(bucket.length, generator=torch.Generator().manual_seed(1)).bfloat16()])
    assert types == [torch.bfloat16, torch.float32]
    assert family.log[-1]["held_out"][-1]["held_out"] > 0


def windows_that_compress() -> Windows:
    """Of one convolution and one worker, with bases."""
    (block, _) = Layout(nn.Conv2d(4, 6, 3)).blocks
    family = Windows(replace(REMEMBERING, error_feedback=False), [block], 0, 1)
    ranks = Ranks([family], bucket_named(block.name, block.shape), [False])
    for iteration in range(3):
        generator = torch.Generator().manual_seed(iteration)
        ranks.exchange(iteration, [torch.randn(block.length, generator=generator)])
    assert family.phase == "compress"
    return family


def bucket_named(name: str, shape: tuple[int, ...]) -> Any:
    bucket = bucket_of(shape)
    return replace(bucket, blocks=(replace(bucket.blocks[0], name=name),))


# One rank in a process group


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()  # models that hold it, or its threads outlive this process's Python
    dist.destroy_process_group()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.other = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.relu(self.other(torch.relu(self.conv(x)))).mean((2, 3)))
        return out


def hooked(method: Any, **options: Any) -> tuple[Any, ddp.State]:
    model = nn.parallel.DistributedDataParallel(Small(), bucket_cap_mb=0.001)
    state = ddp.State(model, method, **options)
    model.register_comm_hook(state, ddp.hook)
    return model, state


def backward(model: nn.Module, iteration: int) -> None:
    model.zero_grad()
    model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(iteration))).square().sum().backward()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("method", [PowerSGD(2), parse("topk:0.1+ef"), parse("threshold:0.5"), REMEMBERING], ids=str)
def test_deliveries_are_let_go_in_the_next_iteration(method: Any) -> None:
    for on_device in (False, True):
        model, state = hooked(method)
        with staying(on_device):
            gc.collect()
            gc.disable()
            try:
                seen: list[weakref.ref[Delivery]] = []
                for iteration in range(10):
                    backward(model, iteration)
                    seen += map(weakref.ref, state._works)
                    alive = [one() for one in seen]
                    assert [one for one in alive if one is not None] == state._works
                    del alive
            finally:
                gc.enable()


@pytest.mark.usefixtures("alone")
def test_a_failure_in_a_callback_is_raised_and_the_iteration_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is the family that fails or what looks at the mean afterwards."""
    for place in ("gradiveq.exchange.compressed.Compression._decompress", "gradiveq.ddp.state.State._find_flaws"):
        model, state = hooked(parse("topk:0.1+ef"))
        for iteration in range(4):
            backward(model, iteration)
        before = state.state_dict()["family"]["memory"]
        with monkeypatch.context() as patch:
            patch.setattr(place, fails)
            with pytest.raises(RuntimeError, match="on purpose"):
                backward(model, 4)
        after = state.state_dict()["family"]["memory"]
        assert all(torch.equal(after[name], memory) for name, memory in before.items())


def fails(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("on purpose")


@pytest.mark.usefixtures("alone")
def test_a_failure_before_the_first_round_is_raised_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = hooked(parse("topk:0.1+ef"))
    for iteration in range(4):
        backward(model, iteration)
    before = state.state_dict()["family"]["memory"]
    with monkeypatch.context() as patch:
        patch.setattr("gradiveq.compressors.topk.TopK.select", fails)
        with pytest.raises(RuntimeError, match="on purpose"):
            backward(model, 4)
    after = state.state_dict()["family"]["memory"]
    assert all(torch.equal(after[name], memory) for name, memory in before.items())
    other = nn.parallel.DistributedDataParallel(Small(), bucket_cap_mb=0.001)
    other.register_comm_hook(state, ddp.hook)
    with pytest.raises(RuntimeError, match="iteration 4 never came to its last bucket"):
        backward(other, 5)


@pytest.mark.usefixtures("alone")
def test_a_failure_on_the_thread_is_raised_in_the_next_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = hooked(REMEMBERING)
    for iteration in range(4):
        backward(model, iteration)
    with monkeypatch.context() as patch:
        patch.setattr("gradiveq.pca.sampling.PCASampler.fit", fails)
        backward(model, 4)
        assert state.phase == "sample"
        assert state.window_log[0]["sample"] == 3
        state.state_dict()
    with pytest.raises(RuntimeError, match="on purpose"):
        backward(model, 5)


@pytest.mark.usefixtures("alone")
def test_nothing_is_looked_at_while_the_thread_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sample of a window ends the use of the last one's bases."""
    model, state = hooked(REMEMBERING)
    for iteration in range(2 + 3 + 4):
        backward(model, iteration)
    family = state._family
    assert isinstance(family, Windows)
    assert family._in_use is not None
    release, absorb, skip, skipped = threading.Event(), family._absorb, family.skip, []

    def slowly(*arguments: Any) -> Any:
        assert release.wait(20)
        yield from absorb(*arguments)

    monkeypatch.setattr(family, "_absorb", slowly)
    monkeypatch.setattr(family, "skip", lambda: (skipped.append(family._in_use), skip()))
    backward(model, 9)
    threading.Timer(0.3, release.set).start()
    skipped.clear()
    backward(model, 10)
    assert skipped == [None]


@pytest.mark.usefixtures("alone")
def test_a_fit_that_is_pending_is_loaded_over() -> None:
    """By the state of an iteration before it, and by its own: each goes on as the first run did."""
    runs: list[Sequence[Any]] = []
    model, state = hooked(REMEMBERING)
    states = []
    for iteration in range(2 + 3 + 4 + 3 + 2):
        states.append(state.state_dict())
        backward(model, iteration)
        runs.append([p.grad.clone() for p in model.parameters()])
    for loaded in (4, 5, 4, 12, 5):  # a fit is pending in those of 5 and 12
        state.load_state_dict(states[loaded])
        for iteration in range(loaded, loaded + 2):
            backward(model, iteration)
            assert all(
                torch.equal(p.grad, expected) for p, expected in zip(model.parameters(), runs[iteration], strict=True)
            ), (loaded, iteration)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("compress", [4, "auto"])
def test_an_iteration_that_is_skipped_leaves_no_trace(compress: Any) -> None:
    """In each phase, in any bucket; with error feedback, held-out losses and votes."""
    method = replace(REMEMBERING, compress=compress, stop_multiple=1.2)
    grads, memory, losses = run_spoilt(method, None)
    for at in (1, 3, 4, 5, 6, 9):
        for name in ("conv.weight", "fc.bias"):
            other_grads, other_memory, other_losses = run_spoilt(method, at, name)
            assert losses == other_losses, (at, name)
            off = [float((a - b).abs().max()) for a, b in zip(grads, other_grads, strict=True)]
            assert not any(off), (at, name, off)
            assert memory.keys() == other_memory.keys()
            assert all(torch.equal(memory[key], other_memory[key]) for key in memory), (at, name)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("at", [3, 5, 9])
def test_buckets_that_come_after_the_error_leave_no_trace(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP raises a bucket's error without waiting for those behind it; whoever goes on meets them here."""
    grads, memory, losses = run_spoilt(REMEMBERING, None)
    all_reduce, next_one, late = Delivery.all_reduce, threading.Event(), []

    def slow(delivery: Delivery, message: Tensor) -> Any:
        future, done, index = all_reduce(delivery, message), torch.futures.Future(), delivery.index
        number = delivery.now.number
        if number not in (at, at + 1) or (number == at and index == 0):
            return future
        if number == at + 1:
            next_one.set()

        def finish() -> None:
            value = future.wait()
            if number == at:
                late.append(not next_one.wait(0.2))
            else:
                time.sleep(0.03 + 0.1 * index)
            done.set_result(value)

        threading.Thread(target=finish).start()
        return done

    monkeypatch.setattr(Delivery, "all_reduce", slow)
    other_grads, other_memory, other_losses = run_spoilt(REMEMBERING, at, "fc.bias")
    assert late
    assert all(late)
    assert losses == other_losses
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))
    assert all(torch.equal(memory[key], other_memory[key]) for key in memory)


def run_spoilt(
    method: Any, at: int | None, name: str = ""
) -> tuple[list[Tensor], dict[str, Tensor], list[list[float]]]:
    """The last gradients, the memory and the held-out losses of 12 iterations, of which one is tried twice."""
    model, state = hooked(method)
    for iteration in range(12):
        if iteration == at:
            handle = dict(model.module.named_parameters())[name].register_hook(lambda grad: grad * torch.nan)
            with pytest.raises(RuntimeError, match=f"{name} has a non-finite gradient on rank 0"):
                backward(model, iteration)
            handle.remove()
        backward(model, iteration)
    losses = [[one["held_out"] for one in window["held_out"]] for window in state.window_log]
    return [p.grad.clone() for p in model.parameters()], state.state_dict()["family"]["memory"], losses
