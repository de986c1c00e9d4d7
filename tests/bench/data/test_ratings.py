"""Tables of ratings, good and bad, what is held out, what it is ranked among, and the batches."""

import gzip
import hashlib
import lzma
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.data import DataError, ratings
from bench.data.ratings import Interactions, Ratings, evaluation_rows, hits, load_ratings, made_ratings

NUM_ITEMS = 170


def table(seed: int = 0) -> list[tuple[int, int, float, int]]:
    """User, item, rating, time: 24 users with 20 to 45 ratings and 4 with 19, in random order."""
    rng = np.random.default_rng(seed)
    rows = []
    for user, count in enumerate((20, 45, 19, 30, 21, 33, 20) * 4):
        items = rng.permutation(NUM_ITEMS)[:count]
        times = rng.permutation(1_000)[:count] + 880_000_000
        for item, time in zip(items.tolist(), times.tolist(), strict=True):
            rows.append((7 + 13 * user, 5 + 3 * item, int(rng.integers(1, 11)) / 2, time))
    return [rows[i] for i in rng.permutation(len(rows))]


def and_one_more(rows: list[tuple[int, int, float, int]], unrated: int = 100) -> list[tuple[int, int, float, int]]:
    """With another user, who rates all items that are known without it but for so many."""
    counts = Counter(user for user, *_ in rows)
    items = sorted({item for user, item, *_ in rows if counts[user] >= 20})
    return [*rows, *((500, item, 4.0, time) for time, item in enumerate(items[unrated:]))]


def as_csv(rows: list[tuple[int, int, float, int]]) -> str:
    return "userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},{r},{t}\r\n" for u, i, r, t in rows)


def as_tabs(rows: list[tuple[int, int, float, int]], header: bool) -> str:
    lines = [f"{u}\t{i}\t{r:g}\t{t}" for u, i, r, t in rows]
    return "\n".join(["UserID\tMovieID\tRating\tTimestamp"] * header + lines) + "\n"


def same(first: Ratings, second: Ratings) -> None:
    for name in ("num_users", "num_items"):
        assert getattr(first, name) == getattr(second, name)
    for name in ("train", "test_items", "test_negatives"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


# ---- reading


def test_every_form_is_the_same_table(tmp_path: Path) -> None:
    rows = and_one_more(table())
    files = {
        "a/ratings.csv": as_csv(rows).encode(),
        "b/u.data": as_tabs(rows, header=False).encode(),
        "c/u.data.xz": lzma.compress(as_tabs(rows, header=True).encode()),
        "d/ratings.csv.gz": gzip.compress(as_csv(rows).encode()),
    }
    read = []
    for name, data in files.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(data)
        read += [load_ratings(path), load_ratings(path.parent)]
    for other in read[1:]:
        same(read[0], other)
    assert read[0].source == (
        f"ratings.csv ({len(rows) - 76} ratings by 25 users of {read[0].num_items} items; "
        "ratings in ratings.csv, not a MovieLens data set as published; 4 user(s) with fewer than 20 left out)"
    )


def test_against_a_user_by_user_reading(tmp_path: Path) -> None:
    rows = and_one_more(table())
    (tmp_path / "ratings.csv").write_text(as_csv(rows))
    result = load_ratings(tmp_path)
    counts = Counter(user for user, *_ in rows)
    kept = [row for row in rows if counts[row[0]] >= 20]
    users = list(dict.fromkeys(user for user, *_ in kept))
    items = list(dict.fromkeys(item for _, item, *_ in kept))
    assert (result.num_users, result.num_items) == (len(users), len(items))
    train = []
    for number, user in enumerate(users):
        mine = sorted((row for row in kept if row[0] == user), key=lambda row: row[3])
        numbers = [items.index(row[1]) for row in mine]
        train += [(number, item) for item in numbers[:-1]]
        assert result.test_items[number] == numbers[-1]
        negatives = result.test_negatives[number].tolist()
        assert len(set(negatives)) == 100
        assert not set(negatives) & set(numbers)
        assert 0 <= min(negatives) <= max(negatives) < len(items)
    assert list(map(tuple, result.train.tolist())) == train
    assert result.train.dtype == result.test_items.dtype == result.test_negatives.dtype == np.int64


def test_an_item_rated_twice_counts_once_at_its_first_time(tmp_path: Path) -> None:
    rows = table()
    again = [(user, item, 1.0, 999_999_999) for user, item, _, _ in rows if user == 7][:3]
    for name, content in (("a", rows), ("b", rows + again)):
        (tmp_path / name).write_text(as_csv(content))
    same(load_ratings(tmp_path / "a"), load_ratings(tmp_path / "b"))


def test_published_sizes_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table()
    (tmp_path / "u.data").write_text(as_tabs(rows, header=False))
    plain = load_ratings(tmp_path)
    assert plain.name == "u.data"
    size = (plain.num_users, plain.num_items, len(rows) - 76)
    monkeypatch.setattr(ratings, "KNOWN", {size: "MovieLens-Tiny"})
    known = load_ratings(tmp_path)
    assert known.name == "MovieLens-Tiny"
    assert known.source.endswith("; as published)")


def test_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ml-20m/ratings.csv", as_csv(table()))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    with pytest.raises(
        DataError, match=rf"some\.zip: [\d,]+ bytes with MD5 {md5}, expected MD5 cd245b17\w+ \(ml-20m\.zip\) or"
    ):
        load_ratings(path)
    monkeypatch.setattr(ratings, "ARCHIVES", {md5: "ml-20m.zip"})
    (tmp_path / "t.csv").write_text(as_csv(table()))
    same(load_ratings(path), load_ratings(tmp_path / "t.csv"))


