"""What the hook makes of gradients: against the same exchange in one process, and against DDP without a hook."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import gradiveq.ddp as ddp
from gradiveq import Aggregator, GradiVeQ, Plain
from gradiveq.compressors import COMPRESSORS
from gradiveq.compressors.half import Half
from gradiveq.compressors.identity import Identity
from gradiveq.compressors.topk import TopK
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.exchange.families import make_family
from gradiveq.flatten import Block, Bucket
from gradiveq.here import Here
from gradiveq.methods import Compressed, takes_mean
from gradiveq.powersgd import PowerSGD
from ring import lockstep
from ring.lockstep import LockstepRing
from tests.support.ddp_harness import (
    Net,
    batch,
    check,
    close,
    gathered,
    gradients,
    hooked,
    plain,
    rank,
    same_everywhere,
    sgd,
    size,
    staying,
    step,
    train,
    weights,
)

START = 2


def local_gradients(net: nn.Module, iteration: int) -> list[Any]:
    """Everybody's gradient in an iteration, flat as in `named_parameters()`, float32 arrays."""
    net.zero_grad()
    x, y = batch(iteration)
    F.cross_entropy(net(x), y).backward()
    own = gradients(net)
    net.zero_grad()
    return [one.numpy() for one in gathered(own)]


def here(method: Any, shapes: Mapping[str, tuple[int, ...]], *, seed: int) -> Here:
    """As many workers as ranks in this process, with one vector of parameters in this order, as PyTorch has them."""
    blocks: list[Block] = []
    for index, (name, shape) in enumerate(shapes.items()):
        blocks.append(Block(name, blocks[-1].stop if blocks else 0, math.prod(shape), shape, False, index))
    bucket = Bucket(tuple(blocks), blocks[-1].stop)
    return Here(lambda r: make_family(method, blocks, rank=r, size=size(), seed=seed), bucket, size())


def against_one_process(method: Compressed, iterations: int = 6) -> None:
    """The hook's means are those of `Here`, on whose correctness tests of their own insist.

    The same compressors get the same gradients, memories and random numbers; payloads that are gathered are added in
    the same order, so that the means are equal bit by bit; sums are within rounding.
    """
    net, reference = Net(), Net()
    model, _ = hooked(net, method, seed=3, min_ratio=1e-9)
    optimizer = sgd(model)
    workers = here(method, {name: tuple(p.shape) for name, p in net.named_parameters()}, seed=3)
    exact = method.compressor.collective == "all_gather"
    for iteration in range(iterations):
        reference.load_state_dict(net.state_dict())
        locals_ = local_gradients(reference, iteration)
        expected = np.mean(locals_, axis=0, dtype=np.float32)
        if iteration >= START:
            workers.aggregate(locals_, expected, iteration)
        x, y = batch(iteration)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        got = gradients(model).numpy()
        if iteration >= START and exact:
            np.testing.assert_array_equal(got, expected)
        elif method.compressor.name == "half":  # whose sums are rounded in another order
            np.testing.assert_allclose(got, expected, rtol=4e-3, atol=1e-4)
        else:
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        optimizer.step()
        same_everywhere(weights(model), f"the weights after iteration {iteration}")


def of_one_compressor(name: str, feedback: bool) -> None:
    compressor = COMPRESSORS[name](**({"ratio": 0.1} if name in ("topk", "randomk") else {}))
    memory = ErrorFeedback() if feedback else None
    against_one_process(Compressed(compressor, feedback=memory))


for _name in COMPRESSORS:

    def _plainly(name: str = _name) -> None:
        of_one_compressor(name, feedback=False)

    def _with_memory(name: str = _name) -> None:
        of_one_compressor(name, feedback=True)

    _plainly.__name__ = f"compressor_{_name}"
    check(_plainly)
    if takes_mean(COMPRESSORS[_name]()):
        _with_memory.__name__ = f"compressor_{_name}_with_error_feedback"
        check(_with_memory)


@check
def lossless_methods_equal_ddp() -> None:
    expected = plain(6)
    for method in (Plain(), Identity(), PowerSGD(rank=999, min_compression_rate=0.0, error_feedback=False)):
        model, _ = hooked(Net(), method)
        close(train(model, range(6)), expected, 2e-6)


@check
def powersgd_equals_one_process() -> None:
    against_powersgd_here(on_device=False)


