"""Image data sets as (n, 3, 32, 32) bytes, and the batches that each rank trains and tests on.

Nothing here is ever unpickled. What can't be read is a `DataError`, one line that names the file, what was found and
what was expected; what could be read is described in `Dataset.source`, to be printed and recorded beside every result.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import shutil
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bench.data.files import check_md5, md5
from bench.data.share import AUGMENT, DataError, Shares, check_share, generator

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Channels = tuple[float, float, float]

SIDE = 32  #: pixels of a side
PADDING = 4  #: black pixels on each side before a random crop
TIMEOUT_S = 30.0  #: longest silence of the server during a download
SAMPLE = Path(__file__).parent.parent / "sample"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, ready to be cut into batches.

    Attributes:
        name: the name of the data set, such as 'CIFAR-100'.
        source: what exactly was used, for people to read beside the results.
        train_images: uint8 of shape (num_train, 3, 32, 32).
        train_labels: int64 of shape (num_train,).
        test_images: uint8 of shape (num_test, 3, 32, 32).
        test_labels: int64 of shape (num_test,).
        num_classes: labels are 0 … num_classes - 1.
        mean: per channel, of the training images, where 1 is white.
        std: deviations of the channels; 1 for a channel that is constant.
    """

    name: str
    source: str
    train_images: Bytes
    train_labels: Labels
    test_images: Bytes
    test_labels: Labels
    num_classes: int
    mean: Channels
    std: Channels


