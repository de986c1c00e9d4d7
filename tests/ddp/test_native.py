"""Compressors as torch operations: the bits of their NumPy forms, and nothing that would wait for a GPU.

No GPU is needed: the operations run on the CPU, and on torch's "meta" device, whose tensors have no elements that
anyone could look at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.futures import Future
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradiveq import GradiVeQ, Plain
from gradiveq.arrays import bits
from gradiveq.compressors import COMPRESSORS
from gradiveq.compressors.base import Draw, Float32
from gradiveq.compressors.identity import Identity
from gradiveq.ddp.bucket import Parameters
from gradiveq.ddp.driver import Carrying, Delivery, carried, device_kernels, uncompressed
from gradiveq.ddp.methods import make_hook_family
from gradiveq.ddp.state import State
from gradiveq.device import bits as device_bits
from gradiveq.exchange.families import make_family
from gradiveq.exchange.flaws import NOT_FINITE, OVERFLOWED, Codes, flaw
from gradiveq.exchange.kernels import HOST
from gradiveq.exchange.lowrank import LowRank
from gradiveq.exchange.requests import Iteration
from gradiveq.exchange.windows import Windows
from gradiveq.flatten import Block, Bucket
from gradiveq.methods import Compressed
from gradiveq.powersgd import PowerSGD
from gradiveq.specs import parse
from tests.ddp.ranks import MATRICES, VECTORS, Ranks
from tests.support.native_methods import METHODS, PALETTES, SPECS, assert_same_bits, check_bits, compressor_of

ON_DEVICE = "gradiveq.ddp.driver.on_device"


@st.composite
def vectors(draw: st.DrawFn) -> Float32:
    edges = (0, 1, 2, 7, 8, 9, 31, 32, 33, 511, 512, 513, 1024, 1025, 4097)
    length = draw(st.one_of(st.sampled_from(edges), st.integers(0, 3000)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from([*PALETTES, "normal", "mixed"]))
    normal = generator.standard_normal(length) * 10.0 ** draw(st.integers(-41, 37))
    if kind == "normal":
        return normal.astype(np.float32)
    if kind == "mixed":
        return np.where(generator.random(length) < 0.5, normal, generator.choice(PALETTES["ends"], length)).astype("f4")
    return generator.choice(np.array(PALETTES[kind], np.float32), length)


@pytest.mark.parametrize("spec", SPECS)
@settings(deadline=None, max_examples=20)
@given(values=vectors(), draw=st.builds(Draw, *[st.integers(0, 2**40)] * 2, *[st.integers(0, 2**20)] * 2))
def test_payloads_and_estimates_are_the_same_bits(spec: str, values: Float32, draw: Draw) -> None:
    check_bits(spec, values, draw, torch.device("cpu"))


@pytest.mark.parametrize("width", range(1, 33))
def test_codes_of_every_width(width: int) -> None:
    for count in (0, 1, 31, 33, 511, 512, 1100):
        codes = np.random.default_rng(count).integers(0, 2**width, count, np.uint32)
        packed = device_bits.pack(torch.from_numpy(codes.astype(np.int64)), width)
        assert_same_bits(packed, bits.pack(codes, width))
        assert_same_bits(device_bits.unpack(packed, width, count), codes.astype(np.int64))


@pytest.mark.parametrize("spec", ["qsgd-gather:255", "qsgd-gather:65536", "sign:scaled", "terngrad:2.5"])
def test_sums_in_another_order_move_a_scale_by_one_float_at_most(spec: str) -> None:
    """Long vectors, of many magnitudes; codes are one level off at most."""
    compressor = compressor_of(spec)
    for seed in range(3):
        generator = np.random.default_rng(seed)
        values = (generator.standard_normal(1 << 19) * 10.0 ** generator.uniform(-6, 3, 1 << 19)).astype(np.float32)
        ours = compressor.compress(values, Draw(0, seed, 0, 0))
        theirs = HOST.array(compressor.compress_tensor(torch.from_numpy(values), Draw(0, seed, 0, 0)))
        scales = [payload[:4].view(np.int32)[0] for payload in (ours, theirs)]
        assert abs(int(scales[0]) - int(scales[1])) <= 1
        estimates = [np.empty_like(values) for _ in range(2)]
        for payload, estimate in zip((ours, theirs), estimates, strict=True):
            compressor.decompress(payload, estimate, Draw(0, seed, 0, 0))
        step = float(ours[:4].view(np.float32)[0]) / getattr(compressor, "levels", 1)
        assert np.abs(estimates[0] - estimates[1]).max() <= 1.001 * step * (scales[0] != scales[1])


def test_all_of_a_fixed_size_are_native() -> None:
    class Other(Identity):
        pass

    for kind in COMPRESSORS.values():
        assert kind().on_device == kind.fixed_size, kind.name
    assert not Other().on_device


# Several ranks in one thread


def ranks_of(method: Compressed, on_device: Sequence[bool], scale: float | None = None) -> Ranks:
    """Whose overrides name layers of `VECTORS`."""
    size = len(on_device)
    families = [
        make_family(method, VECTORS.blocks, rank=rank, size=size, seed=5, one_vector=False) for rank in range(size)
    ]
    return Ranks(families, VECTORS, on_device, scale)


def with_memory(memory: dict[str, Tensor], **others: Any) -> dict[str, Any]:
    """The state of a family."""
    return {"memory": memory, "momentum": None, "total_error": 0.0, **others}


def test_every_torch_form_is_here() -> None:
    forms = {name for name, kind in COMPRESSORS.items() if kind().on_device}
    assert forms == {compressor_of(spec).name for spec in SPECS}


@pytest.mark.parametrize("method", list(METHODS.values()), ids=list(METHODS))
def test_exchanges_are_the_same_bits(method: Compressed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means, codes and memories of 3 ranks: all on the host, all by torch operations, and one beside the others.

    Of the longest layer two ranks are decoded at once, and then the third; of the others all are.
    """
    for module in ("base", "topk"):
        monkeypatch.setattr(f"gradiveq.compressors.{module}.at_once", lambda length: max(1, 2 * 1300 // max(1, length)))
    for dtype, scale in ((torch.float32, None), (torch.bfloat16, None), (torch.float16, 8.0)):
        buckets = [ranks_of(method, where, scale) for where in ([False] * 3, [True] * 3, [False, True, False])]
        for iteration in range(2):
            generator = torch.Generator().manual_seed(iteration)
            gradients = [torch.randn(VECTORS.length, generator=generator).to(dtype) for _ in range(3)]
            expected, *others = (bucket.exchange(iteration, gradients) for bucket in buckets)
            for works in others:
                for host, other in zip(expected, works, strict=True):
                    assert torch.equal(other.buffer, host.buffer)
                    assert torch.equal(other.heard, host.heard)  # type: ignore[arg-type]
                    assert other.traffic == host.traffic
        if method.feedback is not None:
            expected_states, *states = ([family.state_dict() for family in bucket.families] for bucket in buckets)
            for one in states:
                for host_state, other_state in zip(expected_states, one, strict=True):
                    for name, memory in host_state["memory"].items():
                        assert torch.equal(other_state["memory"][name], memory), name


@pytest.mark.parametrize("spec", ["topk:count=1+ef", "identity+ef", "half/layer0=sign:scaled+ef"])
def test_what_overflows_with_its_memory_is_named(spec: str) -> None:
    """Rank 1's layer 3; on all ranks, on the device as on the host. It sends zeros."""
    method = parse(spec)
    for where in ([False] * 2, [True] * 2):
        bucket = ranks_of(method, where)
        for family in bucket.families:
            memory = {block.name: torch.full(block.shape, 3e38) for block in VECTORS.blocks[3:4]}
            family.load_state_dict(with_memory(memory))
        gradients = [torch.ones(VECTORS.length) for _ in range(2)]
        gradients[1][VECTORS.blocks[3].start] = 3e38
        for work in bucket.exchange(0, gradients, count=False):
            assert work.heard is not None
            assert work.heard.tolist() == [0, flaw(OVERFLOWED, 3)]
            assert work.buffer.isfinite().all()


def test_a_mean_that_overflows_is_not_sent_back() -> None:
    gradients = [torch.full((VECTORS.length,), 3e38) for _ in range(3)]
    gradients[0][1:] = 1
    means = [
        ranks_of(parse("identity^topk:0.01"), [bool(where)] * 3).exchange(0, gradients)[0].buffer for where in (0, 1)
    ]
    assert torch.equal(*means)
    assert means[0].isinf().any()
    assert means[0].count_nonzero() == VECTORS.length


@pytest.mark.parametrize(
    "method",
    [
        PowerSGD(3),
        PowerSGD(2, error_feedback=False),
        PowerSGD(3, warm_start=False),
        PowerSGD(9, min_compression_rate=0),
    ],
    ids=str,
)
def test_powersgd_is_the_hosts_within_rounding(method: PowerSGD) -> None:
    """Means, memories and codes; a state of one goes on as the other."""
    for dtype, scale, tolerance in (
        (torch.float32, None, 1e-5),
        (torch.float32, 256.0, 1e-5),
        (torch.float16, 8.0, 5e-3),
    ):
        host, device = (
            Ranks([LowRank(method, seed=4) for _ in range(3)], MATRICES, [there] * 3, scale) for there in (False, True)
        )
        for iteration in range(5):
            generator = torch.Generator().manual_seed(iteration)
            common = torch.randn(MATRICES.length, generator=generator)
            gradients = [common + torch.randn(MATRICES.length, generator=generator) for _ in range(3)]
            if iteration == 1 and method.rank < 9:  # full rank leaves memories of no mean: P would be rounding errors
                gradients = [torch.zeros_like(common)] * 3
            gradients = [gradient.to(dtype) for gradient in gradients]
            expected, works = (bucket.exchange(iteration, gradients) for bucket in (host, device))
            for ours, theirs in zip(works, expected, strict=True):
                off = (ours.buffer.float() - theirs.buffer.float()).norm()
                assert off <= tolerance * common.norm(), iteration
                assert torch.equal(ours.buffer, works[0].buffer)
                assert torch.equal(ours.heard, theirs.heard)  # type: ignore[arg-type]
                assert ours.traffic == theirs.traffic
            for one, other in zip(device.families, host.families, strict=True):
                states = one.state_dict(), other.state_dict()
                assert states[0]["q"].keys() == states[1]["q"].keys()
                memories = [state["memory"] or {} for state in states]
                assert memories[0].keys() == memories[1].keys()
                assert bool(memories[0]) == method.error_feedback
                for name, memory in memories[0].items():
                    torch.testing.assert_close(memory, memories[1][name], rtol=0, atol=100 * tolerance)
                if iteration == 2:
                    one.load_state_dict(states[1])
                    other.load_state_dict(states[0])


def test_powersgd_says_what_overflows() -> None:
    """With the memory of rank 1's layer 2, as a code; in a sum, as NaN in that layer, as on the host."""
    for there in (False, True):
        bucket = Ranks([LowRank(PowerSGD(2), seed=4) for _ in range(2)], MATRICES, [there] * 2)
        block = MATRICES.blocks[2]
        for family in bucket.families:
            family.load_state_dict(with_memory({block.name: torch.full(block.shape, 3e38)}, q={}))
        gradients = [torch.ones(MATRICES.length) for _ in range(2)]
        gradients[1][block.start] = 3e38
        for work in bucket.exchange(0, gradients, count=False):
            assert work.heard is not None
            assert work.heard.tolist() == [0, flaw(OVERFLOWED, 2)]
        bucket = Ranks([LowRank(PowerSGD(2), seed=4) for _ in range(2)], MATRICES, [there] * 2)
        gradients[0][block.where] = gradients[1][block.where] = 3e38
        for work in bucket.exchange(0, gradients, count=False):
            assert work.buffer[block.where].isnan().all()
            assert work.buffer.isnan().sum() == block.length
            assert work.heard is not None
            assert not work.heard.any()


# Nothing waits


class Waiting(Exception):
    pass


class Watch(TorchDispatchMode):
    """Raises where an operation on "meta" tensors, in the place of a GPU's, would make the host wait for it.

    "meta" itself refuses to give elements away (`item`, `bool`, `cpu`, `numpy`, `nonzero` and masks). Refused here are
    copies to it from the host, unless they are asynchronous; what would take tensors of both; masks that are assigned
    to; and tensors made of the host's numbers.
    """

    def __enter__(self) -> Any:
        self._factories = Factories()
        self._factories.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._factories.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        if func in (aten._to_copy.default, aten.copy_.default):
            result = func(*args, **kwargs)
            devices = {one.device for one in (*args[:2], result) if isinstance(one, Tensor)}
            asynchronous = kwargs.get("non_blocking", False) or args[2:3] == (True,)
            if len(devices) > 1 and not asynchronous:
                raise Waiting(f"{func}: a copy from {args}")
            return result
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if len({one.device for one in tensors}) > 1:
            raise Waiting(f"{func} of tensors on the host and on the device")
        by = args[1] if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) else ()
        if any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in by):
            raise Waiting(f"{func} by a mask")
        return func(*args, **kwargs)