@check
def powersgd_by_torch_operations_equals_one_process() -> None:
    against_powersgd_here(on_device=True)


def against_powersgd_here(on_device: bool) -> None:
    net, reference = Net(), Net()
    orders: list[list[str]] = []
    names = {id(p): name for name, p in net.named_parameters()}

    def recording(state, bucket):  # the first Q is drawn by the place in the bucket
        orders.append([names[id(p)] for p in bucket.parameters()])
        return ddp.hook(state, bucket)

    model, _ = hooked(net, PowerSGD(2), hook=recording, seed=5, wrapping={"bucket_cap_mb": 25})
    optimizer = sgd(model)
    places, offset = {}, 0
    for name, p in net.named_parameters():
        places[name] = slice(offset, offset + p.numel())
        offset += p.numel()
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    workers: Here | None = None
    for iteration in range(6):
        reference.load_state_dict(net.state_dict())
        locals_ = local_gradients(reference, iteration)
        x, y = batch(iteration)
        optimizer.zero_grad()
        with staying(on_device):
            F.cross_entropy(model(x), y).backward()
        if iteration >= START:
            order = orders[-1]
            if workers is None:
                workers = here(PowerSGD(2), {name: shapes[name] for name in order}, seed=5)
            elements = np.concatenate([np.arange(places[name].start, places[name].stop) for name in order])
            expected = np.empty(offset, np.float32)
            workers.aggregate([one[elements] for one in locals_], expected, iteration)
            np.testing.assert_allclose(gradients(model).numpy()[elements], expected, rtol=1e-4, atol=1e-6)
        optimizer.step()


def windows(**options: Any) -> GradiVeQ:
    return GradiVeQ(**{"warmup": 0, "sample": 4, "compress": 4, "ratio": 4, "fit_slices": "all", **options})


#: d = K. The largest layers' slices give enough samples at once.
FULL_RANK = windows(sample=3, compress=5, ratio=1, slice_size=8, holdout_every=0)


@check
def full_rank_gradiveq_equals_ddp() -> None:
    model, state = hooked(Net(), replace(FULL_RANK, holdout_every=1))
    close(train(model, range(2 + 8 + 3)), plain(2 + 8 + 3), 2e-6)
    first = state.window_log[0]
    assert [first["layers"][name]["d"] for name in ("conv1.weight", "conv2.weight")] == [[8], [8]]
    assert first["compress"] == 5
    assert len(first["held_out"]) == 5
    assert all(record["held_out"] < 1e-10 for record in first["held_out"])


@check
def gradiveq_compresses_convolutions_only() -> None:
    """The rest equals DDP's mean; the convolutions' part is within what the window's log says of the loss.

    The log has the fields of an aggregator's, with the same meaning.
    """
    net, reference = Net(), Net()
    method = windows(holdout_every=1, sampling=Plain())
    model, state = hooked(net, method)
    optimizer = sgd(model)
    everybodys, traffic = [], []
    for iteration in range(2 + 4 + 4 + 1):
        reference.load_state_dict(net.state_dict())
        everybodys.append(local_gradients(reference, iteration))
        traffic.append((state.traffic.dense, state.traffic.payload))
        expected = torch.from_numpy(np.mean(everybodys[-1], axis=0, dtype=np.float32))
        x, y = batch(iteration)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        offset, errors, norms = 0, {}, {}
        for name, p in net.named_parameters():
            exact = expected[offset : offset + p.numel()].view(p.shape)
            offset += p.numel()
            if not 6 <= iteration < 10 or name not in ("conv1.weight", "conv2.weight"):
                close(p.grad, exact, 1e-6)
            else:
                errors[name] = float((p.grad - exact).square().sum())
                norms[name] = float(exact.square().sum())
        if 6 <= iteration < 10:
            record = state.window_log[-1]["held_out"][-1]
            assert record["iteration"] == iteration
            np.testing.assert_allclose(record["held_out"], sum(errors.values()) / sum(norms.values()), rtol=1e-3)
            for name in errors:
                np.testing.assert_allclose(record["layers"][name], errors[name] / norms[name], rtol=1e-3)
            assert record["held_out"] > 0.01
        optimizer.step()
    window = state.window_log[0]
    assert window["ended_by"] == "count"
    assert window["fit_bytes"] > 0
    dense, payload = (after - before for before, after in zip(traffic[-2], traffic[-1], strict=True))
    assert window["ratio"] == dense / payload
    same_meaning(state.window_log, window_log_of_an_aggregator(replace(method, warmup=2), everybodys))


