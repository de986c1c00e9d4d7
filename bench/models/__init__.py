"""The models of the three papers."""

from bench.models.cifar_resnet import MODELS, Block, ResNet, resnet32, resnet_cifar

__all__ = ["MODELS", "Block", "ResNet", "resnet32", "resnet_cifar"]
