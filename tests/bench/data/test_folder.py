"""A folder of images in ImageNet's layout, good and bad, what is cut out of them, and the batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.data import DataError
from bench.data.folder import (
    MEAN,
    STD,
    FolderBatches,
    folder_evaluation_batches,
    load_folder,
    middle_box,
    random_box,
)

CLASSES = ("n01440764", "n01443537", "n02102040")


def write_image(path: Path, colour: tuple[int, int, int], width: int = 40, height: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path, "JPEG", quality=100, subsampling=0)


def write_folder(root: Path, num_train: int = 4, num_val: int = 3) -> Path:
    """Each image has one colour: red says the class, green the number."""
    for label, name in enumerate(CLASSES):
        for part, count in (("train", num_train), ("val", num_val)):
            for number in range(count):
                path = root / part / name / f"{name}_{number}.JPEG"
                write_image(path, (60 * label, 5 * number, 200), 30 + 3 * number, 60 - number)
    return root


def colours(images: torch.Tensor) -> np.ndarray:
    """Normalisation undone: the mean colour of each image, in 0 … 255."""
    pixels = images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (255 * pixels).mean((2, 3)).numpy()


def expected(labels: torch.Tensor, numbers: list[int]) -> np.ndarray:
    return np.array([(60 * label, 5 * number, 200) for label, number in zip(labels.tolist(), numbers, strict=True)])


# ---- reading


def test_files_and_labels(tmp_path: Path) -> None:
    files = load_folder(write_folder(tmp_path / "tiny"))
    assert files.classes == CLASSES
    assert files.num_classes == 3
    assert [path.name for path in files.train_files[3:5]] == ["n01440764_3.JPEG", "n01443537_0.JPEG"]
    assert files.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert files.test_labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert files.source == "tiny (12 + 9 images of 3 classes; not ImageNet as published)"


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a: no folder train in it, expected train/<class>/\*\.JPEG and"):
        load_folder(tmp_path / "a")
    (tmp_path / "b" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="train: no folders in it, expected one for each class"):
        load_folder(tmp_path / "b")
    root = write_folder(tmp_path / "c")
    write_image(root / "val" / "n09" / "x.JPEG", (0, 0, 0))
    with pytest.raises(DataError, match="c: class n09 is not in both train and val"):
        load_folder(root)
    (root / "val" / "n09" / "x.JPEG").rename(root / "val" / "n09" / "x.txt")
    with pytest.raises(DataError, match=r"n09: no images, expected files that end in"):
        load_folder(root)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "gone"])
def test_damaged_images(damage: str, tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    files = load_folder(root)
    path = root / "val" / CLASSES[1] / f"{CLASSES[1]}_1.JPEG"
    data = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "text":
            path.write_text("hello")
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()
    batches = folder_evaluation_batches(files, 2, side=8)
    with pytest.raises(DataError, match=r"n01443537_1\.JPEG: not a readable image \(") as caught:
        list(batches)
    assert "\n" not in str(caught.value)


def test_grey_and_palette_images_have_three_channels(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    Image.new("L", (20, 20), 100).save(root / "val" / CLASSES[0] / "a.png")
    Image.new("RGBA", (20, 20), (10, 20, 30, 255)).quantize(4).save(root / "val" / CLASSES[0] / "b.png")
    images, _ = next(folder_evaluation_batches(load_folder(root), 5, side=8))
    assert images.shape == (5, 3, 8, 8)
    assert np.abs(colours(images)[0] - 100).max() < 1
    assert np.abs(colours(images)[1] - (10, 20, 30)).max() < 1


# ---- batches


@pytest.mark.parametrize("size", [1, 2])
def test_an_epoch_covers_disjointly(size: int, tmp_path: Path) -> None:
    files = load_folder(write_folder(tmp_path))
    ranks = [FolderBatches(files, 3, rank, size, side=16) for rank in range(size)]
    per_epoch = 12 // (3 * size)
    seen: list[Path] = []
    for iteration in range(per_epoch):
        for batches in ranks:
            assert batches.batches_per_epoch == per_epoch
            images, labels = batches.batch(iteration)
            assert images.shape == (3, 3, 16, 16)
            assert images.is_contiguous()
            assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
            paths = [files.train_files[index] for index in batches.indices(iteration)]
            numbers = [int(path.stem.split("_")[1]) for path in paths]
            assert np.abs(colours(images) - expected(labels, numbers)).max() < 2
            seen += paths
    assert sorted(seen) == sorted(files.train_files)


def test_images_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    files = load_folder(write_folder(tmp_path))
    rng = np.random.default_rng(0)
    for path in files.train_files:  # so that cuts and mirroring show
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path, "JPEG")
    whole, labels = FolderBatches(files, 6, seed=2, side=16).batch(3)
    parts = [FolderBatches(files, 2, rank, 3, seed=2, side=16).batch(3) for rank in range(3)]
    assert torch.equal(whole, torch.cat([part[0] for part in parts]))
    assert torch.equal(labels, torch.cat([part[1] for part in parts]))
    assert not torch.equal(whole, FolderBatches(files, 6, seed=1, side=16).batch(3)[0])
    later = FolderBatches(files, 12, seed=2, side=16)
    first, second = later.batch(0)[0], later.batch(1)[0]
    order = [np.argsort(later.indices(iteration)) for iteration in (0, 1)]
    assert not torch.equal(first[order[0]], second[order[1]])  # the same images, cut anew


def test_half_of_the_images_are_mirrored(tmp_path: Path) -> None:
    files = load_folder(write_folder(tmp_path, num_train=40))
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (48, 1, 3))
    for path in files.train_files:
        Image.fromarray(ramp).save(path, "JPEG")
    images, _ = FolderBatches(files, 120, side=8).batch(0)
    rising = (images[:, 0, :, -1].mean(1) > images[:, 0, :, 0].mean(1)).sum().item()
    assert 35 < rising < 85  # of 120: 99.9 % between 42 and 78


@pytest.mark.parametrize("size", [1, 2, 4, 11])
def test_every_test_image_goes_to_one_rank(size: int, tmp_path: Path) -> None:
    files = load_folder(write_folder(tmp_path))
    labels: list[int] = []
    numbers: list[np.ndarray] = []
    for rank in range(size):
        for images, batch_labels in folder_evaluation_batches(files, 2, rank, size, side=8):
            assert 1 <= len(images) == len(batch_labels) <= 2
            labels += batch_labels.tolist()
            numbers.append(colours(images)[:, 1] / 5)
    assert labels == files.test_labels.tolist()
    assert np.round(np.concatenate(numbers)).astype(int).tolist() == [0, 1, 2] * 3


def test_the_middle_is_tested_on(tmp_path: Path) -> None:
    """The left and right quarters of an image twice as wide as high are not seen."""
    root = write_folder(tmp_path)
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 255
    Image.fromarray(pixels).save(root / "val" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG", "JPEG", quality=100)
    images, _ = next(folder_evaluation_batches(load_folder(root), 1, side=56))
    assert colours(images).min() > 250
    assert middle_box(128, 64) == (36, 4, 92, 60)
    assert middle_box(64, 128) == (4, 36, 60, 92)


def test_cut_boxes_are_inside_and_of_the_stated_sizes() -> None:
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(2_000):
        width, height = 300, 300
        left, top, right, bottom = random_box(width, height, rng.random((10, 2)), *rng.random(2))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        areas.append((right - left) * (bottom - top) / (width * height))
        ratios.append((right - left) / (bottom - top))
    assert 0.075 < min(areas) < 0.1
    assert 0.95 < max(areas) <= 1
    assert 0.74 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.35
    assert abs(np.mean(np.log(ratios))) < 0.02


def test_the_middle_is_cut_where_nothing_fits() -> None:
    tries = np.tile([0.9, 0.5], (10, 1))  # 92 % of the area as a square
    assert random_box(900, 100, tries, 0.3, 0.3) == (383.5, 0, 516.5, 100)
    assert random_box(100, 900, tries, 0.3, 0.3) == (0, 383.5, 100, 516.5)
    assert random_box(100, 100, tries, 0.5, 0.0) == (3, 0, 98, 95)  # √0.908 = 0.953 of a side, in the middle column


def test_arguments(tmp_path: Path) -> None:
    files = load_folder(write_folder(tmp_path))
    with pytest.raises(ValueError, match="side must be at least 1, got 0"):
        FolderBatches(files, 2, side=0)
    with pytest.raises(ValueError, match="side must be at least 1, got 0"):
        next(folder_evaluation_batches(files, 2, side=0))
    with pytest.raises(DataError, match=r"2 ranks x 7 images each need 14 training images, but there are 12 in"):
        FolderBatches(files, 7, 0, 2)