def window_log_of_an_aggregator(method: GradiVeQ, everybodys: list[Any]) -> list[dict[str, Any]]:
    def work(ring: LockstepRing) -> list[dict[str, Any]]:
        net = Net()
        aggregator = Aggregator(net, ring, method)
        for everybody in everybodys:
            vector = torch.from_numpy(everybody[ring.rank])
            for p, part in zip(net.parameters(), vector.split([p.numel() for p in net.parameters()]), strict=True):
                p.grad = part.view_as(p).clone()
            aggregator.aggregate()
        return aggregator.window_log

    return lockstep.run(size(), work)[0]


def same_meaning(own: Any, other: Any, key: str = "") -> None:
    """Of two logs of windows on the same gradients."""
    if isinstance(own, dict):
        assert own.keys() == other.keys(), (own.keys(), other.keys())
        for name in own:
            same_meaning(own[name], other[name], name)
    elif isinstance(own, list):
        assert len(own) == len(other), (key, own, other)
        for one, another in zip(own, other, strict=True):
            same_meaning(one, another, key)
    elif key in ("fit_bytes", "fit_s"):  # other collectives, another machine's moment
        assert (own > 0) == (other > 0)
    elif key == "ratio" and own is not None:  # a hook's codes are more than an aggregator's control elements
        np.testing.assert_allclose(own, other, rtol=0.02, err_msg=key)
    elif isinstance(own, float):
        np.testing.assert_allclose(own, other, rtol=2e-3, atol=1e-9, err_msg=key)
    else:
        assert own == other, (key, own, other)


@check
def gradiveq_windows_go_on() -> None:
    """Several windows, with the lengths that the loss and d decide; the phases are the aggregator's."""
    for method, total in (
        (windows(fit_slices="first", ratio=None, n_components=2, holdout_every=0), 14),
        (windows(fit_slices="first", ratio=None, loss_threshold=0.3, sample="auto", max_sample=40), 45),
        (windows(compress="auto", stop_multiple=1.001), 24),
        (windows(reuse=3, slice_size=16, ratio=None, loss_threshold=0.1), 14),
    ):
        model, state = hooked(Net(), method, start_iteration=3)
        phases, optimizer = [], sgd(model)
        for iteration in range(total):
            phases.append(state.phase)
            step(model, optimizer, iteration)
        same_everywhere(weights(model), "the weights")
        assert phases[:3] == ["start"] * 3
        assert "compress" in phases, (method, phases)
        assert len(state.window_log) >= (1 if method.sample == "auto" else 2), (method, phases)
        if method.sample == "auto":
            assert state.window_log[0]["checks"]
        if method.compress == "auto":
            assert state.window_log[0]["ended_by"] == "vote"
        if len(state.window_log) > 1 and method.holdout_every:
            assert state.window_log[0]["after"]["held_out"] > 0


class Kinds(nn.Module):
    """Every kind of convolution, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv1d = nn.Conv1d(4, 8, 3, padding=1)
        self.conv3d = nn.Conv3d(3, 6, (1, 3, 3), padding=(0, 1, 1))
        self.transposed = nn.ConvTranspose2d(6, 6, 2)
        self.grouped = nn.Conv2d(6, 12, 3, groups=3)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv3d(x.unsqueeze(2))).squeeze(2)
        y = torch.relu(self.grouped(self.transposed(y))).flatten(2).transpose(1, 2)
        z = self.conv1d(x[:, :1].flatten(1).view(len(x), 4, 16)).mean(dim=(1, 2))
        out: torch.Tensor = self.fc(self.attention(y, y, y, need_weights=False)[0].mean(1)) + z[:, None]
        return out


@check
def kinds_of_layers() -> None:
    """1-D and 3-D convolutions are compressed; what isn't a plain convolution is when it is named."""
    for also, more in (
        ((), set()),
        (("fc.weight", "attention.*weight"), {"fc.weight", "attention.in_proj_weight", "attention.out_proj.weight"}),
        (("transposed.weight", "grouped.weight"), {"transposed.weight", "grouped.weight"}),
    ):
        model, state = hooked(Kinds(), windows(sample=4, compress=2, ratio=None, n_components=3), also=also)
        train(model, range(2 + 4 + 2))
        assert set(state.window_log[0]["layers"]) == {"conv1d.weight", "conv3d.weight"} | more
        assert all(layer["ratio"] > 3 for layer in state.window_log[0]["layers"].values())


