"""ImageNet as its folder of JPEG files, decoded when they are needed, and the batches that each rank trains on.

    train/<class>/*.JPEG     val/<class>/*.JPEG

Classes are numbered in the order of their folders' names, as torchvision does. 1,281,167 + 50,000 images of 1,000
classes are ImageNet's (ILSVRC 2012); a folder of any other images in the same layout works as well, and says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from bench.data.share import AUGMENT, DataError, Shares, check_share, generator

Labels = npt.NDArray[np.int64]
Box = tuple[float, float, float, float]

ENDINGS = (".jpeg", ".jpg", ".png")
#: (training images, test images, classes) of ILSVRC 2012.
IMAGENET = (1_281_167, 50_000, 1_000)
#: Mean and deviation of ImageNet's channels, where 1 is white.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Share of the area and ratio of the sides of what is cut out in training (Szegedy et al. 2015).
AREAS, RATIOS = (0.08, 1.0), (3 / 4, 4 / 3)
#: Side of the image before the middle is cut out in testing, for each pixel of that.
TEST_MARGIN = 256 / 224
TRIES = 10


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Files of labelled images.

    Attributes:
        name: the name of the data set.
        source: what exactly was used, for people to read beside the results.
        classes: the folders' names, by label.
        train_files: in the order of classes and names.
        train_labels: int64 of shape (num_train,).
        test_files: the test files, in the same form.
        test_labels: int64 of shape (num_test,).
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train_files: tuple[Path, ...]
    train_labels: Labels
    test_files: tuple[Path, ...]
    test_labels: Labels

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def load_folder(folder: str | os.PathLike[str]) -> ImageFiles:
    """List the images in a folder; none is opened.

    Args:
        folder: with train/<class> and val/<class>; files that end in .jpeg, .jpg or .png, in any case, are images.

    Raises:
        DataError: if there is no such folder, or no class in it, or one without images, or val has other classes.
    """
    folder = Path(folder)
    classes: dict[str, list[str]] = {}
    listed = {}
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise DataError(f"{folder}: no folder {part} in it, expected train/<class>/*.JPEG and val/<class>/*.JPEG")
        names = sorted(entry.name for entry in (folder / part).iterdir() if entry.is_dir())
        if not names:
            raise DataError(f"{folder / part}: no folders in it, expected one for each class")
        classes[part] = names
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(names):
            found = sorted(path for path in (folder / part / name).iterdir() if path.suffix.lower() in ENDINGS)
            if not found:
                raise DataError(f"{folder / part / name}: no images, expected files that end in {', '.join(ENDINGS)}")
            files += found
            labels += [label] * len(found)
        listed[part] = (tuple(files), np.array(labels, np.int64))
    if classes["train"] != classes["val"]:
        differing = sorted(set(classes["train"]) ^ set(classes["val"]))[0]
        raise DataError(f"{folder}: class {differing} is not in both train and val")
    (train_files, train_labels), (test_files, test_labels) = listed["train"], listed["val"]
    size = (len(train_files), len(test_files), len(classes["train"]))
    name = "ImageNet" if size == IMAGENET else folder.name
    source = f"{name} ({size[0]:,} + {size[1]:,} images of {size[2]:,} classes"
    source += ")" if size == IMAGENET else "; not ImageNet as published)"
    return ImageFiles(name, source, tuple(classes["train"]), train_files, train_labels, test_files, test_labels)


class FolderBatches(Shares):
    """The training batches of one rank: which images, see `bench.data.share.Shares`.

    Of each image a random part, 8% to 100% of its area, is scaled to `side` x `side` pixels and mirrored or not. All of
    it is drawn from (seed, iteration) for the whole global batch.

    Args:
        files: whose training images are used.
        batch_size: images per rank and iteration.
        rank: the rank of the caller, 0 … size - 1.
        size: number of ranks.
        side: pixels of a side of what the model sees, at least 1.
        seed: 0 … 2**63 - 1; the same on all ranks.
        device: where the batches are put.
    Raises:
        DataError: if a global batch has more images than the data set.
        ValueError: if another argument is outside its bounds.
    """

    def __init__(
        self,
        files: ImageFiles,
        batch_size: int,
        rank: int = 0,
        size: int = 1,
        *,
        side: int = 224,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(len(files.train_files), batch_size, rank, size, seed, items="images", source=files.source)
        _check_side(side)
        self.files = files
        self.side = side
        self.device = torch.device(device)

    def batch(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of an iteration, counted from 0 over all epochs.

        Takes about 9 ms for an image of 500x375 pixels on one core.

        Returns:
            float32 images of shape (batch_size, 3, side, side), normalised, and int64 labels of shape (batch_size,).
        Raises:
            DataError: if an image is missing or damaged.
        """
        indices = self.indices(iteration)
        draws = generator(self.seed, AUGMENT, iteration).random((self.size * self.batch_size, 3 + 2 * TRIES))
        images = []
        for index, (mirrored, left, top, *tries) in zip(indices, draws[self.part], strict=True):
            image = _decoded(self.files.train_files[index])
            box = random_box(*image.size, np.reshape(tries, (TRIES, 2)), left, top)
            pixels = _resized(image, self.side, box)
            images.append(pixels[:, ::-1] if mirrored < 0.5 else pixels)
        labels = torch.from_numpy(self.files.train_labels[indices])
        return _normalised(images, self.device), labels.to(self.device)


