"""AlexNet and ResNet-9 for 32x32 images, as in the released code of Dutta et al. 2020, which is DAWNBench's.

    github.com/sands-lab/layer-wise-aaai20, CIFAR10/dawn.py and CIFAR10/alexnet.py; the ResNet is David Page's
    ("How to train your ResNet", 2018)

Convolutions and the last layer have no biases (but for `alexnet_fc`), logits are multiplied by 1/8, and weights begin
as PyTorch's constructors draw them.
"""

from __future__ import annotations

import torch
from torch import nn

from bench.models.initial import build_classifier, scaled

LOGITS_SCALE = 0.125


def conv_bn(in_channels: int, channels: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution without bias, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """x + f(x), where f is two convolutions with batch norm and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.res1 = conv_bn(channels, channels)
        self.res2 = conv_bn(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual: torch.Tensor = self.res2(self.res1(x))
        return x + residual


class Classifier(nn.Module):
    """What the images become until one pixel is left, then a linear layer without bias, times 1/8."""

    def __init__(self, features: nn.Sequential, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.linear = nn.Linear(channels, num_classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 images of shape (n, 3, 32, 32) to logits of shape (n, num_classes)."""
        logits: torch.Tensor = self.linear(self.features(x).flatten(1))
        return LOGITS_SCALE * logits


def resnet9(num_classes: int, *, width: float = 1.0, seed: int = 0) -> Classifier:
    """ResNet-9: 6,573,120 parameters for 10 classes.

        64 | 128, halved, residual | 256, halved | 512, halved, residual | largest of 4x4 | linear

    Arguments and errors are those of `initial.build_classifier`.
    """

    def make(num_classes: int, width: float) -> Classifier:
        prep, first, second, third = (scaled(channels, width) for channels in (64, 128, 256, 512))
        features = nn.Sequential(
            conv_bn(3, prep),
            nn.Sequential(conv_bn(prep, first), nn.MaxPool2d(2), Residual(first)),
            nn.Sequential(conv_bn(first, second), nn.MaxPool2d(2)),
            nn.Sequential(conv_bn(second, third), nn.MaxPool2d(2), Residual(third)),
            nn.MaxPool2d(4),
        )
        return Classifier(features, third, num_classes)

    return build_classifier(make, num_classes, width, seed)


def alexnet(num_classes: int, *, width: float = 1.0, seed: int = 0) -> Classifier:
    """AlexNet's convolutions with batch norm and one linear layer (`--network Alexnet`): 2,255,296 parameters for 10.

        64, stride 2, halved | 192, halved | 384 | 256 | 256, halved | largest of 2x2 | linear

    Arguments and errors are those of `initial.build_classifier`.
    """

    def make(num_classes: int, width: float) -> Classifier:
        channels = [scaled(count, width) for count in (64, 192, 384, 256, 256)]
        features = nn.Sequential(
            nn.Sequential(conv_bn(3, channels[0], stride=2), nn.MaxPool2d(2)),
            nn.Sequential(conv_bn(channels[0], channels[1]), nn.MaxPool2d(2)),
            conv_bn(channels[1], channels[2]),
            conv_bn(channels[2], channels[3]),
            nn.Sequential(conv_bn(channels[3], channels[4]), nn.MaxPool2d(2)),
            nn.MaxPool2d(2),
        )
        return Classifier(features, channels[4], num_classes)

    return build_classifier(make, num_classes, width, seed)


def alexnet_fc(num_classes: int, *, width: float = 1.0, seed: int = 0) -> nn.Sequential:
    """AlexNet with its three linear layers and dropout (`--network Alexnet1`): 23,272,266 parameters for 10 classes.

    Nine tenths of the parameters are in the first two linear layers, which says much about entire-model compression.
    The paper doesn't say which of the two it means. From float32 images of shape (n, 3, 32, 32) to logits of shape
    (n, num_classes). Arguments and errors are those of `initial.build_classifier`; `width` counts for the hidden layers
    as well.
    """
    halved = {1, 2, 5}  # the convolutions, from 1, that a maximum over 2x2 follows

    def make(num_classes: int, width: float) -> nn.Sequential:
        channels = [3, *(scaled(count, width) for count in (64, 192, 384, 256, 256))]
        hidden = scaled(4096, width)
        layers: list[nn.Module] = []
        for i in range(1, 6):
            layers += [nn.Conv2d(channels[i - 1], channels[i], 3, 2 if i == 1 else 1, padding=1), nn.ReLU()]
            if i in halved:
                layers.append(nn.MaxPool2d(2))
        layers += [nn.Flatten(), nn.Dropout(), nn.Linear(4 * channels[5], hidden), nn.ReLU()]
        layers += [nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)]
        return nn.Sequential(*layers)

    return build_classifier(make, num_classes, width, seed)
