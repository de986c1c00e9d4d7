"""The models of the three papers, with initial weights that depend on their seed alone.

resnet20 … resnet110       He et al. 2016, for CIFAR: GradiVeQ's paper (ResNet-32)
alexnet, alexnet-fc,       DAWNBench's: the layer-wise paper, which also has ResNet-50 (on ImageNet:
resnet9                    `resnet50(1000, imagenet=True)`)
resnet18, senet18,         the hard-threshold paper, which also has the language model `lstm` and the
googlenet                  recommender `ncf`
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from bench.models.cifar_resnet import ResidualBlock, ResNet, resnet32, resnet_cifar
from bench.models.dawnbench import alexnet, alexnet_fc, resnet9
from bench.models.googlenet import googlenet
from bench.models.language import LanguageModel, detached, lstm
from bench.models.ncf import NeuMF, ncf
from bench.models.resnet import resnet18, resnet50
from bench.models.senet import senet18

#: Models of images: name -> builder(num_classes, seed=…), from float32 (n, 3, 32, 32) to logits (n, num_classes).
MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": partial(resnet_cifar, 20),
    "resnet32": resnet32,
    "resnet44": partial(resnet_cifar, 44),
    "resnet56": partial(resnet_cifar, 56),
    "resnet110": partial(resnet_cifar, 110),
    "alexnet": alexnet,
    "alexnet-fc": alexnet_fc,
    "resnet9": resnet9,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "senet18": senet18,
    "googlenet": googlenet,
}

__all__ = [
    "MODELS",
    "LanguageModel",
    "NeuMF",
    "ResNet",
    "ResidualBlock",
    "alexnet",
    "alexnet_fc",
    "detached",
    "googlenet",
    "lstm",
    "ncf",
    "resnet9",
    "resnet18",
    "resnet32",
    "resnet50",
    "resnet_cifar",
    "senet18",
]
