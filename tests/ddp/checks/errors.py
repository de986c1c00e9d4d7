"""Bad input: what is refused, in which words, on every rank."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import gradiveq.ddp as ddp
from gradiveq import GradiVeQ, Plain, QSGDRing
from gradiveq.compressors import COMPRESSORS
from gradiveq.compressors.half import Half
from gradiveq.compressors.topk import TopK
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.methods import Accordion, AutoThreshold, Compressed
from gradiveq.powersgd import PowerSGD
from gradiveq.report import FitError
from tests.ddp.checks.methods import windows
from tests.ddp.checks.training import REMEMBERING, STATEFUL
from tests.support.ddp_harness import Net, batch, check, hooked, raises, rank, sgd, size, staying, step, train, wrap


@check
def refused_when_the_state_is_made() -> None:
    net = Net()
    with raises(ValueError, "`model` has none", "also"):
        ddp.State(nn.Linear(3, 3), GradiVeQ())
    with raises(ValueError, "no parameter that requires a gradient"):
        ddp.State(nn.Sequential(), Plain())
    with raises(TypeError, "at every hop", "qsgd-gather"):
        ddp.State(net, QSGDRing())  # type: ignore[arg-type]
    with raises(TypeError, "learning rate"):
        ddp.State(net, Accordion(PowerSGD(2), PowerSGD(1)))  # type: ignore[arg-type]
    with raises(TypeError, "noise"):
        ddp.State(net, AutoThreshold())  # type: ignore[arg-type]
    with raises(TypeError, "must be Plain", "topk"):
        ddp.State(net, "topk")  # type: ignore[arg-type]
    with raises(ValueError, "`start_iteration` must be at least 2", "got 1"):
        ddp.State(net, Plain(), start_iteration=1)
    with raises(ValueError, "`nonfinite`", "skip"):
        ddp.State(net, Plain(), nonfinite="skip")  # type: ignore[arg-type]
    with raises(ValueError, "`min_ratio` must be above 0"):
        ddp.State(net, Plain(), min_ratio=0)
    with raises(ValueError, "`also` is for GradiVeQ"):
        ddp.State(net, Plain(), also=("fc.weight",))
    with raises(TypeError, "the string 'fc.weight'"):
        ddp.State(net, GradiVeQ(), also="fc.weight")
    with raises(TypeError, "`loss_scale` must be a function", "GradScaler"):
        ddp.State(net, Plain(), loss_scale=torch.amp.GradScaler("cpu"))  # type: ignore[arg-type]
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)), nn.Conv2d(3, 3, 3).double())
    with raises(ValueError, "that is a parameter", "weight_norm", "in float32"):
        ddp.State(normed, GradiVeQ())
    with raises(ValueError, "matches none of the 6 parameters", "fc2"):
        ddp.State(net, GradiVeQ(), also=("fc2.*",))
    with raises(ValueError, "two or more dimensions", "fc.bias"):
        ddp.State(net, GradiVeQ(), also=("fc.bias",))
    for form in ("scaled", "update"):
        with raises(ValueError, "form 'gradient'", form):
            ddp.State(net, Compressed(TopK(), feedback=ErrorFeedback(form)))  # type: ignore[arg-type]
    with raises(ValueError, "different buckets"):
        ddp.State(net, Compressed(TopK(), granularity=("conv*",)))
    with raises(ValueError, "`workers` must be at least"):
        ddp.State(net, Half(workers=1))
    with raises(ValueError, "matches no layer"):
        ddp.State(net, Compressed(TopK(), overrides=(("head.*", TopK()),)))
    outside = dist.new_group([0])
    if rank() != 0:
        with pytest.raises(ValueError, match="isn't in `process_group`"):
            ddp.State(net, Plain(), process_group=outside)


class Named(nn.Module):
    def __init__(self, name: str, width: int = 8) -> None:
        super().__init__()
        self.add_module(name, nn.Conv2d(3, width, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = next(self.children())(x)
        return out


@check
def ranks_that_differ() -> None:
    last = size() - 1
    x, _ = batch(0)
    model, _ = hooked(Named("body" if rank() < last else "trunk"), Plain())
    with raises(ValueError, "differ", "model.body.weight", "missing on", f"rank {last}"):
        model(x).sum().backward()
    for options in (
        {"method": TopK(0.1 if rank() < last else 0.2)},
        {"method": Plain(), "seed": 0 if rank() < last else 1},
        {"method": windows(), "min_ratio": 1.0 if rank() < last else 2.0},
        {"method": Plain(), "nonfinite": "fail" if rank() < last else "propagate"},
        {"method": Plain(), "loss_scale": None if rank() < last else lambda: 2.0},
    ):
        model, _ = hooked(Net(), **options)
        with raises(ValueError, "differ", f"rank {last}"):
            model(x).sum().backward()
    model, state = hooked(Net(), REMEMBERING)
    optimizer = sgd(model)
    train(model, range(3), optimizer)
    earlier = state.state_dict()
    train(model, range(3, 4), optimizer)
    with raises(ValueError, "iteration is 4", f"3 on rank {last}"):
        state.load_state_dict(earlier if rank() == last else state.state_dict())
    train(model, range(4, 5), optimizer)


@check
def one_state_for_two_models() -> None:
    """In one backward pass; one for each is right."""
    nets = nn.ModuleList([Net(), Net()])
    state = ddp.State(nets, PowerSGD(2))
    models = [wrap(net) for net in nets]
    for model in models:
        model.register_comm_hook(state, ddp.hook)
    x, y = batch(0)
    with raises(RuntimeError, "is not of the model that iteration 0 was of", "a State of its own"):
        sum(F.cross_entropy(model(x), y) for model in models).backward()


@check
def samples_that_pca_fails_on() -> None:
    """Of one layer, whose variance overflows; the rank that had to fit it is named on all."""
    net = Net()
    model, state = hooked(net, windows())
    net.conv2.weight.register_hook(lambda grad: grad.sign() * 2e19 * (1 + torch.rand_like(grad)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(model, range(6), optimizer)
    with raises(FitError, "before iteration 6", "conv2.weight on rank 0", "is not finite in float32"):
        step(model, optimizer, 6)
    assert state.phase == "sample"


@check
def a_model_that_changes() -> None:
    """A parameter that is replaced on one rank: DDP would wait for its gradient."""
    for method, on_device in (
        (Plain(), False),
        (REMEMBERING, False),
        (REMEMBERING, True),
        (PowerSGD(2), False),
        (PowerSGD(2), True),
        (COMPRESSORS["adacomp"](), False),
    ):
        for at in (1, 4):
            # Of its own, as the other ranks begin exchanges that rank 0 never does.
            group = dist.new_group(list(range(size())), timeout=timedelta(seconds=5))
            net = Net()
            model, _ = hooked(net, method, wrapping={"process_group": group})
            optimizer = sgd(model)
            train(model, range(at), optimizer)
            if rank() == 0:
                net.conv1.weight = nn.Parameter(net.conv1.weight.detach().clone())
            said = ["conv1.weight was replaced in the model", "on rank 0", "make a new State"]
            if on_device and method == PowerSGD(2) and at == 4 and rank() != 0:  # which has two rounds
                said = ["a worker is gone, or didn't answer"]
            with raises(Exception, *said), staying(on_device):
                step(model, optimizer, at)


@check
def a_state_of_another_model() -> None:
    """Wrapped after the state was made, with a layer that this one doesn't know."""
    net = Net()
    state = ddp.State(net, Plain())
    net.fc = nn.Linear(8 * 36, 10)
    model = wrap(net)
    model.register_comm_hook(state, ddp.hook)
    x, y = batch(0)
    with raises(Exception, "is in one bucket with parameters", "was not made of"):
        F.cross_entropy(model(x), y).backward()
    state = ddp.State(Named("body"), Plain())
    model = wrap(Net())
    model.register_comm_hook(state, ddp.hook)
    with raises(Exception, "was not made of"):
        F.cross_entropy(model(x), y).backward()


