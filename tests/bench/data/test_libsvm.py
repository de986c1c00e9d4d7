"""LIBSVM files, good and bad, and the points that are made in madelon's place."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.data import DataError
from bench.data.libsvm import KNOWN, load_libsvm, make_madelon


def text(features: np.ndarray, labels: np.ndarray) -> str:
    """A file's text; zeros are left out."""
    return "".join(
        f"{label:+d} " + " ".join(f"{i + 1}:{value!r}" for i, value in enumerate(row.tolist()) if value) + "\n"
        for row, label in zip(features, labels.tolist(), strict=True)
    )


def points(num_points: int = 7, num_features: int = 9) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    features = rng.standard_normal((num_points, num_features)) * (rng.random((num_points, num_features)) < 0.6)
    features[0, -1] = 0.1  # so that the file has them all
    return features, np.where(np.arange(num_points) % 3 == 1, 1, -1)


@pytest.mark.parametrize(
    ("end", "compress"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
    ids=["plain", "gz", "bz2", "xz"],
)
def test_a_file_is_read_bit_by_bit(end: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    features, labels = points()
    path = tmp_path / f"some.svm{end}"
    path.write_bytes(compress(text(features, labels).encode()))
    read, signs, source = load_libsvm(path, "some")
    assert np.array_equal(read, features)
    assert np.array_equal(signs, labels)
    assert read.dtype == signs.dtype == np.float64
    assert read.flags.c_contiguous
    assert source == "some (7 points; 9 raw features)"


def test_features_that_are_nowhere_set_are_there(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("-1 3:485\n1 1:2 7:4.5\n")
    features, _, source = load_libsvm(tmp_path / "m", "madelon")
    assert features.shape == (2, 500)
    assert dict(zip(*(index.tolist() for index in np.nonzero(features)), strict=True)) == {0: 2, 1: 6}
    assert source == "madelon (2 points, published are 2,000; 500 raw features)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"-1 1:3 2:x\n1 1:2\n", r"f\.svm: not in LIBSVM form \("),
        (b"-1 0:3\n1 1:2\n", r"f\.svm: not in LIBSVM form \("),
        (b"-1 1:3\n1 5\n", r"f\.svm: not in LIBSVM form \("),
        (b"-1 501:3\n1 5:1\n", r"f\.svm: not in LIBSVM form \("),
        (b"", r"f\.svm: no points, expected at least 2"),
        (b"0 1:3\n1 1:2\n2 1:2", r"f\.svm: labels 0, 1, 2, expected -1 and 1"),
        (b"1 1:3\n1 1:2\n", r"f\.svm: labels 1, expected -1 and 1"),
        (b"1 1:3\n-1 1:2 4:inf\n", r"f\.svm: inf in line 2, feature 4"),
    ],
)
def test_damaged_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "f.svm").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_libsvm(tmp_path / "f.svm", "madelon")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("end", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("kind", ["cut", "changed", "another"])
def test_damaged_compressed_files(end: str, compress: Callable[[bytes], bytes], kind: str, tmp_path: Path) -> None:
    data = bytearray(compress(text(*points(200, 9)).encode()))
    match kind:
        case "cut":
            data = data[: len(data) // 2]
        case "changed":
            middle = len(data) // 2
            data[middle : middle + 8] = bytes(byte ^ 0xFF for byte in data[middle : middle + 8])
        case "another":
            data = bytearray(b"hello hello hello")
    path = tmp_path / f"f.svm{end}"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"f\.svm\{end}: (damaged or truncated \{end} file|not in LIBSVM form)"):
        load_libsvm(path, "some")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file, expected one in LIBSVM form"):
        load_libsvm(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"^gisette: give the path of its LIBSVM file; only madelon can be made"):
        load_libsvm(None, "gisette")


def test_made_points_are_like_madelon() -> None:
    features, labels, source = load_libsvm(None, "madelon")
    assert features.shape == tuple(KNOWN["madelon"])
    assert "not it" in source
    assert np.array_equal(features, np.rint(features))
    assert features.min() >= 0
    assert features.max() <= 999
    assert set(labels.tolist()) == {-1, 1}
    assert abs(labels.mean()) < 0.05
    # Twenty features of ten kinds that span five dimensions; the others are noise.
    correlation = np.abs(np.corrcoef(features.T))
    useful = np.flatnonzero((correlation > 0.3).sum(0) > 1)
    assert len(useful) == 20
    kinds = {tuple(np.flatnonzero(row > 0.98)) for row in correlation[np.ix_(useful, useful)]}
    assert len(kinds) == 10
    centred = features[:, useful] - features[:, useful].mean(0)
    values = np.linalg.svd(centred / centred.std(0), compute_uv=False)
    assert values[5] < 0.05 * values[0] < values[4]
    # The paper's step on madelon's raw features is 3.36e-8 (1 / L).
    largest = np.linalg.eigvalsh(features.T @ features)[-1] / (4 * len(features))
    assert 1 / largest == pytest.approx(3.36e-8, rel=0.02)


def test_made_points_depend_on_the_seed_alone() -> None:
    state = str(np.random.get_state())  # noqa: NPY002
    first, again, other = make_madelon(1), make_madelon(1), make_madelon(2)
    assert str(np.random.get_state()) == state  # noqa: NPY002
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
