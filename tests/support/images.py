"""A small data set of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_images(folder: Path, num_train: int = 48, num_test: int = 20) -> str:
    """Fashion-MNIST's files, of noise with a bright band that tells the class."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for name, count in (("train", num_train), ("t10k", num_test)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = generator.integers(0, 100, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 4] += 150
        header = np.array([0x803, count, 28, 28], ">u4").tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(np.array([0x801, count], ">u4").tobytes() + labels.tobytes())
    return str(folder)