class Factories(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            func in (torch.tensor, torch.as_tensor, torch.asarray)
            and result.is_meta
            and not isinstance(args[0], Tensor)
        ):
            raise Waiting(f"{args[0]} become a tensor on the device")
        return result


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.isfinite().all()),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "tolist": lambda x: x.tolist(),
    "equal": torch.equal,
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assigned to a mask": lambda x: x.__setitem__(x > 0, torch.ones(3, device="meta")),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.repeat_interleave(x.long()),
    "numbers": lambda x: torch.tensor([1, 2], device=x.device),
    "a copy to it": lambda x: torch.ones(4).to(x.device),
    "a copy into it": lambda x: x.copy_(torch.ones(4)),
    "a factor on the host": lambda x: x * torch.ones(4),
}


@pytest.mark.parametrize("name", list(WAITS))
def test_the_watch_sees(name: str) -> None:
    x = torch.ones(4, device="meta")
    call = WAITS[name]
    with pytest.raises((Waiting, RuntimeError, TypeError)), Watch():
        call(x, x) if name == "equal" else call(x)  # type: ignore[call-arg]


META = torch.device("meta")


class MetaGroup:
    """A process group on the device: what it sums and gathers is there at once."""

    rank, size, device = 1, 3, META

    def all_reduce(self, tensor: Tensor) -> Future[Any]:
        return done()

    def all_gather(self, tensor: Tensor) -> tuple[Tensor, Future[Any]]:
        return torch.empty(self.size, len(tensor), dtype=tensor.dtype, device=META), done()