@dataclass(frozen=True)
class CifarLayout:
    """CIFAR's official binary form: per image its label bytes, the fine label last, then 3x32x32 bytes.

    Attributes:
        name: the name of the data set; in lower case also the `spec` that downloads it.
        url: address of the archive.
        md5: MD5 of the archive.
        folder: the files' folder in the archive.
        label_limits: one past the largest value of each label byte.
        train_files: each of `train_records` images.
        test_file: the file of `test_records` images.
    """

    name: str
    url: str
    md5: str
    folder: str
    label_limits: tuple[int, ...]
    train_files: tuple[str, ...]
    test_file: str
    train_records: int
    test_records: int

    @property
    def archive(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def record_bytes(self) -> int:
        return len(self.label_limits) + 3 * SIDE * SIDE

    def num_bytes(self, file: str) -> int:
        return self.record_bytes * (self.test_records if file == self.test_file else self.train_records)


CIFAR100 = CifarLayout(
    name="CIFAR-100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    folder="cifar-100-binary",
    label_limits=(20, 100),
    train_files=("train.bin",),
    test_file="test.bin",
    train_records=50_000,
    test_records=10_000,
)
CIFAR10 = CifarLayout(
    name="CIFAR-10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    folder="cifar-10-batches-bin",
    label_limits=(10,),
    train_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test_file="test_batch.bin",
    train_records=10_000,
    test_records=10_000,
)
LAYOUTS = (CIFAR100, CIFAR10)

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
IDX_CLASSES = 10
#: MD5 of the four files' data -> what they are. By content, because MNIST has the same file names and sizes.
IDX_KNOWN = {
    "254ac59ad730e84b1c39ea94cd8983c1": ("Fashion-MNIST", "images"),
    "350828eb349b3470444963f79ca90c6c": ("Fashion-MNIST sample", "of 70,000 images"),
}


def load(
    spec: str | os.PathLike[str] | None = None,
    *,
    data_dir: str | os.PathLike[str] = "data",
    layouts: Sequence[CifarLayout] = LAYOUTS,
) -> Dataset:
    """Read a data set into memory.

    Where several ranks share a folder, let one of them finish a download before the others call.

    Args:
        spec: None for the shipped sample; 'cifar-100' or 'cifar-10' to download that one unless `data_dir` has its
            archive; otherwise the path of an official binary CIFAR archive, or of a folder that holds the files of
            one (of CIFAR-10 at least one training batch) or the four IDX files of Fashion-MNIST, gzipped or not.
        data_dir: where downloads go.
        layouts: the CIFAR data sets to recognise.
    Raises:
        DataError: if the data is missing, damaged or of no known kind, or the download fails.
    """
    try:
        if spec is None:
            return _load_idx(SAMPLE)
        for layout in layouts:
            if spec == layout.name.lower():
                return _load_archive(_download(layout, Path(data_dir)), [layout])
        path = Path(spec)
        if path.is_dir():
            return _load_folder(path, layouts)
        if not path.is_file():
            names = " or ".join(repr(layout.name.lower()) for layout in layouts)
            raise DataError(f"{path}: no such file or folder; expected one, or {names} to download")
        return _load_archive(path, layouts)
    except OSError as error:
        raise DataError(f"{error.filename or spec}: {error.strerror or error}") from error


def _load_folder(folder: Path, layouts: Sequence[CifarLayout]) -> Dataset:
    present = {entry.name for entry in folder.iterdir()}
    found = [layout for layout in layouts if present & {*layout.train_files, layout.test_file}]
    has_idx = any(name in present or f"{name}.gz" in present for name in IDX_FILES)
    if len(found) + has_idx != 1:
        expected = "; ".join(
            f"{', '.join((*layout.train_files, layout.test_file))} ({layout.name})" for layout in layouts
        )
        state = "files of several data sets" if found else "no data set that is known"
        raise DataError(
            f"{folder}: {state}, expected one of: {expected}; {', '.join(IDX_FILES)} or .gz (Fashion-MNIST)"
        )
    if has_idx:
        return _load_idx(folder)

    (layout,) = found
    files = {}
    for name in (*layout.train_files, layout.test_file):
        if name in present:
            _check_size(f"{folder / name}", (folder / name).stat().st_size, layout, name)
            files[name] = (folder / name).read_bytes()
    return _cifar(files, layout, folder)


def _load_archive(path: Path, layouts: Sequence[CifarLayout]) -> Dataset:
    by_md5 = {layout.md5: layout for layout in layouts}
    layout = by_md5[check_md5(path, {layout.md5: layout.archive for layout in layouts})]
    wanted = {f"{layout.folder}/{name}": name for name in (*layout.train_files, layout.test_file)}
    files = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:  # one pass: going back in a gzip stream means unpacking it again
                name = wanted.get(member.name)
                stream = tar.extractfile(member) if name else None
                if name and stream:
                    _check_size(f"{path}: {member.name}", member.size, layout, name)
                    files[name] = stream.read()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a readable .tar.gz archive ({error})") from error
    missing = [name for name in layout.train_files if name not in files]
    if missing:
        raise DataError(
            f"{path}: no {layout.folder}/{missing[0]} in it, expected {len(layout.train_files)} training file(s)"
        )
    return _cifar(files, layout, path)


def _cifar(files: Mapping[str, bytes], layout: CifarLayout, where: Path) -> Dataset:
    """Take apart records whose sizes were checked; `files` may lack some of several training files."""
    train_files = [name for name in layout.train_files if name in files]
    if not train_files:
        raise DataError(f"{where}: no training file, expected {' or '.join(layout.train_files)}")
    if layout.test_file not in files:
        raise DataError(f"{where}: no {layout.test_file}, expected it beside {train_files[0]}")

    num_labels = len(layout.label_limits)
    parts = {}
    for name in (*train_files, layout.test_file):
        records = np.frombuffer(files[name], np.uint8).reshape(-1, layout.record_bytes)
        for column, limit in enumerate(layout.label_limits):
            _check_labels(where / name, records[:, column], limit)
        parts[name] = records
    train = np.concatenate([parts[name] for name in train_files]) if len(train_files) > 1 else parts[train_files[0]]
    test = parts[layout.test_file]

    source = f"{layout.name} ({len(train):,} + {len(test):,} images"
    if len(train_files) < len(layout.train_files):
        source += f"; {len(train_files)} of {len(layout.train_files)} training batches"
    return _dataset(
        layout.name,
        source + ")",
        train[:, num_labels:].reshape(-1, 3, SIDE, SIDE),
        train[:, num_labels - 1],
        test[:, num_labels:].reshape(-1, 3, SIDE, SIDE),
        test[:, num_labels - 1],
        layout.label_limits[-1],
    )


def _load_idx(folder: Path) -> Dataset:
    arrays: list[Bytes] = []
    digest = hashlib.md5(usedforsecurity=False)
    for name in IDX_FILES:
        path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
        if path is None:
            raise DataError(f"{folder}: no {name} or {name}.gz, expected {', '.join(IDX_FILES)}")
        array = read_idx(path)
        kind = "images" if "images" in name else "labels"
        if kind == "images" and array.shape[1:] != (28, 28):
            raise DataError(f"{path}: array of shape {array.shape}, expected (images, 28, 28)")
        if kind == "labels":
            if array.shape != arrays[-1].shape[:1]:
                raise DataError(
                    f"{path}: array of shape {array.shape}, expected ({len(arrays[-1])},), a label for each image"
                )
            _check_labels(path, array, IDX_CLASSES)
        if array.size == 0:
            raise DataError(f"{path}: no {kind}, expected at least 1")
        arrays.append(array)
        digest.update(array.data)

    train_images, train_labels, test_images, test_labels = arrays
    unknown = ("IDX images", f"images from {folder.name}, not the published Fashion-MNIST")
    name, what = IDX_KNOWN.get(digest.hexdigest(), unknown)
    source = f"{name} ({len(train_images):,} + {len(test_images):,} {what}), not CIFAR"
    return _dataset(
        name, source, _to_32x32(train_images), train_labels, _to_32x32(test_images), test_labels, IDX_CLASSES
    )


def read_idx(path: Path) -> Bytes:
    """Read an array of bytes in IDX form: 0, 0, 8 (uint8), ndim, then the shape as big-endian int32, then the data.

    Args:
        path: the path of the file, gzipped if it begins as such.
    Returns:
        uint8 of the shape in the header, read-only.
    Raises:
        DataError: if the header or the length of the data is wrong, or the gzip stream is damaged.
    """
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: damaged or truncated gzip file ({error})") from error
    ndim = 3 if "idx3" in path.name else 1
    magic = bytes((0, 0, 8, ndim))
    header = 4 + 4 * ndim
    if data[:4] != magic or len(data) < header:
        raise DataError(
            f"{path}: begins with {data[:4].hex() or 'nothing'}, expected {magic.hex()} and {ndim} dimension(s)"
        )
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", ndim, offset=4))
    if len(data) - header != math.prod(shape):
        raise DataError(
            f"{path}: {len(data) - header:,} bytes of data, expected {math.prod(shape):,} for shape {shape}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _to_32x32(images: Bytes) -> Bytes:
    """(n, 28, 28) -> (n, 3, 32, 32): a black border of 2 pixels, the same grey in each channel."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return np.repeat(padded[:, None], 3, axis=1)


def _dataset(
    name: str,
    source: str,
    train_images: Bytes,
    train_labels: Bytes,
    test_images: Bytes,
    test_labels: Bytes,
    num_classes: int,
) -> Dataset:
    mean, std = zip(*(_mean_and_std(train_images[:, channel]) for channel in range(3)), strict=True)
    return Dataset(
        name=name,
        source=source,
        train_images=train_images,
        train_labels=train_labels.astype(np.int64),
        test_images=test_images,
        test_labels=test_labels.astype(np.int64),
        num_classes=num_classes,
        mean=mean,
        std=std,
    )


def _mean_and_std(values: Bytes) -> tuple[float, float]:
    """Mean and deviation from the histogram: exact whatever the number of images, and without a copy as floats."""
    counts = torch.bincount(torch.from_numpy(values.flatten()), minlength=256).numpy()
    levels = np.arange(256) / 255
    mean = float(counts @ levels / values.size)
    std = math.sqrt(float(counts @ (levels - mean) ** 2 / values.size))
    return mean, std or 1.0


def _check_size(where: str, num_bytes: int, layout: CifarLayout, file: str) -> None:
    expected = layout.num_bytes(file)
    if num_bytes != expected:
        records = f"{expected // layout.record_bytes:,} records of {layout.record_bytes:,} bytes"
        raise DataError(f"{where}: {num_bytes:,} bytes, expected {expected:,} ({records})")


def _check_labels(where: Path, labels: Bytes, limit: int) -> None:
    if labels.size and labels.max() >= limit:
        record = int(labels.argmax())
        raise DataError(f"{where}: label {labels[record]} in record {record:,}, expected 0 to {limit - 1}")


def _download(layout: CifarLayout, data_dir: Path) -> Path:
    """Fetch the archive unless it is there; under its own name only once it is whole and its MD5 right."""
    target = data_dir / layout.archive
    if target.exists():
        return target
    part = data_dir / f"{layout.archive}.{os.getpid()}.part"
    print(f"downloading {layout.url} to {target}", file=sys.stderr, flush=True)
    try:
        with urllib.request.urlopen(layout.url, timeout=TIMEOUT_S) as response:
            data_dir.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
        found = md5(part)
        if found != layout.md5:
            raise DataError(f"{layout.url}: {part.stat().st_size:,} bytes with MD5 {found}, expected MD5 {layout.md5}")
        os.replace(part, target)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"{layout.url}: download failed ({reason}); give the path of a copy instead") from error
    finally:
        part.unlink(missing_ok=True)
    return target


class Batches(Shares):
    """The training batches of one rank: which images, see `Shares`.

    Crops and flips are drawn from (seed, iteration) for the whole global batch, so the images of an iteration don't
    depend on how many ranks share it.

    Args:
        dataset: whose training images are used.
        batch_size: images per rank and iteration.
        rank: the rank of the caller, 0 … size - 1.
        size: number of ranks.
        seed: 0 … 2**63 - 1; the same on all ranks.
        device: where the batches are put.
        augment: whether to crop and flip at random.
    Raises:
        DataError: if a global batch has more images than the data set.
        ValueError: if another argument is outside its bounds.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        rank: int = 0,
        size: int = 1,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        augment: bool = True,
    ) -> None:
        super().__init__(len(dataset.train_images), batch_size, rank, size, seed, items="images", source=dataset.source)
        self.dataset = dataset
        self.augment = augment
        self._normalise = Normalise(dataset, device)

    def batch(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of an iteration, counted from 0 over all epochs.

        Returns:
            float32 images of shape (batch_size, 3, 32, 32), normalised, and int64 labels of shape (batch_size,).
        """
        indices = self.indices(iteration)
        images = self.dataset.train_images[indices]
        if self.augment:
            draws = generator(self.seed, AUGMENT, iteration).integers(
                (2 * PADDING + 1, 2 * PADDING + 1, 2), size=(self.size * self.batch_size, 3)
            )
            top, left, flip = draws[self.part].T
            images = crop_and_flip(images, top, left, flip.astype(bool))
        labels = torch.from_numpy(self.dataset.train_labels[indices])
        return self._normalise(images), labels.to(self._normalise.device)


def evaluation_batches(
    dataset: Dataset, batch_size: int, rank: int = 0, size: int = 1, *, device: str | torch.device = "cpu"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of the test images in batches: each image goes to exactly one rank, and the last may be smaller.

    Yields:
        float32 images of shape (up to batch_size, 3, 32, 32), normalised, and int64 labels. Nothing where there are
        more ranks than images and none is left for this one.
    Raises:
        ValueError: if an argument is outside its bounds.
    """
    check_share(batch_size, rank, size)
    normalise = Normalise(dataset, device)
    num_images = len(dataset.test_images)
    stop = (rank + 1) * num_images // size
    for start in range(rank * num_images // size, stop, batch_size):
        part = slice(start, min(start + batch_size, stop))
        yield normalise(dataset.test_images[part]), torch.from_numpy(dataset.test_labels[part]).to(normalise.device)


class Normalise:
    """Bytes to numbers of mean 0 and deviation 1 in each channel, over the training images."""

    def __init__(self, dataset: Dataset, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (dataset.mean, dataset.std))
        self._scale = 1 / (255 * std)
        self._shift = -mean / std

    def __call__(self, images: Bytes) -> torch.Tensor:
        """uint8 (n, 3, 32, 32) to float32 of the same shape, contiguous on the device: (image / 255 - mean) / std."""
        pixels = torch.from_numpy(np.array(images, order="C")).to(self.device)
        return torch.addcmul(self._shift, pixels.float(), self._scale)


def crop_and_flip(
    images: Bytes, top: npt.NDArray[np.int64], left: npt.NDArray[np.int64], flip: npt.NDArray[np.bool_]
) -> Bytes:
    """The usual augmentation for CIFAR: pad by 4 black pixels, cut 32x32 out of it, mirror.

    Args:
        images: uint8 of shape (n, 3, 32, 32). Not modified.
        top: first row of each cut in the padded image, 0 … 8, shape (n,). 4 leaves the image where it is.
        left: first column likewise.
        flip: whether to mirror left and right after the cut, shape (n,).
    Returns:
        uint8 of shape (n, 3, 32, 32).
    """
    inside = slice(PADDING, PADDING + SIDE)
    padded = np.zeros((len(images), 3, SIDE + 2 * PADDING, SIDE + 2 * PADDING), np.uint8)
    padded[:, :, inside, inside] = images
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SIDE, SIDE), axis=(2, 3))
    cut: Bytes = windows[np.arange(len(images)), :, top, left]
    cut[flip] = cut[flip, :, :, ::-1]
    return cut