def folder_evaluation_batches(
    files: ImageFiles,
    batch_size: int,
    rank: int = 0,
    size: int = 1,
    *,
    side: int = 224,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of the test images in batches: each image goes to exactly one rank, and the last may be smaller.

    The middle of each is cut out, 224 pixels of what is scaled to 256 on its shorter side.

    Yields:
        float32 images of shape (up to batch_size, 3, side, side), normalised, and int64 labels.
    Raises:
        DataError: if an image is missing or damaged.
        ValueError: if an argument is outside its bounds.
    """
    check_share(batch_size, rank, size)
    _check_side(side)
    stop = (rank + 1) * len(files.test_files) // size
    for start in range(rank * len(files.test_files) // size, stop, batch_size):
        part = slice(start, min(start + batch_size, stop))
        images = []
        for path in files.test_files[part]:
            image = _decoded(path)
            images.append(_resized(image, side, middle_box(*image.size)))
        yield _normalised(images, torch.device(device)), torch.from_numpy(files.test_labels[part]).to(device)


def random_box(width: int, height: int, tries: npt.NDArray[np.float64], left: float, top: float) -> Box:
    """What is cut out of an image in training.

    Args:
        width: width of the image, in pixels.
        height: height of the image, in pixels.
        tries: numbers in [0, 1) of shape (n, 2). The first row whose area and ratio fit into the image is taken; if
            none does, the middle, as large as the ratios' bounds allow.
        left: in [0, 1), where the box begins among the possible columns.
        top: in [0, 1), where the box begins among the possible rows.
    Returns:
        Left, top, right and bottom, in pixels.
    """
    least, most = np.log(RATIOS)
    for area, ratio in tries:
        target = width * height * (AREAS[0] + (AREAS[1] - AREAS[0]) * area)
        aspect = np.exp(least + (most - least) * ratio)
        w, h = round((target * aspect) ** 0.5), round((target / aspect) ** 0.5)
        if 1 <= w <= width and 1 <= h <= height:
            column, row = int(left * (width - w + 1)), int(top * (height - h + 1))
            return (column, row, column + w, row + h)
    w, h = min(width, round(height * RATIOS[1])), min(height, round(width / RATIOS[0]))
    x, y = (width - w) / 2, (height - h) / 2
    return (x, y, x + w, y + h)


def middle_box(width: int, height: int) -> Box:
    """The square in the middle that is cut out in testing: left, top, right and bottom, in pixels."""
    side = min(width, height) / TEST_MARGIN
    x, y = (width - side) / 2, (height - side) / 2
    return (x, y, x + side, y + side)


def _decoded(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            image: Image.Image = opened
            if "transparency" in image.info:  # what lies under it is made visible, which isn't asked about
                image = image.convert("RGBA")
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable image ({reason})") from error


def _resized(image: Image.Image, side: int, box: Box) -> npt.NDArray[np.uint8]:
    """uint8 of shape (side, side, 3)."""
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box))


def _normalised(images: list[npt.NDArray[np.uint8]], device: torch.device) -> torch.Tensor:
    """uint8 images of shape (side, side, 3) to float32 of shape (n, 3, side, side), contiguous."""
    pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    return torch.addcmul(-mean / std, pixels.float(), 1 / (255 * std)).contiguous()


def _check_side(side: int) -> None:
    if side < 1:
        raise ValueError(f"side must be at least 1, got {side}")