# ---- bad input


def missing_column(text: str) -> str:
    return "".join(line.rsplit(",", 1)[0] + "\n" for line in text.splitlines())


BAD = [
    pytest.param(lambda text: text.replace("880000", "88x", 1), "not a table of ratings (could not", id="number"),
    pytest.param(lambda text: text + "3,4\n", "not a table of ratings (", id="short line"),
    pytest.param(missing_column, "3 column(s) in line 1, expected user, item, rating and", id="column"),
    pytest.param(lambda text: "", "1 column(s) in line 1, expected user, item, rating and time", id="empty"),
    pytest.param(lambda text: text.splitlines()[0] + "\n", "no ratings", id="header only"),
    pytest.param(
        lambda text: "\n".join(text.splitlines()[:15]) + "\n", "no user with at least 20 ratings", id="few ratings"
    ),
]


@pytest.mark.parametrize(("damage", "message"), BAD)
def test_damaged_tables(damage, message: str, tmp_path: Path) -> None:
    text = as_csv([(user, item, rating, 880_000_001) for user, item, rating, _ in table()])
    (tmp_path / "ratings.csv").write_text(damage(text))
    with pytest.raises(DataError) as caught:
        load_ratings(tmp_path)
    assert f"ratings.csv: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_few_items(tmp_path: Path) -> None:
    (tmp_path / "f").write_text(as_csv(and_one_more(table())))
    num_items = load_ratings(tmp_path / "f").num_items
    (tmp_path / "f").write_text(as_csv(and_one_more(table(), 99)))
    message = rf"f: {num_items} items of which one user rated {num_items - 99}; expected 100 that it didn't rate"
    with pytest.raises(DataError, match=message):
        load_ratings(tmp_path / "f")


def test_a_user_of_one_item(tmp_path: Path) -> None:
    (tmp_path / "f").write_text(as_csv([*table(), *((900, 5, 4.0, time) for time in range(20))]))
    with pytest.raises(DataError, match="f: a user with ratings of one item only, expected at least 2"):
        load_ratings(tmp_path / "f")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no ratings\.csv or u\.data in it"):
        load_ratings(tmp_path)
    with pytest.raises(
        DataError, match=r"nowhere: no such file or folder; expected MovieLens' ratings\.csv or u\.data"
    ):
        load_ratings(tmp_path / "nowhere")
    (tmp_path / "u.data.gz").write_bytes(gzip.compress(as_tabs(table(), header=True).encode())[:-20])
    with pytest.raises(DataError, match=r"u\.data\.gz: damaged or truncated \.gz file"):
        load_ratings(tmp_path)


# ---- what held-out items are ranked among


def test_negatives_are_drawn_uniformly() -> None:
    """Each of 120 items that nobody rated is drawn as often as any other."""
    num_users, num_items = 400, 130
    pairs = np.array([(user, item) for user in range(num_users) for item in range(10)])
    drawn = ratings._unrated(pairs, num_users, num_items, seed=1)
    assert drawn.min() == 10
    assert all(len(set(row)) == 100 for row in drawn.tolist())
    counts = np.bincount(drawn.ravel(), minlength=num_items)[10:]
    expected = num_users * 100 / 120
    # Draws without repetition vary less than chi-squared with 119 degrees, which exceeds 175 in 0.1 % of the cases.
    assert ((counts - expected) ** 2 / expected).sum() < 175


def test_negatives_where_exactly_as_many_are_left() -> None:
    pairs = np.array([(0, item) for item in range(20)] + [(1, item) for item in range(60, 80)])
    drawn = ratings._unrated(pairs, 2, 120, seed=0)
    assert sorted(drawn[0]) == list(range(20, 120))
    assert sorted(drawn[1]) == [*range(60), *range(80, 120)]


def test_negatives_depend_on_the_seed_alone() -> None:
    state = str(np.random.get_state())  # noqa: NPY002
    first, again, other = (load_ratings(seed=seed) for seed in (1, 1, 2))
    same(first, again)
    assert not np.array_equal(first.test_negatives, other.test_negatives)
    assert str(np.random.get_state()) == state  # noqa: NPY002


# ---- made-up ratings


def test_made_up_ratings_say_so() -> None:
    made = load_ratings()
    assert made.source.startswith("made-up ratings (")
    assert made.source.endswith("made here, preferences of rank 6 (seed 0), not MovieLens)")
    assert made.num_users == 600
    counts = np.bincount(made.train[:, 0]) + 1
    assert counts.min() == 20
    assert counts.max() == 60