@check
def sparse_gradients() -> None:
    net = nn.Sequential(nn.EmbeddingBag(10, 4, mode="sum", sparse=True), nn.Linear(4, 2))
    model, _ = hooked(net, Plain())
    with raises(Exception, "gradients must be dense", "0.weight"):
        model(torch.tensor([[1, 2]])).sum().backward()


@check
def checkpoints_of_something_else() -> None:
    model, state = hooked(Net(), REMEMBERING)
    train(model, range(3))
    saved = state.state_dict()
    with raises(ValueError, "another model or method", "method is", "there and", "here"):
        hooked(Net(), STATEFUL["powersgd"])[1].load_state_dict(saved)
    with raises(ValueError, "another model or method", "seed is 0 there and 1 here"):
        hooked(Net(), REMEMBERING, seed=1)[1].load_state_dict(saved)
    with raises(ValueError, "another model or method", "model.conv1.weight is", "missing here"):
        hooked(Named("body"), REMEMBERING)[1].load_state_dict(saved)
    fresh = hooked(Net(), REMEMBERING)[1]
    with raises(ValueError, "an empty list"):
        fresh.load_state_dict([])
    with raises(ValueError, "this is rank"):
        fresh.load_state_dict({**saved, "rank": (rank() + 1) % size()})
    with raises(ValueError, f"one of {size() + 1} workers", "'sum'", "'drop'"):
        fresh.load_state_dict({**saved, "size": size() + 1})
    with raises(ValueError, "must be of ranks 0 ... 2"):
        fresh.load_state_dict([{**saved, "size": 3, "rank": 0}], memories="sum")
    with raises(ValueError, "different iterations"):
        fresh.load_state_dict([{**saved, "rank": 0}, {**saved, "rank": 1, "iteration": 1}])
    with raises(ValueError, "`memories` must be"):
        fresh.load_state_dict({**saved, "size": 3}, memories="keep")  # type: ignore[arg-type]

    family = saved["family"]
    memory = family["memory"]
    for damaged, *words in (
        ({}, "no 'identity', but nothing"),
        (None, "a list of those of all ranks, got NoneType"),
        ([None], "got NoneType"),
        ({"model": model.state_dict(), "hook": saved}, "no 'identity', but 'model', 'hook'"),
        ({**saved, "iteration": "x"}, "a str as 'iteration'"),
        ({**saved, "traffic": [1] * 4}, "is damaged"),
        ({**saved, "family": {}}, "is damaged", "KeyError: 'memory'"),
        ({**saved, "family": {"memory": {name: p[:1] for name, p in memory.items()}}}, "of shape (", "got (1,"),
        ({**saved, "family": {"memory": {**memory, "fc2": memory["fc.bias"]}}}, "fc2 must be nothing here"),
    ):
        with raises(ValueError, "on rank 0, rank 1", *words):
            fresh.load_state_dict(damaged)
        if rank() == 0:  # the others' are good
            damaged = saved
        with raises(ValueError, f"on {', '.join(f'rank {one}' for one in range(1, size()))}", *words):
            fresh.load_state_dict(damaged)
    for name, wrong, word in (
        ("powersgd", {"q": {"fc.weight": torch.ones(3, 2)}}, "Q of fc.weight must be of shape (288, any), got (3, 2)"),
        ("gradiveq", {"bases": [{}]}, "is damaged"),
    ):
        model, state = hooked(Net(), STATEFUL[name])
        train(model, range(6))
        saved = state.state_dict()
        with raises(ValueError, word):
            state.load_state_dict({**saved, "family": {**saved["family"], **wrong}})
        train(model, range(6, 8))
    assert fresh.iteration == 0
