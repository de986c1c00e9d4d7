"""Who rated what, for collaborative filtering: MovieLens where it is given, made-up preferences where it isn't.

As He et al. 2017 and NVIDIA's DeepLearningExamples have it. A rating counts as "likes it", whatever its value. Of each
user the last one by time is held out, and the model ranks it among 100 items that the user never rated: Hit-Rate@10 is
the share of users for whom it comes among the first 10. In training each liked item comes with 4 random ones that count
as "doesn't like it", drawn anew in every epoch.

MovieLens must not be passed on, so none of it is shipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch

from bench.data.files import check_md5, find, reading, reading_member
from bench.data.share import NEGATIVES, TEST_NEGATIVES, DataError, Shares, check_seed, check_share, generator

Ids = npt.NDArray[np.int64]

#: MD5 -> archive, as GroupLens publishes it; and where the ratings are in it.
ARCHIVES = {"cd245b17a1ae2cc31bb14903e1204af3": "ml-20m.zip", "0e33842e24a9c977be4e0107933c0723": "ml-100k.zip"}
MEMBERS = {"ml-20m.zip": "ml-20m/ratings.csv", "ml-100k.zip": "ml-100k/u.data"}
#: Users, items and ratings, as published, of users with at least `MIN_RATINGS`: by them a data set is recognised.
KNOWN = {(138_493, 26_744, 20_000_263): "MovieLens-20M", (943, 1_682, 100_000): "MovieLens-100K"}

MIN_RATINGS = 20
NUM_TEST_NEGATIVES = 100


@dataclass(frozen=True, eq=False)
class Ratings:
    """Which user likes which item; both are numbered from 0 in the order of the file.

    Attributes:
        name: the name of the data set, such as 'MovieLens-20M'.
        source: what exactly was used, for people to read beside the results.
        num_users: each has at least one item to train on.
        num_items: including those that are only held out.
        train: (user, item) pairs, int64 of shape (num_train, 2), by user and then by time.
        test_items: the item held out of each user, int64 of shape (num_users,).
        test_negatives: items that the user didn't rate, int64 of shape (num_users, 100), without repetition.
    """

    name: str
    source: str
    num_users: int
    num_items: int
    train: Ids
    test_items: Ids
    test_negatives: Ids


def load_ratings(spec: str | os.PathLike[str] | None = None, *, seed: int = 0) -> Ratings:
    """Read ratings into memory. Two million took 10 s and 0.6 GB on one core; both grow with the number.

    Args:
        spec: None for made-up ratings (`made_ratings`); otherwise the path of the published ml-20m.zip or ml-100k.zip,
            of a file like their ratings.csv or u.data (with a header line or without, commas or tabs between user,
            item, rating and time), or of a folder with one of these; .gz, .bz2 or .xz where the name ends so.
        seed: the seed of the items that each held-out one is ranked among.
    Raises:
        DataError: if the file is missing or damaged, or has too few ratings or items.
    """
    if spec is None:
        return made_ratings(seed=seed)
    path = Path(spec)
    if path.is_dir():
        names = ("ratings.csv", "u.data")
        found = next((file for name in names if (file := find(path, name))), None)
        if found is None:
            raise DataError(f"{path}: no {' or '.join(names)} in it")
        path = found
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder; expected MovieLens' ratings.csv or u.data, or their archive")
    if path.suffix == ".zip":
        member = MEMBERS[ARCHIVES[check_md5(path, ARCHIVES)]]
        with reading_member(path, ARCHIVES, member) as stream:
            table = _read(stream, f"{path}: {member}")
    else:
        with reading(path) as stream:
            table = _read(stream, f"{path}")
    return _split(*table, path.name, f"ratings in {path.name}, not a MovieLens data set as published", f"{path}", seed)


def made_ratings(num_users: int = 600, num_items: int = 800, rank: int = 6, *, seed: int = 0) -> Ratings:
    """Ratings of people who aren't there: preferences of low rank, 20 to 60 ratings each.

    User u likes item i by the product of two standard normal vectors of `rank` numbers, plus how popular the item is,
    plus noise (Gumbel), and rates those that it likes best, in random order.

    Args:
        num_users: at least 1.
        num_items: at least 160; those that nobody comes to rate are left out.
        rank: the rank of the preferences, at least 1.
        seed: 0 … 2**63 - 1.
    Raises:
        DataError: if too few users make too few items known, so that not 100 remain that one of them didn't rate.
        ValueError: if an argument is outside its bounds.
    """
    for value, least, name in ((num_users, 1, "num_users"), (num_items, 160, "num_items"), (rank, 1, "rank")):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    check_seed(seed)
    rng = np.random.Generator(np.random.Philox(seed))
    tastes = rng.standard_normal((num_users, rank)) @ rng.standard_normal((rank, num_items)) * (2 / rank**0.5)
    liking = tastes + rng.standard_normal(num_items) + rng.gumbel(size=(num_users, num_items))
    counts = rng.integers(MIN_RATINGS, 61, num_users)
    best = np.argsort(-liking, axis=1, kind="stable")
    items = np.concatenate([rng.permutation(row[:count]) for row, count in zip(best, counts, strict=True)])
    users = np.repeat(np.arange(num_users), counts)
    what = f"made here, preferences of rank {rank} (seed {seed}), not MovieLens"
    return _split(users, items, np.arange(len(users)), "made-up ratings", what, "made-up ratings", seed)


def _read(stream: IO[bytes], where: str) -> tuple[Ids, Ids, Ids]:
    """User, item and time of each line."""
    first = stream.readline()
    separator = "\t" if b"\t" in first else ","
    fields = first.strip().split(separator.encode())
    if len(fields) != 4:
        raise DataError(f"{where}: {len(fields)} column(s) in line 1, expected user, item, rating and time")
    if not fields[0].isdigit():  # a header
        first = stream.readline()
    if not first.strip():
        raise DataError(f"{where}: no ratings")
    try:
        columns = np.loadtxt(
            chain([first], stream), np.int64, comments=None, delimiter=separator, usecols=(0, 1, 3), ndmin=2
        )
    except (ValueError, OverflowError) as error:
        raise DataError(f"{where}: not a table of ratings ({str(error).splitlines()[0]})") from error
    user, item, time = columns.T
    return user, item, time


def _split(users: Ids, items: Ids, times: Ids, name: str, what: str, where: str, seed: int) -> Ratings:
    """Number users and items, hold out each user's last item, and draw what it is ranked among."""
    _, positions, counts = np.unique(users, return_inverse=True, return_counts=True)
    often = counts[positions] >= MIN_RATINGS
    left_out = int((counts < MIN_RATINGS).sum())
    if not often.any():
        raise DataError(f"{where}: no user with at least {MIN_RATINGS} ratings")
    users, items, times = users[often], items[often], times[often]
    user, num_users = _numbered(users)
    item, num_items = _numbered(items)
    published = KNOWN.get((num_users, num_items, len(user)))

    order = np.lexsort((times, user))  # stable: of one second, as in the file
    pairs = np.stack((user[order], item[order]), axis=1)
    _, first = np.unique(pairs @ np.array([num_items, 1]), return_index=True)
    pairs = pairs[np.sort(first)]
    last = np.append(pairs[1:, 0] != pairs[:-1, 0], True)
    per_user = np.bincount(pairs[:, 0], minlength=num_users)
    if per_user.min() < 2:
        raise DataError(f"{where}: a user with ratings of one item only, expected at least 2, one to hold out")
    if num_items - per_user.max() < NUM_TEST_NEGATIVES:
        raise DataError(
            f"{where}: {num_items:,} items of which one user rated {per_user.max():,}; expected {NUM_TEST_NEGATIVES} "
            "that it didn't rate, to rank the held-out one among"
        )
    name = published or name
    if published:
        what = "as published"
    elif left_out:
        what += f"; {left_out:,} user(s) with fewer than {MIN_RATINGS} left out"
    return Ratings(
        name=name,
        source=f"{name} ({len(pairs):,} ratings by {num_users:,} users of {num_items:,} items; {what})",
        num_users=num_users,
        num_items=num_items,
        train=pairs[~last],
        test_items=pairs[last, 1],
        test_negatives=_unrated(pairs, num_users, num_items, seed),
    )


