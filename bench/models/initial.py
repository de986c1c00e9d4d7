"""Initial weights that are a function of the seed alone, whatever was drawn before and by however many threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def build(make: Callable[[], Model], initialise: Callable[[nn.Module, torch.Generator], None], seed: int) -> Model:
    """A float32 model on the CPU with the weights of `seed`; the global generators are left as they were.

    Args:
        make: constructs the model. Its layers draw nothing: they are made where there is no memory.
        initialise: called with each module of the model, in order; has to fill what the module itself holds.
        seed: the seed of its generator.
    """
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            initialise(module, generator)
    assert all(parameter.isfinite().all() for parameter in model.parameters()), "a module was left without weights"
    return model


def build_classifier(
    make: Callable[[int, float], Model],
    num_classes: int,
    width: float,
    seed: int,
    initialise: Callable[[nn.Module, torch.Generator], None] | None = None,
) -> Model:
    """A model for images, as `build` makes it.

    Args:
        make: constructs it from the next two.
        num_classes: at least 1.
        width: factor of all channels, for small runs.
        seed: the seed of the initial weights, which are as PyTorch's constructors draw them, or as `initialise` does.
    Raises:
        ValueError: num_classes or width is outside its bounds.
    """
    check_classes(num_classes)
    return build(partial(make, num_classes, width), initialise or pytorch_default, seed)


def pytorch_default(module: nn.Module, generator: torch.Generator) -> None:
    """Draw weights as the layers' own constructors do: what the papers' released code had for its image models.

    Weights and biases of convolutions and linear layers are uniform in ±1/√fan-in, those of an LSTM in
    ±1/√(hidden size); batch norm begins as the identity.
    """
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        bound = 1 / math.sqrt(module.weight[0].numel())
        nn.init.uniform_(module.weight, -bound, bound, generator=generator)
        if module.bias is not None:
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
    elif isinstance(module, nn.LSTM):
        bound = 1 / math.sqrt(module.hidden_size)
        for parameter in module.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    elif isinstance(module, nn.BatchNorm2d):
        module.reset_parameters()


def check_classes(num_classes: int) -> None:
    """A ValueError unless there is a class."""
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")


def scaled(channels: int, width: float) -> int:
    """A layer's channels in a model `width` times as wide, at least 1.

    Raises:
        ValueError: if width isn't positive.
    """
    if not width > 0:
        raise ValueError(f"width must be above 0, got {width}")
    return max(1, round(channels * width))
