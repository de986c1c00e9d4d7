"""ResNet-18 and ResNet-50: for 32x32 images as in kuangliu/pytorch-cifar, ResNet-50 also for ImageNet as torchvision's.

The hard-threshold paper's 11,173,962 parameters are those of this ResNet-18. Weights begin as PyTorch's constructors
draw them; those of the ImageNet form's convolutions as in He et al. 2015, which torchvision does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from bench.models.initial import build_classifier, pytorch_default, scaled

WIDTHS = (64, 128, 256, 512)


class Basic(nn.Module):
    """Two 3x3 convolutions, and a 1x1 convolution as shortcut where the shape changes."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = shortcut(in_channels, channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.residual(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, the last to four times the channels; the shortcut likewise."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = shortcut(in_channels, out_channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.residual(x) + self.shortcut(x))


def shortcut(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """Nothing where the shape stays the same."""
    if stride == 1 and in_channels == channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class WideResNet(nn.Module):
    """A stem, four stages of which all but the first halve the image, the mean over pixels, a linear layer."""

    def __init__(
        self,
        block: type[Basic] | type[Bottleneck],
        num_blocks: Sequence[int],
        num_classes: int,
        width: float,
        imagenet: bool,
    ) -> None:
        super().__init__()
        widths = [scaled(channels, width) for channels in WIDTHS]
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        if imagenet:
            self.stem.append(nn.MaxPool2d(3, 2, padding=1))
        stages = []
        channels = widths[0]
        for i, (width_here, count) in enumerate(zip(widths, num_blocks, strict=True)):
            for j in range(count):
                stages.append(block(channels, width_here, 2 if i and not j else 1))
                channels = block.expansion * width_here
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 images of shape (n, 3, height, width) to logits of shape (n, num_classes)."""
        logits: torch.Tensor = self.fc(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


def resnet18(num_classes: int, *, width: float = 1.0, seed: int = 0) -> WideResNet:
    """ResNet-18 for 32x32 images: 11,173,962 parameters for 10 classes, 11,220,132 for 100.

    Arguments and errors are those of `initial.build_classifier`.
    """
    make = partial(WideResNet, Basic, (2, 2, 2, 2), imagenet=False)
    return build_classifier(make, num_classes, width, seed)


def resnet50(num_classes: int, *, width: float = 1.0, imagenet: bool = False, seed: int = 0) -> WideResNet:
    """ResNet-50: 23,520,842 parameters for 10 classes at 32x32; 25,557,032 for ImageNet's 1,000.

    Args:
        imagenet: begin with a 7x7 convolution of stride 2 and a maximum over 3x3 of stride 2, for images of about 224
            pixels a side, and with weights as in He et al. 2015; otherwise with a 3x3 convolution.

    Other arguments and errors are those of `initial.build_classifier`.
    """
    make = partial(WideResNet, Bottleneck, (3, 4, 6, 3), imagenet=imagenet)
    return build_classifier(make, num_classes, width, seed, _he if imagenet else pytorch_default)


def _he(module: nn.Module, generator: torch.Generator) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    else:
        pytorch_default(module, generator)