def done() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(None)
    return future


def on_meta(dtype: torch.dtype = torch.float32, bucket: Bucket = VECTORS, group: Any = None) -> Delivery:
    """As on a GPU: the code is a tensor, and so is a loss scale."""
    code = torch.zeros((), dtype=torch.int64, device=META)
    group = group or MetaGroup()
    codes, scale = Codes(group.size, len(bucket.blocks)), torch.ones((), device=META)
    buffer = torch.empty(bucket.length, dtype=dtype, device=META)
    return Delivery(bucket, buffer, Iteration(3), 0, code, scale, group, codes)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """All gradients stay where they are."""
    monkeypatch.setattr(ON_DEVICE, lambda buffer: True)


def drained(carrying: Carrying, expected: int = 1) -> None:
    assert [begun.last for begun in carrying] == [*[False] * (expected - 1), True]


#: Each kind, each form of top-k's positions, and all that isn't one compressor.
WAITLESS = [
    "identity",
    "half",
    "integer",
    "integer:1000.3:bits=16:rounding=stochastic",
    "randomk:0.2",
    "randomk:0.7:unbiased=true",
    "topk:0.01",
    "topk:0.6",
    "sign",
    "sign:scaled",
    "natural",
    "terngrad:2.5",
    "qsgd-gather",
    "qsgd-gather:100:norm=max:bucket=64",
    "whole buckets",
    "several",
    "both ways",
    "both ways, added",
]


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("name", WAITLESS)
def test_nothing_waits_for_the_device(name: str) -> None:
    (family,) = ranks_of(METHODS[name], [True]).families
    for dtype in (torch.float32, torch.float16):
        work = on_meta(dtype)
        with Watch():
            drained(carried(family, work))
            assert family.accept(work.now) is None
        assert work.heard is not None
        assert work.heard.shape == (3,)
        assert work.heard.device == work.buffer.device == META


