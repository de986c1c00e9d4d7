"""What the hard-threshold paper trains (Table 2 of Sahu et al. 2021): images, a text, ratings; from a run's spec."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.data import Dataset, load
from bench.data.ratings import Interactions, Ratings, evaluation_rows, hits, load_ratings
from bench.data.text import Corpus, Streams, evaluation_streams, load_text
from bench.models import MODELS, LanguageModel, NeuMF, detached, lstm, ncf
from bench.simulated.training import Images, SimulatedTask

#: Streams that a text is tested in, and users that are ranked at a time.
TEST_STREAMS = 10
TEST_USERS = 512


class Language(SimulatedTask):
    """A recurrent model of a text: cross entropy; "perplexity" of the test text and its logarithm, "loss".

    Each worker has streams of its own and carries the network's state along them, from zeros at each epoch.

    Args:
        batch_size: streams of each worker.
        length: words of each in an iteration.
    """

    def __init__(
        self, model: LanguageModel, corpus: Corpus, batch_size: int, workers: int, *, length: int, device: str
    ) -> None:
        self.model, self.corpus, self.length, self.device = model, corpus, length, device
        self._streams = [
            Streams(corpus, batch_size, rank, workers, length=length, device=device) for rank in range(workers)
        ]
        self._states = [model.initial_state(batch_size) for _ in range(workers)]
        self._fresh = model.initial_state(batch_size)
        self.iterations_per_epoch = self._streams[0].batches_per_epoch

    def batch(self, iteration: int, rank: int) -> tuple[int, Tensor, Tensor]:
        words, targets, begins = self._streams[rank].batch(iteration)
        if begins:
            self._states[rank] = self._fresh
        return rank, words, targets

    def loss(self, batch: tuple[int, Tensor, Tensor]) -> Tensor:
        rank, words, targets = batch
        logits, state = self.model(words, self._states[rank])
        self._states[rank] = detached(state)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def evaluate(self) -> dict[str, float]:
        assert isinstance(self.model, LanguageModel)
        state = self.model.initial_state(TEST_STREAMS)
        total, count = 0.0, 0
        for words, targets in evaluation_streams(self.corpus, TEST_STREAMS, length=self.length, device=self.device):
            logits, state = self.model(words, state)
            total += float(functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            count += targets.numel()
        loss = total / count
        return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}

    def state_dict(self) -> dict[str, Any]:
        return {"states": self._states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._states = [tuple(part.to(self.device) for part in pair) for pair in state["states"]]


class Recommendation(SimulatedTask):
    """Whether a user likes an item: binary cross entropy; "hit_rate" is Hit-Rate@10 on the items held out.

    Args:
        batch_size: examples of each worker and iteration, of which four in five are random items.
        seed: the seed of the order and of the random items.
    """

    def __init__(
        self, model: NeuMF, ratings: Ratings, batch_size: int, workers: int, *, seed: int, device: str
    ) -> None:
        self.model, self.ratings, self.batch_size, self.device = model, ratings, batch_size, device
        self._batches = Interactions(ratings, workers * batch_size, seed=seed, device=device)
        self.iterations_per_epoch = self._batches.batches_per_epoch
        self._last: tuple[int, tuple[Tensor, Tensor, Tensor]] | None = None

    def batch(self, iteration: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The global batch is drawn once; a worker has its stretch, as `Interactions` with its rank would give."""
        if self._last is None or self._last[0] != iteration:
            self._last = iteration, self._batches.batch(iteration)
        part = slice(rank * self.batch_size, (rank + 1) * self.batch_size)
        users, items, labels = self._last[1]
        return users[part], items[part], labels[part]

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        users, items, labels = batch
        return functional.binary_cross_entropy_with_logits(self.model(users, items), labels)

    def evaluate(self) -> dict[str, float]:
        found = [
            hits(self.model(users.flatten(), items.flatten()).view(users.shape))
            for users, items in evaluation_rows(self.ratings, TEST_USERS, device=self.device)
        ]
        return {"hit_rate": float(torch.cat(found).float().mean())}


@cache
def _images(path: str | None) -> Dataset:
    return load(path)


@cache
def _text(path: str | None, max_vocabulary: int | None) -> Corpus:
    return load_text(path, lower=True, max_vocabulary=max_vocabulary)


@cache
def _ratings(path: str | None) -> Ratings:
    return load_ratings(path)


def make(spec: Mapping[str, Any]) -> tuple[SimulatedTask, str]:
    """The task of a spec, with initial weights by its seed, and what its data are."""
    workers, seed, device, options = spec["workers"], spec["seed"], spec["device"], dict(spec["options"])
    if spec["kind"] == "images":
        dataset = _images(spec["data"])
        augment = options.pop("augment", True)
        model = MODELS[spec["network"]](dataset.num_classes, seed=seed, **options).to(device)
        return Images(model, dataset, spec["batch_size"], workers, seed=seed, augment=augment, device=device), (
            dataset.source
        )
    if spec["kind"] == "text":
        length = options.pop("length", 30)
        corpus = _text(spec["data"], options.pop("max_vocabulary", None))
        language = lstm(len(corpus.vocabulary), seed=seed, **options).to(device)
        return Language(language, corpus, spec["batch_size"], workers, length=length, device=device), corpus.source
    ratings = _ratings(spec["data"])
    network = ncf(ratings.num_users, ratings.num_items, seed=seed, **options).to(device)
    return Recommendation(network, ratings, spec["batch_size"], workers, seed=seed, device=device), ratings.source
