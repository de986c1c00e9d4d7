"""A language model of LSTM layers as Sahu et al. 2021 took it from PowerSGD's code, and that from PyTorch's example.

At its 650 units, 3 layers and a vocabulary of 28,869 words it has 28,949,319 parameters: one matrix, 650 floats a word,
serves as embedding and as weights of the output (Press and Wolf 2017).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from bench.models.initial import build, pytorch_default

State = tuple[torch.Tensor, torch.Tensor]

EMBEDDING_BOUND = 0.1


class LanguageModel(nn.Module):
    """Embedding, dropout, LSTM layers with dropout between them, dropout, the embedding's transpose and a bias."""

    def __init__(self, vocabulary_size: int, units: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocabulary_size, units))
        self.lstm = nn.LSTM(units, units, num_layers, dropout=dropout if num_layers > 1 else 0.0)
        self.bias = nn.Parameter(torch.empty(vocabulary_size))
        self.dropout = dropout

    def forward(self, words: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """The logits of each next word.

        Args:
            words: int64 of shape (length, n).
            state: as `initial_state` or the previous call returned it; `detached` where no gradient shall flow back.
        Returns:
            float32 of shape (length, n, vocabulary_size), and the state after the last words.
        """
        embedded = functional.dropout(functional.embedding(words, self.embedding), self.dropout, self.training)
        outputs, state = self.lstm(embedded, state)
        outputs = functional.dropout(outputs, self.dropout, self.training)
        return functional.linear(outputs, self.embedding, self.bias), state

    def initial_state(self, num_streams: int) -> State:
        """Zeros: hidden and cell states, each float32 of shape (num_layers, num_streams, units)."""
        zeros = self.bias.new_zeros(self.lstm.num_layers, num_streams, self.lstm.hidden_size)
        return zeros, zeros


def detached(state: State) -> State:
    """The same state without its history."""
    hidden, cell = state
    return hidden.detach(), cell.detach()


def lstm(
    vocabulary_size: int, *, units: int = 650, num_layers: int = 3, dropout: float = 0.4, seed: int = 0
) -> LanguageModel:
    """The language model with the initial weights of `seed`.

    The embedding is uniform in ±0.1, the bias 0, the LSTM as PyTorch's constructor draws it.

    Args:
        vocabulary_size: number of words, at least 1.
        units: units of the embedding and of each layer, at least 1.
        num_layers: layers of the LSTM, at least 1.
        dropout: probability, from 0 to below 1.
        seed: the seed of the initial weights.
    Raises:
        ValueError: if an argument is outside its bounds.
    """
    for value, name in ((vocabulary_size, "vocabulary_size"), (units, "units"), (num_layers, "num_layers")):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be from 0 to below 1, got {dropout}")

    def initialise(module: nn.Module, generator: torch.Generator) -> None:
        if isinstance(module, LanguageModel):
            nn.init.uniform_(module.embedding, -EMBEDDING_BOUND, EMBEDDING_BOUND, generator=generator)
            nn.init.zeros_(module.bias)
        else:
            pytorch_default(module, generator)

    return build(partial(LanguageModel, vocabulary_size, units, num_layers, dropout), initialise, seed)