@pytest.mark.usefixtures("there")
def test_powersgd_does_not_wait() -> None:
    family = LowRank(PowerSGD(3), seed=1)
    for dtype in (torch.float32, torch.float16):
        work = on_meta(dtype, MATRICES)
        with Watch():
            drained(carried(family, work), 2)
            assert family.accept(work.now) is None
    assert family._q["layer0"].device == META


@pytest.mark.usefixtures("there")
def test_what_is_sent_as_it_is_does_not_wait() -> None:
    for dtype in (torch.float32, torch.float16):
        with Watch():
            drained(uncompressed(on_meta(dtype)))
            drained(carried(make_family(Plain(), VECTORS.blocks, rank=1, size=3), on_meta(dtype)))


def test_the_findings_of_a_bucket_do_not_wait() -> None:
    """Which layer is not finite, and whether the mean is."""
    state: Any = SimpleNamespace(_unread=[])
    work = on_meta()
    with Watch():
        device_kernels(META).flaw_of(work.buffer, work.bucket.blocks, NOT_FINITE)
        drained(uncompressed(work))
        State._note_flaws(state, work)


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("changed", [{}, {"error_feedback": True}, {"compress": "auto"}, {"holdout_every": 1}], ids=str)
def test_iterations_of_gradiveq_do_not_wait(changed: dict[str, Any]) -> None:
    """With the bases on the device, where the first iteration of a window copies them."""
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Linear(4, 4))
    parameters = Parameters(model)
    group: Any = SimpleNamespace(rank=0, size=1, all_reduce=lambda tensor: done())
    method = GradiVeQ(
        **{"warmup": 0, "sample": 5, "compress": 4, "n_components": 3, "holdout_every": 0, **changed}  # type: ignore[arg-type]
    )
    family = make_hook_family(method, model, parameters, group, seed=0, start=2, min_ratio=1.0, also=())
    assert isinstance(family, Windows)
    blocks, start = [], 0
    for index, (name, p) in enumerate(zip(parameters.names, parameters.tensors, strict=True)):
        blocks.append(Block(name, start, p.numel(), tuple(p.shape), False, index, tuple(p.stride())))
        start += p.numel()
    bucket = Bucket(tuple(blocks), start)
    for phase in ("warm-up", "sample"):
        family.schedule.load_state_dict({"phase": phase, "done": 0, "window": 0})
        for dtype in (torch.float32, torch.float16):
            with Watch():
                drained(carried(family, on_meta(dtype, bucket, group)))
            family.skip()

    sampler = family._new_sampler()
    for seed in range(5):
        sampler.add(np.random.default_rng(seed).standard_normal(len(family._sample)).astype(np.float32))
    dims = sampler.fit()
    family._use(sampler.rebuild(dims, [sampler.share(dims)[0]]))
    assert family._in_use is not None
    assert set(family._in_use.by_name) == {"0.weight"}
    family.schedule.load_state_dict({"phase": "compress", "done": 0, "window": 0})
    for first in (True, False, False):
        work = on_meta(bucket=bucket, group=group)
        if first:
            with pytest.raises(Waiting), Watch():
                drained(carried(family, work))
            family.skip()
            drained(carried(family, work))
        else:
            with Watch():
                drained(carried(family, work))
        assert work.heard is not None or first
        family.memory.commit()
