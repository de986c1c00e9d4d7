"""SENet-18 for 32x32 images, as in the released code of Sahu et al. 2021.

    github.com/sands-lab/rethinking-sparsification, cnn-lstm/tasks/cifar_architectures/senet.py

It isn't kuangliu's: every convolution has a bias, blocks end with a ReLU before they are gated, and the last stage has
516 channels, not 512. The paper's thresholds show that it was used: λ = 1/(2·√k_min) with k_min = ⌈0.1% of d⌉ is
4.68e-3 for 10 and for 100 classes, as stated; 512 channels would give 4.71e-3 and 4.70e-3, kuangliu's 11,260,354
parameters 4.71e-3.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from bench.models.initial import build_classifier, scaled

WIDTHS = (64, 128, 256, 516)
REDUCTION = 16  #: channels of a block for each that its gate has between its two linear layers


class GatedBlock(nn.Module):
    """relu(gate(f(x))·f(x) + shortcut(x)), where the gate, one number a channel, sees the means over pixels."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride))
            self.shortcut.append(nn.BatchNorm2d(channels))
        squeezed = max(1, channels // REDUCTION)
        self.gate = nn.Sequential(nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, channels), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = self.residual(x)
        gate = self.gate(residual.mean((2, 3)))
        return functional.relu(gate[:, :, None, None] * residual + self.shortcut(x))


class SENet(nn.Module):
    """A 3x3 convolution, four stages of two blocks of which all but the first halve the image, a linear layer."""

    def __init__(self, num_classes: int, width: float) -> None:
        super().__init__()
        widths = [scaled(channels, width) for channels in WIDTHS]
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1), nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks = []
        channels = widths[0]
        for i, width_here in enumerate(widths):
            blocks += [GatedBlock(channels, width_here, 2 if i else 1), GatedBlock(width_here, width_here, 1)]
            channels = width_here
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 images of shape (n, 3, 32, 32) to logits of shape (n, num_classes)."""
        logits: torch.Tensor = self.linear(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


def senet18(num_classes: int, *, width: float = 1.0, seed: int = 0) -> SENet:
    """SENet-18: 11,389,726 parameters for 10 classes, 11,436,256 for 100.

    Arguments and errors are those of `initial.build_classifier`.
    """
    return build_classifier(SENet, num_classes, width, seed)
