"""GoogLeNet for 32x32 images (Szegedy et al. 2015), as in kuangliu/pytorch-cifar and the code of Sahu et al. 2021.

Batch norm follows every convolution, all of which have biases; the 5x5 convolutions are two of 3x3; there are no side
classifiers. The paper's λ = 1/(2·√k_min) of 6.37e-3 (CIFAR-10) and 6.32e-3 (CIFAR-100) are this model's, k_min being
⌈0.1% of d⌉. (Its code has another for CIFAR-100, of 3 convolutions before the first module: that would give 6.25e-3.)
"""

from __future__ import annotations

import torch
from torch import nn

from bench.models.initial import build_classifier, scaled

STEM = 192
#: Channels of each module: 1x1 | before 3x3, 3x3 | before 5x5, 5x5 | after the maximum; by the size of the image.
MODULES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


def conv(in_channels: int, channels: int, kernel: int) -> nn.Sequential:
    """A convolution that keeps the image's size, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2), nn.BatchNorm2d(channels), nn.ReLU()
    )


class Inception(nn.Module):
    """Four branches side by side; `channels` is a row of `MODULES`."""

    def __init__(self, in_channels: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        single, before3, three, before5, five, pool = channels
        self.branches = nn.ModuleList(
            (
                conv(in_channels, single, 1),
                nn.Sequential(conv(in_channels, before3, 1), conv(before3, three, 3)),
                nn.Sequential(conv(in_channels, before5, 1), conv(before5, five, 3), conv(five, five, 3)),
                nn.Sequential(nn.MaxPool2d(3, 1, padding=1), conv(in_channels, pool, 1)),
            )
        )
        self.out_channels = single + three + five + pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class GoogLeNet(nn.Module):
    """A convolution, nine modules at 32, 16 and 8 pixels, the mean over pixels, a linear layer."""

    def __init__(self, num_classes: int, width: float) -> None:
        super().__init__()
        channels = scaled(STEM, width)
        layers: list[nn.Module] = [conv(3, channels, 3)]
        for i, modules in enumerate(MODULES):
            if i:
                layers.append(nn.MaxPool2d(3, 2, padding=1))
            for row in modules:
                module = Inception(channels, tuple(scaled(count, width) for count in row))
                layers.append(module)
                channels = module.out_channels
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 images of shape (n, 3, 32, 32) to logits of shape (n, num_classes)."""
        logits: torch.Tensor = self.linear(self.features(x).mean((2, 3)))
        return logits


def googlenet(num_classes: int, *, width: float = 1.0, seed: int = 0) -> GoogLeNet:
    """GoogLeNet: 6,166,250 parameters for 10 classes, 6,258,500 for 100.

    Arguments and errors are those of `initial.build_classifier`.
    """
    return build_classifier(GoogLeNet, num_classes, width, seed)
