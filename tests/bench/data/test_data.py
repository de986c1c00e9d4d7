"""Reading data sets (small files in the real formats, good and bad), augmentation, and who gets which image when."""

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.data import (
    CIFAR10,
    CIFAR100,
    IDX_FILES,
    SAMPLE,
    Batches,
    CifarLayout,
    DataError,
    Dataset,
    Normalise,
    crop_and_flip,
    evaluation_batches,
    load,
    read_idx,
)
from bench.sample.make_sample import make_sample, select, write_idx

# ---- small data sets in the real formats


def cifar_records(layout: CifarLayout, num_records: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    labels = [rng.integers(0, limit, (num_records, 1)) for limit in layout.label_limits]
    return np.hstack([*labels, rng.integers(0, 256, (num_records, 3072))]).astype(np.uint8).tobytes()


def cifar_files(layout: CifarLayout) -> dict[str, bytes]:
    files = {name: cifar_records(layout, layout.train_records, seed) for seed, name in enumerate(layout.train_files)}
    return {**files, layout.test_file: cifar_records(layout, layout.test_records, seed=99)}


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def write_archive(path: Path, layout: CifarLayout, files: dict[str, bytes]) -> CifarLayout:
    """Write a .tar.gz; returns the layout with its MD5."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in {"readme.html": b"hello", **files}.items():
            info = tarfile.TarInfo(f"{layout.folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return replace(layout, md5=hashlib.md5(path.read_bytes()).hexdigest())


def write_idx_folder(folder: Path, num_train: int = 40, num_test: int = 20) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name, count in zip(IDX_FILES, (num_train, num_train, num_test, num_test), strict=True):
        array = rng.integers(0, 256, (count, 28, 28)) if "images" in name else np.arange(count) % 10
        write_idx(folder / f"{name}.gz", array.astype(np.uint8))
    return folder


SMALL100 = replace(CIFAR100, train_records=12, test_records=7)
SMALL10 = replace(CIFAR10, train_records=4, test_records=3)
SMALL = (SMALL100, SMALL10)


def small_dataset(num_train: int = 50, num_test: int = 23) -> Dataset:
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (num_train + num_test, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(num_train + num_test, dtype=np.int64)  # each image has a label of its own
    return Dataset(
        name="small",
        source="small (made up)",
        train_images=images[:num_train],
        train_labels=labels[:num_train],
        test_images=images[num_train:],
        test_labels=labels[num_train:],
        num_classes=num_train + num_test,
        mean=(0.5, 0.4, 0.3),
        std=(0.25, 0.2, 0.5),
    )


# ---- reading CIFAR


def check_cifar(dataset: Dataset, layout: CifarLayout, files: dict[str, bytes], num_batches: int) -> None:
    """Against a record-by-record reading."""
    names = [*layout.train_files[:num_batches], layout.test_file]
    num_labels = len(layout.label_limits)
    images, labels = [], []
    for name in names:
        for start in range(0, len(files[name]), layout.record_bytes):
            record = files[name][start : start + layout.record_bytes]
            labels.append(record[num_labels - 1])
            images.append(np.array(list(record[num_labels:]), np.uint8).reshape(3, 32, 32))
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int64
    assert np.array_equal(np.concatenate([dataset.train_images, dataset.test_images]), np.array(images))
    assert np.concatenate([dataset.train_labels, dataset.test_labels]).tolist() == labels
    assert len(dataset.test_images) == layout.test_records
    assert dataset.num_classes == layout.label_limits[-1]
    assert dataset.name == layout.name
    train = dataset.train_images / 255
    assert dataset.mean == pytest.approx(train.mean((0, 2, 3)))
    assert dataset.std == pytest.approx(train.std((0, 2, 3)))


@pytest.mark.parametrize("layout", SMALL, ids=lambda layout: layout.name)
def test_cifar_folder_and_archive_are_the_same_data(layout: CifarLayout, tmp_path: Path) -> None:
    files = cifar_files(layout)
    folder = write_folder(tmp_path / "any name", files)
    archive = tmp_path / "renamed"
    archive_layout = write_archive(archive, layout, files)
    for dataset in (load(folder, layouts=SMALL), load(str(archive), layouts=[archive_layout])):
        check_cifar(dataset, layout, files, len(layout.train_files))
        assert dataset.source == f"{layout.name} ({len(dataset.train_images)} + {layout.test_records} images)"


def test_cifar10_with_fewer_batches_says_so(tmp_path: Path) -> None:
    files = cifar_files(SMALL10)
    for name in SMALL10.train_files[2:]:
        del files[name]
    dataset = load(write_folder(tmp_path, files), layouts=SMALL)
    check_cifar(dataset, SMALL10, files, 2)
    assert dataset.source == "CIFAR-10 (8 + 3 images; 2 of 5 training batches)"


def test_official_sizes_and_checksums() -> None:
    assert CIFAR100.md5 == "03b5dce01913d631647c71ecec9e9cb8"
    assert CIFAR10.md5 == "c32a1d4ab5d03f1284b67883e8d87530"
    assert CIFAR100.num_bytes("train.bin") == 50_000 * 3074
    assert CIFAR100.num_bytes("test.bin") == 10_000 * 3074
    assert CIFAR10.num_bytes("data_batch_5.bin") == CIFAR10.num_bytes("test_batch.bin") == 10_000 * 3073


def test_constant_images_can_be_normalised(tmp_path: Path) -> None:
    files = {name: bytes(len(data)) for name, data in cifar_files(SMALL100).items()}
    dataset = load(write_folder(tmp_path, files), layouts=SMALL)
    assert (dataset.mean, dataset.std) == ((0, 0, 0), (1, 1, 1))


# ---- bad CIFAR input


def cut_short(files: dict[str, bytes]) -> None:
    files["train.bin"] = files["train.bin"][:-1]


def one_record_less(files: dict[str, bytes]) -> None:
    files["test.bin"] = files["test.bin"][:-3074]


def no_test(files: dict[str, bytes]) -> None:
    del files["test.bin"]


def no_train(files: dict[str, bytes]) -> None:
    del files["train.bin"]


def bad_label(column: int, value: int) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        data = bytearray(files["train.bin"])
        data[5 * 3074 + column] = value
        files["train.bin"] = bytes(data)

    return change


BAD_FILES = [
    pytest.param(cut_short, r"train\.bin: 36,887 bytes, expected 36,888 \(12 records of 3,074 bytes\)", id="cut"),
    pytest.param(one_record_less, r"test\.bin: 18,444 bytes, expected 21,518 \(7 records", id="record missing"),
    pytest.param(no_test, r"no test\.bin, expected it beside train\.bin", id="no test"),
    pytest.param(bad_label(0, 20), r"train\.bin: label 20 in record 5, expected 0 to 19", id="coarse label"),
    pytest.param(bad_label(1, 100), r"train\.bin: label 100 in record 5, expected 0 to 99", id="fine label"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_FILES)
def test_damaged_files(damage: Callable[[dict[str, bytes]], None], message: str, tmp_path: Path) -> None:
    files = cifar_files(SMALL100)
    damage(files)
    with pytest.raises(DataError, match=message):
        load(write_folder(tmp_path / "folder", files), layouts=SMALL)
    archive = tmp_path / "archive"
    layout = write_archive(archive, SMALL100, files)
    with pytest.raises(DataError, match=message):
        load(archive, layouts=[layout])


def test_no_training_file(tmp_path: Path) -> None:
    files = cifar_files(SMALL100)
    no_train(files)
    with pytest.raises(DataError, match=r"no training file, expected train\.bin"):
        load(write_folder(tmp_path / "folder", files), layouts=SMALL)
    layout = write_archive(tmp_path / "archive", SMALL100, files)
    with pytest.raises(DataError, match=r"archive: no cifar-100-binary/train\.bin in it, expected 1 training file"):
        load(tmp_path / "archive", layouts=[layout])


def test_archive_with_a_batch_missing_is_refused(tmp_path: Path) -> None:
    files = cifar_files(SMALL10)
    del files["data_batch_4.bin"]
    layout = write_archive(tmp_path / "archive", SMALL10, files)
    with pytest.raises(DataError, match=r"no cifar-10-batches-bin/data_batch_4\.bin in it, expected 5 training file"):
        load(tmp_path / "archive", layouts=[layout])


def test_archive_with_another_checksum_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "cifar-100-binary.tar.gz"
    layout = write_archive(archive, SMALL100, cifar_files(SMALL100))
    archive.write_bytes(archive.read_bytes()[:-100])
    message = rf"cifar-100-binary\.tar\.gz: [\d,]+ bytes with MD5 \w+, expected MD5 {layout.md5} \(cifar-100-binary"
    with pytest.raises(DataError, match=message):
        load(archive, layouts=[layout])


@pytest.mark.parametrize("kind", ["truncated", "not gzip", "damaged", "empty"])
def test_unreadable_archive_of_the_right_checksum(kind: str, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    layout = write_archive(archive, SMALL100, cifar_files(SMALL100))
    data = bytearray(archive.read_bytes())
    match kind:
        case "truncated":
            data = data[: len(data) // 2]
        case "not gzip":
            data = bytearray(b"no archive at all")
        case "damaged":
            data[30:70] = b"\xff" * 40
        case "empty":
            data = bytearray()
    archive.write_bytes(data)
    layout = replace(layout, md5=hashlib.md5(data).hexdigest())
    with pytest.raises(DataError, match=r"archive: not a readable \.tar\.gz archive"):
        load(archive, layouts=[layout])


def test_missing_path(tmp_path: Path) -> None:
    message = r"nowhere: no such file or folder; expected one, or 'cifar-100' or 'cifar-10' to download"
    with pytest.raises(DataError, match=message):
        load(tmp_path / "nowhere")


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: no such file or folder"):
        load(tmp_path / "pipe")


def test_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(
        DataError, match=r"no data set that is known, expected one of: train\.bin, test\.bin \(CIFAR-100"
    ):
        load(tmp_path)


def test_folder_of_two_data_sets(tmp_path: Path) -> None:
    write_folder(tmp_path, {**cifar_files(SMALL100), **cifar_files(SMALL10)})
    with pytest.raises(DataError, match="files of several data sets, expected one of"):
        load(tmp_path, layouts=SMALL)


def test_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    files = cifar_files(SMALL100)
    no_test(files)
    (write_folder(tmp_path, files) / "test.bin").mkdir()
    with pytest.raises(DataError, match=r"test\.bin: "):
        load(tmp_path, layouts=SMALL)


def test_messages_are_one_line(tmp_path: Path) -> None:
    for spec in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError) as caught:
            load(spec)
        assert "\n" not in str(caught.value)


# ---- downloads (from files: the same code path but for the protocol)


def test_download_once(tmp_path: Path) -> None:
    origin = tmp_path / "cifar-100-binary.tar.gz"
    files = cifar_files(SMALL100)
    layout = replace(write_archive(origin, SMALL100, files), url=origin.as_uri())
    data_dir = tmp_path / "deep" / "data"
    check_cifar(load("cifar-100", data_dir=data_dir, layouts=[layout]), layout, files, 1)
    assert os.listdir(data_dir) == ["cifar-100-binary.tar.gz"]
    origin.unlink()
    check_cifar(load("cifar-100", data_dir=data_dir, layouts=[layout]), layout, files, 1)


def test_download_with_another_checksum_leaves_nothing(tmp_path: Path) -> None:
    origin = tmp_path / "cifar-10-binary.tar.gz"
    origin.write_bytes(b"<html>moved</html>")
    layout = replace(SMALL10, url=origin.as_uri())
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz: 18 bytes with MD5 \w+, expected MD5 c32a1d4a"):
        load("cifar-10", data_dir=tmp_path / "data", layouts=[layout])
    assert os.listdir(tmp_path / "data") == []


def test_download_without_network_leaves_nothing(tmp_path: Path) -> None:
    # Port 9 of this host (discard) is closed practically everywhere: refused at once, without a name look-up.
    layout = replace(SMALL100, url="http://127.0.0.1:9/cifar-100-binary.tar.gz")
    with pytest.raises(DataError, match=r"^http://127\.0\.0\.1:9/\S+: download failed \(.+\); give the path of a copy"):
        load("cifar-100", data_dir=tmp_path / "data", layouts=[layout])
    assert not (tmp_path / "data").exists()


def test_damaged_archive_in_the_data_folder_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-binary.tar.gz").write_bytes(b"half")
    with pytest.raises(DataError, match=r"cifar-100-binary\.tar\.gz: 4 bytes with MD5"):
        load("cifar-100", data_dir=tmp_path)


# ---- IDX files


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_folder(zipped: bool, tmp_path: Path) -> None:
    folder = write_idx_folder(tmp_path / "some-images")
    images = read_idx(folder / f"{IDX_FILES[0]}.gz")
    if not zipped:
        for path in list(folder.iterdir()):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    dataset = load(folder)
    assert dataset.train_images.shape == (40, 3, 32, 32)
    assert dataset.test_images.shape == (20, 3, 32, 32)
    for channel in range(3):
        assert np.array_equal(dataset.train_images[:, channel, 2:30, 2:30], images)
    assert int(dataset.train_images.sum(dtype=np.int64)) == 3 * int(images.sum(dtype=np.int64))  # the border is black
    assert dataset.train_labels.tolist() == [label % 10 for label in range(40)]
    assert dataset.num_classes == 10
    assert dataset.source == "IDX images (40 + 20 images from some-images, not the published Fashion-MNIST), not CIFAR"


def idx(shape: tuple[int, ...], data: bytes, start: bytes = b"\0\0\x08") -> bytes:
    return start + bytes([len(shape)]) + np.array(shape, ">u4").tobytes() + data


BAD_IDX = [
    pytest.param(0, gzip.compress(b""), r"begins with nothing, expected 00000803 and 3 dimension", id="empty"),
    pytest.param(0, b"\0\0\x08\x03\0\0", r"begins with 00000803, expected 00000803 and 3 dim", id="header cut"),
    pytest.param(0, idx((2, 28, 28), bytes(1568), b"\0\0\x0d"), r"begins with 00000d03, expected 00000803", id="type"),
    pytest.param(0, idx((40,), bytes(40)), r"begins with 00000801, expected 00000803", id="labels for images"),
    pytest.param(
        0, idx((40, 28, 28), bytes(9)), r"9 bytes of data, expected 31,360 for shape \(40, 28, 28\)", id="cut"
    ),
    pytest.param(0, idx((1, 28, 28), bytes(785)), r"785 bytes of data, expected 784", id="too long"),
    pytest.param(0, idx((40, 32, 32), bytes(40960)), r"shape \(40, 32, 32\), expected \(images, 28, 28\)", id="pixels"),
    pytest.param(0, idx((0, 28, 28), b""), r"no images, expected at least 1", id="no images"),
    pytest.param(
        1, idx((39,), bytes(39)), r"shape \(39,\), expected \(40,\), a label for each image", id="label count"
    ),
    pytest.param(
        1, idx((40,), bytes([*range(10)] * 3 + [10] * 10)), r"label 10 in record 30, expected 0 to 9", id="label"
    ),
    pytest.param(2, gzip.compress(bytes(99))[:-9], r"damaged or truncated gzip file", id="gzip cut"),
    pytest.param(2, gzip.compress(bytes(99))[:10] + b"\xff\xff", r"damaged or truncated gzip file", id="gzip damaged"),
]


@pytest.mark.parametrize(("file", "data", "message"), BAD_IDX)
def test_bad_idx_files(file: int, data: bytes, message: str, tmp_path: Path) -> None:
    folder = write_idx_folder(tmp_path)
    (folder / f"{IDX_FILES[file]}.gz").unlink()
    (folder / IDX_FILES[file]).write_bytes(data)
    with pytest.raises(DataError, match=rf"{IDX_FILES[file]}: .*{message}"):
        load(folder)


@pytest.mark.parametrize("name", IDX_FILES)
def test_missing_idx_file(name: str, tmp_path: Path) -> None:
    (write_idx_folder(tmp_path) / f"{name}.gz").unlink()
    with pytest.raises(DataError, match=rf"no {name} or {name}\.gz, expected train-images"):
        load(tmp_path)


# ---- the shipped sample


def test_shipped_sample() -> None:
    dataset = load()
    assert dataset.name == "Fashion-MNIST sample"
    assert dataset.source == "Fashion-MNIST sample (6,000 + 2,000 of 70,000 images), not CIFAR"
    assert np.bincount(dataset.train_labels).tolist() == [600] * 10
    assert np.bincount(dataset.test_labels).tolist() == [200] * 10
    assert len({image.tobytes() for image in dataset.train_images}) > 5_990  # not one image many times
    assert sum(path.stat().st_size for path in SAMPLE.iterdir() if path.is_file()) <= 4_000_000
    for name in IDX_FILES:
        assert (SAMPLE / f"{name}.gz").read_bytes()[4:8] == bytes(4)  # no time stamp
    assert "Zalando" in (SAMPLE / "LICENSE").read_text()


def test_sample_is_made_the_same_each_time(tmp_path: Path) -> None:
    source = write_idx_folder(tmp_path / "full", num_train=200, num_test=100)
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        out.mkdir()
        make_sample(source, out, train_per_class=7, test_per_class=3)
    for name in IDX_FILES:
        first, again = (out / f"{name}.gz" for out in outs)
        assert first.read_bytes() == again.read_bytes()
    for (images_name, labels_name), per_class in ((IDX_FILES[:2], 7), (IDX_FILES[2:], 3)):
        images, labels = (read_idx(source / f"{name}.gz") for name in (images_name, labels_name))
        full = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
        images, labels = (read_idx(outs[0] / f"{name}.gz") for name in (images_name, labels_name))
        assert np.bincount(labels).tolist() == [per_class] * 10
        assert [full[image.tobytes()] for image in images] == labels.tolist()


def test_select_is_a_random_part_of_each_class() -> None:
    labels = (np.arange(500) * 7 % 10).astype(np.uint8)
    chosen = select(labels, 5, seed=0)
    assert np.array_equal(chosen, np.unique(chosen))
    assert np.bincount(labels[chosen]).tolist() == [5] * 10
    assert chosen.max() > 250
    assert not np.array_equal(chosen, select(labels, 5, seed=1))
    with pytest.raises(DataError, match="50 images of class 0, expected at least 51"):
        select(labels, 51, seed=0)


# ---- augmentation


def test_crop_and_flip_against_pixel_by_pixel() -> None:
    images = small_dataset(num_train=9 * 9 * 2).train_images
    top, left, flip = (draw.ravel() for draw in np.indices((9, 9, 2)))
    result = crop_and_flip(images, top, left, flip.astype(bool))
    columns = np.arange(32)
    for n in range(len(images)):
        for row in range(32):
            source_row = row + top[n] - 4
            source_columns = (31 - columns if flip[n] else columns) + left[n] - 4
            inside = (source_columns >= 0) & (source_columns < 32)
            expected = np.zeros((3, 32), np.uint8)
            if 0 <= source_row < 32:
                expected[:, inside] = images[n, :, source_row, source_columns[inside]].T
            assert np.array_equal(result[n, :, row], expected)


def test_draws_are_uniform() -> None:
    dataset = small_dataset(num_train=1_000)
    images, labels = raw_batch(dataset, 0, batch_size=1_000)
    tops, lefts, flips = np.transpose([recognise(dataset, *pair) for pair in zip(images, labels, strict=True)])
    for draws, size in ((tops, 9), (lefts, 9), (flips, 2)):
        counts = np.bincount(draws, minlength=size)
        assert ((counts - 1_000 / size) ** 2 / (1_000 / size)).sum() < 26  # chi-squared, 8 degrees: 99.9 %
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.1


def raw_batch(dataset: Dataset, iteration: int, batch_size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A batch with the normalisation undone: uint8 images, labels."""
    images, labels = Batches(dataset, batch_size, seed=seed).batch(iteration)
    pixels = (images.numpy() * np.reshape(dataset.std, (3, 1, 1)) + np.reshape(dataset.mean, (3, 1, 1))) * 255
    assert np.abs(pixels - pixels.round()).max() < 1e-3
    return pixels.round().astype(np.uint8), labels.numpy()


def recognise(dataset: Dataset, image: np.ndarray, label: int) -> tuple[int, int, int]:
    """The (top, left, flip) that makes this image of its source, which the label names."""
    source = np.pad(dataset.train_images[label], ((0, 0), (4, 4), (4, 4)))
    for flip in (0, 1):
        cut = image[:, :, ::-1] if flip else image
        for top in range(9):
            for left in range(9):
                if np.array_equal(cut[:, 9, 9:20], source[:, top + 9, left + 9 : left + 20]):
                    assert np.array_equal(cut, source[:, top : top + 32, left : left + 32])
                    return top, left, flip
    raise AssertionError("not a shift or flip of its source")


def test_normalise() -> None:
    dataset = small_dataset()
    expected = (dataset.train_images / 255 - np.reshape(dataset.mean, (3, 1, 1))) / np.reshape(dataset.std, (3, 1, 1))
    result = Normalise(dataset)(dataset.train_images)
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    assert np.allclose(result.numpy(), expected, atol=1e-6)


# ---- which rank gets what, and when


@pytest.mark.parametrize(("batch_size", "size"), [(1, 1), (7, 1), (4, 3), (8, 6), (25, 2), (1, 50)])
def test_an_epoch_covers_disjointly(batch_size: int, size: int) -> None:
    dataset = small_dataset()
    ranks = [Batches(dataset, batch_size, rank, size, augment=False) for rank in range(size)]
    per_epoch = 50 // (batch_size * size)
    orders = []
    for epoch in range(2):
        labels: list[int] = []
        for iteration in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            for batches in ranks:
                assert batches.batches_per_epoch == per_epoch
                images, batch_labels = batches.batch(iteration)
                assert images.shape == (batch_size, 3, 32, 32)
                assert (images.dtype, batch_labels.dtype) == (torch.float32, torch.int64)
                assert torch.equal(images, Normalise(dataset)(dataset.train_images[batch_labels.numpy()]))
                labels += batch_labels.tolist()
        assert len(set(labels)) == len(labels) == per_epoch * batch_size * size
        orders.append(labels)
    assert orders[0] != orders[1]


def test_images_do_not_depend_on_the_number_of_ranks() -> None:
    dataset = small_dataset()
    for iteration in (0, 1, 5, 12):
        images, labels = Batches(dataset, 12, seed=3).batch(iteration)
        parts = [Batches(dataset, 4, rank, 3, seed=3).batch(iteration) for rank in range(3)]
        assert torch.equal(images, torch.cat([part[0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[1] for part in parts]))


def test_a_resumed_run_sees_the_same_batches() -> None:
    dataset = small_dataset()
    batches = Batches(dataset, 8, 1, 2, seed=7)
    straight = [batches.batch(iteration) for iteration in range(10)]
    torch.rand(3)
    for iteration in (9, 4, 0, 7):
        fresh = Batches(dataset, 8, 1, 2, seed=7).batch(iteration)
        again = batches.batch(iteration)
        for images, labels in (fresh, again):
            assert torch.equal(images, straight[iteration][0])
            assert torch.equal(labels, straight[iteration][1])


def test_seed_and_iteration_change_order_and_augmentation() -> None:
    dataset = small_dataset()

    def seen(iteration: int, seed: int) -> tuple[list[int], list[tuple[int, int, int]]]:
        images, labels = raw_batch(dataset, iteration, batch_size=50, seed=seed)
        return labels.tolist(), [recognise(dataset, *pair) for pair in zip(images, labels, strict=True)]

    order, draws = seen(0, seed=0)
    for iteration, seed in ((1, 0), (0, 1), (1, 1)):
        other_order, other_draws = seen(iteration, seed)
        assert order != other_order
        assert draws != other_draws


def test_global_generators_are_left_alone() -> None:
    numpy_state, torch_state = str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    Batches(small_dataset(), 8).batch(3)
    assert str(np.random.get_state()) == numpy_state  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_more_ranks_than_images() -> None:
    message = r"^6 ranks x 9 images each need 54 training images, but there are 50 in small \(made up\)$"
    with pytest.raises(DataError, match=message):
        Batches(small_dataset(), 9, 0, 6)
    assert Batches(small_dataset(), 8, 5, 6).batches_per_epoch == 1


@pytest.mark.parametrize(
    ("batch_size", "rank", "size", "message"),
    [
        (0, 0, 1, "batch_size must be at least 1, got 0"),
        (4, 2, 2, "rank must be 0 to size - 1, got rank 2 of size 2"),
        (4, -1, 2, "rank must be 0 to size - 1, got rank -1 of size 2"),
    ],
)
def test_share_out_of_bounds(batch_size: int, rank: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(small_dataset(), batch_size, rank, size)
    with pytest.raises(ValueError, match=message):
        next(evaluation_batches(small_dataset(), batch_size, rank, size))


def test_seed_and_iteration_out_of_bounds() -> None:
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=rf"seed must be 0 to 2\*\*63 - 1, got {seed}"):
            Batches(small_dataset(), 4, seed=seed)
    batches = Batches(small_dataset(), 4, seed=2**63 - 1)
    batches.batch(10**12)
    with pytest.raises(ValueError, match="iteration must be at least 0, got -1"):
        batches.batch(-1)


@pytest.mark.parametrize("size", [1, 2, 6, 23, 40])
def test_every_test_image_goes_to_one_rank(size: int) -> None:
    dataset = small_dataset()
    labels: list[int] = []
    for rank in range(size):
        share = list(evaluation_batches(dataset, 5, rank, size))
        for images, batch_labels in share:
            assert 1 <= len(images) == len(batch_labels) <= 5
            assert torch.equal(images, Normalise(dataset)(dataset.test_images[batch_labels.numpy() - 50]))
            labels += batch_labels.tolist()
        assert abs(sum(len(images) for images, _ in share) - 23 / size) < 1
    assert labels == dataset.test_labels.tolist()
