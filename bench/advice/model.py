"""The model that `bench.advise` is asked about, and what an iteration of it takes here.

Timed is the calling thread's processor time, which other processes don't disturb much (with several threads the calling
one takes part in all that they do). When a gradient is ready is what a post-accumulate-grad hook says, the moment in
which DDP learns of it.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from bench.models import MODELS, LanguageModel, NeuMF, lstm, ncf, resnet50

#: What an image model of ours takes unless `--input` says otherwise.
CIFAR_INPUT = (3, 32, 32)
#: Iterations that are not counted, and those whose median is.
WARM_UP, REPEATS = 2, 5
#: DDP's own, MiB: the first bucket's limit and the others'.
FIRST_BUCKET_MB, BUCKET_MB = 1.0, 25.0
MIB = 1 << 20
#: Models of ours that are more than a name in `bench.models.MODELS`: the sizes of the papers' data sets.
OTHERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "resnet50-imagenet": ("3x224x224 images, 1,000 classes", lambda: resnet50(1000, imagenet=True)),
    "lstm": ("35 words of a vocabulary of 28,869", lambda: lstm(28_869)),
    "ncf": ("users and items of MovieLens-20M", lambda: ncf(138_493, 26_744)),
}
WORDS = 35


class ModelError(ValueError):
    """The model can't be built, or not be run on such an input; one line."""


@contextmanager
def others_code(title: str) -> Iterator[None]:
    """Somebody else's code runs within: whatever it raises, or that it leaves Python, is told in one line.

    Raises:
        ModelError: begins with `title`.
    """
    try:
        yield
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        said = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{title}: {type(error).__name__}{said and f': {said}'}") from error


@dataclass(frozen=True)
class Profile:
    """What an iteration computes; seconds.

    Attributes:
        forward_s, backward_s, update_s: medians.
        ready_s: by index of the parameters that require a gradient: when in backward it is there.
        flops: operations of forward and backward, as `torch.utils.flop_counter` counts them.
        batch_size: examples of the batch that was timed.
    """

    forward_s: float
    backward_s: float
    update_s: float
    ready_s: tuple[float, ...]
    flops: int
    batch_size: int

    @property
    def seconds(self) -> float:
        return self.forward_s + self.backward_s + self.update_s

    def lasting(self, seconds: float) -> Profile:
        """The same proportions in another time."""
        factor = seconds / self.seconds
        return replace(
            self,
            forward_s=self.forward_s * factor,
            backward_s=self.backward_s * factor,
            update_s=self.update_s * factor,
            ready_s=tuple(factor * one for one in self.ready_s),
        )


@dataclass(frozen=True)
class Task:
    """A model and a batch for it.

    Attributes:
        name: as it was asked for, fit for a file.
        model: in training mode.
        loss: gives the loss of a model on a number of examples, which are made of random numbers.
        images: whether it takes 3x32x32 images, and classifies them.
    """

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, int], Tensor]
    images: bool


def build(name: str, input_shape: Sequence[int] | None = None, vocabulary: int | None = None) -> Task:
    """One of `bench.models`, or what `package.module:function` returns when it is called without arguments.

    Args:
        input_shape: shape of one example, without the batch.
        vocabulary: the example consists of whole numbers below this; None for normally distributed float32.
    Raises:
        ModelError: there is no such model, or it is no module.
    """
    shape = tuple(CIFAR_INPUT if input_shape is None else input_shape)
    if name in OTHERS:
        if input_shape is not None or vocabulary is not None:
            raise ModelError(f"`--input` and `--vocabulary` are not for {name}, which takes {OTHERS[name][0]}")
        model = OTHERS[name][1]()
        if isinstance(model, LanguageModel):
            return language_task(name, model)
        if isinstance(model, NeuMF):
            return ratings_task(name, model)
        shape = (3, 224, 224)
    elif name in MODELS:
        model = MODELS[name](100, seed=0)
    else:
        model = _imported(name)
        if input_shape is None:
            raise ModelError(f"`--input` is needed with {name}: the shape of one example, such as 3x224x224")
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"`--model` {name} has no parameter that requires a gradient")
    return tensor_task(name.replace(":", ".").replace("/", "-"), model, shape, vocabulary)


def tensor_task(name: str, model: nn.Module, shape: Sequence[int], vocabulary: int | None = None) -> Task:
    """A model of one tensor; arguments as for `build`."""
    generator = torch.Generator().manual_seed(0)

    def loss(model: nn.Module, batch_size: int) -> Tensor:
        size = (batch_size, *shape)
        if vocabulary is None:
            return loss_of(model(torch.randn(size, generator=generator)), generator)
        return loss_of(model(torch.randint(vocabulary, size, generator=generator)), generator)

    return Task(name, model.train(), loss, tuple(shape) == CIFAR_INPUT and vocabulary is None)


def language_task(name: str, model: LanguageModel) -> Task:
    """Streams of `WORDS` words, from a zero state."""
    num_words, state = len(model.bias), model.initial_state

    def loss(model: nn.Module, batch_size: int) -> Tensor:
        words = torch.randint(num_words, (WORDS, batch_size))
        logits, _ = model(words, state(batch_size))
        return functional.cross_entropy(logits.flatten(0, 1), words.flatten())

    return Task(name, model.train(), loss, False)


def ratings_task(name: str, model: NeuMF) -> Task:
    """Users, items, and whether the one likes the other."""
    num_users, num_items = model.mf_users.num_embeddings, model.mf_items.num_embeddings

    def loss(model: nn.Module, batch_size: int) -> Tensor:
        users, items = torch.randint(num_users, (batch_size,)), torch.randint(num_items, (batch_size,))
        return functional.binary_cross_entropy_with_logits(model(users, items), torch.rand(batch_size).round())

    return Task(name, model.train(), loss, False)


