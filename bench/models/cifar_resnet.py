"""The residual networks for CIFAR of He et al. 2016, section 4.2."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from bench.models.initial import build, check_classes

WIDTHS = (16, 32, 64)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A).

    Where the block halves the image and widens it, the shortcut takes every second pixel and appends channels of zeros.

    Args:
        in_channels: channels of the input, of shape (n, in_channels, height, width).
        channels: channels of the output, of shape (n, channels, ceil(height / stride), ceil(width / stride)).
        stride: stride of the first convolution and the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride == 1 and not self.new_channels:
            return x
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 convolution, stages of `num_blocks` blocks at 32, 16 and 8 pixels, the mean over pixels, a linear layer."""

    def __init__(self, num_blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = self._stage(num_blocks, WIDTHS[0], WIDTHS[0], 1)
        self.layer2 = self._stage(num_blocks, WIDTHS[0], WIDTHS[1], 2)
        self.layer3 = self._stage(num_blocks, WIDTHS[1], WIDTHS[2], 2)
        self.fc = nn.Linear(WIDTHS[2], num_classes)

    @staticmethod
    def _stage(num_blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
        first = ResidualBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(ResidualBlock(channels, channels, 1) for _ in range(num_blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 images of shape (n, 3, 32, 32) to logits of shape (n, num_classes)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


def resnet_cifar(depth: int, num_classes: int, *, seed: int = 0) -> ResNet:
    """A residual network of 6n + 2 layers with the initial weights of `seed`, the same whatever was drawn before.

    Convolutions and the linear layer are drawn as in He et al. 2015 (variance 2 / fan-out; 1 / fan-in for the linear
    layer, which no ReLU follows); batch norm begins as the identity. The global generators are left as they were.

    Args:
        depth: 6n + 2 for n >= 1, such as 20, 32, 44, 56 or 110.
        num_classes: at least 1.
        seed: the seed of the initial weights.
    Raises:
        ValueError: if depth or num_classes is outside its bounds.
    """
    num_blocks, rest = divmod(depth - 2, 6)
    if num_blocks < 1 or rest:
        raise ValueError(f"depth must be 6n + 2 for n >= 1 (He et al. 2016, section 4.2), got {depth}")
    check_classes(num_classes)
    return build(partial(ResNet, num_blocks, num_classes), _he, seed)


def _he(module: nn.Module, generator: torch.Generator) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        module.reset_parameters()


def resnet32(num_classes: int, *, seed: int = 0) -> ResNet:
    """ResNet-32: 464,154 parameters for 10 classes, 470,004 for 100."""
    return resnet_cifar(32, num_classes, seed=seed)