def test_made_up_ratings_have_a_structure_to_learn() -> None:
    """The likings' low rank shows: the first singular directions rank held-out items far better than chance."""
    made = made_ratings()
    liked = np.zeros((made.num_users, made.num_items), np.float32)
    liked[made.train[:, 0], made.train[:, 1]] = 1
    left, values, right = np.linalg.svd(liked, full_matrices=False)
    scores = torch.from_numpy((left[:, :7] * values[:7]) @ right[:7])
    rate = torch.cat([hits(scores[users, items]) for users, items in evaluation_rows(made, 250)]).float().mean()
    assert rate > 0.3  # 10 of 101 by chance
    popular = torch.from_numpy(liked.sum(0))
    by_popularity = torch.cat([hits(popular[items]) for _, items in evaluation_rows(made, 250)]).float().mean()
    assert rate > by_popularity + 0.05


@pytest.mark.parametrize(("name", "value"), [("num_users", 0), ("num_items", 159), ("rank", 0), ("seed", -1)])
def test_made_up_ratings_arguments(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .* {'got ' + str(value)}"):
        made_ratings(**{name: value})


# ---- batches


def test_an_epoch_has_every_pair_and_its_negatives() -> None:
    made = made_ratings(30, 200)
    ranks = [Interactions(made, 50, rank, 3, negatives=2) for rank in range(3)]
    per_epoch = 3 * len(made.train) // 150
    assert all(batches.batches_per_epoch == per_epoch for batches in ranks)
    liked: list[tuple[int, int]] = []
    random: list[tuple[int, int]] = []
    for iteration in range(per_epoch):
        for batches in ranks:
            users, items, labels = batches.batch(iteration)
            assert users.shape == items.shape == labels.shape == (50,)
            assert (users.dtype, items.dtype, labels.dtype) == (torch.int64, torch.int64, torch.float32)
            for user, item, label in zip(users.tolist(), items.tolist(), labels.tolist(), strict=True):
                (liked if label else random).append((user, item))
    pairs = Counter(map(tuple, made.train.tolist()))
    assert not Counter(liked) - pairs
    dropped = 3 * len(made.train) - 150 * per_epoch
    assert len(made.train) - dropped <= len(liked) <= len(made.train)
    of_user = np.bincount(made.train[:, 0], minlength=30)
    drawn = np.bincount([user for user, _ in random], minlength=30)
    assert (drawn <= 2 * of_user).all()
    assert drawn.sum() >= 2 * of_user.sum() - dropped
    counts = np.bincount([item for _, item in random], minlength=made.num_items)
    expected = len(random) / made.num_items
    assert ((counts - expected) ** 2 / expected).sum() < 270  # chi-squared, 199 degrees: 99.9 %


def test_examples_do_not_depend_on_the_number_of_ranks() -> None:
    made = made_ratings(30, 200)
    for iteration in (0, 1, 30):
        whole = Interactions(made, 60, seed=3).batch(iteration)
        parts = [Interactions(made, 20, rank, 3, seed=3).batch(iteration) for rank in range(3)]
        for index in range(3):
            assert torch.equal(whole[index], torch.cat([part[index] for part in parts]))
    other = Interactions(made, 60, seed=4).batch(0)
    assert not torch.equal(other[0], Interactions(made, 60, seed=3).batch(0)[0])


def test_interactions_arguments() -> None:
    made = made_ratings(30, 200)
    with pytest.raises(DataError, match=r"made-up ratings: \d+ items of which one user rated \d+; expected 100"):
        made_ratings(2, 200)
    with pytest.raises(ValueError, match="negatives must be at least 0, got -1"):
        Interactions(made, 5, negatives=-1)
    with pytest.raises(DataError, match=r"2 ranks x 9999 examples each need 19,998 training examples, but there are"):
        Interactions(made, 9_999, 0, 2)
    assert (Interactions(made, 9, negatives=0).batch(0)[2] == 1).all()
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(evaluation_rows(made, 0))


def test_evaluation_rows_have_the_held_out_item_first() -> None:
    made = made_ratings(30, 200)
    batches = list(evaluation_rows(made, 8))
    assert [len(users) for users, _ in batches] == [8, 8, 8, 6]
    users, items = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
    assert users.shape == items.shape == (30, 101)
    assert (users == np.arange(30)[:, None]).all()
    assert np.array_equal(items[:, 0], made.test_items)
    assert np.array_equal(items[:, 1:], made.test_negatives)


def test_hits() -> None:
    scores = torch.zeros(4, 101)
    scores[0, 0] = 1  # first
    scores[1, 1:10] = 1
    scores[1, 0] = 0.5  # tenth
    scores[2, 1:11] = 1
    scores[2, 0] = 0.5  # eleventh
    assert hits(scores).tolist() == [True, True, False, False]  # the last one can't be told from the others
    assert hits(scores, 1).tolist() == [True, False, False, False]