def _numbered(ids: Ids) -> tuple[Ids, int]:
    """The same ids as numbers from 0 in the order of their first appearance, and how many there are."""
    _, first, positions = np.unique(ids, return_index=True, return_inverse=True)
    numbers = np.empty(len(first), np.int64)
    numbers[np.argsort(first)] = np.arange(len(first))
    return numbers[positions], len(first)


def _unrated(pairs: Ids, num_users: int, num_items: int, seed: int) -> Ids:
    """Items for each user, drawn uniformly without repetition from those that are in none of its pairs.

    Drawn at random and again where that was rated or drawn before: each of the possible sets is as likely.
    """
    rng = generator(seed, TEST_NEGATIVES, 0)
    rated = np.sort(pairs @ np.array([num_items, 1]))
    drawn = rng.integers(num_items, size=(num_users, NUM_TEST_NEGATIVES))
    user = np.arange(num_users)
    while len(user):
        rows = drawn[user]
        keys = user[:, None] * num_items + rows
        found = rated[np.minimum(np.searchsorted(rated, keys), len(rated) - 1)] == keys
        order = np.argsort(rows, axis=1, kind="stable")
        in_order = np.take_along_axis(rows, order, axis=1)
        repeated = np.zeros_like(found)
        np.put_along_axis(repeated, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], axis=1)
        again = found | repeated
        rows[again] = rng.integers(num_items, size=int(again.sum()))
        drawn[user] = rows
        user = user[again.any(axis=1)]
    return drawn