def _imported(name: str) -> nn.Module:
    module_name, colon, function_name = name.partition(":")
    if not colon:
        known = ", ".join([*MODELS, *OTHERS])
        raise ModelError(f"`--model` must be one of {known}, or package.module:function, got {name!r}")
    if os.getcwd() not in sys.path and "" not in sys.path:  # as with `python -m`, if a script was started
        sys.path.insert(0, os.getcwd())
    with others_code(f"`--model` {name} can't be imported"):
        function = getattr(importlib.import_module(module_name), function_name)
    with others_code(f"`--model` {name}: {function_name}() failed"):
        model = function()
    if not isinstance(model, nn.Module):
        raise ModelError(f"`--model` {name}: {function_name}() must return a torch.nn.Module, got {type(model)}")
    return model


def tensor_of(output: Any) -> Tensor:
    """What a model returns, or the first of it.

    Raises:
        ModelError: it is no floating-point tensor.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if isinstance(first, Tensor) and first.is_floating_point():
        return first
    raise ModelError(f"the model must return a floating-point tensor, or a tuple with one first, got {type(first)}")


def loss_of(output: Any, generator: torch.Generator) -> Tensor:
    """A scalar to go backward from: cross entropy with random labels for (n, classes), else the mean square."""
    scores = tensor_of(output)
    if scores.dim() == 2 and scores.shape[1] > 1:
        labels = torch.randint(scores.shape[1], (len(scores),), generator=generator)
        return functional.cross_entropy(scores, labels)
    return scores.square().mean()


def profile(task: Task, batch_size: int, *, warm_up: int = WARM_UP, repeats: int = REPEATS) -> Profile:
    """Train for a few iterations on random numbers, by SGD with momentum; the last gradients stay.

    Raises:
        ModelError: the model doesn't take such an input, or a parameter gets no gradient.
    """
    parameters = [(name, p) for name, p in task.model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in parameters], lr=1e-3, momentum=0.9)
    moments = [0.0] * len(parameters)

    def note(index: int) -> Callable[[Tensor], None]:
        def noted(_: Tensor) -> None:
            moments[index] = time.thread_time()

        return noted

    trained = f"`--model` {task.name} can't be trained on such an `--input`"
    with others_code(trained), FlopCounterMode(display=False) as counter:
        task.loss(task.model, batch_size).backward()  # type: ignore[no-untyped-call]
    idle = [name for name, p in parameters if p.grad is None]
    if idle:
        raise ModelError(
            f"`--model` {task.name}: {len(idle)} parameters get no gradient from its loss, first {idle[0]}"
        )
    handles = [
        p.register_post_accumulate_grad_hook(note(index))  # type: ignore[no-untyped-call]
        for index, (_, p) in enumerate(parameters)
    ]
    rows = []
    for _ in range(warm_up + repeats):
        optimizer.zero_grad(set_to_none=True)
        with others_code(trained):
            begin = time.thread_time()
            loss = task.loss(task.model, batch_size)
            forward = time.thread_time()
            loss.backward()  # type: ignore[no-untyped-call]
        backward = time.thread_time()
        optimizer.step()
        rows.append(
            [
                forward - begin,
                backward - forward,
                time.thread_time() - backward,
                *(moment - forward for moment in moments),
            ]
        )
    for handle in handles:
        handle.remove()
    middle = [median(column) for column in zip(*rows[warm_up:], strict=True)]
    backward_s = middle[1]
    ready_s = tuple(min(backward_s, one) for one in middle[3:])
    return Profile(middle[0], backward_s, middle[2], ready_s, counter.get_total_flops(), batch_size)


class Assigned(NamedTuple):
    """A bucket of DDP's: its parameters, and when in backward the last of their gradients is there, seconds."""

    parameters: list[nn.Parameter]
    ready_s: float

    @property
    def length(self) -> int:
        """Elements."""
        return sum(p.numel() for p in self.parameters)


def assign_buckets(model: nn.Module, ready_s: Sequence[float], bucket_mb: float | None = None) -> list[Assigned]:
    """DDP's buckets after its first iteration: parameters in the order in which their gradients are ready.

    A bucket is closed once it has its limit, so it may have more: 1 MiB for the first and 25 MiB for the others, or
    `bucket_mb` for all if it is given. Parameters of another type are in buckets of their own. No bucket is begun with
    before the one in front of it.

    Args:
        ready_s: when in backward each gradient is ready, for the parameters that require one.
        bucket_mb: DDP's `bucket_cap_mb`; None for its default.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    limits = (FIRST_BUCKET_MB, BUCKET_MB) if bucket_mb is None else (bucket_mb,)
    closed: list[list[int]] = []
    opened: dict[torch.dtype, list[int]] = {}
    filled: dict[torch.dtype, int] = defaultdict(int)
    number: dict[torch.dtype, int] = defaultdict(int)
    for index in sorted(range(len(parameters)), key=ready_s.__getitem__):
        p = parameters[index]
        opened.setdefault(p.dtype, []).append(index)
        filled[p.dtype] += p.numel() * p.element_size()
        if filled[p.dtype] >= limits[min(number[p.dtype], len(limits) - 1)] * MIB:
            closed.append(opened.pop(p.dtype))
            filled[p.dtype] = 0
            number[p.dtype] += 1
    closed += opened.values()
    latest = accumulate((max(ready_s[index] for index in bucket) for bucket in closed), max)
    return [Assigned([parameters[index] for index in of], moment) for of, moment in zip(closed, latest, strict=True)]