@check
def layers_below_the_ratio_go_uncompressed() -> None:
    model, state = hooked(Net(), windows(ratio=None, n_components=10, holdout_every=1), min_ratio=5)
    train(model, range(8))
    layers = state.window_log[0]["layers"]
    for record in state.window_log[0]["held_out"]:  # such a layer's norm is in the whole's loss, as in an aggregator's
        assert record["layers"]["conv1.weight"] == 0 < record["held_out"] < record["layers"]["conv2.weight"]
    assert layers["conv1.weight"]["ratio"] == 1  # K = 24 to 10 components
    assert layers["conv2.weight"]["ratio"] > 6  # K = 64
    # 2 of the 8 elements of a bias take 5 bytes of header, 1 of positions and 8 of values: a ratio of 2.3.
    for min_ratio, sent in ((2.2, 2), (2.4, 8)):
        model, _ = hooked(Net(), TopK(0.2), min_ratio=min_ratio)
        x, y = batch(0, of=0)
        for _ in range(3):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
        assert int((model.module.conv1.bias.grad != 0).sum()) == sent
        assert int((model.module.conv1.weight.grad != 0).sum()) == round(0.2 * 216)


@check
def early_iterations_are_not_compressed() -> None:
    model, state = hooked(Net(), TopK(0.01), start_iteration=4)
    optimizer = sgd(model)
    close(train(model, range(4), optimizer), plain(4), 1e-6)
    assert state.compression_stats() == (0.0, 0, 0)
    train(model, range(4, 6), optimizer)
    assert state.compression_stats().compress_rate > 10


