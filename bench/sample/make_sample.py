"""Make the shipped sample from the full Fashion-MNIST: equally many images of each class, drawn with a fixed seed.

    python -m bench.sample.make_sample FOLDER [--out FOLDER]

The input is the folder of the four published IDX files (Debian's package `dataset-fashion-mnist` puts them into
/usr/share/datasets/fashion-mnist). The images keep their order. The same input gives the same images and labels with
any version of Python and NumPy; the compressed bytes may differ with another version of zlib.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.data import IDX_CLASSES, IDX_FILES, SAMPLE, Bytes, DataError, read_idx

SEED = 0
TRAIN_PER_CLASS = 600
TEST_PER_CLASS = 200


def select(labels: Bytes, per_class: int, seed: int) -> npt.NDArray[np.int64]:
    """Indices, ascending, of `per_class` random images of each class; a DataError where a class has fewer."""
    random = np.random.RandomState(seed)  # the only stream that NumPy promises never to change
    chosen = []
    for label in range(IDX_CLASSES):
        candidates = np.flatnonzero(labels == label)
        if len(candidates) < per_class:
            raise DataError(f"{len(candidates)} images of class {label}, expected at least {per_class}")
        chosen.append(random.permutation(candidates)[:per_class])
    return np.sort(np.concatenate(chosen))


def write_idx(path: Path, array: Bytes) -> None:
    """Write uint8 of shape (n,) or (n, height, width) in IDX form, gzipped without a time stamp."""
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0))


def make_sample(
    source: Path,
    out: Path,
    train_per_class: int = TRAIN_PER_CLASS,
    test_per_class: int = TEST_PER_CLASS,
    seed: int = SEED,
) -> None:
    """Write the four sample files into the folder `out`."""
    for (images, labels), per_class in zip(
        (IDX_FILES[:2], IDX_FILES[2:]), (train_per_class, test_per_class), strict=True
    ):
        all_labels = read_idx(source / f"{labels}.gz")
        chosen = select(all_labels, per_class, seed)
        write_idx(out / f"{images}.gz", read_idx(source / f"{images}.gz")[chosen])
        write_idx(out / f"{labels}.gz", all_labels[chosen])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sample.make_sample", description="Make the shipped sample of Fashion-MNIST."
    )
    parser.add_argument("folder", type=Path, help="of the four published .gz files")
    parser.add_argument("--out", type=Path, default=SAMPLE, help="where to write (default: where it is shipped)")
    arguments = parser.parse_args()
    make_sample(arguments.folder, arguments.out)


if __name__ == "__main__":
    main()
