"""Neural collaborative filtering (NeuMF, He et al. 2017) as in NVIDIA's DeepLearningExamples and Sahu et al. 2021.

For MovieLens-20M's 138,493 users and 26,744 items it has 31,832,577 parameters; all but 107,073 are embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from bench.models.initial import build

EMBEDDING_STD = 0.01


class NeuMF(nn.Module):
    """Products of embeddings (matrix factorisation) beside a perceptron over other embeddings, joined by one neuron."""

    def __init__(self, num_users: int, num_items: int, factors: int, layers: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.mf_users = nn.Embedding(num_users, factors)
        self.mf_items = nn.Embedding(num_items, factors)
        self.mlp_users = nn.Embedding(num_users, layers[0] // 2)
        self.mlp_items = nn.Embedding(num_items, layers[0] // 2)
        self.mlp = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(layers))
        self.final = nn.Linear(layers[-1] + factors, 1)
        self.dropout = dropout

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Logits, float32 of shape (n,), that each user likes an item: int64 of shape (n,) both."""
        hidden = torch.cat((self.mlp_users(users), self.mlp_items(items)), 1)
        for layer in self.mlp:
            hidden = functional.dropout(functional.relu(layer(hidden)), self.dropout, self.training)
        joined = torch.cat((self.mf_users(users) * self.mf_items(items), hidden), 1)
        logits: torch.Tensor = self.final(joined)
        return logits.squeeze(1)


def ncf(
    num_users: int,
    num_items: int,
    *,
    factors: int = 64,
    layers: Sequence[int] = (256, 256, 128, 64),
    dropout: float = 0.5,
    seed: int = 0,
) -> NeuMF:
    """NeuMF with the initial weights of `seed`.

    Embeddings are normal with deviation 0.01, the perceptron's weights as in Glorot and Bengio 2010, the last neuron's
    as in LeCun et al. 1998 (both uniform), biases as PyTorch's constructor draws them: as in that code.

    Args:
        num_users: at least 1.
        num_items: at least 1.
        factors: dimensions of the embeddings whose product is taken.
        layers: sizes of the perceptron's input, which is even (two embeddings), and of its layers.
        dropout: probability after each of its layers, from 0 to below 1.
        seed: the seed of the initial weights.
    Raises:
        ValueError: if an argument is outside its bounds.
    """
    for value, name in ((num_users, "num_users"), (num_items, "num_items"), (factors, "factors")):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not layers or min(layers) < 1 or layers[0] % 2:
        raise ValueError(f"layers must be positive sizes, the first of them even (two embeddings), got {tuple(layers)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be from 0 to below 1, got {dropout}")
    return build(partial(NeuMF, num_users, num_items, factors, tuple(layers), dropout), _initialise, seed)


def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=EMBEDDING_STD, generator=generator)
    elif isinstance(module, nn.Linear):
        if module.out_features == 1:
            bound = math.sqrt(3 / module.in_features)
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
        else:
            nn.init.xavier_uniform_(module.weight, generator=generator)
        bound = 1 / math.sqrt(module.in_features)
        nn.init.uniform_(module.bias, -bound, bound, generator=generator)