@check
def bytes_are_counted() -> None:
    """Against what each method's formulas say, with the codes of each bucket."""
    model, state = hooked(Net(), Half(), wrapping={"bucket_cap_mb": 25})
    train(model, range(5))
    num = sum(p.numel() for p in model.parameters())
    codes = size()  # 6 parameters of which to speak: one digit a rank
    assert state.compression_stats() == (4 * num / (2 * (num + codes)), 3 * 4 * num, 3 * 2 * (num + codes))
    model, state = hooked(Net(), COMPRESSORS["sign"](), wrapping={"bucket_cap_mb": 25})
    train(model, range(5))
    payload = 8 + sum(-(-p.numel() // 8) for p in model.parameters())
    assert state.traffic.payload == 3 * payload


@check
def entire_buckets_are_compressed_as_one() -> None:
    method = Compressed(TopK(count=50), granularity="model", feedback=ErrorFeedback())
    model, _ = hooked(Net(), method, wrapping={"bucket_cap_mb": 25})
    optimizer = sgd(model)
    for iteration in range(5):
        x, y = batch(iteration)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if iteration >= START:
            assert 50 <= int((gradients(model) != 0).sum()) <= 50 * size()
        optimizer.step()


def remembering(name: str, *values: Any, **options: Any) -> Compressed:
    return Compressed(COMPRESSORS[name](*values), feedback=ErrorFeedback(), **options)


#: A sum in each type, what is gathered, and both; `test_native` has the others, without processes.
NATIVE = [
    remembering("half", "bfloat16"),
    remembering("integer", 1000.3, 16, "stochastic"),
    remembering("integer", 20.0, 8, "nearest", 8),
    remembering("qsgd-gather", 3, granularity="model"),
    remembering("topk", 0.1, overrides=(("*.bias", Identity()), ("conv1.weight", Half()))),
    Compressed(COMPRESSORS["sign"]("mean"), master=TopK(0.2)),
]
#: Whose float32 payloads the wrapper halves, and one of 16 bits beside them.
HALVED = [remembering("randomk", 0.2, overrides=(("fc.weight", Half()), ("*.bias", Identity())))]


@check
def torch_operations_give_the_same_bits() -> None:
    """What is for GPUs, on the CPU of every other rank, the others with the NumPy forms; against these on all ranks.

    With memories, and with messages of 16 bits.
    """
    wrapped = default_hooks.fp16_compress_wrapper(ddp.hook)
    cases = [(method, ddp.hook) for method in NATIVE] + [(method, wrapped) for method in HALVED]
    for method, hook in cases:
        results = []
        for on_device in (False, rank() % 2 == 1):
            model, _ = hooked(Net(), method, hook=hook)
            with staying(on_device):
                results.append(train(model, range(4)))
        assert torch.equal(*results), (method, hook)


@check
def some_layers_have_other_compressors() -> None:
    method = Compressed(TopK(count=3), overrides=(("*.bias", Identity()), ("fc.weight", Half())))
    net, reference = Net(), Net()
    model, _ = hooked(net, method)
    for iteration in range(4):
        expected = np.mean(local_gradients(reference, iteration), axis=0, dtype=np.float32)
        x, y = batch(iteration)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
    offset = 0
    for name, p in net.named_parameters():
        exact = torch.from_numpy(expected[offset : offset + p.numel()]).view(p.shape)
        offset += p.numel()
        if name.startswith("conv") and name.endswith("weight"):
            assert 3 <= int((p.grad != 0).sum()) <= 3 * size()
        else:
            close(p.grad, exact, 1e-4 if name == "fc.weight" else 1e-6)


@check
def the_mean_is_compressed_on_its_way_back() -> None:
    """Algorithm 1 with an identity at the workers: top-k of the mean."""
    method = Compressed(Identity(), master=TopK(count=4))
    model, _ = hooked(Net(), method)
    for iteration in range(3):
        x, y = batch(iteration)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
    assert all(int((p.grad != 0).sum()) == 4 for p in model.parameters())


@check
def half_precision_wrapper() -> None:
    """Float32 payloads travel in 16 bits, and error feedback knows of it."""
    wrapped = default_hooks.fp16_compress_wrapper(ddp.hook)
    expected = plain(6)
    for method, tolerance in (
        (Plain(), 1e-3),
        (Identity(), 1e-3),
        (PowerSGD(rank=999, min_compression_rate=0.0, error_feedback=False), 5e-3),
        (Compressed(Identity(), feedback=ErrorFeedback()), 1e-3),
    ):
        model, state = hooked(Net(), method, hook=wrapped)
        close(train(model, range(6)), expected, tolerance)
        assert state.traffic.payload < 2.1 * 4 * sum(p.numel() for p in model.parameters()) * 2
    for method in (windows(sample=3, compress=3), Compressed(TopK(0.1), feedback=ErrorFeedback()), PowerSGD(2)):
        model, _ = hooked(Net(), method, hook=wrapped)
        train(model, range(10))
    model, _ = hooked(Net(), FULL_RANK, hook=wrapped)
    close(train(model, range(10)), plain(10), 5e-3)


@check
def bfloat16_model() -> None:
    """DDP refuses its bf16 wrapper on CPUs; a model in bfloat16 takes the same way."""
    for method in (Plain(), windows(sample=3, compress=3), PowerSGD(2), TopK(0.1), COMPRESSORS["integer"]()):
        net = Net().to(torch.bfloat16)
        model, _ = hooked(net, method)
        optimizer = sgd(model)
        for iteration in range(9):
            x, y = batch(iteration)
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(torch.bfloat16)).float(), y).backward()
            optimizer.step()
        everybody = gathered(torch.cat([p.detach().float().view(-1) for p in net.parameters()]))
        assert all(torch.equal(everybody[0], one) for one in everybody)
        assert everybody[0].isfinite().all()


@check
def float64_goes_as_it_is() -> None:
    net = Net()
    net.fc.double()
    forward = net.fc.forward
    net.fc.forward = lambda x: forward(x.double()).float()  # type: ignore[method-assign]
    model, _ = hooked(net, TopK(count=1))
    for iteration in range(3):
        x, y = batch(iteration)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
    assert int((net.fc.weight.grad != 0).sum()) > 1000
    assert 1 <= int((net.conv2.weight.grad != 0).sum()) <= size()


@check
def channels_last() -> None:
    """DDP stores such gradients in the parameters' own order; what is measured is the same as in PyTorch's."""
    logs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        net = Net().to(memory_format=memory_format)  # type: ignore[call-overload]
        model, state = hooked(net, windows(holdout_every=1))
        train(model, range(10))
        logs.append([record["held_out"] for record in state.window_log[0]["held_out"]])
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-3)