class Interactions(Shares):
    """The training batches of one rank: liked items, and random ones beside them. Which, see `Shares`.

    An epoch has every pair of `Ratings.train` and `negatives` copies of it, all in one random order. The item of a copy
    is drawn uniformly from all items (as in NVIDIA's code, so it may be one that the user likes), from (seed,
    iteration) for the whole global batch.

    Args:
        ratings: whose training pairs are used.
        batch_size: examples per rank and iteration.
        rank: the rank of the caller, 0 … size - 1.
        size: number of ranks.
        negatives: random items per liked one, at least 0.
        seed: 0 … 2**63 - 1; the same on all ranks.
        device: where the batches are put.
    Raises:
        DataError: if a global batch has more examples than an epoch.
        ValueError: if another argument is outside its bounds.
    """

    def __init__(
        self,
        ratings: Ratings,
        batch_size: int,
        rank: int = 0,
        size: int = 1,
        *,
        negatives: int = 4,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if negatives < 0:
            raise ValueError(f"negatives must be at least 0, got {negatives}")
        num_examples = (1 + negatives) * len(ratings.train)
        super().__init__(num_examples, batch_size, rank, size, seed, items="examples", source=ratings.source)
        self.ratings = ratings
        self.device = torch.device(device)

    def batch(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The batch of an iteration, counted from 0 over all epochs.

        Returns:
            Users, items, int64 of shape (batch_size,); labels, float32 likewise: 1 where the user likes the item.
        """
        indices = self.indices(iteration)
        num_train = len(self.ratings.train)
        users, items = self.ratings.train[indices % num_train].T
        liked = indices < num_train
        draws = generator(self.seed, NEGATIVES, iteration).integers(
            self.ratings.num_items, size=self.size * self.batch_size
        )
        items = np.where(liked, items, draws[self.part])
        return (
            torch.from_numpy(users.copy()).to(self.device),
            torch.from_numpy(items).to(self.device),
            torch.from_numpy(liked.astype(np.float32)).to(self.device),
        )


def evaluation_rows(
    ratings: Ratings, num_users: int, *, device: str | torch.device = "cpu"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What is ranked, for `num_users` users at a time, the last time maybe fewer.

    Yields:
        Users and items, int64 of shape (up to num_users, 101): in each row the held-out item comes first.
    Raises:
        ValueError: if num_users is below 1.
    """
    check_share(num_users, 0, 1)
    rows = np.concatenate((ratings.test_items[:, None], ratings.test_negatives), axis=1)
    for start in range(0, len(rows), num_users):
        items = torch.from_numpy(rows[start : start + num_users])
        users = torch.arange(start, start + len(items))[:, None].expand_as(items)
        yield users.to(device), items.to(device)


def hits(scores: torch.Tensor, k: int = 10) -> torch.Tensor:
    """Whether each user's held-out item comes among the first k: Hit-Rate@k is the mean over all users.

    Args:
        scores: scores of shape (n, 101), of the items as `evaluation_rows` has them. An item with the same score as the
            held-out one comes before it, so that a model that can't tell them apart has no hits.
        k: at least 1.
    Returns:
        bool of shape (n,).
    """
    return (scores[:, 1:] >= scores[:, :1]).sum(1) < k
